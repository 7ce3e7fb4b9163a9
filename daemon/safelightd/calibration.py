"""What this machine's receipts teach: kept beside the ledger; planner and `status` use it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from safelight import durable, footprint, pace, planner
from safelight.calibration import NOTHING_LEARNED, PIN, Calibration, link_key, load_key, memory_key, ratio, work_key
from safelight.plan import Overrun, PhaseName, PhasePrediction, Plan, Shipped
from safelight.planner import PHASES
from safelight.receipt import PhaseRecord, Receipt
from safelightd.logs import Log

WEIGHT_OF_FASTER, WEIGHT_OF_SLOWER = 0.8, 0.4
"""What the last job counts for in a known ratio: a night's jobs are alike, and yesterday's machine was not. Neighbours
and cold caches only ever add seconds, so that a fast job says more of the machine than a slow one: with 0.5 for both,
7 of 27 jobs were predicted up to 1.54 times as long as they took, after a first one on a cold machine (H100, torch
2.11.0+cu130, 2026-11-26)."""

LEAST_SHARE = 0.2
"""Of what a part was expected to take, that it is believed to have taken at least: one job's noise is no discovery."""

MORE_ROOM = 1.1
"""After each job that went well; a plan after one that ran out takes 0.9 of it."""

DEVICE_MARGIN = 1.02
"""A ratio of device memory is never learned below what was seen, and this much above."""

log = Log("safelight.calibration")


def load(state: Path) -> Calibration:
    """Return what was learned; nothing on a fresh machine, or where the file cannot be read: it is learned again."""
    file = state / "calibration.json"
    try:
        return Calibration.model_validate_json(file.read_bytes())
    except FileNotFoundError:
        return NOTHING_LEARNED
    except (OSError, ValidationError) as error:
        log.warning("calibration.damaged", file=file, error=error)  # no reason to fail a night of jobs
        return NOTHING_LEARNED


def save(state: Path, calibration: Calibration) -> None:
    durable.write(state / "calibration.json", calibration.model_dump_json(indent=1).encode())


def learned(calibration: Calibration, receipt: Receipt) -> Calibration:
    """Return the calibration with what one finished job showed; what others took in a job's middle is tried again."""
    plan = receipt.plan
    if receipt.state != "done" or plan is None or plan.backend != "diffusers":
        return calibration
    after = calibration.model_copy(deep=True)
    for phase in PHASES:
        record, predicted = receipt.phases.get(phase), plan.predicted.get(phase)
        if record is None or predicted is None or (plan.embeddings_known and phase == "encode"):
            continue
        if phase == "denoise" and receipt.resumed_after_step:
            continue  # only a part of it was done here
        after = _with_memory(after, phase, plan, record, predicted)
        if told := predicted.shipped:
            after = _with_seconds(after, phase, plan, _took(phase, receipt, record, told), told)
    vram, ram = (machine.vram_total_bytes, machine.ram_total_bytes) if (machine := receipt.machine) else (0, 0)
    rooms = {
        "room_bytes": _more_room(calibration.room_bytes, footprint.CONTEXT_BYTES, vram),
        "host_room_bytes": _more_room(calibration.host_room_bytes, footprint.HOST_BYTES[plan.device], ram),
    }
    return after.model_copy(update=rooms)


def _with_seconds(before: Calibration, phase: PhaseName, plan: Plan, took: _Seconds, told: Shipped) -> Calibration:
    """Return the calibration with what a phase's seconds show."""
    works = work_key(plan, phase)
    load = _Part(before.load, load_key(plan, phase), told.load_seconds)
    pin = _Part(before.pin, PIN, told.pin_seconds)
    compute = _Part(before.work, works, told.compute_seconds, f"/{phase}/")
    copy = _Part(before.link, link_key(plan), told.copy_seconds, link_key(plan))
    compiling = _Part(before.compile, works, told.compile_seconds)
    loaded, pinned = _one_after_the_other(load, pin, took.load)
    computed, copied = _at_once(compute, copy, took.work)
    ratios = {
        "load": loaded,
        "pin": pinned,
        "compile": compiling.found(took.compiling),
        "work": computed,
        "link": copied,
    }
    return before.model_copy(update=ratios)


@dataclass(frozen=True)
class _Part:
    """A part of a phase's seconds: where its ratio is kept, and what the shipped figures say."""

    ratios: Mapping[str, float]
    name: str
    shipped: float
    alike: str = ""

    @property
    def seconds(self) -> float:
        """What it is expected to take here."""
        return ratio(self.ratios, self.name, self.alike) * self.shipped

    @property
    def is_new(self) -> bool:
        return self.shipped > 0 and self.name not in self.ratios

    def found(self, seconds: float) -> dict[str, float]:
        """Return the ratios with this one moved towards what was found; the first job's is taken whole."""
        if seconds <= 0 or self.shipped <= 0:
            return dict(self.ratios)
        seen = max(seconds, self.seconds * LEAST_SHARE) / self.shipped
        before = self.ratios.get(self.name, seen)
        weight = WEIGHT_OF_FASTER if seen < before else WEIGHT_OF_SLOWER
        return {**self.ratios, self.name: before + weight * (seen - before)}


