"""How many bytes a plan takes: weights from the parameter counts, everything else from measured constants. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from safelight.jobspec import JobSpec
from safelight.machine import GIB
from safelight.models import Blocks, ModelFacts
from safelight.plan import Dtype, Precision

MIB = 2**20

# Measured on one H100 80GB, torch 2.11.0+cu130, 2026-11-25 (bench/gpu_memory.py, FLUX.1 at ten sizes; Wan's with
# bench/gpu_phases.py, 2026-11-22), with a little on top: a prediction must not be below what happens.

CONTEXT_BYTES = int(0.78 * GIB)
"""CUDA context, cuBLAS, cuDNN and loaded kernels, outside of what torch allocates: 801,964,032 bytes after a job."""

LATER_BYTES = {"flux": 0, "wan": 160 * MIB}
"""What more an engine keeps outside of torch after its first job: UniPC's corrector loads cuSOLVER, and Wan's VAE more
of cuDNN. 0.13 GiB in the second of two clips (H100, torch 2.11.0+cu130, 2026-11-26)."""

ACTIVATION_BYTES = {"flux": 36.0, "wan": 30.0}
"""Of one forward above the weights, a token and channel: 106 kB a token of FLUX, whose channels are 3072; 11.5 GiB in
all for Wan 5B at 1280x704x121 (27,280 tokens of 3072) with one timestep for all tokens."""

WAN_COMPILED_BYTES = (7.5, 4.6)
"""Of a compiled forward of Wan, a token and channel of the stream, and of the wider one inside of a block, of which
there are 4.67 a channel in the 5B and 2.7 in A14B. Reserved were 27.2 to 27.9 bytes a token and channel of the 5B (26.7
of it growing with the tokens) and 17.5 to 18.8 of A14B; the first comes out at 29.0 so, the second at 19.9. H100,
torch 2.11.0+cu130, 2026-11-26 (bench/gpu_memory.py, bench/gpu_video_a14b.py)."""

FORWARD_BYTES = 160 * MIB
"""Of one forward besides, however few its tokens: cuBLAS' workspace, modulation. 128 MiB fell short by 15 MiB in one of
thirty cases (FLUX 512x512 at 8 GB, fp8-weight-only; H100, torch 2.11.0+cu130, 2026-11-26)."""

DEQUANTISED: tuple[Precision, ...] = (
    "fp8-dynamic", "fp8-weight-only", "fp8-quanto", "int8-dynamic", "int8-weight-only",
)  # fmt: skip
DEQUANTISED_BYTES_PER_WEIGHT = 14
"""Of the largest Linear, while eager torchao makes it 16 bit again by way of float32: 0.7 to 1.4 GiB in all. How soon
that is given back depends on how the streams come: one plan took 6.59 GiB, 6.73 and 6.82, where 10 had 6.72 predicted
(FLUX, fp8-weight-only, 41 of 57 blocks streamed; H100, torch 2.11.0+cu130, 2026-11-27)."""

ENCODE_BYTES = 48 * MIB
ENCODE_BYTES_PER_TOKEN = 420_000
"""Peak of a text encoder's forward above its weights: T5's took 0.19 GiB at 512 tokens."""

DECODE_BYTES_PER_PIXEL = {"flux": 3_260, "wan": 14_400}
"""Of a whole bf16 decode above the VAE: FLUX reserves 2.95 GiB at 1024x1024, 4.33 GiB at 1536x1024, once in six times
4.80, and at 1472x1088 4.83; Wan 2.2 11.5 GiB at 1280x704x121 and 11.8 in an engine's second job, where convolutions
make their own borders (`safelightd.pipelines.wan_vae`; 9.6 as diffusers does it): it gives its frames away as they
come, and takes the same for fewer. H100, torch 2.11.0+cu130, 2026-11-26 and 27."""

TILED_BYTES_PER_PIXEL_AND_FRAME = 7
"""The clip that the VAE joins of tiles before it gives any: 4.2 GiB in all at 1280x704x121."""

TILES = (512, 256)
"""Sides of the tiles that a VAE may work in, in pixels; smaller ones show more seams."""

STRIP_ROWS = {"flux": (64,), "wan": (128, 64)}
"""Of the strips that a VAE may work in, which have no seams (`safelightd.pipelines.flux_vae`, `.wan_strips`), by
family. Lower ones save little of what is there for the whole picture; of Wan lower ones are slower, too."""

STRIPS_BYTES_PER_PIXEL = {("flux", 8): 1_080, ("wan", 16): 3_700, ("wan", 8): 4_600}
"""What a decode in bf16 takes of all pixels, by family and `vae_scale`. FLUX's layers hold 1,024 between them, of 256
and twice 128 channels: reserved were 1,026 to 1,040 at six sizes and strips of 32, 64 and 128 rows, 512x512 to
1536x1536. Wan's convolutions hold two frames each of what they were shown, beside the part of a clip that comes out:
3,650 to 3,670 of the 5B at 1280x704 and 704x1280 and 4,410 of A14B at 832x480, strips of 32 to 256 rows
(`bench.gpu_decode`, `bench.gpu_decode_wan`, H100, torch 2.11.0+cu130, 2026-11-27)."""

STRIP_BYTES_PER_PIXEL = {"flux": 2_100, "wan": 8_000}
"""Of those of a strip besides: 1,925 and 7,900 at most, in the same runs."""

STRIP_MORE_ROWS = {"flux": 0, "wan": 34}
"""What Wan's convolutions keep between two strips, in rows of a strip (counted on meta tensors: 34 in the 5B, 11 in
A14B)."""

TINY_TILES = {"flux": (32,), "wan": (64,)}
TINY_STRIP_ROWS = 16
TINY_DECODE = 16
"""The tiny VAEs are so many times narrower than the real ones."""

QUANTISING_BYTES_PER_WEIGHT = 14
"""Of the largest Linear, while it is quantised on its way: itself, its parts, and what torchao computes in float32 of
16 million weights at a time. 12 fell short by 0.03 GiB in two cases of thirty (FLUX at 8 GB, fp8-weight-only and
fp8-dynamic; H100, torch 2.11.0+cu130, 2026-11-26)."""

LEAF_BYTES = 340 * MIB
"""diffusers' leaf offload and accelerate's sequential one, above the activations: 0.81 GiB in all."""

HOST_BYTES = {"cuda": int(2.4 * GIB), "cpu": int(0.5 * GIB)}
"""Anonymous memory of an engine with torch, diffusers and a context, nothing loaded; the CPU's without a context."""

