"""The ways each phase of a job could run on a machine, each with what it takes. Pure; the planner chooses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, get_args

from safelight import footprint, pace
from safelight.calibration import Calibration, memory_key
from safelight.jobspec import JobSpec
from safelight.machine import Machine
from safelight.models import ModelFacts
from safelight.plan import Dtype, Overrun, PhaseName, Placement, Plan, Precision
from safelight.refusals import Way, refused

FAMILIES: dict[str, tuple[Precision, ...]] = {
    "auto": (
        "bf16", "fp16", "fp8-dynamic", "fp8-weight-only", "int8-dynamic", "int8-weight-only", "int8-bnb", "nf4",
    ),
    "fp8": ("fp8-dynamic", "fp8-weight-only"),
    "int8": ("int8-weight-only", "int8-dynamic", "int8-bnb"),
}  # fmt: skip
"""What the words of a job stand for. auto leaves fp8-quanto out: fp8-weight-only is as good and can be streamed."""


AUTO_PLACEMENTS: tuple[Placement, ...] = ("model", "partial", "leaf", "sequential")
"""Not block: partial with all blocks streamed is the same, and pins less."""


@dataclass(frozen=True)
class Circumstances:
    """What the planner should know besides the job and the machine."""

    waiting: int = 1
    """Jobs of this shape that wait, this one included: what is compiled once serves them all."""
    overruns: tuple[Overrun, ...] = ()
    refused: tuple[str, ...] = ()
    """Precisions whose result was refused."""
    compiled_here: frozenset[str] = frozenset()
    compiled_before: frozenset[str] = frozenset()
    """Kinds, "family/precision", that this process has compiled, and those whose code is on disk."""


@dataclass(frozen=True)
class Rung:
    """One way to run one phase."""

    phase: PhaseName
    words: str
    device_bytes: int
    host_bytes: int
    seconds: float
    changes: dict[str, Any] = field(default_factory=dict)
    """The fields of the plan that say so."""
    once_seconds: float = 0.0
    """Of `seconds`, what later jobs of the shape will not take again."""
    seconds_per_step: float = 0.0
    load_seconds: float = 0.0


def precisions(asked: str) -> tuple[Precision, ...]:
    """Return what a job's word for a precision allows."""
    if asked in FAMILIES:
        return FAMILIES[asked]
    return tuple(known for known in get_args(Precision) if known == asked)


def dtype_of(precision: Precision, machine: Machine) -> Dtype:
    """Return what a GPU computes in: bf16, where it can and nothing else was asked for."""
    return "float16" if precision == "fp16" or pace.capability(machine) < (8, 0) else "bfloat16"


def is_guided(spec: JobSpec, facts: ModelFacts) -> bool:
    """Whether a step runs the transformer twice."""
    if facts.family == "wan":
        return (spec.guidance_scale or 0.0) > 1
    return spec.negative_prompt is not None and (spec.true_cfg_scale or 0.0) > 1


def ways(spec: JobSpec, machine: Machine) -> tuple[list[Way], list[str]]:
    """Return the ways that the job allows and this machine has, and why others do not go."""
    placements: Sequence[Any] = AUTO_PLACEMENTS if spec.offload == "auto" else (spec.offload,)
    switches = {"auto": (False, True), "on": (True,), "off": (False,)}
    # Compiling Wan is taken only where a person asks: it has not been measured here.
    compiled = (False,) if spec.compile == "auto" and spec.kind == "video" else switches[spec.compile]
    every = [
        Way(precision, compiled, placement, low)
        for precision, compiled, placement, low in product(
            precisions(spec.precision), compiled, placements, switches[spec.low_cpu_mem_usage]
        )
    ]
    if spec.precision == "auto":
        every = [way for way in every if way.precision != "fp16" or pace.capability(machine) < (8, 0)]
    if spec.low_cpu_mem_usage == "auto":
        every = [way for way in every if not way.low_cpu_mem_usage or way.placement == "leaf"]
    legal = [way for way in every if refused(way, machine) is None]
    # Of the others only those are told of that do nothing the job left open.
    asked = [
        way
        for way in every
        if not (way.compiled and spec.compile == "auto")
        and not (way.placement != "model" and spec.offload == "auto")
        and not (way.low_cpu_mem_usage and spec.low_cpu_mem_usage == "auto")
    ]
    return legal, list(dict.fromkeys(reason for way in asked if (reason := refused(way, machine))))


