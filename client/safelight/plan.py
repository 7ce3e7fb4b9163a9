"""What is decided: how one job runs on one machine. Pure; no torch; nothing is measured here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from safelight.errors import Fault, InvalidJob
from safelight.jobspec import JobSpec
from safelight.machine import GIB, Machine
from safelight.models import ModelFacts, Models

BASELINE_BYTES = int(0.8 * GIB)
"""CUDA context, cuBLAS and cuDNN: an idle context holds 527 MiB (H100 80GB, torch 2.11, 2026-11-22), the libraries
the rest."""

ACTIVATION_BYTES_PER_TOKEN = {"flux": 114_000, "wan": 202_000}
"""Peak of one bf16 forward above the weights: FLUX.1-schnell at 1024x1024 22.61 GiB, Wan 2.2 5B at 1280x704x121 with a
timestep a token 14.54 GiB (bench/gpu_phases.py, H100 80GB, torch 2.11, 2026-11-22)."""

DECODE_BYTES_PER_PIXEL = {"flux": 2_450, "wan": 9_020}
"""Peak of a whole bf16 decode above the VAE: FLUX 2.57 GiB at 1024x1024, Wan 2.2 11.32 GiB at 1280x704x121 (the same
run), less the frames below."""

DECODE_BYTES_PER_PIXEL_AND_FRAME = 24
"""The decoded clip in float32, held twice while its parts are joined."""

BYTES_PER_PARAMETER = {"bfloat16": 2, "float32": 4}


class PhasePrediction(BaseModel):
    """Bytes above the idle baseline and bytes of host RAM that one phase is expected to hold at its peak."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    device_bytes: int
    host_bytes: int


class Plan(BaseModel):
    """How a job runs. With its spec it determines the bytes that come out."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    v: Literal[1] = 1
    model: str
    device: Literal["cuda", "cpu"]
    dtype: Literal["bfloat16", "float32"]
    precision: Literal["bf16", "fp32"]
    offload: Literal["none", "model"]
    """"model": each component is on the GPU for its own phase only."""
    vae_tiling: bool
    text_encoder_device: Literal["cuda", "cpu"]
    predicted: dict[str, PhasePrediction] = Field(default_factory=dict)
    seconds: float | None = None
    """Expected run time, None while nothing like it has been measured here."""
    passed_over: tuple[str, ...] = ()
    """Faster rungs that were not taken, each with its reason."""


class Pace(BaseModel):
    """How fast one model has been on this machine."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seconds_per_token_step: float
    other_seconds: float
    """Everything but the steps: loading, encoding, decoding, publishing."""

    def seconds(self, spec: JobSpec, facts: ModelFacts) -> float:
        """Return the expected run time of `spec`: time grows with tokens and steps, within what it was measured on."""
        tokens = facts.tokens(spec.width, spec.height, spec.num_frames)
        return self.other_seconds + self.seconds_per_token_step * tokens * spec.num_inference_steps


Calibration = dict[str, Pace]
"""The pace of each model, from receipts of this machine."""


class DoesNotFit(InvalidJob):
    """No way of running the job fits the machine."""


def make_plan(spec: JobSpec, machine: Machine, models: Models, calibration: Calibration) -> Plan:
    """Return the plan for `spec` on `machine`.

    One rung stands so far: bf16 with each component on the GPU for its own phase, or float32 on the CPU.

    Raises:
        DoesNotFit: it needs more than the machine has; the message says what would fit.
        InvalidJob: the job insists on something no rung offers, or its model is no longer in the table.
    """
    if spec.model not in models:
        remedy = "Put it back into the settings, or submit the job again with another."
        raise InvalidJob([Fault(spec.id or spec.model, f"model {spec.model} is not known any more", remedy)])
    facts = models[spec.model]
    on_gpu = machine.device == "cuda"
    refuse_unoffered(spec, on_gpu=on_gpu)
    pace = calibration.get(spec.model)
    plan = Plan(
        model=spec.model,
        device=machine.device,
        dtype="bfloat16" if on_gpu else "float32",
        precision="bf16" if on_gpu else "fp32",
        offload="model" if on_gpu else "none",
        vae_tiling=spec.vae_tiling == "on",
        text_encoder_device="cpu" if spec.text_encoder_device == "cpu" else machine.device,
        seconds=pace.seconds(spec, facts) if pace else None,
    )
    plan = plan.model_copy(update={"predicted": predict(spec, facts, plan)})
    if spec.vae_tiling == "auto" and on_gpu and _over(plan, machine, "decode"):
        plan = plan.model_copy(update={"vae_tiling": True, "passed_over": ("whole decode: does not fit",)})
        plan = plan.model_copy(update={"predicted": predict(spec, facts, plan)})
    _refuse_what_does_not_fit(spec, facts, plan, machine)
    return plan