READING_BYTES = 128 * MIB
"""Pinned, between file and GPU."""

PINNED_ROUNDING = 1.57
"""What torch's power-of-two blocks make of a FLUX transformer: 37.2 GB of 23.8 (counted by its sizes)."""

FUSING_BYTES = 96 * MIB
"""Of the device, while LoRAs are added to a weight: 2^22 weights in float32 three times over, and the factors of the
widest layer at rank 256."""

LORA_BYTES_PER_BYTE = 2
"""Of RAM, for the file of a LoRA in half precision: its factors are held in float32 until the job is done."""

KEEPING_BYTES = 32 * MIB
"""Of RAM, while what is made is kept: pieces of 16 MiB on their way to the file."""

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


def lora_bytes(spec: JobSpec) -> int:
    """Return what a job's LoRAs take of RAM, from the first phase to the last."""
    return LORA_BYTES_PER_BYTE * sum(lora.size_bytes for lora in spec.loras)


def controlnet_bytes(spec: JobSpec, facts: ModelFacts, seen: int, dtype: Dtype) -> int:
    """Return what a job's ControlNet takes beside the transformer: its weights, and what its blocks hand over."""
    if spec.controlnet is None:
        return 0
    net = facts.controlnets[spec.controlnet.model]
    handed_over = sum(blocks.count * blocks.width for blocks in net.blocks) * seen
    return (net.parameters + handed_over) * WIDTHS[dtype]


