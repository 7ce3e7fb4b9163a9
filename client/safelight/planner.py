"""Decides how one job runs on one machine: for each phase the fastest rung that fits. Pure; no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

from safelight import calibration as learned
from safelight import footprint, ladder, wan_cli, wan_cli_plan
from safelight.calibration import Calibration
from safelight.computed import Computed
from safelight.errors import Fault, InvalidJob
from safelight.jobspec import JobSpec
from safelight.machine import GIB, Machine
from safelight.models import ModelFacts, Models
from safelight.plan import PhaseName, PhasePrediction, Plan, Shipped
from safelight.rung import Circumstances, Rung

SMALLER = 0.9
"""A plan after one that ran out of memory takes at most this share of what that one expected to add to the process."""

SLOW = 2.0
"""A plan that takes so many times the fastest one's time deserves a warning."""

PASSED_OVER_MAX = 6
PHASES: tuple[PhaseName, ...] = get_args(PhaseName)
NO_CIRCUMSTANCES = Circumstances()


class DoesNotFit(InvalidJob):
    """No way of running the job fits the machine."""


class _Lacking(Exception):
    """No rung of a phase fits; `least` needs the least of what is short."""

    def __init__(self, least: Rung, memory: str, need_bytes: int, there_bytes: int) -> None:
        super().__init__(memory)
        self.least = least
        self.memory = memory
        self.need_bytes = need_bytes
        self.there_bytes = there_bytes


def make_plan(
    spec: JobSpec, machine: Machine, models: Models, calibration: Calibration,
    circumstances: Circumstances = NO_CIRCUMSTANCES,
) -> Plan:  # fmt: skip
    """Return the plan for `spec` on `machine`: the fastest that fits, what is compiled once shared by all that wait.

    A job of which a part is done goes on in the way it was begun in, wherever its weights have room now, unless it
    would end sooner if it began anew.

    Raises:
        DoesNotFit: it needs more than the machine has; the message says what would fit.
        InvalidJob: the job insists on something no rung offers, or its model is no longer in the table.
    """
    if spec.model not in models:
        remedy = "Put it back into the settings, or submit the job again with another."
        raise InvalidJob([Fault(spec.id or spec.model, f"model {spec.model} is not known any more", remedy)])
    facts = models[spec.model]
    if spec.backend == "wan-cli":
        return _plan_of_own_program(spec, facts, machine)
    _refuse_unoffered(spec, facts, machine, circumstances.refused)
    begun, going_on = circumstances.begun, _as_begun(spec, facts, machine, calibration, circumstances)
    try:
        plan = _with_what_is_kept(spec, facts, machine, calibration, circumstances)
        return going_on if begun and going_on and begun.is_sooner(going_on, plan) else plan
    except _Lacking as lacking:
        if going_on:
            return going_on
        advice = _what_would_fit(spec, facts, machine, calibration, circumstances)
        problem = (
            f"{lacking.least.phase} of {spec.model} at {_size(spec)} needs about {lacking.need_bytes / GIB:.1f} GiB of "
            f"{lacking.memory}" + (f" on {machine.gpu}" if machine.gpu and "GPU" in lacking.memory else "")
        )
        remedy = f"{max(lacking.there_bytes, 0) / GIB:.1f} GiB is free. {advice}"
        raise DoesNotFit([Fault(spec.id or spec.model, problem, remedy)]) from None


def _as_begun(
    spec: JobSpec, facts: ModelFacts, machine: Machine, calibration: Calibration, circumstances: Circumstances
) -> Plan | None:
    """Return the plan that goes on with what an earlier attempt has done; None where there is none, it has no room, or
    another kind of device made it.

    On the CPU there is one way only.
    """
    begun = circumstances.begun
    if begun is None or begun.device != machine.device or machine.device == "cpu":
        return None
    if begun.precision in circumstances.refused:
        return None
    held = begun.held_to(spec)
    try:
        _refuse_unoffered(held, facts, machine, circumstances.refused)
        return _with_what_is_kept(held, facts, machine, calibration, circumstances)
    except (InvalidJob, _Lacking):
        return None


