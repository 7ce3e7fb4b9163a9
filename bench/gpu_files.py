"""Single files on a GPU: a demo model's transformer in each layout that can be registered, decoded as jobs decode it.

    python -m bench.gpu_files                      # demo-flux, 64 held-out prompts
    python -m bench.gpu_files --model demo-wan --prompts 20
    python -m bench.gpu_files --device cpu --prompts 8
    python -m bench.gpu_files --tiny               # two prompts and fewer layouts, on the CPU

Each file is loaded by the daemon's own loader, all of it on the GPU and with every other block streamed, from RAM and
from the file; one of them in fewer bits, too, which stream from RAM alone. The prompts and seeds are those of
bench/accuracy.py. Prints one JSON object a layout: the share of prompts with everything right, the points lost and the
grey levels away from the published weights, by how much pictures of streamed blocks differ, and how many weights, in
float32 and in bfloat16, have other bits than the same loader gives them on the CPU. Then one a decoder, of random
blocks: those of GGUF's K types, which nothing here can pack, among them; and one of what was left out. Exits 1 where
bits differ, or where a layout of 8 bits or more loses over 10 points of 20 prompts or more; what fewer bits lose is
only said.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.pool import Pool, ThreadPool
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from bench import layouts
from bench.accuracy import BARS, ask, plan_of, rendered, verdicts
from bench.drawings.training import share
from bench.gpu_techniques import Technique, every_other
from bench.layouts import Weights
from safelight import models
from safelight.models import ModelFacts
from safelight.tensorfile import GGUF_TYPES
from safelightd import singlefile
from safelightd.encodings import Ggml, Scaled
from safelightd.loading import Loader
from safelightd.modelfolder import model_folder
from safelightd.weights import ENCODED_PIECE_BYTES, Encoding, Reader, Stored

SEED = 40_000
LOST_MAX = 10.0
"""Points of percent: six of 64 prompts. It is to notice weights that are wrong, not those that are rounded."""
JUDGED_FROM = 20
"""Prompts. Of fewer, two that go wrong are more than may be lost."""
PLAIN = ("F32", "F16", "BF16")
LARGE_BLOCK = 256
"""Weights a block of GGUF's K types and IQ4_XS."""
ROW_ITEMS = 512
"""Of the random rows with a scale each."""

BF16 = Technique("bf16", {})
FLOAT32 = Technique("float32", {"dtype": "float32", "precision": "fp32"})
FEWER_BITS = (
    Technique("int8-weight-only", {"precision": "int8-weight-only"}),
    Technique("nf4", {"precision": "nf4"}),
)
FEWER_BITS_OF = "fp8 scaled"


@dataclass(frozen=True)
class Layout:
    """One way to keep a transformer in a file."""

    name: str
    write: Callable[[Weights, Weights, Path], object]
    """Given the weights by diffusers' names, by the authors', and the file."""
    end: str = "safetensors"
    bits: int = 8


@dataclass(frozen=True)
class Exact:
    """What the published weights make, in bfloat16."""

    shown: Any
    right: list[bool]


@dataclass(frozen=True)
class Bench:
    """What every layout is tried with."""

    facts: ModelFacts
    folder: Path
    asked: Any
    device: str
    readers: Pool


def main(words: Sequence[str] | None = None) -> int:
    arguments = _arguments(words)
    facts = models.load()[arguments.model]
    # Forked before anything is on the GPU, which a forked process could not use; they only look at pictures.
    pool = ThreadPool(1) if arguments.tiny else get_context("fork").Pool()
    with pool as readers, tempfile.TemporaryDirectory() as made:
        folder = model_folder(facts, Path(made))
        bench = Bench(facts, folder, ask(facts, arguments.prompts), arguments.device, readers)
        lines = [_told(line) for line in _all(bench, Path(made), tiny=arguments.tiny)]
    return 0 if all(line.get("ok", True) for line in lines) else 1


def _told(line: dict[str, Any]) -> dict[str, Any]:
    print(json.dumps(line), flush=True)
    return line


