"""Which ways of holding and placing a transformer do not go together, each with its reason. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from safelight.machine import Machine
from safelight.pace import COMPILED_EFFICIENCY, capability
from safelight.plan import Placement, Precision

BITSANDBYTES: tuple[Precision, ...] = ("nf4", "int8-bnb")
BY_LIBRARY: tuple[Placement, ...] = ("block", "leaf", "sequential")
PLAIN: tuple[Precision, ...] = ("bf16", "fp16")
STREAMED_AS_PARTS: tuple[Precision, ...] = (
    "bf16", "fp16", "nf4", "fp8-dynamic", "fp8-weight-only", "int8-dynamic", "int8-weight-only",
)  # fmt: skip


@dataclass(frozen=True)
class Way:
    """One way to run a transformer."""

    precision: Precision
    compiled: bool
    placement: Placement
    low_cpu_mem_usage: bool = False
    cached: bool = False


Rule = tuple[Callable[[Way, Machine], bool], str]

RULES: tuple[Rule, ...] = (
    (lambda way, _: way.placement == "none", "offload none: the phases have the GPU one after another. Use model."),
    (
        lambda way, machine: way.precision == "bf16" and capability(machine) < (8, 0),
        "bf16 needs compute capability 8.0. Use fp16.",
    ),
    (
        lambda way, machine: way.precision == "fp8-dynamic" and capability(machine) < (8, 9),
        "fp8-dynamic multiplies in 8 bit, which needs compute capability 8.9. Use fp8-weight-only or nf4.",
    ),
    (
        lambda way, machine: (
            way.precision in ("fp8-weight-only", "int8-dynamic", "int8-weight-only") and capability(machine) < (8, 0)
        ),
        "torchao's precisions need compute capability 8.0. Use nf4 or fp16.",
    ),
    (
        lambda way, machine: way.precision in BITSANDBYTES and capability(machine) < (7, 5),
        "nf4 and int8-bnb need compute capability 7.5. Use fp16.",
    ),
    (
        lambda way, machine: way.compiled and not machine.compiler,
        "compile needs a C compiler and Python's headers. Install gcc and python3-dev, or leave it off.",
    ),
    (
        lambda way, _: way.compiled and way.placement in BY_LIBRARY,
        "compile and offload block, leaf or sequential: torch cannot compile through the library's hooks. Use partial.",
    ),
    (
        lambda way, _: way.cached and way.placement in BY_LIBRARY,
        "cache and offload block, leaf or sequential: the library fetches each block from the one before it, and a "
        "cache leaves blocks out. Use partial.",
    ),
    (
        lambda way, _: way.compiled and way.precision == "int8-dynamic",
        "compile and int8-dynamic: its product wants more than 16 rows, and FLUX's modulation has one. Leave it off.",
    ),
    (
        lambda way, _: way.compiled and way.precision not in COMPILED_EFFICIENCY,
        "compile with this precision has not been measured. Use bf16, fp8-dynamic or nf4.",
    ),
    (
        lambda way, _: way.placement == "sequential" and way.precision in BITSANDBYTES,
        "bitsandbytes weights and offload sequential: they cannot leave the meta device. Use partial or model.",
    ),
    (
        lambda way, _: way.placement == "sequential" and way.precision == "fp8-quanto",
        "fp8-quanto and offload sequential: accelerate cannot rebuild its tensors. Use model.",
    ),
    (
        lambda way, _: way.placement in ("block", "leaf") and way.precision in BITSANDBYTES,
        "bitsandbytes weights and offload block or leaf: their scales stay behind on the other side. Use partial.",
    ),
    (
        lambda way, _: way.placement in ("block", "leaf") and way.precision == "fp8-quanto",
        "fp8-quanto and offload block or leaf: diffusers loses its scales on the GPU. Use model.",
    ),
    (
        lambda way, _: way.placement in BY_LIBRARY and way.precision not in PLAIN,
        "offload block, leaf and sequential move plain weights alone here. Use partial.",
    ),
    (
        lambda way, _: way.placement == "partial" and way.precision not in STREAMED_AS_PARTS,
        "int8-bnb and fp8-quanto cannot be streamed block by block. Use offload model, or another precision.",
    ),
    (
        lambda way, _: way.low_cpu_mem_usage and way.placement == "block",
        "low_cpu_mem_usage and offload block: four times slower than without. Use leaf or partial.",
    ),
    (
        lambda way, _: way.low_cpu_mem_usage and way.placement != "leaf",
        "low_cpu_mem_usage is of offload leaf. Leave it out, or use leaf.",
    ),
)
"""Found broken or silently wrong with diffusers 0.42.1, torchao 0.18, bitsandbytes 0.50.2 and optimum-quanto 0.2.7;
docs/memory.md tells how each shows."""


def refused(way: Way, machine: Machine) -> str | None:
    """Return why a way is not taken, None where it may be."""
    return next((reason for broken, reason in RULES if broken(way, machine)), None)
