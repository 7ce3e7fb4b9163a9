"""Predicted against measured: FLUX at five sizes on cards of three sizes, and each technique a job can ask for."""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

from bench.measured import NIGHT, USABLE_GIB, Place
from safelight.calibration import key
from safelight.errors import InvalidJob
from safelight.jobspec import JobSpec
from safelight.ladder import Circumstances
from safelight.machine import GIB
from safelight.plan import Plan
from safelight.planner import PHASES, make_plan
from safelight.receipt import Receipt

SIZES = ("512x512", "768x768", "1024x1024", "1536x1024", "640x1152")
LEARNED_AT = "896x640"
"""The size of a card's and model's first job, which is no case."""

STEPS = 2

TECHNIQUES: dict[str, dict[str, str]] = {
    "bf16 partial": {"precision": "bf16", "offload": "partial", "compile": "off"},
    "fp16 partial": {"precision": "fp16", "offload": "partial", "compile": "off"},
    "nf4": {"precision": "nf4", "compile": "off"},
    "int8-bnb": {"precision": "int8-bnb"},
    "int8-weight-only": {"precision": "int8-weight-only"},
    "int8-dynamic": {"precision": "int8-dynamic", "compile": "off"},
    "fp8-weight-only": {"precision": "fp8-weight-only"},
    "fp8-dynamic eager": {"precision": "fp8-dynamic", "compile": "off"},
    "fp8-dynamic compiled": {"precision": "fp8-dynamic", "compile": "on"},
    "fp8-quanto": {"precision": "fp8-quanto"},
    "bf16 block": {"precision": "bf16", "offload": "block"},
    "bf16 leaf": {"precision": "bf16", "offload": "leaf", "low_cpu_mem_usage": "off"},
    "bf16 leaf, low_cpu_mem_usage": {"precision": "bf16", "offload": "leaf", "low_cpu_mem_usage": "on"},
    "bf16 sequential": {"precision": "bf16", "offload": "sequential"},
    "text encoder on the CPU": {"text_encoder_device": "cpu"},
    "text encoder nf4": {"text_encoder_precision": "nf4"},
    "text encoder int8-bnb": {"text_encoder_precision": "int8-bnb"},
    "VAE in tiles": {"vae_tiling": "on"},
}
"""What a person writes. How far the latents of each are from bf16's: bench/techniques.py."""


class Budget:
    """No case begins after its end: a lent machine's call ends then."""

    def __init__(self, limit_s: float) -> None:
        self._ends_at = time.monotonic() + limit_s

    def is_spent(self) -> bool:
        return time.monotonic() > self._ends_at


def run_cases(
    place: Place, model: str, sizes: Sequence[str], shrink: int, learn: int, budget: Budget
) -> Iterator[dict[str, Any]]:
    """Run a job of each size after `learn` of another size, which calibrate; yield a line for each."""
    for i in range(learn):
        name = f"{model} {LEARNED_AT} on {_card(place)}, learned from, {i + 1}"
        yield {"part": "learned", **_run(place, name, _spec(place, model, LEARNED_AT, shrink))}
    for size in sizes:
        if budget.is_spent():
            return
        yield {"part": "cases", **_run(place, f"{model} {size} on {_card(place)}", _spec(place, model, size, shrink))}


def run_techniques(
    place: Place, model: str, names: Sequence[str], shrink: int, budget: Budget
) -> Iterator[dict[str, Any]]:
    """Run one job of each technique; one that fails is a line, too."""
    for name in names or TECHNIQUES:
        if budget.is_spent():
            return
        spec = _spec(place, model, "1024x1024", shrink).model_copy(update=TECHNIQUES[name])
        yield {"part": "techniques", **_run(place, name, spec, waiting=1)}


def _card(place: Place) -> str:
    return f"{next(card for card, usable in USABLE_GIB.items() if usable == place.usable_gib)} GiB"


def _spec(place: Place, model: str, size: str, shrink: int) -> JobSpec:
    width, height = (int(side) // shrink for side in size.split("x"))
    return place.spec(model, width=width, height=height, num_inference_steps=STEPS)


def _run(place: Place, name: str, spec: JobSpec, waiting: int = NIGHT) -> dict[str, Any]:
    try:
        is_first = not _is_learned(place, spec, waiting)
        receipt = place.run(spec, waiting)
    except InvalidJob as error:
        return {"name": name, "refused": str(error)[:400]}
    except Exception as error:  # noqa: BLE001 - a job that fails is a result
        traceback.print_exc(limit=-4)
        return {"name": name, "error": f"{type(error).__name__}: {error}"[:400]}
    return {"name": name, "first_of_kind": is_first, **described(receipt)}


def _is_learned(place: Place, spec: JobSpec, waiting: int) -> bool:
    """Whether this machine has run each phase in the way that the job's plan will."""
    from safelightd import calibration, compiling, probe

    known = calibration.load(place.config.paths.state)
    here, before = compiling.compiled_here(), compiling.compiled_before()
    around = Circumstances(waiting=waiting, compiled_here=here, compiled_before=before)
    plan = make_plan(spec, probe.read_machine(place.config), place.models, known, around)
    return all(key(plan, phase) in known.seconds for phase in PHASES) and not _compiles(plan, place, here)


def _compiles(plan: Plan, place: Place, here: frozenset[str]) -> bool:
    return plan.compiled and f"{place.models[plan.model].family}/{plan.precision}" not in here


def described(receipt: Receipt) -> dict[str, Any]:
    """Return what a line says of a job: each phase's prediction beside what it took."""
    plan = receipt.plan
    assert plan is not None
    phases = {}
    for phase in PHASES:
        record, predicted = receipt.phases[phase], plan.predicted[phase]
        phases[phase] = {
            "device_gib": [_gib(predicted.device_bytes), _gib(record.device_peak_bytes)],
            "host_gib": [_gib(predicted.host_bytes), _gib(record.host_peak_bytes)],
            "seconds": [round(predicted.seconds or 0.0, 2), round(record.seconds, 2)],
        }
    seconds = sum(receipt.phases[phase].seconds for phase in PHASES)
    return {
        "rung": plan.rung,
        "seconds": [round(plan.seconds or 0.0, 2), round(seconds, 2)],
        "step_ms": round(1000 * receipt.seconds_per_step, 1) if receipt.seconds_per_step else None,
        "phases": phases,
        "warnings": list(plan.warnings),
    }


def _gib(size_bytes: int) -> float:
    return round(size_bytes / GIB, 3)