def _all(bench: Bench, scratch: Path, *, tiny: bool) -> Iterator[dict[str, Any]]:
    shown = rendered(bench.facts, bench.folder, BF16, bench.asked, bench.device)
    exact = Exact(shown, _right(bench, shown))
    card = torch.cuda.get_device_name() if bench.device == "cuda" else "CPU"
    yield {"layout": "published", "device": card, "prompts": len(exact.right), "all": share(exact.right)}
    own = layouts.published(bench.folder / "transformer")
    authors = layouts.OF_AUTHORS[bench.facts.family](own)
    for layout in _layouts(bench.facts.family, tiny=tiny):
        file = scratch / f"{layout.name.replace(' ', '-')}.{layout.end}"
        layout.write(own, authors, file)
        for technique in (BF16, *(FEWER_BITS if layout.name == FEWER_BITS_OF else ())):
            yield _tried(bench, layout, technique, file, exact)
        file.unlink()
    for name, encoding in _encodings(tiny=tiny):
        yield _decoded(name, encoding, scratch / "blocks", bench.device)
    yield {"left_out": _left_out(authors)}


def _layouts(family: str, *, tiny: bool) -> list[Layout]:
    found = [
        Layout("bf16 authors", lambda _, authors, file: layouts.save(authors, file), bits=16),
        Layout("bf16 diffusers", lambda own, _, file: layouts.save(own, file), bits=16),
        Layout("fp8", lambda _, authors, file: layouts.save(layouts.in_fp8(authors), file)),
        Layout("fp8 scaled", lambda _, authors, file: layouts.save(layouts.scaled(authors, "scale_weight"), file)),
        Layout(
            "fp8 scaled by row",
            lambda _, authors, file: layouts.save(layouts.scaled(authors, "weight_scale", by_row=True), file),
        ),
        *(_in_gguf(kind, bits, family) for kind, bits in (("Q8_0", 8), ("Q5_1", 5), ("Q5_0", 5), ("Q4_1", 4))),
        _in_gguf("Q4_0", 4, family),
    ]
    return [layout for layout in found if layout.name in ("bf16 authors", "fp8 scaled", "Q4_0")] if tiny else found


def _in_gguf(kind: str, bits: int, family: str) -> Layout:
    packed = gguf.GGMLQuantizationType[kind]
    return Layout(kind, lambda _, authors, file: layouts.save_gguf(authors, file, packed, family), "gguf", bits)


def _tried(bench: Bench, layout: Layout, technique: Technique, file: Path, exact: Exact) -> dict[str, Any]:
    """Return what a layout makes of the prompts when it is held as a technique holds it."""
    line: dict[str, Any] = {"layout": layout.name, "plan": technique.name, "mib": round(file.stat().st_size / 2**20, 1)}
    began = time.perf_counter()
    try:
        line |= _measured(bench, technique, file, exact)
    except Exception as error:  # noqa: BLE001 - a layout that fails is a result
        return {**line, "error": f"{type(error).__name__}: {error}"[:300], "ok": False}
    line["ok"] = _is_held(layout, technique.name, len(exact.right), line)
    return {**line, "seconds": round(time.perf_counter() - began, 1)}


def _is_held(layout: Layout, plan: str, prompts: int, line: dict[str, Any]) -> bool:
    """Return whether no bit differs, and as many pictures are right as should be."""
    is_judged = layout.bits >= 8 and plan != "nf4" and prompts >= JUDGED_FROM
    return (
        (line["lost_points"] <= LOST_MAX or not is_judged)
        and not any(line["streamed_differs"].values())
        and not line.get("weights_differing")
        and (layout.bits < 16 or line["largest_difference"] == 0)
    )


def _measured(bench: Bench, technique: Technique, file: Path, exact: Exact) -> dict[str, Any]:
    def made(more: dict[str, Any]) -> Any:
        changed = Technique(technique.name, technique.plan | more)
        paths = {"transformer": str(file)}
        return rendered(bench.facts, bench.folder, changed, bench.asked, bench.device, paths)

    shown = made({})
    right = _right(bench, shown)
    off = _off(shown, exact.shown)
    found: dict[str, Any] = {"stored": singlefile.precision_in(file, ""), "all": share(right)}
    found["lost_points"] = round(100 * float(np.mean(exact.right) - np.mean(right)), 2)
    found["mean_difference"], found["largest_difference"] = round(float(off.mean()), 4), int(off.max())
    half = {"transformer": every_other(sum(part.count for part in bench.facts.blocks["transformer"]))}
    found["streamed_differs"] = {
        place: int(_off(made({"offload": "partial", "streamed": half, **more}), shown).max())
        for place, more in (("ram", {}), ("file", {"streamed_from": "file"}))[: 2 if technique is BF16 else 1]
    }
    if technique is BF16:
        found["weights"] = len(_weights(bench, BF16, file, "cpu"))
        found["weights_differing"] = sum(_differing(bench, held, file) for held in (BF16, FLOAT32))
    return found