def _with_what_is_kept(
    spec: JobSpec, facts: ModelFacts, machine: Machine, calibration: Calibration, circumstances: Circumstances
) -> Plan:
    """Return the plan with the results that are kept of its LoRAs, or are to be, counted.

    What is kept decides nothing about the pixels: the precision is that of a machine that keeps nothing, unless none
    would fit there.
    """
    keeps = machine.fused or machine.fused_room_bytes
    if not spec.loras or not keeps or circumstances.without_fused:
        return _plan(spec, facts, machine, calibration, circumstances)
    try:
        plan = _plan(spec, facts, machine, calibration, dataclasses.replace(circumstances, without_fused=True))
    except _Lacking:
        return _plan(spec, facts, machine, calibration, circumstances)
    if not plan.is_quantised:
        return plan
    settings = Computed.of(plan).settings
    held = spec.model_copy(update={name: settings[name] for name in ("precision", "compile")})
    try:
        return _plan(held, facts, machine, calibration, circumstances)
    except _Lacking:  # what keeping takes beside it does not fit
        return plan


def _plan_of_own_program(spec: JobSpec, facts: ModelFacts, machine: Machine) -> Plan:
    where = spec.id or spec.model
    unable = [*wan_cli.refusals(spec.model_dump(exclude_none=True), facts)]  # the table may have changed meanwhile
    if unable:
        raise InvalidJob([Fault(where, problem, remedy) for _, problem, remedy in unable])
    if lacks := [Fault(where, *lack) for lack in wan_cli_plan.lacking(spec, facts, machine)]:
        raise DoesNotFit(lacks)
    return wan_cli_plan.plan_of(spec, facts, machine)


def _refuse_unoffered(spec: JobSpec, facts: ModelFacts, machine: Machine, refused: Sequence[str]) -> None:
    """Raise InvalidJob where the job insists on what this device has no way for, all reasons at once."""
    where = spec.id or spec.model
    if machine.device == "cpu":
        asked = {
            "precision": (spec.precision, ("auto",)),
            "offload": (spec.offload, ("auto", "none")),
            "compile": (spec.compile, ("auto", "off")),
            "low_cpu_mem_usage": (spec.low_cpu_mem_usage, ("auto", "off")),
            "text_encoder_precision": (spec.text_encoder_precision, ("auto",)),
            "text_encoder_device": (spec.text_encoder_device, ("auto", "cpu")),
        }
        faults = [
            Fault(where, f"{name} {value} is not offered on the CPU", f"Use {' or '.join(offered)}.")
            for name, (value, offered) in asked.items()
            if value not in offered
        ]
        if faults:
            raise InvalidJob(faults)
        return
    ways, reasons = ladder.ways(spec, facts, machine)
    faults = [Fault(where, *_parted(reason)) for reason in (reasons if not ways else ())]
    faults += [Fault(where, *_parted(reason)) for reason in ladder.encoder_reasons(spec, facts, machine)]
    is_open = spec.precision in ladder.FAMILIES
    if ways and is_open and not [way for way in ways if way.precision not in refused]:
        remedy = "The weights may be damaged; fetch the model anew."
        faults.append(Fault(where, f"precision {spec.precision} gave results that were refused", remedy))
    if faults:
        raise InvalidJob(faults)


def _parted(reason: str) -> tuple[str, str]:
    problem, _, remedy = reason.partition(". ")
    return problem, remedy