def ring_bytes(streamed: Sequence[int], at_once: int = 2) -> int:
    """Return what the staging ring for blocks of these sizes takes, with room for so many of the largest."""
    return min(at_once * max(streamed), sum(streamed)) if streamed else 0


@dataclass(frozen=True)
class Decoding:
    """How a VAE goes over a picture: whole, unless one of these is above 0."""

    strip_rows: int = 0
    tile_pixels: int = 0


def decodings(spec: JobSpec, facts: ModelFacts) -> tuple[Decoding, ...]:
    """Return how the VAE may work, the largest first; who names a way gets that and no other."""
    rows = (TINY_STRIP_ROWS,) if facts.tiny else STRIP_ROWS[facts.family]
    strips = tuple(Decoding(strip_rows=high) for high in rows) if facts.decodes_in_strips else ()
    tiles = tuple(Decoding(tile_pixels=side) for side in (TINY_TILES[facts.family] if facts.tiny else TILES))
    ways = {"off": (Decoding(),), "strips": strips, "on": tiles}
    return ways[spec.vae_tiling] if spec.vae_tiling != "auto" else (Decoding(), *strips, *tiles)


def decode_bytes(spec: JobSpec, facts: ModelFacts, how: Decoding, width: int) -> int:
    """Return what a decode takes above the VAE, in floats of `width` bytes."""
    pixels = spec.width * spec.height
    if how.strip_rows:
        rows = min(how.strip_rows + STRIP_MORE_ROWS[facts.family], spec.height)
        working = pixels * STRIPS_BYTES_PER_PIXEL[facts.family, facts.vae_scale]
        working += rows * spec.width * STRIP_BYTES_PER_PIXEL[facts.family]
    else:
        at_once = min(pixels, how.tile_pixels**2) if how.tile_pixels else pixels
        working = at_once * DECODE_BYTES_PER_PIXEL[facts.family]
    working //= TINY_DECODE if facts.tiny else 1
    if how.tile_pixels and spec.num_frames:
        working += pixels * spec.num_frames * TILED_BYTES_PER_PIXEL_AND_FRAME
    return working * width // 2


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


def outside_bytes(facts: ModelFacts) -> int:
    """Return what an engine holds of the GPU besides what torch allocates, in any phase of any of its jobs."""
    return CONTEXT_BYTES + LATER_BYTES[facts.family]


def activation_bytes_per_token(facts: ModelFacts, *, compiled: bool = False) -> int:
    """Return what one token takes on its way through the transformer, in 16 bit."""
    block = facts.blocks["transformer"][0]
    if compiled and facts.family == "wan":
        wider = block.linear_rows - 9 * block.width  # two attentions have four outputs each, ffn ends with a ninth
        return int(WAN_COMPILED_BYTES[0] * block.width + WAN_COMPILED_BYTES[1] * wider)
    return int(ACTIVATION_BYTES[facts.family] * block.width)


def forward_bytes(facts: ModelFacts, seen: int, precision: Precision, *, compiled: bool, quantising: bool) -> int:
    """Return what a forward over `seen` tokens takes above the weights, or quantising before it where that is more.

    Args:
        quantising: the weights are quantised on their way to the GPU.
    """
    if facts.tiny:
        return largest_linear(facts, "transformer") * QUANTISING_BYTES_PER_WEIGHT if quantising else 0
    needed = FORWARD_BYTES + seen * activation_bytes_per_token(facts, compiled=compiled)
    largest = largest_linear(facts, "transformer")
    if precision in DEQUANTISED and not compiled:
        needed += largest * DEQUANTISED_BYTES_PER_WEIGHT
    return max(needed, largest * QUANTISING_BYTES_PER_WEIGHT if quantising else 0)


def tokens(facts: ModelFacts, width: int, height: int, num_frames: int | None, max_sequence_length: int) -> int:
    """Return what a forward sees: the picture's or clip's tokens and the prompt's."""
    return facts.tokens(width, height, num_frames) + max_sequence_length
