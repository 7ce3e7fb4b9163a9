"""Wan clips that are killed three times on a GPU, beside undisturbed ones: their latents, and what a checkpoint takes.

    python -m bench.gpu_resume                     # 1280x704x121 and 832x480x81: two minutes on an H100
    python -m bench.gpu_resume --only wan-ti2v-5b
    python -m bench.gpu_resume --tiny              # the same path in seconds, on the CPU in float32

The transformers have their true width and a few of their blocks; a checkpoint is as large as a clip's, but for what a
cache keeps of the blocks. 5 GB of disk below --folder at a time, gone afterwards. Each clip is run once without a
checkpoint, and once by four attempts, each of which but the last is killed after a step, in the middle of the next one.
Prints a JSON object for each; exits 1 where latents are not equal bit for bit.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import torch

from bench import fullsize, options
from bench.fullsize import Meter
from bench.gpu_agreement import FEW
from bench.measured import Budget
from bench.shapes import SMALLER
from safelight import models
from safelight.jobspec import JobSpec
from safelight.machine import GIB
from safelight.models import ModelFacts
from safelight.plan import Plan
from safelightd import device, pipelines
from safelightd.checkpoint import NOWHERE, Checkpoint
from safelightd.loading import Loader
from safelightd.progress import Watch

STEPS = 8
KILLED_AFTER = (2, 3, 6)
SIZES = {
    "wan-ti2v-5b": {"width": 1280, "height": 704, "num_frames": 121},
    "wan-t2v-a14b": {"width": 832, "height": 480, "num_frames": 81},
}
TINY_SIZE = {"width": 256, "height": 256, "num_frames": 9}

WAYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "bf16": ({}, {}),
    "bf16 compiled": ({"compiled": True}, {}),
    "bf16 compiled, every second block streamed": ({"compiled": True, "offload": "partial"}, {}),
    "fp8-dynamic compiled": ({"precision": "fp8-dynamic", "compiled": True}, {}),
    "nf4": ({"precision": "nf4"}, {}),
    "bf16 compiled, taylorseer": ({"compiled": True}, {"kind": "taylorseer", "cache_interval": 2}),
    "bf16 compiled, first-block": ({"compiled": True}, {"kind": "first-block", "threshold": 0.3}),
}
"""What of the plan, and which cache."""


class _Killed(BaseException):
    """The process would end here."""


def main() -> int:
    arguments = _arguments()
    budget = Budget(arguments.limit_s)
    table = models.load()
    lines = []
    for key in arguments.only or SIZES:
        folder = arguments.folder / "resume" / key
        shutil.rmtree(folder, ignore_errors=True)  # of a call that was cut off
        try:
            where = "cpu" if arguments.tiny else "cuda"
            fullsize.build(table[key], folder, where, changed={**SMALLER, **FEW} if arguments.tiny else FEW)
            for way in WAYS:
                if budget.is_spent():
                    return 1
                line = _told(table[key], folder, way, tiny=arguments.tiny)
                print(json.dumps(line), flush=True)
                lines.append(line)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    return 0 if lines and all(line.get("bit_equal") for line in lines) else 1


def _told(facts: ModelFacts, folder: Path, way: str, *, tiny: bool) -> dict[str, Any]:
    name = f"{facts.key}, {way}"
    try:
        return {"name": name, **_measured(facts, folder, way, tiny=tiny)}
    except Exception as error:  # noqa: BLE001 - what fails is a result
        traceback.print_exc(limit=-4)
        return {"name": name, "error": f"{type(error).__name__}: {error}"[:400]}
    finally:
        device.release()


def _measured(facts: ModelFacts, folder: Path, way: str, *, tiny: bool) -> dict[str, Any]:
    changes, cache = WAYS[way]
    size = TINY_SIZE if tiny else SIZES[facts.key]
    spec = fullsize.spec_of(facts, tiny=False, num_inference_steps=STEPS, **size, **({"cache": cache} if cache else {}))
    plan = _plan(facts, {} if tiny else changes, cache.get("kind"), tiny=tiny)
    family, loader = pipelines.family(facts.family), Loader(folder, plan, blocks=facts.blocks)
    watch = _watch(0)
    with watch.phase("encode"):
        embeddings = family.encode(spec, plan, loader, watch)
    undisturbed = _attempt(spec, plan, folder, facts, embeddings, NOWHERE, _watch(0))
    place = Checkpoint(folder / "checkpoint", every_s=0.0, plan=plan)
    for after in KILLED_AFTER:
        try:
            _attempt(spec, plan, folder, facts, embeddings, place, _watch(after))
        except _Killed:
            device.release()
    size_bytes = (folder / "checkpoint").stat().st_size
    began = time.perf_counter()
    place.load()
    reading = time.perf_counter() - began
    last = _watch(0)
    latents = _attempt(spec, plan, folder, facts, embeddings, place, last)
    (folder / "checkpoint").unlink()
    return {
        "rung": plan.rung, "bit_equal": torch.equal(latents, undisturbed), "went_on_after": last.resumed_after_step,
        "largest_difference": float((latents - undisturbed).abs().max()), "forwards": last.forwards,
        "left_out": last.skipped, "checkpoint_gib": round(size_bytes / GIB, 3), "checked_s": round(reading, 2),
    }  # fmt: skip


def _attempt(
    spec: JobSpec, plan: Plan, folder: Path, facts: ModelFacts, embeddings: Any, place: Checkpoint, watch: Watch
) -> torch.Tensor:
    """Return the latents of an attempt, with weights of its own."""
    family, loader = pipelines.family(facts.family), Loader(folder, plan, blocks=facts.blocks)
    with watch.phase("denoise"):
        return family.denoise(spec, plan, loader, embeddings, watch, checkpoint=place)


def _watch(killed_after: int) -> Watch:
    """Return what ends an attempt at the beginning of the step after `killed_after`; 0: never."""

    def told(message: dict[str, Any]) -> None:
        if message["type"] == "step" and message["phase"] == "denoise" and message["i"] == killed_after:
            raise _Killed

    return Watch(told, threading.Event(), Meter())


def _plan(facts: ModelFacts, changes: dict[str, Any], cache: str | None, *, tiny: bool) -> Plan:
    of_gpu = {"device": "cuda", "dtype": "bfloat16", "precision": "bf16", "text_encoder_device": "cuda"}
    of_cpu = {"device": "cpu", "dtype": "float32", "precision": "fp32", "text_encoder_device": "cpu"}
    fields = {"offload": "model", "vae_tiling": False, "cache": cache, **(of_cpu if tiny else of_gpu), **changes}
    plan = Plan.model_validate({"model": facts.key, **fields})
    if plan.offload == "partial":
        streamed = tuple(range(1, FEW["num_layers"], 2))
        plan = plan.model_copy(update={"streamed": {name: streamed for name in facts.blocks if "transf" in name}})
    return plan


def _arguments() -> argparse.Namespace:
    parser = options.full_size(__doc__)
    parser.add_argument("--only", nargs="+", choices=tuple(SIZES))
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
