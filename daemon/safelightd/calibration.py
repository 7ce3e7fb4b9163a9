"""How fast each model has been here: learned from receipts, kept beside the ledger; planner and `status` use it."""

from __future__ import annotations

from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from safelight import durable
from safelight.models import ModelFacts
from safelight.plan import Calibration, Pace
from safelight.receipt import Receipt
from safelightd.logs import Log

WEIGHT_OF_LAST = 0.5
"""Half of the estimate is the last job: a night's jobs are alike, and yesterday's machine was not."""

_FILE = TypeAdapter(Calibration)
log = Log("safelight.calibration")


def load(state: Path) -> Calibration:
    """Return what was learned; {} on a fresh machine, or where the file cannot be read back: it is learned again."""
    file = state / "calibration.json"
    try:
        return _FILE.validate_json(file.read_bytes())
    except FileNotFoundError:
        return {}
    except ValidationError as error:
        log.warning("calibration.damaged", file=file, error=error)  # no reason to fail a night of jobs
        return {}


def save(state: Path, calibration: Calibration) -> None:
    durable.write(state / "calibration.json", _FILE.dump_json(calibration, indent=1))


def learned(calibration: Calibration, receipt: Receipt, facts: ModelFacts) -> Calibration:
    """Return the calibration with what one finished job showed."""
    denoise = receipt.phases.get("denoise")
    if receipt.state != "done" or denoise is None or receipt.seconds_per_step is None:
        return calibration
    spec = receipt.spec
    tokens = facts.tokens(spec.width, spec.height, spec.num_frames)
    steps_seconds = receipt.seconds_per_step * spec.num_inference_steps
    seen = Pace(
        seconds_per_token_step=receipt.seconds_per_step / tokens,
        other_seconds=max(sum(phase.seconds for phase in receipt.phases.values()) - steps_seconds, 0.0),
    )
    before = calibration.get(spec.model, seen)
    mixed = Pace(
        seconds_per_token_step=_mix(before.seconds_per_token_step, seen.seconds_per_token_step),
        other_seconds=_mix(before.other_seconds, seen.other_seconds),
    )
    return {**calibration, spec.model: mixed}


def _mix(before: float, last: float) -> float:
    return before * (1 - WEIGHT_OF_LAST) + last * WEIGHT_OF_LAST
