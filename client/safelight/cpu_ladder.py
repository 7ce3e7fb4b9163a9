"""The ways each phase of a job could run on the CPU: float32, resident or block by block from the file. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from safelight import footprint, pace
from safelight.jobspec import JobSpec
from safelight.models import ModelFacts
from safelight.plan import PhaseName
from safelight.rung import Rung, decode_rung

HOST = footprint.HOST_BYTES["cpu"]
WIDTH = footprint.WIDTHS["float32"]

SETUP_SECONDS = 0.3
"""A component's modules, on an idle machine."""

DECODE_SECONDS_PER_PIXEL = 2e-6

STREAMED_AT_ONCE = 1
"""Blocks in the staging ring: nothing computes while a CPU reads."""


def rungs(phase: PhaseName, spec: JobSpec, facts: ModelFacts) -> Iterator[Rung]:
    """Yield every way to run a phase."""
    of_phase: dict[PhaseName, Callable[[JobSpec, ModelFacts], Iterator[Rung]]] = {
        "encode": _encode,
        "denoise": _denoise,
        "decode": _decode,
    }
    return of_phase[phase](spec, facts)


def _encode(_spec: JobSpec, facts: ModelFacts) -> Iterator[Rung]:
    names = [name for name in facts.components if name.startswith("text_encoder")]
    weights = sum(facts.components[name] for name in names) * WIDTH
    seconds = SETUP_SECONDS + 2 * weights / pace.READ_BYTES_PER_SECOND
    yield Rung("encode", "float32 resident", 0, HOST + weights, seconds)
    large = next((name for name in names if name in facts.blocks), None)
    if large:
        of = footprint.sizes(facts, large, "fp32", "float32")
        every = {large: tuple(range(len(of)))}
        host = HOST + weights - _spared(of)
        changes = {"streamed": every}
        yield Rung("encode", "float32 from the file", 0, host, seconds, changes=changes, last_resort=1)


def _denoise(spec: JobSpec, facts: ModelFacts) -> Iterator[Rung]:
    experts = [name for name in facts.components if name.startswith("transformer")]
    weights = max(facts.components[name] for name in experts) * WIDTH
    seen = footprint.tokens(facts, spec.width, spec.height, spec.num_frames, spec.max_sequence_length)
    activations = 0 if facts.tiny else 2 * seen * footprint.activation_bytes_per_token(facts)
    forwards = (2 if pace.is_guided(spec, facts) else 1) * spec.steps_run
    work = forwards * pace.forward_flop(facts, "transformer", seen) / pace.CPU_FLOPS
    work += spec.steps_run * pace.controlnet_flop(spec, facts, seen) / pace.CPU_FLOPS
    activations += footprint.controlnet_bytes(spec, facts, seen, "float32")
    load = SETUP_SECONDS + len(experts) * weights / pace.READ_BYTES_PER_SECOND
    steps = spec.steps_run
    resident = HOST + weights + activations
    yield Rung("denoise", "float32 resident", 0, resident, load, work, steps=steps)
    of = footprint.sizes(facts, experts[0], "fp32", "float32")
    reading = forwards * sum(of) / pace.READ_BYTES_PER_SECOND
    changes = {
        "offload": "partial",
        "streamed": dict.fromkeys(experts, tuple(range(len(of)))),
        "streamed_from": "file",
    }
    yield Rung(
        "denoise", "float32 from the file", 0, resident - _spared(of), SETUP_SECONDS, work, changes, reading, steps,
        last_resort=1,
    )  # fmt: skip


def _decode(spec: JobSpec, facts: ModelFacts) -> Iterator[Rung]:
    vae = facts.components.get("vae", 0) * WIDTH
    frames = spec.width * spec.height * (spec.num_frames or 1)
    clip = frames * footprint.TILED_BYTES_PER_PIXEL_AND_FRAME * 2  # what is joined, whole or not
    whole = SETUP_SECONDS + frames * DECODE_SECONDS_PER_PIXEL
    for how in footprint.decodings(spec, facts):
        host = HOST + vae + clip + footprint.decode_bytes(spec, facts, how, WIDTH)
        yield decode_rung(how, 0, host, whole * pace.decode_times(how))


def _spared(of: Sequence[int]) -> int:
    """Return what streaming blocks of these sizes leaves out of RAM."""
    return sum(of) - footprint.ring_bytes(of, STREAMED_AT_ONCE)
