"""Tiny transformers as other programs keep them: the authors' names, prefixes, 8-bit floats with scales, GGUF.

Written by hand from black-forest-labs/flux (model.py) and Wan-Video/Wan2.2 (model.py), the other way round than
diffusers' converters, which the code under test uses.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import gguf
import torch
from safetensors.torch import load_file, save_file

Weights = dict[str, torch.Tensor]

PREFIX = "model.diffusion_model."


def published(component: Path) -> Weights:
    """Return the weights of a component's folder."""
    return {
        name: tensor for file in sorted(component.glob("*.safetensors")) for name, tensor in load_file(file).items()
    }


def flux_of_authors(own: Weights) -> Weights:  # noqa: C901 - a list of names, in the authors' order
    """Return a FLUX transformer by the names of black-forest-labs/flux."""
    left = dict(own)
    made: Weights = {}

    def move(theirs: str, ours: str) -> None:
        for end in ("weight", "bias"):
            made[f"{theirs}.{end}"] = left.pop(f"{ours}.{end}")

    def join(theirs: str, *ours: str) -> None:
        for end in ("weight", "bias"):
            made[f"{theirs}.{end}"] = torch.cat([left.pop(f"{name}.{end}") for name in ours])

    move("img_in", "x_embedder")
    move("txt_in", "context_embedder")
    for theirs, ours in (
        ("time_in", "timestep_embedder"),
        ("vector_in", "text_embedder"),
        ("guidance_in", "guidance_embedder"),
    ):
        if f"time_text_embed.{ours}.linear_1.weight" in left:
            move(f"{theirs}.in_layer", f"time_text_embed.{ours}.linear_1")
            move(f"{theirs}.out_layer", f"time_text_embed.{ours}.linear_2")
    for i in range(_count(own, "transformer_blocks")):
        at, to = f"transformer_blocks.{i}", f"double_blocks.{i}"
        for side, norm, projections, out, ff, names in (
            ("img", "norm1", ("to_q", "to_k", "to_v"), "to_out.0", "ff", ("norm_q", "norm_k")),
            ("txt", "norm1_context", ("add_q_proj", "add_k_proj", "add_v_proj"), "to_add_out", "ff_context",
             ("norm_added_q", "norm_added_k")),
        ):  # fmt: skip
            move(f"{to}.{side}_mod.lin", f"{at}.{norm}.linear")
            join(f"{to}.{side}_attn.qkv", *(f"{at}.attn.{name}" for name in projections))
            move(f"{to}.{side}_attn.proj", f"{at}.attn.{out}")
            move(f"{to}.{side}_mlp.0", f"{at}.{ff}.net.0.proj")
            move(f"{to}.{side}_mlp.2", f"{at}.{ff}.net.2")
            for theirs, ours in zip(("query", "key"), names, strict=True):
                made[f"{to}.{side}_attn.norm.{theirs}_norm.scale"] = left.pop(f"{at}.attn.{ours}.weight")
    for i in range(_count(own, "single_transformer_blocks")):
        at, to = f"single_transformer_blocks.{i}", f"single_blocks.{i}"
        move(f"{to}.modulation.lin", f"{at}.norm.linear")
        join(f"{to}.linear1", f"{at}.attn.to_q", f"{at}.attn.to_k", f"{at}.attn.to_v", f"{at}.proj_mlp")
        move(f"{to}.linear2", f"{at}.proj_out")
        for theirs, ours in (("query", "norm_q"), ("key", "norm_k")):
            made[f"{to}.norm.{theirs}_norm.scale"] = left.pop(f"{at}.attn.{ours}.weight")
    move("final_layer.linear", "proj_out")
    for end in ("weight", "bias"):  # diffusers has the scale first, the authors the shift
        scale, shift = left.pop(f"norm_out.linear.{end}").chunk(2)
        made[f"final_layer.adaLN_modulation.1.{end}"] = torch.cat([shift, scale])
    assert left == {}
    return made


