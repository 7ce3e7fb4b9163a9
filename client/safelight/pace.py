"""How many seconds a plan takes: arithmetic and bytes over the card's and the disk's rates. Pure.

What the machine really does is learned: `safelight.calibration` multiplies these figures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from safelight.footprint import Decoding
from safelight.jobrules import guides
from safelight.jobspec import JobSpec
from safelight.machine import Machine
from safelight.models import Blocks, ModelFacts
from safelight.plan import Precision

FLOP_PER_CLOCK = {(7, 5): 512, (8, 0): 2048, (8, 6): 512, (8, 7): 512, (8, 9): 512, (9, 0): 4096, (10, 0): 8192}
"""Of one multiprocessor, 16-bit products summed in float32 (NVIDIA's architecture papers). Newer ones count as 8.9."""

ASSUMED_CAPABILITY = (8, 9)
"""Of a card of which only the memory is known: a laptop's of today."""

ASSUMED_FLOPS = {(7, 5): 25e12, (8, 0): 312e12, (8, 6): 40e12, (8, 9): 75e12, (9, 0): 900e12, (12, 0): 90e12}
"""Of a laptop's card of that capability, where only the capability is known."""

ASSUMED_LINK_BYTES_PER_SECOND = 12_000_000_000
"""PCIe 4 with 8 lanes, pinned."""

READ_BYTES_PER_SECOND = 3_000_000_000
"""From an NVMe disk; from the page cache it was 13 to 20 GB/s (H100 machine, 2026-11-23)."""

PIN_SECONDS_PER_BYTE = 0.1e-9
"""What pinned RAM takes besides reading into it: 10.3 GiB in 0.5 s (H100 machine, 2026-11-25), and a laptop's RAM is
slower."""

QUANTISE_SECONDS_PER_BYTE: dict[Precision, float] = {
    "fp8-dynamic": 0.08e-9,
    "fp8-weight-only": 0.08e-9,
    "fp8-quanto": 0.08e-9,
    "int8-dynamic": 0.08e-9,
    "int8-weight-only": 0.08e-9,
    "int8-bnb": 0.05e-9,
    "nf4": 0.05e-9,
}
"""Of a bf16 weight on its way to the GPU (H100, 2026-11-25)."""

KEEP_SECONDS_PER_BYTE = 1.2e-9
"""Of a result that is kept while it is made, above making it: syncing at 2 GB/s and SHA-256 at 1.0 GB/s (2 cores,
2026-11-23) in a thread of its own, a part of it while published weights are read. Not measured beside a GPU yet; on two
cores that made the weights, too, it was 2.2e-9 (fp8-weight-only, 2026-11-26)."""

# Share of the card's 16-bit arithmetic that a FLUX forward reaches: bench/gpu_techniques.py, H100 80GB, torch 2.11,
# 1024x1024, 2026-11-23. 171 ms in bf16 are 406 of 989 TFLOP/s.
EFFICIENCY: dict[Precision, float] = {
    "bf16": 0.41,
    "fp16": 0.40,
    "fp32": 0.05,
    "fp8-dynamic": 0.23,
    "fp8-weight-only": 0.24,
    "fp8-quanto": 0.276,
    "int8-dynamic": 0.052,
    "int8-weight-only": 0.293,
    "int8-bnb": 0.143,
    "nf4": 0.38,
}
COMPILED_EFFICIENCY: dict[Precision, float] = {"bf16": 0.57, "fp16": 0.57, "fp8-dynamic": 0.74, "nf4": 0.517}
"""Only what was measured is offered."""

NOT_OVERLAPPED = 0.12
"""Of the shorter of computing and copying, what streaming does not hide: 243 ms where 222 and 171 overlap."""

COMPILE_SECONDS: dict[str, float] = {"bf16": 21.0, "fp16": 21.0, "fp8-dynamic": 41.0, "nf4": 13.0}
COMPILE_AGAIN_SECONDS = 4.0
"""Two kinds of block for all sizes, cold by precision, and in a new process with the code on disk (H100, torch 2.11,
2026-11-25)."""

LAUNCH_SECONDS = {False: 2.0e-3, True: 1.5e-3}
"""What the CPU takes to start one block's kernels, eager and compiled: a forward of a small picture takes no less."""

LIBRARY_RATES = {"block": 0.90, "leaf": 0.81, "sequential": 0.125}
"""Share of the link that diffusers' and accelerate's offloads reach: 480, 534 and 3,505 ms for 23.8 GB at 54.8 GB/s."""

LOW_CPU_RATE = 0.38
"""Of leaf offload that pins on the way: 1,138 ms."""

SETUP_SECONDS = 0.4
"""A component's modules without their weights, and giving them back."""

VAE_SECONDS = 0.25
"""Loading the VAE, giving it back, and the file to the disk."""

WRITE_SECONDS_PER_PIXEL = 0.4e-6
"""A frame's way from the GPU into a PNG or the MP4 encoder, on one core."""

DECODE_PIXELS_PER_FLOP = {"flux": 1.0e-7, "wan": 1.6e-8}
"""Output pixels per flop of the card's rate: FLUX decodes 1024x1024 in 0.1 s, Wan 1280x704x121 in 6.3 s (H100)."""

TILED_TIMES = 1.6
"""What a decode in tiles takes longer, since they overlap."""

STRIPS_TIMES: Mapping[tuple[str | None, int], float] = {("wan", 128): 1.25, ("wan", 64): 1.5}
"""What a decode in strips takes longer, by family and rows: 1.20 to 1.26 and 1.36 to 1.74 times the whole's seconds
(`bench.gpu_decode_wan`, H100, torch 2.11.0+cu130, 2026-11-27). FLUX's takes no longer from 1024x1024 on."""

CPU_FLOPS = 50e9
"""Of a few cores in float32."""


def capability(machine: Machine) -> tuple[int, int]:
    """Return the card's compute capability, or the one that is assumed where nobody has said."""
    return machine.capability or ASSUMED_CAPABILITY


def flops_per_second(machine: Machine) -> float:
    """Return the card's 16-bit arithmetic."""
    if machine.device == "cpu":
        return CPU_FLOPS
    found = capability(machine)
    per_clock = FLOP_PER_CLOCK.get(found, FLOP_PER_CLOCK[ASSUMED_CAPABILITY])
    if machine.multiprocessors and machine.clock_mhz:
        return machine.multiprocessors * machine.clock_mhz * 1e6 * per_clock
    known = max((known for known in ASSUMED_FLOPS if known <= found), default=(7, 5))
    return ASSUMED_FLOPS[known]


def decode_pixels_per_second(facts: ModelFacts, machine: Machine) -> float:
    """Return how fast the VAE makes pixels; it reads them as fast at least."""
    return DECODE_PIXELS_PER_FLOP[facts.family] * flops_per_second(machine)


def link_bytes_per_second(machine: Machine) -> int:
    return machine.link_bytes_per_second or ASSUMED_LINK_BYTES_PER_SECOND


def decode_times(how: Decoding, family: str | None = None) -> float:
    """Return how many times the whole's seconds a decode takes so; of a CPU's strips, and other families', they are the
    whole's."""
    return TILED_TIMES if how.tile_pixels else STRIPS_TIMES.get((family, how.strip_rows), 1.0)


def is_guided(spec: JobSpec, facts: ModelFacts) -> bool:
    """Whether a step runs the transformer twice."""
    if facts.family == "wan":
        return guides(spec.guidance_scale)
    return spec.negative_prompt is not None and (spec.true_cfg_scale or 0.0) > 1


def forward_flop(facts: ModelFacts, component: str, tokens: int) -> float:
    """Return the floating-point operations of one forward: Linears over all tokens, and attention between them."""
    return _flop(facts.blocks.get(component, ()), tokens)


def _flop(of: Sequence[Blocks], tokens: int) -> float:
    linear = sum(2.0 * blocks.per_token * blocks.count * tokens for blocks in of)
    attention = sum(4.0 * tokens**2 * blocks.width * blocks.count for blocks in of)
    return linear + attention


def controlnet_flop(spec: JobSpec, facts: ModelFacts, tokens: int) -> float:
    """Return the operations of a ControlNet's forward, once a step whether guided or not; 0 without one."""
    return _flop(facts.controlnets[spec.controlnet.model].blocks, tokens) if spec.controlnet else 0.0


def overlapped(compute_seconds: float, copy_seconds: float) -> float:
    """Return the time of computing and copying at once."""
    return max(compute_seconds, copy_seconds) + NOT_OVERLAPPED * min(compute_seconds, copy_seconds)
