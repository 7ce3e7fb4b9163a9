"""The ways each phase of a job could run on a machine, each with what it takes. Pure; the planner chooses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from typing import Any, get_args

from safelight import caches, cpu_ladder, footprint, fused, pace
from safelight.calibration import Calibration, memory_key
from safelight.jobspec import JobSpec
from safelight.machine import Machine
from safelight.models import ModelFacts
from safelight.plan import Dtype, PhaseName, Placement, Plan, Precision, plain_precision
from safelight.refusals import PLAIN, Way, refused
from safelight.rung import Circumstances, Pinned, Rung, decode_rung

FAMILIES: dict[str, tuple[Precision, ...]] = {
    "auto": (
        "bf16", "fp16", "fp8-dynamic", "fp8-weight-only", "int8-dynamic", "int8-weight-only", "int8-bnb", "nf4",
    ),
    "fp8": ("fp8-dynamic", "fp8-weight-only"),
    "int8": ("int8-weight-only", "int8-dynamic", "int8-bnb"),
}  # fmt: skip
"""What the words of a job stand for. auto leaves fp8-quanto out: fp8-weight-only is as good and can be streamed."""


COMPILED_EXPERTS: tuple[Precision, ...] = (*PLAIN, "fp8-dynamic")
"""What is compiled of Wan by itself where a model has two experts: of A14B fp8-dynamic was measured, a step at 0.71 of
bf16 that is resident and eager; of the 5B bf16 alone (docs/numbers.md). Others where a person asks."""

AUTO_PLACEMENTS: tuple[Placement, ...] = ("model", "partial", "leaf", "sequential")
"""Not block: partial with all blocks streamed is the same, and pins less."""


def precisions(asked: str) -> tuple[Precision, ...]:
    """Return what a job's word for a precision allows."""
    if asked in FAMILIES:
        return FAMILIES[asked]
    return tuple(known for known in get_args(Precision) if known == asked)


def dtype_of(precision: Precision, machine: Machine) -> Dtype:
    """Return what a GPU computes in: bf16, where it can and nothing else was asked for."""
    return "float16" if precision == "fp16" or pace.capability(machine) < (8, 0) else "bfloat16"


def ways(spec: JobSpec, facts: ModelFacts, machine: Machine) -> tuple[list[Way], list[str]]:
    """Return the ways that the job allows and this machine has, and why others do not go."""
    placements: Sequence[Any] = AUTO_PLACEMENTS if spec.offload == "auto" else (spec.offload,)
    switches = {"auto": (False, True), "on": (True,), "off": (False,)}
    every = [
        Way(precision, compiled, placement, low, cached=spec.cache is not None)
        for precision, compiled, placement, low in product(
            precisions(spec.precision), switches[spec.compile], placements, switches[spec.low_cpu_mem_usage]
        )
    ]
    if spec.compile == "auto" and spec.kind == "video":
        compiled = COMPILED_EXPERTS if "transformer_2" in facts.blocks else PLAIN
        every = [way for way in every if not way.compiled or way.precision in compiled]
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