def _plan(
    spec: JobSpec,
    facts: ModelFacts,
    machine: Machine,
    calibration: Calibration,
    circumstances: Circumstances,
    spared_bytes: int = 0,
) -> Plan:
    """Choose a rung for each phase; the transformer's first, whose dtype the others share.

    Args:
        spared_bytes: RAM that denoising must leave: what stays pinned is there while others encode and decode.
    """
    on_cpu = machine.device == "cpu"
    plan = Plan(
        model=spec.model,
        device=machine.device,
        dtype="float32" if on_cpu else ladder.dtype_of("bf16", machine),
        precision="fp32" if on_cpu else "bf16",
        offload="none" if on_cpu else "model",
        loras=len(spec.loras),
        controlnet=spec.controlnet.model if spec.controlnet else "",
        vae_tiling=False,
        text_encoder_device=machine.device,
        cache=spec.cache and spec.cache.kind,
    )
    predicted: dict[str, PhasePrediction] = {}
    passed_over: list[str] = []
    warnings: list[str] = []
    order: tuple[PhaseName, ...] = ("denoise", "encode", "decode")
    for phase in order:
        pinned = 0 if phase == "denoise" else _pinned(plan, facts)
        limits = _limits(phase, spec, machine, circumstances)
        if phase == "denoise":
            limits = replace(limits, host=limits.host - spared_bytes)
        comfortable = _comfortable(limits, calibration)
        rungs = ladder.of_phase(
            phase, spec, facts, machine, circumstances, comfortable.device, plan, pinned, calibration
        )
        corrected = [_corrected(rung, plan, calibration) for rung in rungs]
        try:
            chosen = _fastest(corrected, limits, comfortable, circumstances.waiting)
        except _Lacking as lacking:
            if not pinned or lacking.memory != "RAM":
                raise
            more = max(
                spared_bytes + lacking.need_bytes - lacking.there_bytes,
                # where denoising has taken less than it may: below what it has, or the same would be chosen again
                _limits("denoise", spec, machine, circumstances).host - predicted["denoise"].host_bytes + 1,
            )
            return _plan(spec, facts, machine, calibration, circumstances, more)
        plan = _with(plan, chosen)
        predicted[phase] = _prediction(chosen)
        if phase == "denoise":
            plan = plan.model_copy(update={"seconds_per_step": round(chosen.work_seconds / chosen.steps, 4)})
        order_of = _order(circumstances.waiting)
        faster = [rung for rung in corrected if order_of(rung) < order_of(chosen)]
        passed_over += _reasons(faster, limits, comfortable)
        warnings += _warnings(chosen, faster)
    warnings += _advice(plan, facts, circumstances.waiting)
    if spec.encodes_picture:
        predicted["denoise"] = _with_encoding(predicted["denoise"], predicted["decode"])
    ordered = {phase: predicted[phase] for phase in PHASES}
    return plan.model_copy(
        update={
            "predicted": ordered,
            "seconds": round(sum(prediction.seconds or 0.0 for prediction in ordered.values()), 2),
            "passed_over": tuple(passed_over),
            "warnings": tuple(warnings),
        }
    )


def _with_encoding(denoise: PhasePrediction, decode: PhasePrediction) -> PhasePrediction:
    """Return what a phase takes in which the VAE encodes a picture first, in the way that it decodes in.

    That is less than decoding takes, with the same weights: 1.35 GB beside 1.6 at 1024x1024 whole, 0.62 beside 1.16 in
    strips (on meta tensors).
    """
    return denoise.model_copy(
        update={
            "device_bytes": max(denoise.device_bytes, decode.device_bytes),
            "host_bytes": max(denoise.host_bytes, decode.host_bytes),
        }
    )


def with_known_embeddings(plan: Plan, facts: ModelFacts) -> Plan:
    """Return the plan of a job whose prompts an earlier one has encoded just so: no text encoder is loaded."""
    encode = PhasePrediction(
        device_bytes=footprint.outside_bytes(facts) if plan.device == "cuda" else 0,
        host_bytes=plan.predicted["decode"].host_bytes,
        seconds=0.0,
    )
    saved = plan.predicted["encode"].seconds or 0.0
    return plan.model_copy(
        update={
            "embeddings_known": True,
            "predicted": {**plan.predicted, "encode": encode},
            "seconds": round((plan.seconds or 0.0) - saved, 2),
        }
    )


def _prediction(rung: Rung) -> PhasePrediction:
    return PhasePrediction(
        device_bytes=rung.device_bytes,
        host_bytes=rung.host_bytes,
        seconds=round(rung.seconds, 3),
        once_seconds=round(rung.once_seconds, 3),
        shipped=rung.shipped,
    )


def _pinned(plan: Plan, facts: ModelFacts) -> int:
    """Return what stays pinned for the next job of this plan, and so is there while this one encodes and decodes."""
    if plan.offload != "partial" or plan.streamed_from != "pinned":
        return 0
    name, blocks = next((name, blocks) for name, blocks in plan.streamed.items() if name.startswith("transformer"))
    of = footprint.sizes(facts, name, plan.precision, plan.dtype)
    return sum(of[place] for place in blocks)


def _with(plan: Plan, rung: Rung) -> Plan:
    """Return the plan with what a rung says; what is streamed and prepared adds up over the phases."""
    changes: dict[str, Any] = dict(rung.changes)
    if "streamed" in changes:
        changes["streamed"] = plan.streamed | changes["streamed"]
    if "prepared" in changes:
        changes["prepared"] = (*plan.prepared, *changes["prepared"])
    return plan.model_copy(update=changes)