def _right(bench: Bench, shown: Any) -> list[bool]:
    return [answer["all"] for answer in verdicts(bench.facts, bench.asked, shown, bench.readers)]


def _off(some: Any, others: Any) -> Any:
    return np.abs(some.astype(np.int16) - others.astype(np.int16))


def _differing(bench: Bench, technique: Technique, file: Path) -> int:
    """Return how many weights have other bits, or are others, on the device than on the CPU."""
    there, here = (_weights(bench, technique, file, device) for device in (bench.device, "cpu"))
    both = set(there) & set(here)
    return len(set(there) ^ set(here)) + sum(not _same_bits(there[name], here[name]) for name in both)


def _weights(bench: Bench, technique: Technique, file: Path, device: str) -> Weights:
    """Return the transformer's weights as the loader holds them, all of them on `device`, brought to the CPU."""
    plan = plan_of(bench.facts, technique, device)
    loader = Loader(bench.folder, plan, {"transformer": str(file)}, blocks=bench.facts.blocks)
    with loader.component("transformer", device) as module:
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in module.state_dict().items()}


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    same = one.dtype == other.dtype and one.shape == other.shape
    return same and torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


def _encodings(*, tiny: bool) -> list[tuple[str, Encoding]]:
    draw = torch.Generator().manual_seed(SEED)
    rows = 2 * ENCODED_PIECE_BYTES // ROW_ITEMS
    scales = tuple(torch.rand(rows, generator=draw).tolist())
    found: list[tuple[str, Encoding]] = [
        *((name, Ggml(name)) for name, _, _ in GGUF_TYPES.values() if name not in PLAIN),
        ("fp8_e4m3", Scaled(torch.float8_e4m3fn, scales[:1], ROW_ITEMS)),
        ("fp8_e5m2", Scaled(torch.float8_e5m2, scales[:1], ROW_ITEMS)),
        ("fp8_e4m3 by row", Scaled(torch.float8_e4m3fn, scales, ROW_ITEMS)),
    ]
    return [each for each in found if each[0] in ("Q6_K", "fp8_e4m3 by row")] if tiny else found


def _decoded(name: str, encoding: Encoding, file: Path, device: str) -> dict[str, Any]:
    """Return whether random blocks, more than are decoded at once, become the same numbers on the device and here."""
    blocks = 3 * ENCODED_PIECE_BYTES // 2 // encoding.block_bytes
    size = blocks * encoding.block_bytes
    draw = torch.Generator().manual_seed(SEED)
    file.write_bytes(torch.randint(256, (size,), generator=draw, dtype=torch.uint8).numpy().tobytes())
    numbers = blocks * encoding.block_items
    stored = Stored(file, 0, size, torch.float32, (numbers,), encoding)
    line: dict[str, Any] = {"decoder": name, "numbers": numbers}
    try:
        there, here = (_read(stored, place) for place in (device, "cpu"))
    except Exception as error:  # noqa: BLE001 - a decoder that fails is a result
        return {**line, "error": f"{type(error).__name__}: {error}"[:300], "ok": False}
    # Random scales may be no numbers, and which of the many that are none a product gives is not said.
    same = (there.view(torch.int32) == here.view(torch.int32)) | (there.isnan() & here.isnan())
    return {**line, "finite": int(here.isfinite().sum()), "differing": int((~same).sum()), "ok": bool(same.all())}


def _read(stored: Stored, device: str) -> torch.Tensor:
    made = torch.empty(stored.shape, device=device)
    with Reader(made.device) as reader:
        reader.read([(stored, made)])
        reader.finish()
        return made.cpu()


def _left_out(authors: Weights) -> dict[str, str]:
    """Return why types of GGUF were tried as random blocks alone, by their names."""
    packed = [tensor for name, tensor in authors.items() if layouts.is_packed(name, tensor)]
    narrow = sum(tensor.shape[1] % LARGE_BLOCK != 0 for tensor in packed)
    found = {}
    for name, items, _ in GGUF_TYPES.values():
        if items == LARGE_BLOCK:
            rows = f"; {narrow} of {len(packed)} matrices have rows that are no multiple of {items}" if narrow else ""
            found[name] = f"the gguf package packs none{rows}"
    return {**found, "IQ4_NL": "the gguf package packs none"}


def _arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo-flux", choices=list(BARS))
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--tiny", action="store_true", help="two prompts and fewer layouts, on the CPU")
    arguments = parser.parse_args(words)
    if arguments.tiny:
        arguments.device, arguments.prompts = "cpu", 2
    return arguments


if __name__ == "__main__":
    sys.exit(main())
