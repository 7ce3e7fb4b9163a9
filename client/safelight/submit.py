"""From specs to jobs that wait: refuse what cannot run, write the ledger, then the queue. `add`, `batch`, `rerun`.

Knows no command line and no prompt file.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from safelight import fused, planner, rung
from safelight.calibration import NOTHING_LEARNED, Calibration
from safelight.errors import Fault, InvalidJob, QueueUnreachable, SafelightError
from safelight.jobqueue import JobQueue
from safelight.jobspec import JobSpec
from safelight.ledger import Ledger
from safelight.machine import GIB, Machine
from safelight.models import Models
from safelight.plan import Plan
from safelight.queueserver import AWAY

PATIENCE_S = 10.0
"""How long a server may be away once the ledger is written: systemd has one back in 0.7 s, and one with 100,000 jobs
has loaded them in 2.2 s (2 cores, 2026-11-22)."""

TRY_EVERY_S = 0.2


@dataclass(frozen=True)
class Forecast:
    """What the planner says of jobs that are alike in all it looks at."""

    spec: JobSpec
    """One of them."""
    jobs: int
    plan: Plan | None
    """None where no way of running them fits."""
    faults: tuple[Fault, ...] = ()
    """Why none fits."""


def forecast(specs: Iterable[JobSpec], machine: Machine, models: Models, calibration: Calibration) -> list[Forecast]:
    """Return what the planner says of `specs` on `machine`, each shape once, in the order of the first of each."""
    alike: dict[tuple[Any, ...], list[JobSpec]] = {}
    for spec in specs:
        alike.setdefault(_shape(spec, machine), []).append(spec)
    return [_forecast(group, machine, models, calibration) for group in alike.values()]


def _shape(spec: JobSpec, machine: Machine) -> tuple[Any, ...]:
    """Return what the planner looks at; of LoRAs their sizes, and which of their results are kept."""
    return (
        fused.of_loras(spec.loras, spec.model, machine) if spec.loras else (),
        spec.model, spec.backend, spec.width, spec.height, spec.num_frames, spec.steps_run,
        spec.max_sequence_length,
        spec.precision, spec.offload, spec.vae_tiling, spec.text_encoder_device, spec.text_encoder_precision,
        spec.compile, spec.low_cpu_mem_usage,
        tuple(lora.size_bytes for lora in spec.loras), spec.controlnet and spec.controlnet.model,
        spec.image is None, spec.last_image is None, (spec.true_cfg_scale or 1) > 1, (spec.guidance_scale or 1) > 1,
    )  # fmt: skip


def _forecast(alike: Sequence[JobSpec], machine: Machine, models: Models, calibration: Calibration) -> Forecast:
    # Without its id a fault names the model: what is wrong is the shape, not this one job of it.
    spec = alike[0].model_copy(update={"id": ""})
    is_again = len({fused.loras_of(each.loras) for each in alike}) < len(alike)
    around = rung.Circumstances(waiting=len(alike), again=is_again)
    try:
        return Forecast(alike[0], len(alike), planner.make_plan(spec, machine, models, calibration, around))
    except InvalidJob as error:
        return Forecast(alike[0], len(alike), None, error.faults)


def refuse_hopeless(
    specs: Sequence[JobSpec], machines: Sequence[Machine], models: Models, *, vram_gib: float | None = None
) -> list[str]:
    """Refuse jobs that fit none of the workers' machines even when they are idle; return what is tight, as lines.

    Args:
        machines: as the workers published them; what was free then may have been less than tonight, so only what
            does not fit the whole of a machine is hopeless.
        vram_gib: what the settings let the planner have, None for all.

    Raises:
        InvalidJob: the faults of each shape that fits nowhere.
    """
    if not machines:
        return []
    hopeless: list[Fault] = []
    tight: list[str] = []
    for shape in forecast(specs, _idle(machines[0], vram_gib), models, NOTHING_LEARNED):
        others = [
            _forecast([shape.spec], _idle(machine, vram_gib), models, NOTHING_LEARNED) for machine in machines[1:]
        ]
        if not any(found.plan for found in (shape, *others)):
            hopeless += shape.faults
            continue
        now = [_forecast([shape.spec], machine, models, NOTHING_LEARNED) for machine in machines]
        if not any(found.plan for found in now):
            tight += [f"Tight: {fault}" for fault in now[0].faults]
        elif all(found.plan and found.plan.warnings for found in now) and now[0].plan:
            tight += [f"Slow: {warning}" for warning in now[0].plan.warnings]
    if hopeless:
        raise InvalidJob(hopeless)
    return tight


def _idle(machine: Machine, vram_gib: float | None) -> Machine:
    vram = machine.vram_total_bytes if vram_gib is None else min(machine.vram_total_bytes, int(vram_gib * GIB))
    return machine.model_copy(update={"vram_free_bytes": vram, "ram_available_bytes": machine.ram_total_bytes})


@contextmanager
def undisturbed() -> Iterator[None]:
    """Keep signals waiting that would end this process: for the moment between accepting jobs and naming them.

    Who presses Ctrl-C in between would have jobs without knowing it, and submit them again.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def submit(
    submissions: Mapping[str, Sequence[JobSpec]],
    queue: JobQueue,
    ledger: Ledger | None,
    *,
    patience_s: float = PATIENCE_S,
) -> list[str]:
    """Put jobs into the ledger and then into the queue; return what a person must know of it, mostly nothing.

    When this returns the jobs are accepted: they are not to be submitted again.

    Args:
        ledger: None where this client cannot write it; the server's append-only file is what it relies on then.
        patience_s: how long the server may be away in between.

    Raises:
        SafelightError: nothing was accepted.
        QueueUnreachable: the server went away and there is no ledger to hold the jobs; it is said which may be queued.
    """
    specs = [spec for group in submissions.values() for spec in group]
    if ledger is None:
        _refuse_pictures(specs)
        return _queue_alone(specs, queue, patience_s)
    try:
        ledger.accept(submissions)
    except OSError as error:
        raise SafelightError(
            f"{error.filename or ledger.paths.jobs}: {error.strerror}. {_left(specs, ledger)}"
        ) from error
    if _queued(specs, queue, patience_s):
        return []
    return [
        "The queue stopped answering. The jobs are in the ledger and will be queued when the worker starts next: "
        "do not submit them again."
    ]


