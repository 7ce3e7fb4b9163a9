"""How many bytes a plan takes: weights from the parameter counts, everything else from measured constants. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from safelight.machine import GIB
from safelight.models import Blocks, ModelFacts
from safelight.plan import Dtype, Precision

MIB = 2**20

# Measured on one H100 80GB, torch 2.11.0+cu130, 2026-11-23 (bench/techniques.py, FLUX.1-schnell at 1024x1024; Wan's
# with bench/gpu_phases.py the day before), with a little on top: a prediction must not be below what happens.

CONTEXT_BYTES = int(0.85 * GIB)
"""CUDA context, cuBLAS, cuDNN and loaded kernels, outside of what torch allocates: 0.75 to 0.83 GiB."""

ACTIVATION_BYTES = {"flux": 45.0, "wan": 30.0}
"""Peak of one forward above the weights, a token and channel: 22.71 GiB for FLUX in bf16 (4608 tokens of 3072); 11.5
for Wan 5B at 1280x704x121 (27,280 tokens of 3072) with one timestep for all tokens."""

TIMESTEP_A_TOKEN_BYTES = 37.0
"""More than that where each token has a timestep of its own, as Wan 5B's have: 14.54 GiB."""

EAGER_8_BIT_BYTES_PER_TOKEN = 90_000
"""On top, where 8-bit weights or activations are converted without being compiled: 12.82 GiB for fp8-dynamic."""

ENCODE_BYTES = 160 * MIB
"""Peak of a text encoder's forward above its weights."""

DECODE_BYTES_PER_PIXEL = {"flux": 3_070, "wan": 11_950}
"""Of a whole bf16 decode above the VAE: FLUX reserves 3.08 GiB at 1024x1024, Wan 2.2 11.32 GiB at 1280x704x121,
which gives its frames away as they come and takes the same for fewer."""

TILED_BYTES_PER_PIXEL_AND_FRAME = 7
"""The clip that the VAE joins of tiles before it gives any: 4.2 GiB in all at 1280x704x121."""

DECODE_TILE_PIXELS = 512 * 512

QUANTISING_BYTES_PER_WEIGHT = 10
"""Of the largest Linear, while it is quantised on its way: itself, and what torchao computes in float32."""

LEAF_BYTES = 340 * MIB
"""diffusers' leaf offload and accelerate's sequential one, above the activations: 0.81 GiB in all."""

HOST_BYTES = {"cuda": int(2.4 * GIB), "cpu": int(0.5 * GIB)}
"""Anonymous memory of an engine with torch, diffusers and a context, nothing loaded; the CPU's without a context."""

READING_BYTES = 128 * MIB
"""Pinned, between file and GPU."""

PINNED_ROUNDING = 1.57
"""What torch's power-of-two blocks make of a FLUX transformer: 37.2 GB of 23.8 (counted by its sizes)."""

SLACK_BYTES = 64 * MIB
"""What the allocator cannot use of what it holds."""

WIDTHS: dict[Dtype, int] = {"bfloat16": 2, "float16": 2, "float32": 4}


def block_bytes(blocks: Blocks, precision: Precision, dtype: Dtype) -> int:
    """Return what one of these blocks takes: its Linear weights in `precision`, the rest in `dtype`."""
    width = WIDTHS[dtype]
    spared = blocks.spared if precision in ("nf4", "int8-bnb") else 0
    held, rest = blocks.linear - spared, blocks.parameters - blocks.linear + spared
    kept_in_float32 = 2 * blocks.spared if dtype == "float16" else 0
    match precision:
        case "nf4":
            scales = held // 64
            quantised = held // 2 + scales + scales // 256 * 4
        case "fp8-dynamic" | "fp8-weight-only" | "int8-bnb":
            quantised = held + 4 * blocks.linear_rows
        case "int8-dynamic" | "int8-weight-only":
            quantised = held + 5 * blocks.linear_rows  # a scale and a zero point
        case "fp8-quanto":
            quantised = held + 2 * blocks.linear_rows
        case _:
            quantised = held * width
    return quantised + rest * width + kept_in_float32


def sizes(facts: ModelFacts, component: str, precision: Precision, dtype: Dtype) -> list[int]:
    """Return the bytes of each repeated block of a component, in running order."""
    return [
        block_bytes(blocks, precision, dtype) for blocks in facts.blocks.get(component, ()) for _ in range(blocks.count)
    ]


def rest_bytes(facts: ModelFacts, component: str, dtype: Dtype) -> int:
    """Return what a component takes besides its repeated blocks: all, where it has none."""
    repeated = sum(blocks.count * blocks.parameters for blocks in facts.blocks.get(component, ()))
    return (facts.components.get(component, 0) - repeated) * WIDTHS[dtype]


def ring_bytes(streamed: Sequence[int]) -> int:
    """Return what the staging ring for blocks of these sizes takes."""
    return min(2 * max(streamed), sum(streamed)) if streamed else 0


def largest_linear(facts: ModelFacts, component: str) -> int:
    """Return the weights of about the largest Linear: a sixth of the largest block's are in FLUX's and Wan's."""
    return max((blocks.linear for blocks in facts.blocks.get(component, ())), default=0) // 6


def spread(of: Sequence[int], wanted_bytes: int) -> tuple[int, ...]:
    """Return which blocks to stream so that at least `wanted_bytes` are, evenly over the time of a forward.

    Blocks of all kinds take about the same time; so the link is always busy when each stretch of blocks streams the
    same bytes, and a large block is streamed less often than a small one.
    """
    if wanted_bytes <= 0:
        return ()
    total = sum(of)
    wanted = aim = min(wanted_bytes, total)
    while aim < total:
        credit, chosen = 0.0, []
        for place, size in enumerate(of):
            credit += aim / len(of)
            if credit >= size / 2:
                chosen.append(place)
                credit -= size
        if sum(of[place] for place in chosen) >= wanted:
            return tuple(chosen)
        aim += max(total // (4 * len(of)), 1)
    return tuple(range(len(of)))


def activation_bytes_per_token(facts: ModelFacts) -> int:
    """Return what one token takes on its way through the transformer, in 16 bit."""
    a_channel = ACTIVATION_BYTES[facts.family] + (TIMESTEP_A_TOKEN_BYTES if facts.expand_timesteps else 0.0)
    return int(a_channel * facts.blocks["transformer"][0].width)


def tokens(facts: ModelFacts, width: int, height: int, num_frames: int | None, max_sequence_length: int) -> int:
    """Return what a forward sees: the picture's or clip's tokens and the prompt's."""
    return facts.tokens(width, height, num_frames) + max_sequence_length
