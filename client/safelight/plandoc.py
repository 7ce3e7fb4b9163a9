"""Writes docs/plans.md, what runs on which card, from the planner itself: `make docs`. A test compares them.

The figures are predictions by the shipped calibration, for a card that nobody has measured.
"""

from __future__ import annotations

from collections.abc import Iterator

import click

from safelight import jobspec, models, planner
from safelight.calibration import NOTHING_LEARNED
from safelight.display import duration
from safelight.errors import InvalidJob
from safelight.jobspec import JobSpec
from safelight.machine import GIB, Machine
from safelight.models import Models
from safelight.rung import Circumstances

CARDS_GIB = {16: 14.8, 12: 10.8, 8: 6.8}
"""By what is printed on the box: what a desktop leaves."""

RAMS_GB = {32: 26, 16: 10}
"""By what is built in: what other programs leave."""

CAPABILITY = (8, 9)

JOBS: tuple[dict[str, object], ...] = (
    {"model": "flux-schnell"},
    {"model": "flux-schnell", "width": 1536, "height": 1024},
    {"model": "flux-dev"},
    {"model": "wan-ti2v-5b"},
    {"model": "wan-ti2v-5b", "width": 832, "height": 480, "num_frames": 49},
    {"model": "wan-t2v-a14b", "width": 832, "height": 480, "num_frames": 81},
    {"model": "wan-i2v-a14b", "width": 832, "height": 480, "num_frames": 81, "image": "0" * 64},
)

NIGHT = 100

HEAD = """\
# What runs on which card

What the planner chooses for a night of 100 jobs alike, before it has seen the machine: a card of compute capability 8.9 with a link of 12 GB/s, weights read at 3 GB/s, nothing prepared.
`safelight plan FILE --vram 12 --ram 16` says it of your jobs, and once a job has run here the seconds are this machine's own.
GPU memory is the largest of the three phases, context and libraries included; RAM is what is not a mapped file.
What of this has been measured is in [numbers.md](numbers.md); how it works, in [memory.md](memory.md).
This page is generated: `python -m safelight.plandoc > docs/plans.md`.
"""


def document() -> str:
    """Return the page: a table for each job that people ask for."""
    table = models.load()
    return HEAD + "".join(_section(_spec(written, table), table) for written in JOBS)


def _spec(written: dict[str, object], table: Models) -> JobSpec:
    spec = jobspec.check(
        {"prompt": "a fox", "seed": 1, **written},
        table,
        "plandoc",
        image_model="flux-schnell",
        video_model="wan-ti2v-5b",
    )
    if isinstance(spec, list):
        raise InvalidJob(spec)
    return spec


def _section(spec: JobSpec, table: Models) -> str:
    frames = f"x{spec.num_frames}" if spec.num_frames else ""
    title = f"\n## {spec.model}, {spec.width}x{spec.height}{frames}, {spec.num_inference_steps} steps\n\n"
    head = "| GPU | RAM | plan | GPU memory, GiB | RAM, GiB | a job |\n|---|---|---|---|---|---|\n"
    return title + head + "".join(_rows(spec, table))


def _rows(spec: JobSpec, table: Models) -> Iterator[str]:
    for card, vram_gib in CARDS_GIB.items():
        for ram, ram_gb in RAMS_GB.items():
            machine = Machine(
                device="cuda", gpu=f"a {card} GB GPU", capability=CAPABILITY, compiler=True, cpus=8,
                vram_total_bytes=card * GIB, vram_free_bytes=int(vram_gib * GIB),
                ram_total_bytes=ram * 10**9, ram_available_bytes=ram_gb * 10**9,
            )  # fmt: skip
            try:
                plan = planner.make_plan(spec, machine, table, NOTHING_LEARNED, Circumstances(waiting=NIGHT))
            except InvalidJob as refused:
                yield f"| {card} GB | {ram} GB | does not fit: {refused.faults[0].remedy} | | | |\n"
                continue
            device = max(phase.device_bytes for phase in plan.predicted.values()) / GIB
            host = max(phase.host_bytes for phase in plan.predicted.values()) / GIB
            seconds = (plan.seconds_of(NIGHT) or 0.0) / NIGHT
            yield f"| {card} GB | {ram} GB | {plan.rung} | {device:.1f} | {host:.1f} | {duration(seconds)} |\n"


if __name__ == "__main__":
    click.echo(document(), nl=False)