def _corrected(rung: Rung, plan: Plan, calibration: Calibration) -> Rung:
    """Return a rung as this machine has shown it to be."""
    held = _with(plan, rung)
    work = learned.work_key(held, rung.phase)
    alike = f"/{rung.phase}/"
    load = learned.ratio(calibration.load, learned.load_key(held, rung.phase))
    return replace(
        rung,
        device_bytes=int(rung.device_bytes * calibration.device.get(learned.memory_key(held, rung.phase), 1.0)),
        load_seconds=rung.load_seconds * load,
        read_once_seconds=rung.read_once_seconds * load,
        pin_seconds=rung.pin_seconds * learned.ratio(calibration.pin, learned.PIN),
        compile_seconds=rung.compile_seconds * learned.ratio(calibration.compile, work),
        compute_seconds=rung.compute_seconds * learned.ratio(calibration.work, work, alike),
        copy_seconds=rung.copy_seconds * calibration.link.get(learned.link_key(held), 1.0),
        shipped=_shipped(rung),
    )


def _shipped(rung: Rung) -> Shipped:
    return Shipped(
        load_seconds=round(rung.load_seconds + rung.read_once_seconds, 4),
        pin_seconds=round(rung.pin_seconds, 4),
        compile_seconds=round(rung.compile_seconds, 4),
        compute_seconds=round(rung.compute_seconds, 4),
        copy_seconds=round(rung.copy_seconds, 4),
    )


@dataclass(frozen=True)
class _Limits:
    """What a phase may take, in bytes."""

    device: int
    host: int

    def holds(self, rung: Rung) -> bool:
        return (rung.device_bytes == 0 or rung.device_bytes <= self.device) and rung.host_bytes <= self.host

    def excess(self, rung: Rung) -> float:
        """Return how many times over these limits a rung is, by the worse of the two."""
        return max(rung.device_bytes / max(self.device, 1), rung.host_bytes / max(self.host, 1))


def _limits(phase: PhaseName, spec: JobSpec, machine: Machine, circumstances: Circumstances) -> _Limits:
    """Return what the phase may take at most: what is free, and less than what this job has run out with.

    A picture is encoded while denoising begins, in the way that the VAE decodes in.
    """
    phases = {phase, "denoise"} if phase == "decode" and spec.encodes_picture else {phase}
    device, host = machine.vram_free_bytes, machine.ram_available_bytes
    for overrun in circumstances.overruns:
        if overrun.phase in phases and overrun.memory == "device":
            device = min(device, smaller_than(overrun.predicted_bytes, footprint.CONTEXT_BYTES))
        if overrun.phase in phases and overrun.memory == "host":
            host = min(host, smaller_than(overrun.predicted_bytes, footprint.HOST_BYTES[machine.device]))
    return _Limits(device, host)


def _comfortable(limits: _Limits, calibration: Calibration) -> _Limits:
    """Return what is wise to take after other programs took memory in the middle of jobs."""
    return _Limits(
        min(limits.device, calibration.room_bytes or limits.device),
        min(limits.host, calibration.host_room_bytes or limits.host),
    )


def smaller_than(predicted_bytes: int, base_bytes: int) -> int:
    """Return what the next plan may take after one that ran out; what any process takes is not made smaller."""
    return int(base_bytes + SMALLER * max(predicted_bytes - base_bytes, 0))


def _order(waiting: int) -> Callable[[Rung], tuple[int, float]]:
    """Return what rungs are taken by, the least first: seconds for one job among those that wait."""
    return lambda rung: (rung.last_resort, rung.seconds - rung.once_seconds * (1 - 1 / max(waiting, 1)))


def _fastest(rungs: Sequence[Rung], limits: _Limits, comfortable: _Limits, waiting: int) -> Rung:
    """Return the fastest rung that is comfortable; where none is, the one that is nearest to it within the limits: what
    others once took may be free again, and is no reason to refuse a job, nor to change what it shows.

    Raises:
        _Lacking: none is within the limits.
    """
    within = [rung for rung in rungs if limits.holds(rung)]
    within = [rung for rung in within if not rung.changes_pixels] or within
    if fitting := [rung for rung in within if comfortable.holds(rung)]:
        return min(fitting, key=_order(waiting))
    if within:
        return min(within, key=comfortable.excess)
    if on_device := [rung for rung in rungs if rung.device_bytes <= limits.device or rung.device_bytes == 0]:
        least = min(on_device, key=lambda rung: rung.host_bytes)
        raise _Lacking(least, "RAM", least.host_bytes, limits.host)
    least = min(rungs, key=lambda rung: rung.device_bytes)
    raise _Lacking(least, "GPU memory", least.device_bytes, limits.device)


