"""The formats of torchao: 8-bit floats and integers, weights alone or multiplied in 8 bit, one scale a row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torchao.quantization import (
    Float8DynamicActivationFloat8WeightConfig,
    Float8WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    PerRow,
    quantize_,
)

from safelight.errors import Fault, InvalidJob
from safelight.plan import Precision
from safelightd.precision import Layout, Parts, check_multiples

AT_ONCE = 2**24
"""Weights that are quantised together. torchao computes in float32 and takes 13 bytes a weight meanwhile, 468 MiB for
one of FLUX's 12288x3072 (H100, torchao 0.18, 2026-11-23); with pieces of a quarter of this its own Python took longer
than the GPU."""


@dataclass(frozen=True)
class _Template:
    """What every weight of one shape shares: its class, what that keeps beside tensors, and the tensors' layout."""

    tensor_class: Any
    context: Any
    layout: Layout


@dataclass
class TorchAo:
    """A weight as torchao's own tensor class; the parts are its inner tensors."""

    precision: Precision
    held: Any
    """torchao's configuration that quantises a weight."""
    computed: Any = None
    """The one that says how it multiplies, where that is another one's: the tensors of both are the same."""
    multiple: int = 1
    """Of in_features and out_features."""
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16, torch.float32)
    _templates: dict[tuple[int, int, int, torch.dtype], _Template] = field(default_factory=dict)

    def takes(self, name: str, linear: nn.Linear) -> bool:
        check_multiples(self.precision, name, linear, in_features=self.multiple, out_features=self.multiple)
        return True

    def quantise(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        layout = self.layout(weight.shape[0], weight.shape[1], weight.dtype)
        made = {name: torch.empty(shape, dtype=dtype, device=weight.device) for name, (shape, dtype) in layout.items()}
        rows = max(AT_ONCE // weight.shape[1], 1)  # each has a scale of its own: the bits are those of the whole
        for begin in range(0, weight.shape[0], rows):
            quantised = _quantised(weight[begin : begin + rows], self.held)
            for name, part in made.items():
                part[begin : begin + rows].copy_(getattr(quantised, name))
        return made

    def layout(self, out_features: int, in_features: int, dtype: torch.dtype) -> Layout:
        self._check_dtype(dtype)
        return self._template(self.held, out_features, in_features, dtype).layout

    def attach(self, linear: nn.Linear, parts: Parts, dtype: torch.dtype) -> nn.Module:
        template = self._template(self.computed or self.held, linear.out_features, linear.in_features, dtype)
        weight = template.tensor_class.__tensor_unflatten__(dict(parts), template.context, None, None)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        return linear

    def _check_dtype(self, dtype: torch.dtype) -> None:
        if dtype not in self.dtypes:
            problem = f"computes in {' or '.join(map(_word, self.dtypes))}, and the plan in {_word(dtype)}"
            raise InvalidJob([Fault(f"precision {self.precision}", problem, "Use another precision.")])

    def _template(self, config: Any, out_features: int, in_features: int, dtype: torch.dtype) -> _Template:
        """Return what is left of a weight without memory: so nothing of it can depend on any weight's values."""
        key = (id(config), out_features, in_features, dtype)
        if key not in self._templates:
            weight: Any = _quantised(torch.empty(out_features, in_features, dtype=dtype, device="meta"), config)
            names, context = weight.__tensor_flatten__()
            parts = {name: getattr(weight, name) for name in names}
            layout = {name: (tuple(part.shape), part.dtype) for name, part in parts.items()}
            self._templates[key] = _Template(type(weight), context, layout)
        return self._templates[key]


def _quantised(weight: torch.Tensor, config: Any) -> torch.Tensor:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    quantize_(linear, config)
    return linear.weight


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# set_inductor_config would switch coordinate descent tuning on for the whole process: minutes of compiling.
_FLOAT8 = Float8WeightOnlyConfig(granularity=PerRow(), set_inductor_config=False)

FORMATS: Mapping[Precision, TorchAo] = {
    # torch._scaled_mm takes multiples of 16, and rows with a scale each only where the product is bfloat16.
    "fp8-dynamic": TorchAo(
        "fp8-dynamic",
        _FLOAT8,
        computed=Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), set_inductor_config=False),
        multiple=16,
        dtypes=(torch.bfloat16,),
    ),
    "fp8-weight-only": TorchAo("fp8-weight-only", _FLOAT8),
    # torch._int_mm takes multiples of 8; for any other size torchao would go through the CPU.
    "int8-dynamic": TorchAo(
        "int8-dynamic", Int8DynamicActivationInt8WeightConfig(set_inductor_config=False), multiple=8
    ),
    "int8-weight-only": TorchAo("int8-weight-only", Int8WeightOnlyConfig(set_inductor_config=False)),
}
