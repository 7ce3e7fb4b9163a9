"""Prediction against truth: FLUX at the sizes and caps that people have, each phase's memory and seconds.

    python -m bench.gpu_cases --model flux-schnell            # needs a GPU; 33 GB of disk for random weights

For each cap a first job, at a size that is no case, teaches the calibration. JSON lines; exit code 1 where a phase held
more than predicted, or less than nine tenths of it and 0.3 GiB, ran out of memory, or RAM passed 26 GiB.
"""

from __future__ import annotations

import argparse
import threading
from pathlib import Path

import torch

from bench import fullsize
from bench.fullsize import say
from safelight import models
from safelight.calibration import NOTHING_LEARNED, Calibration
from safelight.ladder import Circumstances
from safelight.machine import GIB, Machine
from safelight.planner import make_plan
from safelight.receipt import Receipt
from safelightd import calibration, compiling, device, pipelines, probe
from safelightd.assembly import PinnedSet
from safelightd.loading import Loader
from safelightd.progress import Watch

TEACHING = "896x640"
SIZES = ("512x512", "768x768", "1024x1024", "1536x1024", "640x1152")
CAPS_GIB = {16: 14.8, 12: 10.8, 8: 6.8}
"""What a desktop leaves of a card: 1.2 GiB less."""

HOST_GIB_MAX = 26.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="flux-schnell", choices=("flux-schnell",))
    parser.add_argument("--folder", type=Path, default=Path("/tmp/models"))
    arguments = parser.parse_args()
    facts = models.load()[arguments.model]
    folder = arguments.folder / facts.key
    fullsize.build("flux", facts, folder, "cuda", tiny=False)
    card = probe._read_gpu("0").model_copy(
        update={"ram_total_bytes": 32 * GIB, "ram_available_bytes": int(HOST_GIB_MAX * GIB), "compiler": True}
    )
    pinned = PinnedSet(limit_bytes=64 * GIB)
    missed = 0
    for cap, usable_gib in CAPS_GIB.items():
        machine = card.model_copy(update={"vram_free_bytes": int(usable_gib * GIB)})
        shown = NOTHING_LEARNED
        for size in (TEACHING, *SIZES):
            receipt, bad = case(size, cap, machine, shown, folder, facts, pinned)
            missed += bad
            if receipt and size == TEACHING:
                shown = calibration.learned(shown, receipt)
    say("summary", missed=missed)
    return 1 if missed else 0


def case(
    size: str, cap: int, machine: Machine, shown: Calibration, folder: Path, facts: models.ModelFacts, pinned: PinnedSet
) -> tuple[Receipt | None, int]:
    """Run one job of two steps under a cap; return its receipt, and how many bars it missed."""
    width, height = size.split("x")
    spec = fullsize.spec_of(facts, tiny=False, width=width, height=height, num_inference_steps=2)
    around = Circumstances(waiting=100, compiled_here=compiling.compiled_here())
    plan = make_plan(spec, machine, models.load(), shown, around)
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((machine.vram_free_bytes - device.context_bytes()) / total)
    watch = Watch(lambda _told: None, threading.Event(), device.ProcessMeter())
    loader = Loader(folder, plan, blocks=facts.blocks, pinned=pinned)
    family = pipelines.family(facts.family)
    try:
        with watch.phase("encode"):
            embeddings = family.encode(spec, plan, loader, watch)
        with watch.phase("denoise"):
            latents = family.denoise(spec, plan, loader, embeddings, watch)
        with watch.phase("decode"):
            list(family.decode(spec, plan, loader, latents, watch))
    except torch.OutOfMemoryError as error:
        say("out of memory", cap=cap, size=size, rung=plan.rung, error=str(error)[:200])
        device.release()
        return None, 1
    if plan.compiled:
        compiling.remember(f"{facts.family}/{plan.precision}")
    device.release()
    figures = {}
    bad = 0
    for phase, record in watch.records.items():
        measured, predicted = record.device_peak_bytes / GIB, plan.predicted[phase].device_bytes / GIB
        bad += not measured <= predicted <= 1.10 * measured + 0.3
        figures[phase] = [round(measured, 2), round(predicted, 2), record.seconds, plan.predicted[phase].seconds]
    host = fullsize.status("RssAnon") / GIB + pinned.nbytes / GIB
    seconds = sum(record.seconds for record in watch.records.values())
    say(
        "case", cap=cap, size=size, rung=plan.rung, figures=figures, host_gib=round(host, 2),
        seconds=round(seconds, 2), predicted_seconds=plan.seconds, seconds_per_step=watch.seconds_per_step,
        held_after_gib=round((device.held_bytes() + device.context_bytes()) / GIB, 3), missed=bad,
    )  # fmt: skip
    receipt = Receipt(
        id="case", state="done", spec=spec, plan=plan, finished_at="-", phases=watch.records,
        seconds_per_step=watch.seconds_per_step,
    )  # fmt: skip
    return receipt, bad + (host > HOST_GIB_MAX)


if __name__ == "__main__":
    raise SystemExit(main())
