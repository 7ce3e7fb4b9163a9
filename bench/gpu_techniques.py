"""Every way to hold and place a FLUX transformer, at full size on a GPU: seconds, peaks, and how far from bf16.

    python -m bench.gpu_techniques --folder /tmp/models          # all of them, FLUX.1-schnell, 1024x1024
    python -m bench.gpu_techniques --only nf4 fp8-dynamic        # those whose name begins so
    python -m bench.gpu_techniques --tiny                        # the same path in seconds, on the CPU

The weights are random (bench/gpu_phases.py), so memory and time are true to size and the picture means nothing.
Prints one JSON object a technique.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from bench import fullsize, options
from bench.fullsize import Meter, say
from bench.measured import Budget
from safelight import footprint, models
from safelight.jobspec import JobSpec
from safelight.machine import GIB
from safelight.models import ModelFacts
from safelight.plan import Plan
from safelightd import device as held_by
from safelightd import pipelines
from safelightd.loading import Loader
from safelightd.pinnedset import PinnedSet
from safelightd.progress import Watch


@dataclasses.dataclass(frozen=True)
class Technique:
    name: str
    plan: dict[str, Any]
    runs: int = 1


def every_other(count: int) -> tuple[int, ...]:
    return tuple(range(0, count, 2))


def techniques(facts: ModelFacts, *, tiny: bool) -> list[Technique]:
    """Return all of them, bf16 resident first: the others are compared with it."""
    blocks = sum(part.count for part in facts.blocks["transformer"])
    half, every = {"transformer": every_other(blocks)}, {"transformer": tuple(range(blocks))}
    found = [
        Technique("bf16 resident", {}),
        Technique("bf16 partial, half streamed", {"offload": "partial", "streamed": half}, runs=2),
        Technique("bf16 partial, all streamed", {"offload": "partial", "streamed": every}),
        Technique("bf16 partial, half from file", {"offload": "partial", "streamed": half, "streamed_from": "file"}),
        Technique("nf4 resident", {"precision": "nf4"}),
        Technique("nf4 partial", {"precision": "nf4", "offload": "partial", "streamed": half}),
        Technique("int8-bnb resident", {"precision": "int8-bnb"}),
        Technique("int8-weight-only resident", {"precision": "int8-weight-only"}),
        Technique("int8-dynamic resident", {"precision": "int8-dynamic"}),
        Technique("fp8-weight-only resident", {"precision": "fp8-weight-only"}),
        Technique("fp8-weight-only partial", {"precision": "fp8-weight-only", "offload": "partial", "streamed": half}),
        Technique("fp8-quanto resident", {"precision": "fp8-quanto"}),
        Technique("fp16 resident", {"dtype": "float16", "precision": "fp16"}),
    ]
    if tiny:
        return found
    return [
        *found,
        Technique("fp8-dynamic resident", {"precision": "fp8-dynamic"}),
        Technique("fp8-dynamic compiled", {"precision": "fp8-dynamic", "compiled": True}, runs=2),
        Technique(
            "fp8-dynamic compiled partial",
            {"precision": "fp8-dynamic", "compiled": True, "offload": "partial", "streamed": half},
            runs=2,
        ),
        Technique("bf16 compiled", {"compiled": True}, runs=2),
        Technique("int8-dynamic compiled", {"precision": "int8-dynamic", "compiled": True}, runs=2),
        Technique("nf4 compiled", {"precision": "nf4", "compiled": True}, runs=2),
        Technique("bf16 block", {"offload": "block"}),
        Technique("bf16 leaf", {"offload": "leaf"}),
        Technique("bf16 leaf low_cpu_mem_usage", {"offload": "leaf", "low_cpu_mem_usage": True}),
        Technique("bf16 sequential", {"offload": "sequential"}),
    ]


class Steps:
    """Notes when each step of a phase ended, the GPU's work included."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.ended: list[float] = []

    def told(self, message: dict[str, Any]) -> None:
        if message["type"] != "step":
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ended.append(time.perf_counter() - self.began)

    def seconds(self) -> dict[str, float | None]:
        steps = [after - before for before, after in zip(self.ended, self.ended[1:], strict=False)]
        return {
            "load_and_first_step_s": round(self.ended[0], 3),
            "step_ms": round(1000 * sorted(steps)[len(steps) // 2], 1) if steps else None,
        }


def main() -> int:
    arguments = _arguments()
    budget = Budget(arguments.limit_s)
    facts = models.load()["tiny-flux-schnell" if arguments.tiny else "flux-schnell"]
    device: Any = "cpu" if arguments.tiny else "cuda"
    folder = arguments.folder / facts.key
    if arguments.tiny:
        from safelightd.modelfolder import model_folder

        folder = model_folder(facts, arguments.folder)
    else:
        fullsize.build(facts, folder, device)
    say("start", torch=torch.__version__, device="cpu" if arguments.tiny else torch.cuda.get_device_name())
    base = Plan(
        model=facts.key, device=device, dtype="bfloat16", precision="bf16", offload="model", vae_tiling=False,
        text_encoder_device=device,
    )  # fmt: skip
    spec = fullsize.spec_of(facts, num_inference_steps=arguments.steps, tiny=arguments.tiny)
    family = pipelines.family(facts.family)
    try:
        text(family, spec, base, facts, folder)
        embeddings = family.encode(spec, base, Loader(folder, base, blocks=facts.blocks), watch(Steps()))
        exact: torch.Tensor | None = None
        for technique in techniques(facts, tiny=arguments.tiny):
            wanted = not arguments.only or any(technique.name.startswith(name) for name in arguments.only)
            if not wanted and exact is not None:
                continue
            latents = denoise(technique, family, spec, base, facts, folder, embeddings, exact)
            exact = latents if exact is None else exact
            if budget.is_spent():
                say("limit", seconds=arguments.limit_s)
                break
        assert exact is not None
        decode(family, spec, base, facts, folder, exact)
    finally:
        if not arguments.keep:
            shutil.rmtree(folder, ignore_errors=True)
    return 0


def watch(steps: Steps) -> Watch:
    return Watch(steps.told, threading.Event(), Meter())


def text(family: Any, spec: JobSpec, base: Plan, facts: ModelFacts, folder: Path) -> None:
    """Encode with the large text encoder resident, streamed from its file, and quantised."""
    name = "text_encoder_2"
    every = {name: tuple(range(sum(part.count for part in facts.blocks[name])))}
    exact = None
    for label, changes in (
        ("resident", {}),
        ("streamed", {"streamed": every}),
        ("streamed again", {"streamed": every}),
        ("nf4", {"text_encoder_precision": "nf4"}),
        ("int8-bnb", {"text_encoder_precision": "int8-bnb"}),
        ("fp8-weight-only", {"text_encoder_precision": "fp8-weight-only"}),
    ):
        plan = base.model_copy(update=changes)
        meter = Meter()
        meter.reset()
        began = time.perf_counter()
        try:
            embeds = family.encode(spec, plan, Loader(folder, plan, blocks=facts.blocks), watch(Steps())).prompt_embeds
        except Exception as error:  # noqa: BLE001 - a technique that fails is a result
            say(f"text encoder {label}", error=f"{type(error).__name__}: {error}"[:300])
            continue
        exact = embeds if exact is None else exact
        say(
            f"text encoder {label}",
            seconds=round(time.perf_counter() - began, 3),
            relative_error=_error(embeds, exact),
            **_peaks(meter),
        )


def denoise(
    technique: Technique, family: Any, spec: JobSpec, base: Plan, facts: ModelFacts, folder: Path, embeddings: Any,
    exact: torch.Tensor | None,
) -> torch.Tensor | None:  # fmt: skip
    plan = base.model_copy(update=technique.plan)
    pinned = PinnedSet(limit_bytes=64 * GIB)
    own = _as_dtype(embeddings, getattr(torch, plan.dtype))
    latents = None
    for run in range(technique.runs):
        steps, meter = Steps(), Meter()
        meter.reset()
        try:
            loader = Loader(folder, plan, blocks=facts.blocks, pinned=pinned)
            latents = family.denoise(spec, plan, loader, own, watch(steps))
        except Exception as error:  # noqa: BLE001 - a technique that fails is a result
            traceback.print_exc(limit=-3)
            say(technique.name, run=run, error=f"{type(error).__name__}: {error}"[:400])
            break
        say(
            technique.name,
            run=run,
            **steps.seconds(),
            seconds=round(time.perf_counter() - steps.began, 3),
            relative_error=_error(latents, exact) if exact is not None else 0.0,
            bit_equal=exact is None or torch.equal(latents, exact),
            pinned_gib=round(pinned.nbytes / GIB, 3),
            **_peaks(meter),
        )
        held_by.release()
    pinned.drop_unless([])
    held_by.release()
    return latents


def decode(family: Any, spec: JobSpec, base: Plan, facts: ModelFacts, folder: Path, latents: torch.Tensor) -> None:
    ways: dict[str, dict[str, Any]] = {
        "whole": {},
        "in strips": {"vae_strip_rows": footprint.STRIP_ROWS["flux"][0]},
        "tiled": {"vae_tiling": True, "vae_tile_pixels": footprint.TILES[0]},
    }
    for way, changes in ways.items():
        plan = base.model_copy(update=changes)
        meter = Meter()
        meter.reset()
        began = time.perf_counter()
        list(family.decode(spec, plan, Loader(folder, plan, blocks=facts.blocks), latents, watch(Steps())))
        say(f"decode {way}", seconds=round(time.perf_counter() - began, 3), **_peaks(meter))


def _as_dtype(embeddings: Any, dtype: torch.dtype) -> Any:
    fields = {field.name: getattr(embeddings, field.name) for field in dataclasses.fields(embeddings)}
    return type(embeddings)(**{name: None if value is None else value.to(dtype) for name, value in fields.items()})


def _error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return round(float((found.float() - exact.float()).norm() / exact.float().norm()), 6)


def _peaks(meter: Meter) -> dict[str, float]:
    device, host = meter.peaks()
    found = {"device_gib": round(device / GIB, 3), "host_gib": round(host / GIB, 3)}
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        found["outside_torch_gib"] = round((total - free - torch.cuda.memory_reserved()) / GIB, 3)
        found["reserved_gib"] = round(torch.cuda.max_memory_reserved() / GIB, 3)
    found["anonymous_gib"] = round(fullsize.status("RssAnon") / GIB, 3)
    return found


def _arguments() -> argparse.Namespace:
    parser = options.full_size(__doc__)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--keep", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
