"""The format of optimum-quanto: 8-bit floats, weights alone, one scale a row in the dtype of the computation.

Its tensors are made here and not by `WeightQBytesTensor.create`: on a GPU that would make Marlin's, whose kernel
quanto compiles with nvcc at run time.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from optimum.quanto import AbsmaxOptimizer, WeightQBytesTensor, qfloat8, quantize_weight
from torch import nn

from safelight.plan import Precision
from safelightd.precision import Layout, Parts, check_multiples


class Quanto:
    """`qdata`: (out_features, in_features) in float8_e4m3fn; `scale`: (out_features, 1)."""

    precision: Precision = "fp8-quanto"

    def takes(self, name: str, linear: nn.Linear) -> bool:
        # Of a single row quanto makes a weight with one scale and no axis, which is another layout.
        check_multiples(self.precision, name, linear, out_features=2)
        return True

    def quantise(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        scale = AbsmaxOptimizer()(weight, qtype=qfloat8, axis=0)
        quantised = quantize_weight(weight, qtype=qfloat8, axis=0, scale=scale, optimized=False)
        return {"qdata": quantised._data, "scale": quantised._scale}  # noqa: SLF001 - as quanto's own modules store it

    def layout(self, out_features: int, in_features: int, dtype: torch.dtype) -> Layout:
        return {"qdata": ((out_features, in_features), qfloat8.dtype), "scale": ((out_features, 1), dtype)}

    def attach(self, linear: nn.Linear, parts: Parts, dtype: torch.dtype) -> nn.Module:
        del dtype  # the scale's
        size = torch.Size((linear.out_features, linear.in_features))
        weight = WeightQBytesTensor(
            qfloat8, 0, size, (linear.in_features, 1), parts["qdata"], parts["scale"], activation_qtype=None
        )
        linear.weight = nn.Parameter(weight, requires_grad=False)
        return linear


FORMATS: Mapping[Precision, Quanto] = {"fp8-quanto": Quanto()}
