"""Predicted against measured: FLUX and Wan at several sizes on cards of three, and each technique to ask for."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bench.measured import NIGHT, Budget, Place
from safelight.calibration import link_key, load_key, work_key
from safelight.errors import InvalidJob
from safelight.jobspec import JobSpec
from safelight.machine import GIB
from safelight.plan import Plan, Shipped
from safelight.planner import PHASES, make_plan
from safelight.receipt import Receipt
from safelight.rung import Circumstances
from safelightd import calibration, device, probe, runjob

FROM_A_PICTURE = "+image"
"""How a size ends whose job starts from a picture. Those of a model that always does say nothing of it."""
SIZES = {
    "flux": ("512x512", "768x768", "1024x1024", "1536x1024", "640x1152"),
    "wan-ti2v": (
        "832x480x49", "1280x704x81", "1280x704x121", "1280x704x121+image", "704x1280x121", "704x1280x121+image",
    ),
    "wan-t2v": ("832x480x49", "832x480x81"),
    "wan-i2v": ("832x480x49", "832x480x81"),
}  # fmt: skip
LEARNED_AT = {
    "flux": ("448x576", "704x832", "960x1088", "1472x1088", "704x1024"),
    "wan-ti2v": ("800x512x45", "1216x736x77", "1248x704x113"),
    "wan-t2v": ("800x512x45", "816x496x77"),
    "wan-i2v": ("800x512x45", "816x496x77"),
}
"""For each of them another of about as many pixels: what calibrates is no case. By how a model's key begins."""

WAYS_MAX = 3
"""What one way turned out to take may make another the faster one."""

STEPS = {1: 2, 2: 3}
"""By experts: of three steps with a shift of 12 the last is below the boundary."""

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
"""What a person writes. How far the latents of each are from bf16's: bench/gpu_techniques.py."""


def learn(place: Place, model: str, cap: int, shrink: int, budget: Budget) -> Iterator[dict[str, Any]]:
    """Run a job of each other shape, and more until each way that they run in has run; yield a line for each.

    Of each shape one at least, on whichever card: a first job of a process starts more than itself.
    """
    place.become(cap)
    for size in _of(LEARNED_AT, model):
        spec = _spec(place, model, size, shrink)
        for _ in range(WAYS_MAX):
            if budget.is_spent():
                return
            try:
                known = _is_learned(place, spec, NIGHT)
            except InvalidJob:
                break  # too large for this card: there is nothing to learn of it
            if known and (model, size) in place.learned_at:
                break
            place.learned_at.add((model, size))
            line = _run(place, f"{model} {size} on {cap} GB", spec, learn=True)
            yield {"part": "learned", **line}
            if "seconds" not in line:
                break  # it failed, and would again


def run_cases(
    place: Place, model: str, cap: int, sizes: Sequence[str] | None, shrink: int, budget: Budget
) -> Iterator[dict[str, Any]]:
    """Run a job of each size, the calibration as it is; yield a line for each."""
    place.become(cap)
    for size in sizes or _of(SIZES, model):
        if budget.is_spent():
            return
        yield {"part": "cases", **_run(place, f"{model} {size} on {cap} GB", _spec(place, model, size, shrink))}


def run_techniques(
    place: Place, model: str, names: Sequence[str], shrink: int, budget: Budget
) -> Iterator[dict[str, Any]]:
    """Run one job of each technique; one that fails is a line, too."""
    for name in names or TECHNIQUES:
        if budget.is_spent():
            return
        spec = _spec(place, model, "1024x1024", shrink).model_copy(update=TECHNIQUES[name])
        yield {"part": "techniques", **_run(place, name, spec, waiting=1)}


def _spec(place: Place, model: str, size: str, shrink: int) -> JobSpec:
    facts = place.models[model]
    width, height, *frames = map(int, size.removesuffix(FROM_A_PICTURE).split("x"))
    width, height = (side // shrink // facts.size_multiple * facts.size_multiple for side in (width, height))
    more: dict[str, object] = {"num_frames": (frames[0] // shrink // 4) * 4 + 1} if frames else {}
    if size.endswith(FROM_A_PICTURE) or facts.image == "required":
        more["image"] = place.picture()
    return place.spec(model, width=width, height=height, num_inference_steps=STEPS[facts.experts], **more)


def _of(sizes: Mapping[str, tuple[str, ...]], model: str) -> tuple[str, ...]:
    return next(own for key, own in sizes.items() if model.removeprefix("tiny-").startswith(key))


def _run(place: Place, name: str, spec: JobSpec, waiting: int = NIGHT, *, learn: bool = False) -> dict[str, Any]:
    try:
        is_first = not _is_learned(place, spec, waiting)
        receipt = place.run(spec, waiting, learn=learn)
    except InvalidJob as error:
        return {"name": name, "refused": str(error)[:400]}
    except Exception as error:  # noqa: BLE001 - a job that fails is a result
        traceback.print_exc(limit=-4)
        return {"name": name, "error": f"{type(error).__name__}: {error}"[:400]}
    line = {"name": name, "first_of_kind": is_first, "outside_gib": _gib(place.gauge.outside_bytes)}
    return {**line, **described(receipt)}


def _is_learned(place: Place, spec: JobSpec, waiting: int) -> bool:
    """Whether this machine has run each phase in the way that the job's plan will."""
    known = calibration.load(place.config.paths.state)
    around = runjob.now(Circumstances(waiting=waiting), place.setting, spec.model)
    plan = make_plan(spec, probe.read_machine(place.config, device.own()), place.models, known, around)
    told = plan.predicted["denoise"].shipped
    assert told is not None
    return (
        all(load_key(plan, phase) in known.load for phase in ("encode", "denoise"))
        and work_key(plan, "decode") in known.work
        and (work_key(plan, "denoise") in known.work or (link_key(plan) in known.link and _waits_for_link(told)))
        and not compiles(plan)
    )


def _waits_for_link(told: Shipped) -> bool:
    return told.copy_seconds > told.compute_seconds


def compiles(plan: Plan) -> bool:
    """Whether the job waits for code that is not compiled yet."""
    told = plan.predicted["denoise"].shipped
    return told is not None and told.compile_seconds > 0


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
            "load_seconds": record.load_seconds,
            "first_step_seconds": record.first_step_seconds,
            "swap_seconds": record.swap_seconds,
            "shipped": predicted.shipped.model_dump() if predicted.shipped else None,
        }
    seconds = sum(receipt.phases[phase].seconds for phase in PHASES)
    return {
        "rung": plan.rung,
        "seconds": [round(plan.seconds or 0.0, 2), round(seconds, 2)],
        "step_ms": [
            round(1000 * seconds, 1) for seconds in (plan.seconds_per_step, receipt.seconds_per_step) if seconds
        ],
        "phases": phases,
        "warnings": list(plan.warnings),
    }


def _gib(size_bytes: int) -> float:
    return round(size_bytes / GIB, 3)