def _left(specs: Sequence[JobSpec], ledger: Ledger) -> str:
    """Return what is left of a submission that could not be written down: a disk may refuse to remove it, too."""
    left = [spec.id for spec in specs if ledger.knows(spec.id)]
    if not left:
        return "Nothing was queued."
    return f"These are written down all the same, and will be queued; do not submit them again: {' '.join(left)}"


def _refuse_pictures(specs: Sequence[JobSpec]) -> None:
    """The queue carries words alone: a picture kept on this host would not be found by the worker of another."""
    remedy = "Put it into the inbox of the worker's host, beside its text."
    faults = [
        Fault(spec.id, "its picture cannot be sent to another host", remedy)
        for spec in specs
        if spec.image or spec.controlnet
    ]
    by_name = "Put it into the folder loras of the worker's models, and name it."
    faults += [
        Fault(spec.id, f"its LoRA {lora.path} cannot be sent to another host", by_name)
        for spec in specs
        for lora in spec.loras
        if lora.path
    ]
    if faults:
        raise InvalidJob(faults)


def _queue_alone(specs: Sequence[JobSpec], queue: JobQueue, patience_s: float) -> list[str]:
    if not _queued(specs, queue, patience_s):
        ids = " ".join(spec.id for spec in specs)
        raise QueueUnreachable(
            f"The queue stopped answering while jobs were handed over. Some of these may be queued: {ids}"
        )
    if queue.wait_durable():
        return []
    return ["The jobs are queued; the server has not said that they are on its disk: a power cut now may lose them."]


def _queued(specs: Sequence[JobSpec], queue: JobQueue, patience_s: float) -> bool:
    """Hand the jobs over, patiently: each is queued at most once, however often it is sent."""
    deadline = time.monotonic() + patience_s
    while True:
        try:
            queue.submit(specs)
        except AWAY:
            if time.monotonic() >= deadline:
                return False
            time.sleep(TRY_EVERY_S)
            continue
        return True