def encoder_reasons(spec: JobSpec, facts: ModelFacts, machine: Machine) -> list[str]:
    """Return why the text encoder cannot be held as the job insists; nothing where it can."""
    asked = spec.text_encoder_precision
    if asked == "auto":
        return []
    if asked == "fp8-dynamic":
        return ["text_encoder_precision fp8-dynamic is not offered: it pays over many steps. Use fp8-weight-only."]
    dtypes = {dtype_of(way.precision, machine) for way in ways(spec, facts, machine)[0]}
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
    passes = 2 if pace.is_guided(spec, facts) else 1
    host = footprint.HOST_BYTES["cuda"] + footprint.READING_BYTES + held
    plain = plain_precision(dtype)
    for precision in _encoder_precisions(spec, machine, plain, large, facts):
        is_prepared = f"{facts.key}/{precision}/{large}" in machine.prepared
        of = footprint.sizes(facts, large, precision, dtype)
        rest = footprint.rest_bytes(facts, large, dtype) + others
        files = (sum(of) if is_prepared else sum(footprint.sizes(facts, large, plain, dtype))) + rest
        reading = files / pace.READ_BYTES_PER_SECOND
        quantising = 0.0 if is_prepared or precision == plain else files * pace.QUANTISE_SECONDS_PER_BYTE[precision]
        changes: dict[str, Any] = {
            "text_encoder_device": "cuda",
            "text_encoder_precision": None if precision == plain else precision,
            "prepared": (large,) if is_prepared else (),
        }
        working = footprint.ENCODE_BYTES + spec.max_sequence_length * footprint.ENCODE_BYTES_PER_TOKEN
        base = footprint.outside_bytes(facts) + rest + working + footprint.SLACK_BYTES
        name = f"text encoder {precision}"
        if spec.text_encoder_device != "cpu":
            seconds = 2 * pace.SETUP_SECONDS + reading + quantising
            yield Rung("encode", f"{name} resident", base + sum(of), host, seconds, changes=changes)
            if precision == plain or is_prepared:
                device = base + footprint.ring_bytes(of)
                seconds = pace.SETUP_SECONDS + reading * passes
                streamed = {"streamed": {large: tuple(range(len(of)))}}
                yield Rung("encode", f"{name} streamed", device, host, seconds, changes=changes | streamed)
        if spec.text_encoder_device != "gpu" and precision == plain:
            if facts.tiny and spec.text_encoder_device == "auto":
                continue  # its encoder is as large as the staging of a block: no way is smaller
            seconds = reading + passes * 2 * facts.components[large] * spec.max_sequence_length / pace.CPU_FLOPS
            on_cpu = footprint.HOST_BYTES["cuda"] + held + sum(of) + rest
            elsewhere = changes | {"text_encoder_device": "cpu"}
            yield Rung("encode", f"{name} on the CPU", 0, on_cpu, seconds, changes=elsewhere)


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
    for way in ways(spec, facts, machine)[0]:
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
    plain = plain_precision(dtype)
    experts = [name for name in facts.blocks if name.startswith("transformer")]
    made_of: Precision = "bf16" if way.precision == plain else way.precision
    ready = tuple(name for name in experts if f"{facts.key}/{made_of}/{name}" in machine.prepared)
    kept, keeping = _kept(spec, facts, machine, circumstances, way.precision, dtype)
    if spec.loras and way.precision != plain:
        ready = ()  # what has been rounded once would be rounded again
    is_quantised_here = way.precision != plain and len(ready) + len(kept) < len(experts)
    of = footprint.sizes(facts, experts[0], way.precision, dtype)
    rest = footprint.rest_bytes(facts, experts[0], dtype)
    seen = footprint.tokens(facts, spec.width, spec.height, spec.num_frames, spec.max_sequence_length)
    working = footprint.forward_bytes(facts, seen, way.precision, compiled=way.compiled, quantising=is_quantised_here)
    a_step = 2 if pace.is_guided(spec, facts) else 1
    working += caches.kept_bytes(spec.cache, seen, facts.blocks[experts[0]][0].width, a_step)
    if spec.loras and not facts.tiny:
        working = max(working, footprint.FUSING_BYTES)  # while loading, when nothing is kept
    beside = footprint.controlnet_bytes(spec, facts, seen, dtype)
    base = footprint.outside_bytes(facts) + rest + working + beside + footprint.SLACK_BYTES
    forwards = a_step * spec.steps_run
    rate = pace.flops_per_second(machine)
    efficiency = pace.COMPILED_EFFICIENCY if way.compiled else pace.EFFICIENCY
    compute = pace.forward_flop(facts, experts[0], seen) / (rate * efficiency[way.precision])
    compute = max(compute, len(of) * pace.LAUNCH_SECONDS[way.compiled])
    leading = pace.controlnet_flop(spec, facts, seen) / (rate * pace.EFFICIENCY[plain])
    link = pace.link_bytes_per_second(machine)
    files = len(experts) * (sum(footprint.sizes(facts, experts[0], plain, dtype)) if is_quantised_here else sum(of))
    compiling = _compile_seconds(f"{facts.family}/{way.precision}", circumstances) if way.compiled else 0.0
    host = footprint.HOST_BYTES["cuda"] + footprint.READING_BYTES
    changes: dict[str, Any] = {
        "precision": way.precision, "dtype": dtype, "compiled": way.compiled, "offload": way.placement,
        "prepared": ready, "fused": kept, "keeping": keeping, "low_cpu_mem_usage": way.low_cpu_mem_usage,
        "vae_dtype": "float32" if dtype == "float16" else None,
    }  # fmt: skip
    quantise = files * pace.QUANTISE_SECONDS_PER_BYTE[way.precision] if is_quantised_here else 0.0
    fetching = files / pace.READ_BYTES_PER_SECOND + quantise
    later = len(experts) * sum(of) / pace.READ_BYTES_PER_SECOND if keeping else fetching
    keep = len(experts) * (sum(of) + rest) * pace.KEEP_SECONDS_PER_BYTE if keeping else 0.0
    host += footprint.KEEPING_BYTES if keeping else 0
    setup = len(experts) * pace.SETUP_SECONDS + (rest + beside) / pace.READ_BYTES_PER_SECOND

    def rung(
        words: str,
        device: int,
        host_bytes: int,
        copying: float = 0.0,
        share: float = 0.0,
        read_once: float = 0.0,
        pin: float = 0.0,
        **more: Any,
    ) -> Rung:
        """Return the way; of what is fetched it does not load a share, which is pinned once.

        Where the result is kept, later jobs fetch less.
        """
        return Rung(
            "denoise", f"{way.precision}{' compiled' if way.compiled else ''}, {words}", device, host_bytes,
            setup + later * (1 - share), compute * forwards + leading * spec.steps_run, changes | more,
            copying * forwards, spec.steps_run, read_once + (fetching - later) * (1 - share) + keep, pin, compiling,
        )  # fmt: skip

    match way.placement:
        case "model":
            yield rung("resident", base + sum(of), host)
        case "partial":
            if spec.offload == "auto" and base + sum(of) <= room_bytes:
                return  # there is room for all of it
            there = _pinned_already(circumstances.pinned, facts, experts, way.precision, dtype)
            is_changed = circumstances.pinned is not None and circumstances.pinned.loras != fused.loras_of(spec.loras)
            for streamed in dict.fromkeys(filter(None, (_streamed(of, room_bytes - base), there))):
                passing = [of[place] for place in streamed]
                device = base + sum(of) - sum(passing) + footprint.ring_bytes(passing)
                blocks = dict.fromkeys(experts, streamed)
                label = f"{len(streamed)} of {len(of)} blocks streamed"
                share = sum(passing) / sum(of)
                is_there = streamed == there
                pin = len(experts) * sum(passing) * pace.PIN_SECONDS_PER_BYTE
                # Where other LoRAs are in them, the memory is there, and what is in it is not.
                once = (fetching * share if is_changed or not is_there else 0.0, 0.0 if is_there else pin)
                yield rung(
                    label, device, host + sum(passing), sum(passing) / link, share, *once,
                    streamed=blocks, streamed_from="pinned", pinned_before=is_there and not is_changed,
                )  # fmt: skip
                if way.precision == plain or not is_quantised_here:
                    reading = sum(passing) / min(link, pace.READ_BYTES_PER_SECOND)
                    yield rung(f"{label} from the file", device, host, reading, streamed=blocks, streamed_from="file")
        case "block":
            device = base + footprint.ring_bytes(of)
            rounding = footprint.PINNED_ROUNDING if machine.pinned_rounds_up else 1.0
            copies = sum(of) / (link * pace.LIBRARY_RATES["block"])
            yield rung("block offload", device, host + int((sum(of) + rest) * rounding), copies)
        case "leaf":
            device = base - rest + footprint.LEAF_BYTES
            rounding = footprint.PINNED_ROUNDING if machine.pinned_rounds_up and not way.low_cpu_mem_usage else 1.0
            share = pace.LOW_CPU_RATE if way.low_cpu_mem_usage else pace.LIBRARY_RATES["leaf"]
            words = "leaf offload" + (", low_cpu_mem_usage" if way.low_cpu_mem_usage else "")
            yield rung(words, device, host + int((sum(of) + rest) * rounding), sum(of) / (link * share))
        case "sequential":
            device = base - rest + footprint.LEAF_BYTES
            copies = sum(of) / (link * pace.LIBRARY_RATES["sequential"]) + (1 - pace.NOT_OVERLAPPED) * compute
            yield rung("sequential offload", device, host + sum(of) + rest, copies)