def _one_after_the_other(first: _Part, second: _Part, took: float) -> tuple[dict[str, float], dict[str, float]]:
    """Return the ratios of two parts that together took so long: what is known of one tells the other.

    Where both are known or neither is, they are as wrong as they are long.
    """
    if took <= 0:
        return dict(first.ratios), dict(second.ratios)
    expected = first.seconds + second.seconds
    share = first.seconds / expected if expected else 0.0
    if first.is_new != second.is_new:
        share = float(first.is_new)
    off = took - expected
    least = LEAST_SHARE * min(first.seconds, second.seconds) if second.shipped else 0.0
    return first.found(max(first.seconds + share * off, least)), second.found(
        max(second.seconds + (1 - share) * off, least)
    )


def _at_once(compute: _Part, copy: _Part, took: float) -> tuple[dict[str, float], dict[str, float]]:
    """Return the ratios of computing and copying, which overlapped, from how long both took.

    The longer one is what took so long, and the shorter one stays; but where one is known and the other is not, time
    that the known one does not explain is the other's.
    """
    longer, shorter = (copy, compute) if copy.seconds > compute.seconds else (compute, copy)
    if shorter.is_new and not longer.is_new and took > (1 + pace.NOT_OVERLAPPED) * longer.seconds:
        longer, shorter = shorter, longer
    found = longer.found(took - pace.NOT_OVERLAPPED * shorter.seconds)
    return (dict(compute.ratios), found) if longer is copy else (found, dict(copy.ratios))


def _with_memory(
    before: Calibration, phase: PhaseName, plan: Plan, record: PhaseRecord, predicted: PhasePrediction
) -> Calibration:
    """Return the calibration with what a phase held of the GPU, where that was more than predicted."""
    if plan.device != "cuda" or not record.device_peak_bytes > predicted.device_bytes > 0:
        return before
    name = memory_key(plan, phase)
    larger = before.device.get(name, 1.0) * record.device_peak_bytes / predicted.device_bytes * DEVICE_MARGIN
    return before.model_copy(update={"device": {**before.device, name: larger}})


@dataclass(frozen=True)
class _Seconds:
    """What a phase's seconds were made of; 0 where it cannot be told."""

    load: float
    compiling: float = 0.0
    work: float = 0.0


def _took(phase: PhaseName, receipt: Receipt, record: PhaseRecord, told: Shipped) -> _Seconds:
    if phase == "decode":
        return _Seconds(0.0, work=record.seconds)  # the VAE is small, and writing the file grows with the pixels
    first = record.first_step_seconds
    if first is None:
        return _Seconds(record.seconds)
    steps = receipt.spec.steps_run
    if steps == 1:
        return _Seconds(record.seconds - first, work=0.0 if told.compile_seconds else first)
    each = receipt.seconds_per_step or first
    return _Seconds(record.seconds - first - (steps - 1) * each, first - each, steps * each)


def _more_room(room_bytes: int | None, base_bytes: int, total_bytes: int) -> int | None:
    """Return a little more than what any process takes, and no limit once that is more than there is; 0 where that is
    not known. What is tried again too soon runs out again."""
    if room_bytes is None:
        return None
    wider = max(room_bytes, int(base_bytes + MORE_ROOM * (room_bytes - base_bytes)))
    return wider if not total_bytes or wider < total_bytes else None


def overran(calibration: Calibration, overrun: Overrun, plan: Plan | None) -> Calibration:
    """Return the calibration after a plan that ran out of memory: the next such job begins on a smaller rung.

    Where it held more than predicted the prediction was wrong; else others took what had been free.
    """
    if plan is None or not overrun.predicted_bytes:
        return calibration
    name = memory_key(plan, overrun.phase)
    if overrun.memory == "device" and overrun.reached_bytes > overrun.predicted_bytes:
        larger = calibration.device.get(name, 1.0) * overrun.reached_bytes / overrun.predicted_bytes * DEVICE_MARGIN
        return calibration.model_copy(update={"device": {**calibration.device, name: larger}})
    field = "room_bytes" if overrun.memory == "device" else "host_room_bytes"
    left = overrun.reached_bytes if overrun.memory == "device" else 0  # what a killed engine reached nobody knows
    base = footprint.CONTEXT_BYTES if overrun.memory == "device" else footprint.HOST_BYTES[plan.device]
    room = left or planner.smaller_than(overrun.predicted_bytes, base)
    return calibration.model_copy(update={field: min(room, getattr(calibration, field) or room)})