def _reasons(faster: Iterable[Rung], limits: _Limits, comfortable: _Limits) -> list[str]:
    """Say of the fastest rungs that were not taken what they need, and what there is, or was when others took more."""
    found = []
    for rung in sorted(faster, key=lambda rung: rung.seconds)[:PASSED_OVER_MAX]:
        if rung.device_bytes > comfortable.device:
            what, need, wise = "GPU memory", rung.device_bytes, comfortable.device
            there = f"{limits.device / GIB:.1f} is free"
        else:
            what, need, wise = "RAM", rung.host_bytes, comfortable.host
            there = f"{limits.host / GIB:.1f} is available"
        if wise < (limits.device if what == "GPU memory" else limits.host):
            there += f", of which others have left {wise / GIB:.1f} before"
        found.append(f"{rung.words}: needs {need / GIB:.1f} GiB of {what}, {there}")
    return found


def _warnings(chosen: Rung, faster: Sequence[Rung]) -> list[str]:
    best = min(faster, key=lambda rung: rung.seconds, default=chosen)
    if chosen.seconds <= SLOW * best.seconds or chosen.seconds - best.seconds < 1.0:
        return []
    return [
        f"{chosen.phase} takes {chosen.seconds / best.seconds:.1f} times as long as with "
        f"{best.device_bytes / GIB:.1f} GiB of GPU memory and {best.host_bytes / GIB:.1f} GiB of RAM: {chosen.words}"
    ]


def _advice(plan: Plan, facts: ModelFacts, waiting: int) -> list[str]:
    """Say where every job of a night would do again what one command does once."""
    ready = (*plan.prepared, *plan.fused)
    left = [name for name in facts.blocks if name.startswith("transformer") and name not in ready]
    if not plan.is_quantised or plan.keeping or not left or waiting < 2 or facts.tiny:
        return []
    if plan.loras:
        held = plan.precision
        return [
            f"each job reads the whole weights, adds its LoRAs and makes {held} of them; nothing prepared spares that. "
            "What jobs with the same LoRAs make is kept where [worker] fused_gib has room for it"
        ]
    return [
        f"each job reads the whole weights and makes {plan.precision} of them. "
        f"Once for all: safelight models prepare {plan.model} --precision {plan.precision}"
    ]


def _size(spec: JobSpec) -> str:
    return f"{spec.width}x{spec.height}" + (f"x{spec.num_frames}" if spec.num_frames else "")


def _what_would_fit(
    spec: JobSpec, facts: ModelFacts, machine: Machine, calibration: Calibration, circumstances: Circumstances
) -> str:
    """Name the largest clip or picture of this shape that fits; weights that do not fit alone are said so."""
    smaller = _smaller(spec, facts)
    low, high = 0, len(smaller)  # the first that fits: what fits at some size fits at every smaller one
    while low < high:
        middle = (low + high) // 2
        try:
            _plan(smaller[middle], facts, machine, calibration, circumstances)
        except _Lacking:
            low = middle + 1
        else:
            high = middle
    if low < len(smaller):
        return f"{_size(smaller[low])} would fit."
    return "The weights alone do not fit: use a smaller model, or close other programs that use the memory."


def _smaller(spec: JobSpec, facts: ModelFacts) -> list[JobSpec]:
    """Return fewer frames first, then smaller pictures of nearly the same shape."""
    found = []
    frames = spec.num_frames or 0
    while frames - facts.frames_multiple >= facts.frames_min > 0:
        frames -= facts.frames_multiple
        found.append(spec.model_copy(update={"num_frames": frames}))
    least = spec.model_copy(update={"num_frames": facts.frames_min}) if spec.num_frames else spec
    width = spec.width - facts.size_multiple
    while width >= facts.size_min:
        height = facts.side_near(round(spec.height * width / spec.width))
        found.append(least.model_copy(update={"width": width, "height": height}))
        width -= facts.size_multiple
    return found
