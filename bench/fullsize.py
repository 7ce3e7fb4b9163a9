"""Models of their true size with random weights, for the benches: memory and time are right, pictures mean nothing.

FLUX takes 33 GB of disk, Wan 2.2 TI2V-5B 23 GB. flux-dev shares flux-schnell's files: its transformer differs by one
small layer, which has a shard of its own.
"""

from __future__ import annotations

import contextlib
import json
import math
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from bench import shapes
from bench.shapes import SMALLER
from safelight import jobspec, models
from safelight.jobspec import JobSpec
from safelight.machine import GIB
from safelight.models import ModelFacts
from safelightd.device import give_back
from safelightd.shards import Entry, Shard, split

FULL: Mapping[str, Any] = MappingProxyType({})
"""What is changed of a configuration for its true size."""

GAIN = 0.5
SHARD_BYTES = 2**30
WRITERS = 6
GIVEN_BACK_S = 10.0


class Meter:
    """Peaks on the device and in host RAM since `reset`; host RAM counts mapped files too."""

    def reset(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        with contextlib.suppress(OSError):  # a container may forbid it: the peak is then of the whole run
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # proc(5): resets VmHWM

    def settle(self) -> None:
        synchronise()

    def peaks(self) -> tuple[int, int]:
        device = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        return device, status("VmHWM")


def build_elsewhere(folders: dict[str, Path]) -> None:
    """Build models in a process of its own, FLUX.1-dev beside -schnell: what the card holds before this one has a
    context is the baseline."""
    elsewhere(_build_all, folders)


def elsewhere(build_it: Callable[..., None], *arguments: object) -> None:
    """Call a function in a process of its own that may use the GPU, and return when the card has got all of it back."""
    from bench.measured import card_used_bytes

    before = card_used_bytes()
    building = multiprocessing.get_context("spawn").Process(target=build_it, args=arguments)
    building.start()
    building.join()
    if building.exitcode:
        raise SystemExit("building the models failed")
    began = time.monotonic()
    while (more := card_used_bytes() - before) > GIB // 16:
        if time.monotonic() - began > GIVEN_BACK_S:
            say("the card holds more than before building", bytes=more)  # of another process: the baseline is off
            break
        time.sleep(0.05)


def _build_all(folders: dict[str, Path]) -> None:
    table = models.load()
    for key, folder in folders.items():
        if key == "flux-dev":
            build_dev(folders["flux-schnell"], table[key], folder, tiny=False)
        else:
            build(table[key], folder, "cuda")


def build(
    facts: ModelFacts,
    folder: Path,
    device: str,
    *,
    changed: Mapping[str, Any] = FULL,
    config_only: Sequence[str] = (),
) -> None:
    """Write a diffusers folder of the model's true size with random weights, unless it is there.

    Args:
        changed: of the configurations; `SMALLER` makes the same model in little.
        config_only: components whose weights are elsewhere, prepared.
    """
    if (folder / "model_index.json").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    for name in shapes.components(facts):
        with timed(f"build {name}"):
            module = on_meta(shapes.CLASSES[facts.family][name], shapes.config(facts, name, changed))
            count = sum(parameter.numel() for parameter in module.parameters())
            if not changed and count != facts.components[name]:
                raise SystemExit(f"{name}: {count:,} parameters, models.toml says {facts.components[name]:,}.")
            if name in config_only:
                module.save_config(folder / name)
            else:
                write(module, folder / name, device)
            give_back()
    _write_the_rest(facts, folder)
    os.sync()  # what is measured next should not share the disk with these 33 GB


@torch.no_grad()
def build_dev(schnell: Path, facts: ModelFacts, folder: Path, *, tiny: bool) -> None:
    """Write a folder of flux-dev beside one of flux-schnell, unless it is there: links to its files, and in one more
    shard the layers that schnell's transformer has not."""
    if (folder / "model_index.json").is_file():
        return
    (folder / "transformer").mkdir(parents=True)
    for name in ("text_encoder", "text_encoder_2", "vae", "tokenizer", "tokenizer_2"):
        (folder / name).symlink_to(schnell.absolute() / name)
    config = shapes.config(facts, "transformer", SMALLER if tiny else FULL) | {"guidance_embeds": True}
    transformer = on_meta(shapes.CLASSES["flux"]["transformer"], config)
    count = sum(parameter.numel() for parameter in transformer.parameters())
    if not tiny and count != facts.components["transformer"]:
        raise SystemExit(f"transformer: {count:,} parameters, models.toml says {facts.components['transformer']:,}.")
    weight_map: dict[str, str] = {}
    for shard in sorted((schnell / "transformer").glob("*.safetensors")):
        (folder / "transformer" / shard.name).symlink_to(shard.absolute())
        with safe_open(shard, framework="pt") as stored:
            weight_map |= dict.fromkeys(stored.keys(), shard.name)
    more = {
        name: random_weight(name, tuple(parameter.shape), "cpu")
        for name, parameter in transformer.named_parameters()
        if name not in weight_map
    }
    own = "diffusion_pytorch_model-guidance.safetensors"
    save_file(more, folder / "transformer" / own, metadata={"format": "pt"})
    index = {"metadata": {"total_size": 2 * count}, "weight_map": weight_map | dict.fromkeys(more, own)}
    (folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    transformer.save_config(folder / "transformer")
    from safelightd.tiny import flux

    flux.scheduler(dynamic=True).save_pretrained(folder / "scheduler")
    shutil.copy(schnell / "model_index.json", folder)


def on_meta(path: str, config: dict[str, Any]) -> Any:
    """Return a module without memory."""
    import importlib

    library, _, name = path.partition(".")
    wanted = getattr(importlib.import_module(library), name)
    with torch.device("meta"):
        return wanted(wanted.config_class(**config)) if library == "transformers" else wanted(**config)


def write(module: Any, folder: Path, device: str) -> None:
    """Write a module of the meta device with random weights, several files at a time: one would take minutes."""
    folder.mkdir(parents=True)
    of_transformers = module.__module__.startswith("transformers")
    (module.config.save_pretrained if of_transformers else module.save_config)(folder)
    stem = "model" if of_transformers else "diffusion_pytorch_model"
    entries = [Entry(name, tuple(value.shape), torch.bfloat16) for name, value in module.named_parameters()]
    shards = split([[entry] for entry in entries], SHARD_BYTES)
    names = [f"{stem}-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    with ThreadPoolExecutor(WRITERS) as threads:
        list(threads.map(lambda name, own: _write_shard(folder / name, own, device), names, shards))
    weight_map = {entry.name: name for name, own in zip(names, shards, strict=True) for entry in own}
    index = {"metadata": {"total_size": sum(entry.nbytes for entry in entries)}, "weight_map": weight_map}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))


def _write_shard(file: Path, entries: Sequence[Entry], device: str) -> None:
    with Shard(file, entries) as shard:
        for entry in entries:
            shard.write(entry.name, random_weight(entry.name, entry.shape, device))


@torch.no_grad()
def random_weight(name: str, shape: tuple[int, ...], device: str) -> torch.Tensor:
    """Return bfloat16 numbers such that a forward of 57 blocks stays in float16's range: uniform, half as far as those
    that would keep the variance; norms 1."""
    weight = torch.empty(shape, dtype=torch.bfloat16, device=device)
    if name.endswith(".gamma") or (len(shape) == 1 and name.endswith("weight")):
        return weight.fill_(1.0)
    bound = 0.1 if len(shape) == 1 else GAIN * math.sqrt(3 / math.prod(shape[1:]))
    return weight.uniform_(-bound, bound)


def _write_the_rest(facts: ModelFacts, folder: Path) -> None:
    """Write tokenizers, scheduler and index; the tiny model's tokenizers do, their words are few."""
    from safelightd.tiny import flux, tokens, wan

    classes: dict[str, Any] = {name: shapes.CLASSES[facts.family][name].split(".") for name in shapes.components(facts)}
    index: dict[str, Any] = {"_class_name": facts.pipeline}
    if facts.family == "flux":
        parts = {"tokenizer": tokens.clip_tokenizer(), "tokenizer_2": tokens.t5_tokenizer()}
        parts["scheduler"] = flux.scheduler(dynamic=False)
    else:
        parts = {"tokenizer": tokens.t5_tokenizer()}
        parts["scheduler"] = wan.scheduler(flow_shift=facts.defaults.flow_shift or 1.0)
        if facts.expand_timesteps:
            index |= {"expand_timesteps": True, "transformer_2": [None, None]}
        else:
            index["boundary_ratio"] = facts.boundary_ratio
    for name, part in parts.items():
        part.save_pretrained(folder / name)
        library = "diffusers" if name == "scheduler" else "transformers"
        classes[name] = [library, type(part).__name__]
    (folder / "model_index.json").write_text(json.dumps(index | classes, indent=2), encoding="utf-8")


def spec_of(facts: ModelFacts, *, tiny: bool, **written: object) -> JobSpec:
    """Return a job of this model; what is None or left out is the model's default."""
    asked = {"model": facts.key, "prompt": "a red fox in the snow", "seed": 7}
    asked |= {name: value for name, value in written.items() if value is not None}
    spec = jobspec.check(asked, models.load(), "arguments", image_model=facts.key, video_model=facts.key)
    if isinstance(spec, list):
        raise SystemExit("\n".join(str(fault) for fault in spec))
    if tiny:
        few = {"width": 256, "height": 256, "num_inference_steps": 2}
        spec = spec.model_copy(update=few | ({"num_frames": 5} if facts.kind == "video" else {}))
    return spec


@contextmanager
def timed(name: str) -> Iterator[None]:
    """Print what the block took."""
    started = time.monotonic()
    yield
    synchronise()
    say(name, seconds=round(time.monotonic() - started, 3), **held())


def held() -> dict[str, int | float]:
    """Return what the process holds now: device bytes in use and kept back, host RAM that no file backs."""
    host = {"host_anon_gib": round(status("RssAnon") / GIB, 3)}
    if not torch.cuda.is_available():
        return host
    device = {"device_bytes": torch.cuda.memory_allocated(), "device_reserved_bytes": torch.cuda.memory_reserved()}
    return device | host


def status(field: str, pid: int | None = None) -> int:
    """Return a figure of a process's /proc/PID/status in bytes, this one's by default; 0 for one that has ended."""
    lines = Path(f"/proc/{pid or 'self'}/status").read_text(encoding="ascii").splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), 0)


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def say(what: str, **figures: object) -> None:
    print(json.dumps({"phase": what} | {k: v for k, v in figures.items() if v is not None}), flush=True)