def encoder_reasons(spec: JobSpec, machine: Machine) -> list[str]:
    """Return why the text encoder cannot be held as the job insists; nothing where it can."""
    asked = spec.text_encoder_precision
    if asked == "auto":
        return []
    if asked == "fp8-dynamic":
        return ["text_encoder_precision fp8-dynamic is not offered: it pays over many steps. Use fp8-weight-only."]
    dtypes = {dtype_of(way.precision, machine) for way in ways(spec, machine)[0]}
    plain: dict[str, Dtype] = {"bf16": "bfloat16", "fp16": "float16"}
    if asked in plain:
        other = f"text_encoder_precision {asked} is not what the job computes in. Leave it out."
        return [] if plain[asked] in dtypes else [other]
    if spec.text_encoder_device == "cpu":
        return [f"text_encoder_precision {asked} is not offered with text_encoder_device cpu. Use gpu."]
    reasons = [refused(Way(precision, compiled=False, placement="model"), machine) for precision in precisions(asked)]
    return [f"text_encoder_precision: {reason}" for reason in reasons if reason] if all(reasons) else []


def encode_rungs(spec: JobSpec, facts: ModelFacts, machine: Machine, dtype: Dtype, held: int) -> Iterator[Rung]:
    """Yield the ways to encode. `held` is what stays pinned from one job to the next."""
    large = next((name for name in facts.blocks if name.startswith("text_encoder")), "")
    others = sum(
        footprint.rest_bytes(facts, name, dtype)
        for name in facts.components
        if name.startswith("text_encoder") and name != large
    )
    passes = 2 if is_guided(spec, facts) else 1
    host = footprint.HOST_BYTES["cuda"] + footprint.READING_BYTES + held
    plain: Precision = "fp16" if dtype == "float16" else "bf16"
    for precision in _encoder_precisions(spec, machine, plain, large, facts):
        is_prepared = f"{facts.key}/{precision}/{large}" in machine.prepared
        of = footprint.sizes(facts, large, precision, dtype)
        rest = footprint.rest_bytes(facts, large, dtype) + others
        files = (sum(of) if is_prepared else sum(footprint.sizes(facts, large, plain, dtype))) + rest
        reading = files / pace.READ_BYTES_PER_SECOND
        quantising = 0.0 if is_prepared or precision == plain else files * pace.QUANTISE_SECONDS_PER_BYTE
        changes: dict[str, Any] = {
            "text_encoder_device": "cuda",
            "text_encoder_precision": None if precision == plain else precision,
            "prepared": (large,) if is_prepared else (),
        }
        base = footprint.CONTEXT_BYTES + rest + footprint.ENCODE_BYTES + footprint.SLACK_BYTES
        name = f"text encoder {precision}"
        if spec.text_encoder_device != "cpu":
            yield Rung(
                "encode",
                f"{name} resident",
                base + sum(of),
                host,
                2 * pace.SETUP_SECONDS + reading + quantising,
                changes,
            )
            if precision == plain or is_prepared:
                yield Rung(
                    "encode",
                    f"{name} streamed",
                    base + footprint.ring_bytes(of),
                    host,
                    pace.SETUP_SECONDS + reading * passes,
                    changes | {"streamed": {large: tuple(range(len(of)))}},
                )
        if (
            spec.text_encoder_device != "gpu"
            and precision == plain
            and (spec.text_encoder_device == "cpu" or not facts.tiny)
        ):
            yield Rung(
                "encode",
                f"{name} on the CPU",
                0,
                footprint.HOST_BYTES["cuda"] + held + sum(of) + rest,
                reading + passes * 2 * facts.components[large] * spec.max_sequence_length / pace.CPU_FLOPS,
                changes | {"text_encoder_device": "cpu"},
            )