def wan_of_authors(own: Weights) -> Weights:
    """Return a Wan transformer by the names of Wan-Video/Wan2.2."""
    names = {
        "condition_embedder.time_embedder.linear_1": "time_embedding.0",
        "condition_embedder.time_embedder.linear_2": "time_embedding.2",
        "condition_embedder.text_embedder.linear_1": "text_embedding.0",
        "condition_embedder.text_embedder.linear_2": "text_embedding.2",
        "condition_embedder.time_proj": "time_projection.1",
        "patch_embedding": "patch_embedding",
        "proj_out": "head.head",
    }
    inside = {
        "attn1.to_out.0": "self_attn.o", "attn2.to_out.0": "cross_attn.o", "ffn.net.0.proj": "ffn.0",
        "ffn.net.2": "ffn.2", "norm2": "norm3",
    }  # fmt: skip
    for attention, theirs in (("attn1", "self_attn"), ("attn2", "cross_attn")):
        inside |= {f"{attention}.to_{part}": f"{theirs}.{part}" for part in "qkv"}
        inside |= {f"{attention}.norm_{part}": f"{theirs}.norm_{part}" for part in "qk"}
    made: Weights = {}
    for name, tensor in own.items():
        if name == "scale_shift_table":
            made["head.modulation"] = tensor
        elif name.endswith(".scale_shift_table"):
            made[name.replace("scale_shift_table", "modulation")] = tensor
        elif name.startswith("blocks."):
            _, number, rest = name.split(".", 2)
            part, _, end = rest.rpartition(".")
            made[f"blocks.{number}.{inside[part]}.{end}"] = tensor
        else:
            part, _, end = name.rpartition(".")
            made[f"{names[part]}.{end}"] = tensor
    return made


OF_AUTHORS: dict[str, Callable[[Weights], Weights]] = {"flux": flux_of_authors, "wan": wan_of_authors}


def prefixed(weights: Weights) -> Weights:
    """Return weights as whole checkpoints have them, beside a VAE and a text encoder."""
    others = {"vae.decoder.conv_in.weight": torch.ones(2), "text_encoders.t5xxl.shared.weight": torch.ones(2)}
    return {f"{PREFIX}{name}": tensor for name, tensor in weights.items()} | others


def in_fp8(weights: Weights) -> Weights:
    """Return weights with every matrix of the blocks as 8-bit floats, without scales."""
    return {
        name: tensor.to(torch.float8_e4m3fn) if is_packed(name, tensor) else tensor for name, tensor in weights.items()
    }


def scaled(weights: Weights, end: str, *, by_row: bool = False) -> Weights:
    """Return weights as ComfyUI scales them: largest of a weight, or of each row, at the end of the 8-bit range."""
    made: Weights = {"scaled_fp8": torch.empty(2, dtype=torch.float8_e4m3fn)}
    for name, tensor in weights.items():
        if not is_packed(name, tensor):
            made[name] = tensor
            continue
        most = tensor.abs().flatten(1).amax(1) if by_row else tensor.abs().amax()
        scale = (most / 448).float()
        divisor = scale[:, None] if by_row else scale
        made[name] = (tensor / divisor).to(torch.float8_e4m3fn)
        made[f"{name.removesuffix('.weight')}.{end}"] = scale
        made[f"{name.removesuffix('.weight')}.input_scale"] = torch.tensor(1.0)
    return made


def unscaled(weights: Weights, end: str) -> Weights:
    """Return what scaled weights stand for, by the definition of their scales."""
    made: Weights = {}
    for name, tensor in weights.items():
        scale = weights.get(f"{name.removesuffix('.weight')}.{end}")
        if name == "scaled_fp8" or name.endswith((f".{end}", ".input_scale")):
            continue
        made[name] = tensor.float() if scale is None else tensor.float() * (scale[:, None] if scale.ndim else scale)
    return made


def is_packed(name: str, tensor: torch.Tensor) -> bool:
    return "blocks." in name and name.endswith(".weight") and tensor.ndim == 2


def save(weights: Weights, file: Path) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, file, metadata={"format": "pt"})
    return file


def save_gguf(weights: Weights, file: Path, kind: gguf.GGMLQuantizationType, architecture: str = "flux") -> Weights:
    """Write weights as GGUF, matrices of the blocks packed; return what the reference decoder makes of the file."""
    writer = gguf.GGUFWriter(file, architecture)
    meant: Weights = {}
    for name, tensor in weights.items():
        values = tensor.float().numpy()
        packed = gguf.quants.quantize(values, kind) if is_packed(name, tensor) else values
        writer.add_tensor(name, packed, raw_dtype=kind if is_packed(name, tensor) else None)
        plain = gguf.quants.dequantize(packed, kind) if is_packed(name, tensor) else values
        meant[name] = torch.from_numpy(plain.copy()).float()
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return meant


def _count(weights: Weights, path: str) -> int:
    return 1 + max(int(name.split(".")[1]) for name in weights if name.startswith(f"{path}."))


def sparse(weights: Weights, file: Path) -> Path:
    """Write a file of these names and shapes in bfloat16 whose weights are a hole: full size, and no room on disk."""
    header: dict[str, object] = {}
    end = 0
    for name, tensor in weights.items():
        begin, end = end, end + 2 * tensor.numel()
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + end)
    return file