def _kept(
    spec: JobSpec, facts: ModelFacts, machine: Machine, circumstances: Circumstances, precision: Precision, dtype: Dtype
) -> tuple[tuple[str, ...], bool]:
    """Return which transformers an earlier job has kept with these LoRAs, and whether this one should keep them.

    It should where it is likely that they are read: the LoRAs were used before, or other jobs with them wait.
    """
    if not spec.loras or precision in PLAIN or circumstances.without_fused:
        return (), False
    experts = [name for name in facts.blocks if name.startswith("transformer")]
    made_on = machine.gpu or machine.device
    name = fused.set_name(facts.key, precision, fused.digest(fused.loras_of(spec.loras), dtype, made_on))
    if all(f"{name}/{expert}" in machine.fused for expert in experts):
        return tuple(experts), False
    whole = sum(sum(footprint.sizes(facts, expert, precision, dtype)) for expert in experts)
    whole += sum(footprint.rest_bytes(facts, expert, dtype) for expert in experts)
    is_likely = circumstances.again or name in circumstances.seen
    return (), is_likely and 0 < whole <= machine.fused_room_bytes


def _compile_seconds(kind: str, circumstances: Circumstances) -> float:
    """Return what compiling takes before the first step, for blocks of this kind."""
    if kind in circumstances.compiled_here:
        return 0.0
    if kind in circumstances.compiled_before:
        return pace.COMPILE_AGAIN_SECONDS
    return pace.COMPILE_SECONDS.get(kind.partition("/")[2], max(pace.COMPILE_SECONDS.values()))


