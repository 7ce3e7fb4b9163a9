"""What this machine's receipts teach: kept beside the ledger; planner and `status` use it."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from safelight import durable
from safelight.calibration import NOTHING_LEARNED, Calibration, key, memory_key
from safelight.plan import Overrun, Plan
from safelight.planner import PHASES
from safelight.receipt import Receipt
from safelightd.logs import Log

WEIGHT_OF_LAST = 0.5
"""Half of a known ratio is the last job: a night's jobs are alike, and yesterday's machine was not."""

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
    seconds, steps, device = dict(calibration.seconds), dict(calibration.step_seconds), dict(calibration.device)
    for phase in PHASES:
        record, predicted = receipt.phases.get(phase), plan.predicted.get(phase)
        if record is None or predicted is None or not predicted.seconds:
            continue
        name = key(plan, phase)
        found, expected = record.seconds, predicted.seconds
        if phase == "denoise" and receipt.seconds_per_step and plan.seconds_per_step:
            count = receipt.spec.num_inference_steps
            _mix(steps, name, receipt.seconds_per_step / plan.seconds_per_step)
            found, expected = found - count * receipt.seconds_per_step, expected - count * plan.seconds_per_step
        if expected > 0 and found > 0:
            _mix(seconds, name, found / expected)
        if plan.device == "cuda" and record.device_peak_bytes > predicted.device_bytes > 0:
            short = record.device_peak_bytes / predicted.device_bytes
            held = memory_key(plan, phase)
            device[held] = device.get(held, 1.0) * short * DEVICE_MARGIN
    return Calibration(seconds=seconds, step_seconds=steps, device=device, room_bytes=_more_room(calibration, receipt))


def _more_room(calibration: Calibration, receipt: Receipt) -> int | None:
    """Return half as much again, and no limit once that is more than the card has."""
    if calibration.room_bytes is None:
        return None
    wider = calibration.room_bytes * 3 // 2
    return wider if receipt.machine is None or wider < receipt.machine.vram_total_bytes else None


def overran(calibration: Calibration, overrun: Overrun, plan: Plan | None) -> Calibration:
    """Return the calibration after a plan that ran out of GPU memory: the next such job begins on a smaller rung.

    Where it held more than predicted the prediction was wrong; else others took what had been free.
    """
    if overrun.memory != "device" or plan is None or not overrun.predicted_bytes:
        return calibration
    name = memory_key(plan, overrun.phase)
    if overrun.reached_bytes > overrun.predicted_bytes:
        ratio = calibration.device.get(name, 1.0) * overrun.reached_bytes / overrun.predicted_bytes * DEVICE_MARGIN
        return calibration.model_copy(update={"device": {**calibration.device, name: ratio}})
    room = overrun.reached_bytes or overrun.predicted_bytes * 9 // 10
    return calibration.model_copy(update={"room_bytes": min(room, calibration.room_bytes or room)})


def _mix(ratios: dict[str, float], name: str, last: float) -> None:
    """Correct a ratio by what is left of the error after it; the first job's is taken whole."""
    before = ratios.get(name)
    ratios[name] = last if before is None else before * (1 - WEIGHT_OF_LAST + WEIGHT_OF_LAST * last)