def _encoder_precisions(
    spec: JobSpec, machine: Machine, plain: Precision, large: str, facts: ModelFacts
) -> list[Precision]:
    """Return how the text encoder may be held: quantised only where it was asked for, or somebody prepared it so."""
    if spec.text_encoder_precision == "auto":
        made = [name.split("/")[1] for name in machine.prepared if name.split("/")[::2] == [facts.key, large]]
        return [plain, *(known for known in get_args(Precision) if known in made and known not in (plain, "bf16"))]
    return [known for known in precisions(spec.text_encoder_precision) if known != "fp8-dynamic"]


def denoise_rungs(
    spec: JobSpec, facts: ModelFacts, machine: Machine, circumstances: Circumstances, room_bytes: int, before: Plan,
    calibration: Calibration,
) -> Iterator[Rung]:  # fmt: skip
    """Yield the ways to denoise. `room_bytes` is what the device has for it: partial residency fills it."""
    for way in ways(spec, machine)[0]:
        if way.precision in circumstances.refused and spec.precision in FAMILIES:
            continue
        held = before.model_copy(
            update={"precision": way.precision, "compiled": way.compiled, "offload": way.placement}
        )
        # A rung fills its room by what it is predicted to take, and is then corrected: leave room for that.
        ratio = calibration.device.get(memory_key(held, "denoise"), 1.0)
        yield from _denoise(way, spec, facts, machine, circumstances, int(room_bytes / ratio))


