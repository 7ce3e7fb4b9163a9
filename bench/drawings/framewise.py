"""Wan's transformer applied with one noise level a frame, as training needs it: the same numbers in less memory.

WanTransformer3DModel is told a noise level for each token and holds six modulations of each: at 80 tokens, eight
times what it is about. All tokens of a frame have the same one. tests/integration/test_drawings.py holds that values
and gradients are the class's own. Knows no loss and no clock.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear, rms_norm, scaled_dot_product_attention

Block = Callable[[dict[str, Tensor], Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
EPS = 1e-6
"""Of every norm of the class, by its default."""
HEAD = 32
PATCH = 2


def velocity(transformer: Any, noisy: Tensor, sigma: Tensor, embeds: Tensor, block: Block) -> Tensor:
    """Return what the transformer predicts of (B, C, T, H, W) at noise levels (B, T), 0 to 1.

    Args:
        block: `block_applied`, or that compiled.
    """
    batch, channels, frames, rows, columns = noisy.shape
    rows, columns = rows // PATCH, columns // PATCH
    cos, sin = (table[0, :, 0] for table in transformer.rope(noisy))
    cos, sin = cos[:, 0::2], sin[:, 1::2]
    patches = noisy.view(batch, channels, frames, rows, PATCH, columns, PATCH).permute(0, 2, 3, 5, 1, 4, 6)
    embedding = transformer.patch_embedding
    x = linear(patches.flatten(4).flatten(2, 3), embedding.weight.flatten(1), embedding.bias)
    time, modulations, text, _ = transformer.condition_embedder(1000 * sigma.flatten(), embeds, None, frames)
    modulations = modulations.unflatten(2, (6, -1))
    for part in transformer.blocks:
        x = block(_weights(part), x, text, modulations, cos, sin)
    shift, scale = (transformer.scale_shift_table[None] + time[:, :, None]).chunk(2, 2)
    x = linear((_normed(x) * (1 + scale) + shift).to(x.dtype), transformer.proj_out.weight, transformer.proj_out.bias)
    x = x.view(batch, frames, rows, columns, PATCH, PATCH, channels).permute(0, 6, 1, 2, 4, 3, 5)
    return x.flatten(5, 6).flatten(3, 4)


def block_applied(
    weights: dict[str, Tensor], x: Tensor, text: Tensor, modulations: Tensor, cos: Tensor, sin: Tensor
) -> Tensor:
    """Return (B, T, patches, width) after one block.

    Args:
        weights: by the block's own names; tensors alone, so that compiled code serves every block.
        modulations: (B, T, 6, width).
    """
    shapes = x.shape
    shift, scale, gate, shift_2, scale_2, gate_2 = (
        (weights["scale_shift_table"][None] + modulations.float()).unsqueeze(3).unbind(2)
    )

    seen = (_normed(x) * (1 + scale) + shift).to(x.dtype).flatten(1, 2)
    query, key, value = linear(seen, *_joined(weights, "attn1", "qkv")).chunk(3, -1)
    query = _turned(_heads(_scaled(query, weights["attn1.norm_q.weight"])), cos, sin).to(value.dtype)
    key = _turned(_heads(_scaled(key, weights["attn1.norm_k.weight"])), cos, sin).to(value.dtype)
    taken = scaled_dot_product_attention(query, key, _heads(value)).transpose(1, 2).flatten(2)
    taken = linear(taken, weights["attn1.to_out.0.weight"], weights["attn1.to_out.0.bias"]).view(shapes)
    x = (x.float() + taken * gate).to(x.dtype)

    seen = (_normed(x) * weights["norm2.weight"] + weights["norm2.bias"]).to(x.dtype).flatten(1, 2)
    query = linear(seen, weights["attn2.to_q.weight"], weights["attn2.to_q.bias"])
    key, value = linear(text, *_joined(weights, "attn2", "kv")).chunk(2, -1)
    query = _heads(_scaled(query, weights["attn2.norm_q.weight"])).to(value.dtype)
    key = _heads(_scaled(key, weights["attn2.norm_k.weight"])).to(value.dtype)
    taken = scaled_dot_product_attention(query, key, _heads(value)).transpose(1, 2).flatten(2)
    x = x + linear(taken, weights["attn2.to_out.0.weight"], weights["attn2.to_out.0.bias"]).view(shapes)

    seen = (_normed(x) * (1 + scale_2) + shift_2).to(x.dtype)
    wide = gelu(linear(seen, weights["ffn.net.0.proj.weight"], weights["ffn.net.0.proj.bias"]), approximate="tanh")
    out = linear(wide, weights["ffn.net.2.weight"], weights["ffn.net.2.bias"])
    return (x.float() + out.float() * gate_2).to(x.dtype)


def _weights(block: Any) -> dict[str, Tensor]:
    return dict(block.named_parameters())


def _joined(weights: dict[str, Tensor], attention: str, letters: str) -> tuple[Tensor, Tensor]:
    """Return several projections as one."""
    weight, bias = (
        torch.cat([weights[f"{attention}.to_{letter}.{kind}"] for letter in letters]) for kind in ("weight", "bias")
    )
    return weight, bias


def _normed(x: Tensor) -> Tensor:
    normed: Tensor = layer_norm(x.float(), x.shape[-1:], eps=EPS)
    return normed


def _scaled(x: Tensor, weight: Tensor) -> Tensor:
    scaled: Tensor = rms_norm(x.float(), x.shape[-1:], weight, EPS)
    return scaled


def _heads(x: Tensor) -> Tensor:
    """Return (B, heads, tokens, HEAD)."""
    heads: Tensor = x.unflatten(2, (-1, HEAD))
    return heads.transpose(1, 2)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return a rotary position embedding of pairs of neighbours."""
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned: Tensor = torch.stack([first * cos - second * sin, first * sin + second * cos], -1).flatten(-2)
    return turned
