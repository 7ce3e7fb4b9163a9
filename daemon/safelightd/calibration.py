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

WEIGHT_OF_LAST = 0.5
"""Half of a known ratio is the last job: a night's jobs are alike, and yesterday's machine was not."""

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
    except ValidationError as error:
        log.warning("calibration.damaged", file=file, error=error)  # no reason to fail a night of jobs
        return NOTHING_LEARNED


def save(state: Path, calibration: Calibration) -> None:
    durable.write(state / "calibration.json", calibration.model_dump_json(indent=1).encode())


def learned(calibration: Calibration, receipt: Receipt) -> Calibration:
    """Return the calibration with what one finished job showed; what others took in a job's middle is tried again."""
    plan = receipt.plan
    if receipt.state != "done" or plan is None:
        return calibration
    after = calibration.model_copy(deep=True)
    for phase in PHASES:
        record, predicted = receipt.phases.get(phase), plan.predicted.get(phase)
        if record is None or predicted is None or (plan.embeddings_known and phase == "encode"):
            continue
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
    loads, works, copies = load_key(plan, phase), work_key(plan, phase), link_key(plan)
    load, pin, work, link = before.load, before.pin, before.work, before.link
    if told.pin_seconds and load:  # what the rest took is known from this way or from others
        rest = ratio(load, loads) * told.load_seconds
        load = load if loads in load else {**load, loads: ratio(load, loads)}
        pin = _mixed(pin, PIN, took.load - rest, told.pin_seconds)
    else:
        together = told.load_seconds + told.pin_seconds
        load = _mixed(load, loads, took.load, together)
        pin = _mixed(pin, PIN, took.load, together) if told.pin_seconds else pin
    computing = ratio(work, works, f"/{phase}/") * told.compute_seconds
    copying = link.get(copies, 1.0) * told.copy_seconds
    if copying > computing:
        link = _mixed(link, copies, took.work - pace.NOT_OVERLAPPED * computing, told.copy_seconds)
    else:
        work = _mixed(work, works, took.work - pace.NOT_OVERLAPPED * copying, told.compute_seconds)
    compiled = _mixed(before.compile, works, took.compiling, told.compile_seconds)
    return before.model_copy(update={"load": load, "pin": pin, "compile": compiled, "work": work, "link": link})


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
    steps = receipt.spec.num_inference_steps
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


def _mixed(ratios: Mapping[str, float], name: str, found: float, expected: float) -> dict[str, float]:
    """Return ratios with one moved towards what was found; the first job's is taken whole."""
    if found <= 0 or expected <= 0:
        return dict(ratios)
    before = ratios.get(name, found / expected)
    return {**ratios, name: before * (1 - WEIGHT_OF_LAST) + WEIGHT_OF_LAST * found / expected}