def _denoise(
    way: Way, spec: JobSpec, facts: ModelFacts, machine: Machine, circumstances: Circumstances, room_bytes: int
) -> Iterator[Rung]:
    dtype = dtype_of(way.precision, machine)
    plain: Precision = "fp16" if dtype == "float16" else "bf16"
    experts = [name for name in facts.blocks if name.startswith("transformer")]
    made_of: Precision = "bf16" if way.precision == plain else way.precision
    ready = tuple(name for name in experts if f"{facts.key}/{made_of}/{name}" in machine.prepared)
    is_quantised_here = way.precision != plain and len(ready) < len(experts)
    of = footprint.sizes(facts, experts[0], way.precision, dtype)
    rest = footprint.rest_bytes(facts, experts[0], dtype)
    seen = footprint.tokens(facts, spec.width, spec.height, spec.num_frames, spec.max_sequence_length)
    per_token = footprint.activation_bytes_per_token(facts)
    if way.precision in ("fp8-dynamic", "fp8-weight-only", "fp8-quanto", "int8-dynamic") and not way.compiled:
        per_token += footprint.EAGER_8_BIT_BYTES_PER_TOKEN
    activations = 0 if facts.tiny else seen * per_token
    quantising = footprint.largest_linear(facts, experts[0]) * footprint.QUANTISING_BYTES_PER_WEIGHT
    working = max(activations, quantising if is_quantised_here else 0)
    base = footprint.CONTEXT_BYTES + rest + working + footprint.SLACK_BYTES
    forwards = (2 if is_guided(spec, facts) else 1) * spec.num_inference_steps
    rate = pace.flops_per_second(machine)
    efficiency = pace.COMPILED_EFFICIENCY if way.compiled else pace.EFFICIENCY
    compute = pace.forward_flop(facts, experts[0], seen) / (rate * efficiency[way.precision])
    link = pace.link_bytes_per_second(machine)
    files = len(experts) * (sum(footprint.sizes(facts, experts[0], plain, dtype)) if is_quantised_here else sum(of))
    kind = f"{facts.family}/{way.precision}"
    once = 0.0
    if way.compiled and kind not in circumstances.compiled_here:
        seen_before = kind in circumstances.compiled_before
        once = pace.COMPILE_AGAIN_SECONDS if seen_before else pace.COMPILE_SECONDS
    host = footprint.HOST_BYTES["cuda"] + footprint.READING_BYTES
    changes: dict[str, Any] = {
        "precision": way.precision, "dtype": dtype, "compiled": way.compiled, "offload": way.placement,
        "prepared": ready, "low_cpu_mem_usage": way.low_cpu_mem_usage,
        "vae_dtype": "float32" if dtype == "float16" else None,
    }  # fmt: skip
    quantise = files * pace.QUANTISE_SECONDS_PER_BYTE if is_quantised_here else 0.0
    load = len(experts) * pace.SETUP_SECONDS + (files + rest) / pace.READ_BYTES_PER_SECOND + quantise

    def rung(words: str, device: int, host_bytes: int, step: float, more: dict[str, Any], slower: float = 0.0) -> Rung:
        label = way.precision + (" compiled" if way.compiled else "") + f", {words}"
        seconds = load + slower + once + step * forwards
        per_step = step * forwards / spec.num_inference_steps
        return Rung("denoise", label, device, host_bytes, seconds, changes | more, once, per_step, load + slower)

    match way.placement:
        case "model":
            yield rung("resident", base + sum(of), host, compute, {})
        case "partial":
            streamed = _streamed(of, room_bytes - base)
            if not streamed:
                return
            passing = [of[place] for place in streamed]
            device = base + sum(of) - sum(passing) + footprint.ring_bytes(passing)
            blocks = dict.fromkeys(experts, streamed)
            step = pace.overlapped(compute, sum(passing) / link)
            label = f"{len(streamed)} of {len(of)} blocks streamed"
            yield rung(
                label, device, host + sum(passing), step, {"streamed": blocks, "streamed_from": "pinned"},
                len(experts) * sum(passing) * pace.PIN_SECONDS_PER_BYTE,
            )  # fmt: skip
            if way.precision == plain or not is_quantised_here:
                reading = sum(passing) / min(link, pace.READ_BYTES_PER_SECOND)
                step = pace.overlapped(compute, reading)
                yield rung(f"{label} from the file", device, host, step, {"streamed": blocks, "streamed_from": "file"})
        case "block":
            device = base + footprint.ring_bytes(of)
            rounding = footprint.PINNED_ROUNDING if machine.pinned_rounds_up else 1.0
            copies = sum(of) / (link * pace.LIBRARY_RATES["block"])
            yield rung(
                "block offload", device, host + int((sum(of) + rest) * rounding), pace.overlapped(compute, copies), {}
            )
        case "leaf":
            device = base - rest + footprint.LEAF_BYTES
            rounding = footprint.PINNED_ROUNDING if machine.pinned_rounds_up and not way.low_cpu_mem_usage else 1.0
            share = pace.LOW_CPU_RATE if way.low_cpu_mem_usage else pace.LIBRARY_RATES["leaf"]
            words = "leaf offload" + (", low_cpu_mem_usage" if way.low_cpu_mem_usage else "")
            host_bytes = host + int((sum(of) + rest) * rounding)
            yield rung(words, device, host_bytes, pace.overlapped(compute, sum(of) / (link * share)), {})
        case "sequential":
            device = base - rest + footprint.LEAF_BYTES
            copies = sum(of) / (link * pace.LIBRARY_RATES["sequential"])
            yield rung("sequential offload", device, host + sum(of) + rest, compute + copies, {})


def _streamed(of: Sequence[int], room_bytes: int) -> tuple[int, ...]:
    """Return the blocks to stream so that the others and the ring are within the room; all, where nothing is."""
    excess = sum(of) - room_bytes
    if excess <= 0:
        return footprint.spread(of, 1)
    wanted = excess
    while wanted < sum(of):
        chosen = footprint.spread(of, wanted)
        passing = [of[place] for place in chosen]
        if sum(of) - sum(passing) + footprint.ring_bytes(passing) <= room_bytes:
            return chosen
        wanted = sum(passing) + 1
    return tuple(range(len(of)))


