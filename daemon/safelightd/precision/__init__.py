"""How a Linear's weight is held in fewer bits: quantised to plain tensors, and computed with where those lie.

The tensors of a quantised weight are its parts. They are what is stored, loaded and streamed; a module that computes
with them holds views, so that new bytes in the same memory are new weights. The libraries that do the arithmetic
(torchao, bitsandbytes, optimum-quanto) are imported when a format is first used. Knows no file and no model; of
models' layers it knows by name the one that must not be quantised.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from typing import Protocol

import torch
from torch import nn

from safelight.errors import Fault, InvalidJob
from safelight.plan import Precision

Parts = Mapping[str, torch.Tensor]
Layout = Mapping[str, tuple[tuple[int, ...], torch.dtype]]

LIBRARIES: Mapping[Precision, str] = {
    "fp8-dynamic": "torchao",
    "fp8-weight-only": "torchao",
    "int8-dynamic": "torchao",
    "int8-weight-only": "torchao",
    "fp8-quanto": "optimum.quanto",
    "int8-bnb": "bitsandbytes",
    "nf4": "bitsandbytes",
}
"""Every precision that quantises, and what does its arithmetic."""

FP8_CAPABILITY = (8, 9)
"""The first CUDA capability whose matrix units multiply 8-bit floats (CUDA C++ Programming Guide, table of
arithmetic throughput): Ada, as the RTX 40 cards."""

PLACE_FOR_WO = "wo"
"""T5's and UMT5's second feed-forward Linear. Before it, transformers casts activations to `wo.weight.dtype`, which
for packed 4-bit weights is uint8; and 8-bit matrices are multiplied in float16, in which its sums overflow: "to make
8bit quantization work for google/flan-t5-xxl, self.wo is kept in float32" (modeling_t5.py, transformers 5.23)."""


NO_NEWS: Mapping[str, str] = {
    "torchao": "Failed to load",
    "torchao.kernel.intmm": "Warning: Detected no triton",
    "torch.utils._pytree": "%s is an Enum subclass",
    "bitsandbytes.autograd._functions": "MatMul8bitLt: inputs will be cast",
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
    "diffusers.quantizers.torchao.torchao_quantizer": "Unable to import `torchao` Tensor objects",
}
"""By logger, how messages begin that say nothing to anybody here: kernels for other cards that are in torchao's wheel,
what torchao still tells torch, the cast to float16 at each of thousands of products, a faster CPU kernel that some CPUs
could have fetched, a file format of diffusers'."""


class Format(Protocol):
    """One way to hold the weight of a Linear."""

    precision: Precision

    def takes(self, name: str, linear: nn.Linear) -> bool:
        """Whether this Linear of a repeated block is quantised; `name` is its weight's.

        Raises:
            InvalidJob: it ought to be, and its size forbids it.
        """
        ...

    def quantise(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the parts of a weight, contiguous, on its device.

        Args:
            weight: (out_features, in_features), of the dtype that is computed in.
        """
        ...

    def layout(self, out_features: int, in_features: int, dtype: torch.dtype) -> Layout:
        """Return the shape and dtype of each part that `quantise` makes of such a weight, in the same order."""
        ...

    def attach(self, linear: nn.Linear, parts: Parts, dtype: torch.dtype) -> nn.Module:
        """Return a module in the place of `linear` that computes with `parts` and `linear.bias`, copying neither.

        Args:
            linear: its weight is not looked at and may be on the meta device; its bias is real, or None. It is of no
                use afterwards.
            dtype: of the computation.
        """
        ...


@cache
def format_of(precision: Precision) -> Format | None:
    """Return the format of a precision; None for those that quantise nothing.

    Raises:
        ImportError: its library is not there, or not whole. `unusable` says so first.
    """
    match LIBRARIES.get(precision):
        case None:
            return None
        case "torchao":
            from safelightd.precision import by_torchao

            return by_torchao.FORMATS[precision]
        case "bitsandbytes":
            from safelightd.precision import by_bitsandbytes

            return by_bitsandbytes.FORMATS[precision]
        case _:
            from safelightd.precision import by_quanto

            return by_quanto.FORMATS[precision]


def unusable(precision: Precision, device: torch.device) -> str | None:
    """Return why a precision cannot be used on a device, and what to do; None when it can."""
    library = LIBRARIES.get(precision)
    if library is None:
        return None
    if find_spec(library.partition(".")[0]) is None:
        return f"{precision} needs {library}, which is not installed. Install it: pip install 'safelight[daemon]'"
    if precision == "fp8-dynamic":
        return _without_fp8_units(device)
    if library == "bitsandbytes":
        from safelightd.precision import by_bitsandbytes

        return by_bitsandbytes.unusable(device)
    return None


def _without_fp8_units(device: torch.device) -> str | None:
    remedy = "Use fp8-weight-only."
    if device.type != "cuda":
        return f"fp8-dynamic multiplies 8-bit floats, which a CPU cannot. {remedy}"
    capability = torch.cuda.get_device_capability(device)
    if capability >= FP8_CAPABILITY:
        return None
    has, needs = (".".join(map(str, version)) for version in (capability, FP8_CAPABILITY))
    return f"fp8-dynamic needs a GPU of CUDA capability {needs} or later, and this one has {has}. {remedy}"


def check_multiples(
    precision: Precision, name: str, linear: nn.Linear, *, in_features: int = 1, out_features: int = 1
) -> None:
    """Raise InvalidJob unless the sizes of a Linear are multiples of these."""
    for what, size, multiple in (
        ("input", linear.in_features, in_features),
        ("output", linear.out_features, out_features),
    ):
        if size % multiple:
            problem = f"{size} {what} features cannot be held in {precision}, which takes multiples of {multiple}"
            raise InvalidJob([Fault(name, problem, "Use another precision.")])


def is_wo(name: str) -> bool:
    """Whether this is the weight that 4-bit and mixed 8-bit formats leave alone: see PLACE_FOR_WO."""
    return name.removesuffix(".weight").rpartition(".")[2] == PLACE_FOR_WO


def _drop(logger: str, beginning: str) -> None:
    logging.getLogger(logger).addFilter(lambda record: not str(record.msg).startswith(beginning))


for _logger, _beginning in NO_NEWS.items():
    _drop(_logger, _beginning)
