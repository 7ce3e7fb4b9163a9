"""Whose transformer a file of weights holds, and by which names: told by the names and shapes of its tensors alone.

Two layouts of each family are read: that of diffusers, and that of the model's authors, which most other programs use
as well. Knows no weight and no path but for its errors.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from safelight.errors import SafelightError
from safelight.tensorfile import Entry

Family = Literal["flux", "wan"]
Names = Literal["diffusers", "authors"]

PREFIXES = ("model.diffusion_model.", "diffusion_model.")
"""What other programs put before the names; with the first, a file may hold text encoders and a VAE besides."""

TRANSFORMERS: Mapping[Family, str] = {"flux": "FluxTransformer2DModel", "wan": "WanTransformer3DModel"}
"""By family, the class of diffusers."""

_SIGNS: Sequence[tuple[Family, Names, tuple[str, ...]]] = (
    ("flux", "diffusers", ("single_transformer_blocks.0.proj_mlp.weight", "x_embedder.weight")),
    ("flux", "authors", ("double_blocks.0.img_attn.qkv.weight", "single_blocks.0.linear1.weight", "img_in.weight")),
    ("wan", "diffusers", ("blocks.0.attn1.to_q.weight", "condition_embedder.time_proj.bias", "patch_embedding.weight")),
    ("wan", "authors", ("blocks.0.self_attn.q.weight", "time_projection.1.weight", "patch_embedding.weight")),
)  # fmt: skip

_OTHERS: Sequence[tuple[str, str]] = (
    ("lora", r"lora_(up|down|A|B)\b|\.lora\.|^lora_"),
    ("Stable Diffusion XL", r"^conditioner\.|input_blocks\..*transformer_blocks\.9\.|^add_embedding\."),
    ("Stable Diffusion", r"input_blocks\.|^cond_stage_model\.|^down_blocks\..*attentions\."),
    ("Stable Diffusion 3", r"joint_blocks\."),
    ("a text encoder", r"^encoder\.block\.|^text_model\.encoder\.|^shared\.weight$"),
    ("a VAE", r"^(decoder|encoder)\.(up|down|mid|conv_in)"),
)
"""What people have besides, for the error: by words, a pattern of its names."""

_SCALES = (".scale_weight", ".weight_scale")
"""End the name of what an 8-bit weight is to be multiplied by: ComfyUI's `scaled_fp8`, and its later `comfy_quant`."""

SCALED_DTYPES = ("F8_E4M3", "F8_E5M2")
SCALE_DTYPES = ("F32", "F16", "BF16", "F64")

_UNUSED = (".scale_input", ".input_scale", ".comfy_quant")
"""End names that say how other programs compute, and not what the weights are."""

_MARKER = "scaled_fp8"
"""An empty tensor by which ComfyUI knows files whose 8-bit weights have scales."""


class OtherModel(SafelightError):
    """A file holds no transformer that jobs load."""


@dataclass(frozen=True)
class Layout:
    """The transformer in a file."""

    family: Family
    names: Names
    tensors: Mapping[str, Entry]
    """By name, without a prefix; no scales among them."""
    scales: Mapping[str, Entry]
    """By the name of the weight that they belong to."""

    @property
    def parameters(self) -> int:
        return sum(entry.parameters for entry in self.tensors.values())

    @property
    def precision(self) -> str:
        """What most of the weights are stored as, as `precision` says."""
        return precision(self.tensors.values(), scaled=bool(self.scales))


def recognise(found: Sequence[Entry], file: Path) -> Layout:
    """Return the transformer that a file of these tensors holds.

    Raises:
        OtherModel: it holds something else; the error says what, where it can be told.
    """
    prefix = next((prefix for prefix in PREFIXES if any(entry.name.startswith(prefix) for entry in found)), "")
    named = {entry.name.removeprefix(prefix): entry for entry in found if entry.name.startswith(prefix)}
    family_and_names = next((sign[:2] for sign in _SIGNS if all(name in named for name in sign[2])), None)
    if family_and_names is None:
        raise OtherModel(f"{file}: {_what(found)}. FLUX.1 and Wan 2.2 transformers can be registered.")
    tensors, scales = {}, {}
    for name, entry in named.items():
        if name.endswith(_SCALES):
            scales[name.rpartition(".")[0] + ".weight"] = entry
        elif name != _MARKER and not name.endswith(_UNUSED):
            tensors[name] = entry
    if astray := sorted(set(scales) - set(tensors)):
        raise OtherModel(f"{file}: holds a scale of {astray[0]}, and not the weight. Fetch it anew.")
    for name, scale in scales.items():
        if tensors[name].dtype not in SCALED_DTYPES:
            raise OtherModel(
                f"{file}: {scale.name} is of a weight that is {tensors[name].dtype}; scales of 8-bit floats are read. "
                "Use another file of the model."
            )
        if scale.dtype not in SCALE_DTYPES or scale.parameters not in (1, *tensors[name].shape[:1]):
            raise OtherModel(
                f"{file}: {scale.name} is {scale.dtype} of the shape {list(scale.shape)}; one float for the weight, or "
                "one a row, is read. Use another file of the model."
            )
    return Layout(*family_and_names, tensors, scales)


def precision(entries: Iterable[Entry], *, scaled: bool = False) -> str:
    """Return what most of these weights are stored as: bf16, fp8_e4m3 scaled, Q4_K."""
    counted: Counter[str] = Counter()
    for entry in entries:
        counted[entry.dtype] += entry.parameters
    if not counted:
        return ""
    most = counted.most_common(1)[0][0]
    words = {"F8_E4M3": "fp8_e4m3", "F8_E5M2": "fp8_e5m2", "F64": "fp64", "F32": "fp32", "F16": "fp16", "BF16": "bf16"}
    return words.get(most, most) + (" scaled" if scaled else "")


def _what(found: Sequence[Entry]) -> str:
    for words, pattern in _OTHERS:
        if any(re.search(pattern, entry.name) for entry in found):
            return f"holds {words if words.startswith('a ') else f'a {words}'}" + " model" * words.startswith("Stable")
    first = f", {found[0].name} the first" if found else ""
    return f"holds no transformer that is known ({len(found)} tensors{first})"