def decode_rungs(spec: JobSpec, facts: ModelFacts, machine: Machine, dtype: Dtype, held: int) -> Iterator[Rung]:
    """Yield the ways to decode: whole, and in tiles."""
    vae_dtype: Dtype = "float32" if dtype == "float16" else dtype
    width = footprint.WIDTHS[vae_dtype]
    weights = facts.components.get("vae", 0) * width
    pixels = spec.width * spec.height
    frames = pixels * (spec.num_frames or 1)
    host = footprint.HOST_BYTES["cuda"] + held + 12 * frames
    seconds = pace.SETUP_SECONDS + frames / (pace.DECODE_PIXELS_PER_FLOP[facts.family] * pace.flops_per_second(machine))
    base = footprint.CONTEXT_BYTES + weights + footprint.SLACK_BYTES
    for tiled in (False, True):
        if spec.vae_tiling in ("auto", "on" if tiled else "off"):
            at_once = min(pixels, footprint.DECODE_TILE_PIXELS) if tiled else pixels
            working = 0 if facts.tiny else at_once * footprint.DECODE_BYTES_PER_PIXEL[facts.family] * width // 2
            if tiled and spec.num_frames:
                working += frames * footprint.TILED_BYTES_PER_PIXEL_AND_FRAME * width // 2
            words = "VAE in tiles" if tiled else "VAE whole"
            changes = {"vae_tiling": tiled}
            yield Rung("decode", words, base + working, host, seconds * (1.6 if tiled else 1.0), changes)


def on_the_cpu(spec: JobSpec, facts: ModelFacts) -> Iterator[Rung]:
    """Yield the one way of a CPU: float32, one component after another; the VAE in tiles where that is asked for."""
    host = footprint.HOST_BYTES["cpu"]
    width = footprint.WIDTHS["float32"]
    encoders = sum(count for name, count in facts.components.items() if name.startswith("text_encoder")) * width
    transformer = max(count for name, count in facts.components.items() if name.startswith("transformer")) * width
    seen = footprint.tokens(facts, spec.width, spec.height, spec.num_frames, spec.max_sequence_length)
    activations = 0 if facts.tiny else 2 * seen * footprint.activation_bytes_per_token(facts)
    forwards = (2 if is_guided(spec, facts) else 1) * spec.num_inference_steps
    compute = pace.forward_flop(facts, "transformer", seen) / pace.CPU_FLOPS
    yield Rung("encode", "float32", 0, host + encoders, 0.3 + 2 * encoders / pace.READ_BYTES_PER_SECOND)
    per_step = compute * forwards / spec.num_inference_steps
    load = 0.2 + transformer / pace.READ_BYTES_PER_SECOND
    seconds = load + compute * forwards
    yield Rung("denoise", "float32", 0, host + transformer + activations, seconds, {}, 0.0, per_step, load)
    vae = facts.components.get("vae", 0) * width
    pixels = spec.width * spec.height
    frames = pixels * (spec.num_frames or 1)
    for tiled in (False, True):
        if spec.vae_tiling in ("auto", "on" if tiled else "off"):
            at_once = min(pixels, footprint.DECODE_TILE_PIXELS) if tiled else pixels
            working = 0 if facts.tiny else at_once * footprint.DECODE_BYTES_PER_PIXEL[facts.family] * 2
            peak = host + vae + working + frames * footprint.TILED_BYTES_PER_PIXEL_AND_FRAME * 2
            words = "VAE in tiles" if tiled else "VAE whole"
            yield Rung("decode", words, 0, peak, 0.3 + frames * 2e-6 * (1.5 if tiled else 1), {"vae_tiling": tiled})


def of_phase(
    phase: PhaseName, spec: JobSpec, facts: ModelFacts, machine: Machine, circumstances: Circumstances, room_bytes: int,
    before: Plan, held: int, calibration: Calibration,
) -> list[Rung]:  # fmt: skip
    """Return every way to run a phase. `before` is the plan as far as it stands: its dtype is that of all phases."""
    if machine.device == "cpu":
        return [rung for rung in on_the_cpu(spec, facts) if rung.phase == phase]
    if phase == "encode":
        return list(encode_rungs(spec, facts, machine, before.dtype, held))
    if phase == "denoise":
        return list(denoise_rungs(spec, facts, machine, circumstances, room_bytes, before, calibration))
    return list(decode_rungs(spec, facts, machine, before.dtype, held))
