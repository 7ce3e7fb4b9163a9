"""What a job takes of a machine when Wan's own program runs it: there is one way, and it fits or not. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from safelight import footprint, pace, wan_cli
from safelight.jobspec import JobSpec
from safelight.machine import GIB, Machine
from safelight.models import ModelFacts, OwnProgram
from safelight.plan import PhaseName, PhasePrediction, Plan

BYTES_PER_TOKEN = 431_840
"""Of the GPU, for tokens above those that were measured: between A14B's 480p and 720p (its assets/comp_effic.png).
Fewer take no less: cards of 24 GB ran out of memory at nine frames, too (Wan2.2#295)."""

FORWARD_TIMES, DECODE_TIMES = 1.09, 1.5
"""How much longer its forward and its decode take than what safelight.pace expects of ours: 2.75 s a step and 10.3 s
at 1280x704x121 (H100 80GB, torch 2.11, 2026-11-22)."""

CAPABILITY_MIN = (8, 0)
"""Of flash_attn, without which it does not run."""


def lacking(spec: JobSpec, facts: ModelFacts, machine: Machine) -> Iterator[tuple[str, str]]:
    """Yield what the machine lacks for the job, each with what could be done instead."""
    instead = "Wan's own program has no smaller way: leave backend out, and diffusers takes less."
    if machine.device == "cpu":
        yield "Wan's own program needs an NVIDIA GPU", "Leave backend out."
        return
    if pace.capability(machine) < CAPABILITY_MIN:
        yield "Wan's own program needs flash_attn, which needs compute capability 8.0", "Leave backend out."
    card = f" on {machine.gpu}" if machine.gpu else ""
    for memory, need, there in (
        (f"GPU memory{card}", device_bytes(spec, facts), machine.vram_free_bytes),
        ("RAM", host_bytes(facts), machine.ram_available_bytes),
    ):
        if need > there:
            size = f"{spec.width}x{spec.height}x{spec.num_frames}"
            problem = f"{spec.model} at {size} by Wan's own program needs about {need / GIB:.1f} GiB of {memory}"
            yield problem, f"{max(there, 0) / GIB:.1f} GiB is free. {instead}"


def device_bytes(spec: JobSpec, facts: ModelFacts) -> int:
    """Return what the program holds of the GPU at its peak, by its authors' figures."""
    size = next(size for size in _program(facts).sizes if (size.width, size.height) == (spec.width, spec.height))
    measured = facts.tokens(spec.width, spec.height, facts.defaults.num_frames)
    more = facts.tokens(spec.width, spec.height, spec.num_frames) - measured
    return size.device_bytes + max(more, 0) * BYTES_PER_TOKEN


def host_bytes(facts: ModelFacts) -> int:
    """Return what the program holds of RAM at its peak: it reads each transformer in float32, beside the text encoder
    and the transformers before, which it has made bf16 by then. 31.4 GB of weights for the 5B."""
    text_encoder = facts.components["text_encoder"]
    transformers = [count for name, count in facts.components.items() if name.startswith("transformer")]
    reading = 2 * text_encoder + 2 * sum(transformers[:-1]) + 4 * transformers[-1]
    return max(4 * text_encoder, reading) + footprint.HOST_BYTES["cuda"]


def plan_of(spec: JobSpec, facts: ModelFacts, machine: Machine) -> Plan:
    """Return how the program runs the job; nothing is said of whether it fits."""
    asked = spec.text_encoder_device
    on_cpu = (_program(facts).text_encoder_device if asked == "auto" else asked) == "cpu"
    seconds = _seconds(spec, facts, machine, on_cpu=on_cpu)
    held = {"device_bytes": device_bytes(spec, facts), "host_bytes": host_bytes(facts)}
    predicted = {phase: PhasePrediction(**held, seconds=round(took, 3)) for phase, took in seconds.items()}
    return Plan(
        model=spec.model,
        backend="wan-cli",
        device="cuda",
        dtype="bfloat16",
        precision="bf16",
        offload="model",
        text_encoder_device="cpu" if on_cpu else "cuda",
        vae_dtype="float32",
        vae_tiling=False,
        predicted={**predicted},
        seconds=round(sum(seconds.values()), 2),
        seconds_per_step=round(seconds["denoise"] / spec.num_inference_steps, 4),
    )


def _seconds(spec: JobSpec, facts: ModelFacts, machine: Machine, *, on_cpu: bool) -> dict[PhaseName, float]:
    """Return the seconds of each phase. Every step is two forwards, with guidance or without."""
    components, rate = facts.components, pace.flops_per_second(machine)
    weights = sum(count * (2 if name == "text_encoder" else 4) for name, count in components.items())
    encoding = 2 * 2 * components["text_encoder"] * wan_cli.OWN_SEQUENCE_LENGTH / pace.CPU_FLOPS if on_cpu else 0.0
    seen = footprint.tokens(facts, spec.width, spec.height, spec.num_frames, wan_cli.OWN_SEQUENCE_LENGTH)
    forward = pace.forward_flop(facts, "transformer", seen) / (rate * pace.EFFICIENCY["bf16"])
    pixels = spec.width * spec.height * (spec.num_frames or 1)
    decoding = pixels / (pace.DECODE_PIXELS_PER_FLOP[facts.family] * rate)
    return {
        "encode": weights / pace.READ_BYTES_PER_SECOND + encoding,
        "denoise": 2 * spec.num_inference_steps * forward * FORWARD_TIMES,
        "decode": decoding * DECODE_TIMES + pixels * pace.WRITE_SECONDS_PER_PIXEL,
    }


def _program(facts: ModelFacts) -> OwnProgram:
    assert facts.wan_cli is not None  # a job of any other model was refused when it was submitted
    return facts.wan_cli