def _pinned_already(
    pinned: Pinned | None, facts: ModelFacts, experts: Sequence[str], precision: Precision, dtype: Dtype
) -> tuple[int, ...]:
    """Return the blocks that need not be pinned again; a model of two experts exchanges them in every job."""
    if pinned is None or len(experts) > 1:
        return ()
    wanted = Pinned(facts.key, experts[0], precision, dtype, pinned.blocks, pinned.loras)
    return pinned.blocks if pinned == wanted else ()


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
    """Yield the ways to decode: whole, in strips, and in tiles."""
    vae_dtype: Dtype = "float32" if dtype == "float16" else dtype
    width = footprint.WIDTHS[vae_dtype]
    weights = facts.components.get("vae", 0) * width
    frames = spec.width * spec.height * (spec.num_frames or 1)
    host = footprint.HOST_BYTES["cuda"] + held + 12 * frames
    seconds = frames / pace.decode_pixels_per_second(facts, machine)
    seconds += pace.VAE_SECONDS + frames * pace.WRITE_SECONDS_PER_PIXEL
    base = footprint.outside_bytes(facts) + weights + footprint.SLACK_BYTES
    for how in footprint.decodings(spec, facts):
        device = base + footprint.decode_bytes(spec, facts, how, width)
        yield decode_rung(how, device, host, seconds * pace.decode_times(how, facts.family))


def of_phase(
    phase: PhaseName, spec: JobSpec, facts: ModelFacts, machine: Machine, circumstances: Circumstances, room_bytes: int,
    before: Plan, held: int, calibration: Calibration,
) -> list[Rung]:  # fmt: skip
    """Return every way to run a phase. `before` is the plan as far as it stands: its dtype is that of all phases."""
    found = _of_phase(phase, spec, facts, machine, circumstances, room_bytes, before, held, calibration)
    more = footprint.lora_bytes(spec)
    encode_s = 0.0
    if phase == "denoise" and spec.encodes_picture:  # before the transformer comes
        encode_s = pace.VAE_SECONDS + spec.width * spec.height / pace.decode_pixels_per_second(facts, machine)
    return [
        replace(rung, host_bytes=rung.host_bytes + more, load_seconds=rung.load_seconds + encode_s) for rung in found
    ]


def _of_phase(
    phase: PhaseName, spec: JobSpec, facts: ModelFacts, machine: Machine, circumstances: Circumstances, room_bytes: int,
    before: Plan, held: int, calibration: Calibration,
) -> list[Rung]:  # fmt: skip
    if machine.device == "cpu":
        return list(cpu_ladder.rungs(phase, spec, facts))
    if phase == "encode":
        return list(encode_rungs(spec, facts, machine, before.dtype, held))
    if phase == "denoise":
        return list(denoise_rungs(spec, facts, machine, circumstances, room_bytes, before, calibration))
    return list(decode_rungs(spec, facts, machine, before.dtype, held))
