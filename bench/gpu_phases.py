"""Seconds and memory of encode, denoise and decode at full size, through our own functions, beside the stock pipeline.

    python -m bench.gpu_phases flux                      # FLUX.1-schnell, 1024x1024, 4 steps
    python -m bench.gpu_phases wan --steps 3             # Wan 2.2 TI2V-5B, 1280x704x121
    python -m bench.gpu_phases flux --cap-gib 14.8       # as a 16 GB card with a desktop on it
    python -m bench.gpu_phases flux --tiny               # the same path in seconds, on the CPU

The weights are random, so memory and time are true to size and the picture means nothing. They are written below
--folder first, component by component (33 GB for FLUX, 23 GB for Wan), and removed at the end unless --keep.
Prints one JSON object a line.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import numpy as np
import torch

from bench.fullsize import FULL, Meter, build, held, say, spec_of, synchronise, timed
from bench.shapes import SMALLER
from safelight import models
from safelight.jobspec import JobSpec
from safelight.machine import GIB
from safelight.models import ModelFacts
from safelight.plan import Plan
from safelightd import pipelines
from safelightd.device import give_back
from safelightd.loading import Loader
from safelightd.progress import Cancelled, Watch

RELATIVE_ERROR_MAX = 2e-2
"""What counts as bfloat16 rounding over a few steps: one forward of an exact reimplementation is bit-equal, quantised
ones differ by 8e-3 to 2e-2 (H100 80GB, 2026-11-22)."""


def main() -> int:
    """Measure one family and say whether it agrees with the stock pipeline."""
    arguments = _arguments()
    facts = models.load()[{"flux": "flux-schnell", "wan": "wan-ti2v-5b"}[arguments.family]]
    device = "cpu" if arguments.tiny else "cuda"
    say("start", torch=torch.__version__, device=torch.cuda.get_device_name() if device == "cuda" else "cpu")
    folder = arguments.folder / facts.key
    try:
        build(facts, folder, device, changed=SMALLER if arguments.tiny else FULL)
        if arguments.cap_gib and device == "cuda":
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(arguments.cap_gib * GIB / total)
        agrees = measure(_spec(facts, arguments), facts, folder, device, arguments)
    finally:
        if not arguments.keep:
            shutil.rmtree(folder, ignore_errors=True)
    return 0 if agrees else 1


def measure(spec: JobSpec, facts: ModelFacts, folder: Path, device: Any, arguments: argparse.Namespace) -> bool:
    """Run the three phases as often as asked, then cancel one, then ask the stock pipeline."""
    dtype = "float32" if arguments.tiny else "bfloat16"
    plan = Plan(
        model=spec.model,
        device=device,
        dtype=dtype,
        precision="fp32" if arguments.tiny else "bf16",
        offload="model",
        vae_tiling=arguments.tiled,
        text_encoder_device=device,
    )
    with timed("import"):
        family = pipelines.family(facts.family)
    loader = Loader(folder, plan, blocks=facts.blocks)
    for run in range(arguments.runs):
        watch = Watch(lambda _told: None, threading.Event(), Meter())
        with phase("encode", watch, run):
            embeddings = family.encode(spec, plan, loader, watch)
        with phase("denoise", watch, run):
            latents = family.denoise(spec, plan, loader, embeddings, watch)
        with phase("decode", watch, run):
            frames = list(family.decode(spec, plan, loader, latents, watch))
    cancel_within_a_step(family, spec, plan, loader, embeddings)
    if arguments.skip_stock:
        return True
    return compare(spec, folder, plan, latents, frames)


@contextmanager
def phase(name: Any, watch: Watch, run: int) -> Iterator[None]:
    """Measure one phase and print what it took and what it left behind."""
    with watch.phase(name):
        yield
        synchronise()
    record = watch.records[name]
    say(
        name,
        run=run,
        seconds=record.seconds,
        seconds_per_step=watch.seconds_per_step if name == "denoise" else None,
        device_peak_gib=round(record.device_peak_bytes / GIB, 3),
        host_peak_gib=round(record.host_peak_bytes / GIB, 3),
        **held(),
    )


def cancel_within_a_step(family: Any, spec: JobSpec, plan: Plan, loader: Loader, embeddings: Any) -> None:
    """Cancel in the second step, and print how soon it ended and what was still held."""
    stop = threading.Event()
    asked_at = 0.0

    def told(message: dict[str, Any]) -> None:
        nonlocal asked_at
        if message["type"] == "step" and message["i"] == 1:
            asked_at = time.monotonic()
            stop.set()

    watch = Watch(told, stop, Meter())
    try:
        with watch.phase("denoise"):
            family.denoise(spec, plan, loader, embeddings, watch)
    except Cancelled:
        give_back()
        say("cancel", seconds=round(time.monotonic() - asked_at, 3), **held())


def compare(spec: JobSpec, folder: Path, plan: Plan, ours: torch.Tensor, frames: list[Any]) -> bool:
    """Print how far the stock pipeline's latents and pixels are from ours; whether that is rounding."""
    from diffusers import DiffusionPipeline

    if plan.device == "cuda":
        torch.cuda.set_per_process_memory_fraction(1.0)  # it holds all components at once
    with timed("stock load"):
        pipe = DiffusionPipeline.from_pretrained(
            folder, dtype=getattr(torch, plan.dtype), local_files_only=True, use_safetensors=True
        ).to(plan.device)
        pipe.set_progress_bar_config(disable=True)
        if spec.flow_shift is not None:
            pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, flow_shift=spec.flow_shift)
    names = ("prompt", "negative_prompt", "width", "height", "num_inference_steps", "num_frames", "guidance_scale")
    wanted = {name: value for name in (*names, "max_sequence_length") if (value := getattr(spec, name)) is not None}
    steps: list[torch.Tensor] = []

    def keep(_pipe: Any, _i: int, _t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        steps.append(tensors["latents"])
        return tensors

    meter = Meter()
    meter.reset()
    with timed("stock run"):
        answer = pipe(
            **wanted, generator=torch.Generator().manual_seed(spec.seed), output_type="np", callback_on_step_end=keep
        )[0]
        synchronise()
    stock = steps[-1].cpu().float()
    error = float((ours.float() - stock).norm() / stock.norm())
    pixels = (answer if spec.kind == "image" else answer[0]) * 255
    difference = np.abs(np.stack(frames) - pixels)
    say(
        "compare",
        bit_equal_latents=torch.equal(ours.float(), stock),
        relative_error=error,
        grey_levels_mean=float(difference.mean()),
        grey_levels_max=float(difference.max()),
        stock_device_peak_gib=round(meter.peaks()[0] / GIB, 3),
    )
    return error <= RELATIVE_ERROR_MAX


def _spec(facts: ModelFacts, arguments: argparse.Namespace) -> JobSpec:
    width, _, height = arguments.size.partition("x") if arguments.size else (None, "", None)
    return spec_of(
        facts,
        tiny=arguments.tiny,
        num_inference_steps=arguments.steps,
        num_frames=arguments.frames,
        width=width,
        height=height,
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=("flux", "wan"))
    parser.add_argument("--folder", type=Path, default=Path("/tmp/safelight-bench"))
    parser.add_argument("--keep", action="store_true", help="leave the weights for the next run")
    parser.add_argument("--runs", type=int, default=2, help="the second finds the files in memory")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--frames", type=int)
    parser.add_argument("--size", help="WIDTHxHEIGHT")
    parser.add_argument("--tiled", action="store_true", help="decode in tiles")
    parser.add_argument("--cap-gib", type=float, help="let torch have no more of the card's memory")
    parser.add_argument("--skip-stock", action="store_true", help="the stock pipeline holds all components at once")
    parser.add_argument("--tiny", action="store_true", help="the same configurations, shrunk, on the CPU")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