def refuse_unoffered(spec: JobSpec, *, on_gpu: bool) -> None:
    """Raise InvalidJob where the job insists on a precision or placement that no rung offers."""
    offered_precision = ("auto", "bf16") if on_gpu else ("auto",)
    offered_offload = ("auto", "model") if on_gpu else ("auto", "none")
    where = "on the GPU" if on_gpu else "on the CPU"
    faults = []
    if spec.precision not in offered_precision:
        remedy = f"Use {' or '.join(offered_precision)}."
        faults.append(Fault(spec.id or spec.model, f"precision {spec.precision} is not offered {where}", remedy))
    if spec.offload not in offered_offload:
        remedy = f"Use {' or '.join(offered_offload)}."
        faults.append(Fault(spec.id or spec.model, f"offload {spec.offload} is not offered {where}", remedy))
    if spec.text_encoder_device == "gpu" and not on_gpu:
        faults.append(Fault(spec.id or spec.model, "text_encoder_device gpu is not offered on the CPU", "Use auto."))
    if faults:
        raise InvalidJob(faults)


def predict(spec: JobSpec, facts: ModelFacts, plan: Plan) -> dict[str, PhasePrediction]:
    """Return the predicted peaks of the three phases: weights of the phase plus its activations."""
    width_bytes = BYTES_PER_PARAMETER[plan.dtype]
    weights = {name: count * width_bytes for name, count in facts.components.items()}
    encoders = sum(size for name, size in weights.items() if name.startswith("text_encoder"))
    transformer = max((size for name, size in weights.items() if name.startswith("transformer")), default=0)
    tokens = facts.tokens(spec.width, spec.height, spec.num_frames) + spec.max_sequence_length
    activations = 0 if facts.tiny else tokens * ACTIVATION_BYTES_PER_TOKEN[facts.family]
    pixels = spec.width * spec.height
    if plan.vae_tiling:
        pixels = min(pixels, 512 * 512)
    decode = 0 if facts.tiny else pixels * DECODE_BYTES_PER_PIXEL[facts.family] * width_bytes // 2
    frames = spec.width * spec.height * (spec.num_frames or 1) * DECODE_BYTES_PER_PIXEL_AND_FRAME
    peaks = {
        "encode": encoders,
        "denoise": transformer + activations,
        "decode": weights.get("vae", 0) + decode + frames,
    }
    if plan.device == "cpu":
        return {phase: PhasePrediction(device_bytes=0, host_bytes=peak) for phase, peak in peaks.items()}
    on_host = {"encode": plan.text_encoder_device == "cpu"}
    return {
        phase: PhasePrediction(
            device_bytes=0 if on_host.get(phase) else peak, host_bytes=peak if on_host.get(phase) else 0
        )
        for phase, peak in peaks.items()
    }


def _over(plan: Plan, machine: Machine, phase: str) -> bool:
    return plan.predicted[phase].device_bytes + BASELINE_BYTES > machine.vram_free_bytes


def _lacks(plan: Plan, machine: Machine) -> list[tuple[str, str, int, int]]:
    """Return what does not fit: (phase, kind of memory, bytes needed, bytes there)."""
    lacking = []
    for phase, peak in plan.predicted.items():
        if plan.device == "cuda" and _over(plan, machine, phase):
            need = peak.device_bytes + BASELINE_BYTES
            lacking.append((phase, f"GPU memory on {machine.gpu}", need, machine.vram_free_bytes))
        if peak.host_bytes > machine.ram_available_bytes:
            lacking.append((phase, "RAM", peak.host_bytes, machine.ram_available_bytes))
    return lacking


def _refuse_what_does_not_fit(spec: JobSpec, facts: ModelFacts, plan: Plan, machine: Machine) -> None:
    lacking = _lacks(plan, machine)
    if not lacking:
        return
    advice = _what_would_fit(spec, facts, plan, machine)
    raise DoesNotFit(
        [
            Fault(
                spec.id or spec.model,
                f"{phase} of {spec.model} at {_size(spec)} needs about {need / GIB:.1f} GiB of {memory}",
                f"{there / GIB:.1f} GiB is free. {advice}",
            )
            for phase, memory, need, there in lacking
        ]
    )


def _size(spec: JobSpec) -> str:
    return f"{spec.width}x{spec.height}" + (f"x{spec.num_frames}" if spec.num_frames else "")


def _what_would_fit(spec: JobSpec, facts: ModelFacts, plan: Plan, machine: Machine) -> str:
    """Name the largest clip or picture of this shape that fits; weights that do not fit alone are said so."""
    for smaller in _smaller(spec, facts):
        predicted = predict(smaller, facts, plan)
        if not _lacks(plan.model_copy(update={"predicted": predicted}), machine):
            return f"{_size(smaller)} would fit."
    return "The weights alone do not fit: use a smaller model, or close other programs that use the memory."


def _smaller(spec: JobSpec, facts: ModelFacts) -> Iterator[JobSpec]:
    """Yield fewer frames first, then smaller pictures of nearly the same shape."""
    frames = spec.num_frames or 0
    while frames - facts.frames_multiple >= facts.frames_min > 0:
        frames -= facts.frames_multiple
        yield spec.model_copy(update={"num_frames": frames})
    least = spec.model_copy(update={"num_frames": facts.frames_min}) if spec.num_frames else spec
    width = spec.width - facts.size_multiple
    while width >= facts.size_min:
        height = facts.side_near(round(spec.height * width / spec.width))
        yield least.model_copy(update={"width": width, "height": height})
        width -= facts.size_multiple
