"""The formats of bitsandbytes: 4-bit NormalFloat with doubly quantised scales, and 8-bit integers with outliers apart.

Both leave T5's `wo` as it is. Modules are put into the state that bitsandbytes' own reach at their first forward, and
stay in it: what they compute with is never replaced.
"""

from __future__ import annotations

from collections.abc import Mapping
from weakref import WeakValueDictionary

import bitsandbytes
import torch
from bitsandbytes import functional
from torch import nn

from safelight.plan import Precision
from safelightd.precision import Format, Layout, Parts, check_multiples, is_wo

BLOCK = 64
"""Weights that share a scale."""

SCALES_BLOCK = 256
"""Scales that share one themselves. The only size that bitsandbytes' fused product takes."""

OUTLIER = 6.0
"""Columns with an activation above it are multiplied in float16: the value of the LLM.int8() paper (arXiv 2208.07339),
and of diffusers' and transformers' BitsAndBytesConfig."""

_codes: WeakValueDictionary[tuple[str, torch.device], torch.Tensor] = WeakValueDictionary()
"""The values that codes stand for, by device. Held by the modules alone, so that nothing stays on the GPU after
them."""


def unusable(device: torch.device) -> str | None:
    """Return why bitsandbytes cannot compute on this device; None when it can."""
    from bitsandbytes.cextension import lib

    if device.type != "cuda" or lib.compiled_with_cuda:
        return None
    return (
        f"bitsandbytes {bitsandbytes.__version__} has no kernels for CUDA {torch.version.cuda}. Install a version that "
        "has, or use fp8-weight-only."
    )


class Nf4:
    """`qdata`: two codes a byte; `absmax`: a scale each 64 weights, itself a code; `nested_absmax` and `offset`: what
    those codes are scaled and moved by."""

    precision: Precision = "nf4"

    def takes(self, name: str, linear: nn.Linear) -> bool:
        if is_wo(name):
            return False
        check_multiples(self.precision, name, linear, in_features=BLOCK)
        return True

    def quantise(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        # bitsandbytes would keep the map on the device of the first weight for as long as the process lives.
        functional.name2qmap.setdefault("dynamic", functional.create_dynamic_map())
        qdata, state = functional.quantize_4bit(
            weight.contiguous(), blocksize=BLOCK, compress_statistics=True, quant_type="nf4"
        )
        return {
            "qdata": qdata,
            "absmax": state.absmax,
            "nested_absmax": state.state2.absmax,
            "offset": state.offset,
        }

    def layout(self, out_features: int, in_features: int, dtype: torch.dtype) -> Layout:
        del dtype  # the same for all
        scales = out_features * in_features // BLOCK
        return {
            "qdata": ((out_features * in_features // 2, 1), torch.uint8),
            "absmax": ((scales,), torch.uint8),
            "nested_absmax": ((-(-scales // SCALES_BLOCK),), torch.float32),
            "offset": ((), torch.float32),
        }

    def attach(self, linear: nn.Linear, parts: Parts, dtype: torch.dtype) -> nn.Module:
        attached: bitsandbytes.nn.Linear4bit = bitsandbytes.nn.Linear4bit(
            linear.in_features, linear.out_features, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta"
        )
        attached.weight = bitsandbytes.nn.Params4bit(
            parts["qdata"],
            requires_grad=False,
            quant_state=_quant_state(parts, (linear.out_features, linear.in_features), dtype),
            blocksize=BLOCK,
            compress_statistics=True,
            quant_type="nf4",
            bnb_quantized=True,
        )
        attached.bias = linear.bias
        # On CPUs with AVX512-BF16 the first forward would repack the weights into memory of its own.
        attached.support_avx512bf16_for_cpu = False
        module: nn.Module = attached
        return module


class Int8Mixed:
    """`qdata`: (out_features, in_features) integers; `scale`: the largest magnitude of each row."""

    precision: Precision = "int8-bnb"

    def takes(self, name: str, linear: nn.Linear) -> bool:
        del linear  # of any size
        return not is_wo(name)

    def quantise(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        qdata, scale, _ = functional.int8_vectorwise_quant(weight.contiguous().to(torch.float16))
        return {"qdata": qdata, "scale": scale}

    def layout(self, out_features: int, in_features: int, dtype: torch.dtype) -> Layout:
        del dtype  # the same for all
        return {"qdata": ((out_features, in_features), torch.int8), "scale": ((out_features,), torch.float32)}

    def attach(self, linear: nn.Linear, parts: Parts, dtype: torch.dtype) -> nn.Module:
        del dtype  # of its input
        attached: bitsandbytes.nn.Linear8bitLt = bitsandbytes.nn.Linear8bitLt(
            linear.in_features, linear.out_features, bias=False, has_fp16_weights=False, threshold=OUTLIER,
            device="meta",
        )  # fmt: skip
        attached.weight = bitsandbytes.nn.Int8Params(parts["qdata"], requires_grad=False, has_fp16_weights=False)
        # Where the first forward would put them; forward points the weight at CB each time.
        attached.state.CB = parts["qdata"]
        attached.state.SCB = parts["scale"]
        attached.bias = linear.bias
        module: nn.Module = attached
        return module


def _quant_state(parts: Parts, shape: tuple[int, int], dtype: torch.dtype) -> functional.QuantState:
    device = parts["qdata"].device
    return functional.QuantState(
        absmax=parts["absmax"],
        shape=torch.Size(shape),
        code=_code("nf4", device),
        blocksize=BLOCK,
        quant_type="nf4",
        dtype=dtype,
        offset=parts["offset"],
        state2=functional.QuantState(
            absmax=parts["nested_absmax"], code=_code("dynamic", device), blocksize=SCALES_BLOCK, dtype=torch.float32
        ),
    )


def _code(name: str, device: torch.device) -> torch.Tensor:
    code = _codes.get((name, device))
    if code is None:
        made = functional.get_4bit_type("nf4", device="cpu") if name == "nf4" else functional.create_dynamic_map()
        _codes[name, device] = code = made.to(device)
    return code


FORMATS: Mapping[Precision, Format] = {"nf4": Nf4(), "int8-bnb": Int8Mixed()}
