"""The video VAE's weights applied to whole clips at once, as training needs it: the same numbers, several times faster.

AutoencoderKLWan goes through a clip in chunks and convolves in three dimensions, which suits long clips and little
memory. Here a clip is one tensor with the channels last, and a causal convolution over three frames is one over a
picture whose channels are those of three frames. tests/integration/test_drawings.py holds that values and gradients
are the class's own. Knows no loss and no clock.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch import _dynamo as dynamo
from torch.nn.functional import conv2d, linear, pad, scaled_dot_product_attention, silu

TAPS = 3
"""Frames that a causal convolution sees: its own and the two before it."""


def encoded(vae: Any, clips: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and logarithm of the variance, (B, C, T, H/16, W/16), of clips (B, 3, 4T - 3, H, W)."""
    encoder, patch = vae.encoder, vae.config.patch_size
    x = _conv(_framed(_patched(clips, patch)), encoder.conv_in)
    for block in encoder.down_blocks:
        before = x
        for resnet in block.resnets:
            x = _resnet(x, resnet)
        if block.downsampler is not None:
            x = _downsampled(x, block.downsampler)
        x = x + _averaged(before, block.avg_shortcut)
    x = _middle(x, encoder.mid_block)
    x = _conv(_activated(x, encoder.norm_out), encoder.conv_out)
    mean, logvar = _linear(x, vae.quant_conv).permute(0, 4, 1, 2, 3).chunk(2, 1)
    return mean, logvar.clamp(-30.0, 20.0)


def decoded(vae: Any, latents: Tensor) -> Tensor:
    """Return clips of latents, without the class's clamp, through which no gradient comes back."""
    decoder = vae.decoder
    x = _linear(latents.permute(0, 2, 3, 4, 1), vae.post_quant_conv)
    x = _middle(_conv(_framed(x), decoder.conv_in), decoder.mid_block)
    for block in decoder.up_blocks:
        before = x
        for resnet in block.resnets:
            x = _resnet(x, resnet)
        if block.upsampler is not None:
            x = _upsampled(x, block.upsampler) + _repeated(before, block.avg_shortcut)
    x = _conv(_activated(x, decoder.norm_out), decoder.conv_out)
    return _unpatched(x, vae.config.patch_size)


def _framed(x: Tensor) -> Tensor:
    """Return (B, T, H, W, 3 C): with each frame's channels, those of the two before it; before the first are zeros."""
    frames = x.shape[1]
    padded = pad(x, (0, 0, 0, 0, 0, 0, TAPS - 1, 0))
    return torch.cat([padded[:, i : i + frames] for i in range(TAPS)], -1)


def _framed_activation(x: Tensor, gamma: Tensor) -> Tensor:
    """Return, framed, the norm over channels and SiLU of it."""
    return _framed(silu(_normed(x, gamma)).to(x.dtype))


def _normed(x: Tensor, gamma: Tensor) -> Tensor:
    """Return the root-mean-square norm over channels, in float32."""
    wide = x.float()
    length = (wide * wide).sum(-1, keepdim=True).sqrt().clamp(min=1e-12)
    normed: Tensor = wide / length * (x.shape[-1] ** 0.5 * gamma)
    return normed


_framing: Callable[[Tensor, Tensor], Tensor] = _framed_activation


def activate(*, compiled: bool) -> None:
    """Have what lies between the convolutions compiled, or not: as it is, each of its steps goes through memory.

    Every shape is compiled anew, so only what is done thousands of times is worth it.
    """
    global _framing
    dynamo.config.recompile_limit = SHAPES_MAX
    _framing = torch.compile(_framed_activation, dynamic=False) if compiled else _framed_activation


SHAPES_MAX = 100
"""That activations have in one process, of two sizes of clips: torch's own limit is eight, after which nothing is."""


def _activated(x: Tensor, norm: Any) -> Tensor:
    return _framing(x, norm.gamma.flatten())


def _conv(framed: Tensor, conv: Any) -> Tensor:
    """Return a causal 3x3x3 convolution of what _framed returned."""
    weight = conv.weight.permute(0, 2, 1, 3, 4).flatten(1, 2)
    return _pictures(framed, weight, conv.bias, 1, 1)


def _pictures(x: Tensor, weight: Tensor, bias: Tensor, stride: int, padding: int) -> Tensor:
    """Return a 2-D convolution of each frame of (B, T, H, W, C)."""
    pictures = x.flatten(0, 1).permute(0, 3, 1, 2)
    weight = weight.contiguous(memory_format=torch.channels_last)
    drawn = conv2d(pictures, weight, bias, stride, padding).permute(0, 2, 3, 1)
    return drawn.view(*x.shape[:2], *drawn.shape[1:])


def _linear(x: Tensor, conv: Any) -> Tensor:
    """Return a convolution of one pixel and one frame, or of framed pixels."""
    weight = conv.weight.flatten(2)  # (O, C, 1) or (O, C, TAPS)
    return linear(x, weight.transpose(1, 2).flatten(1), conv.bias)


def _resnet(x: Tensor, block: Any) -> Tensor:
    shortcut = x if isinstance(block.conv_shortcut, torch.nn.Identity) else _linear(x, block.conv_shortcut)
    x = _conv(_activated(x, block.norm1), block.conv1)
    return _conv(_activated(x, block.norm2), block.conv2) + shortcut


def _middle(x: Tensor, block: Any) -> Tensor:
    x = _resnet(x, block.resnets[0])
    for attention, resnet in zip(block.attentions, block.resnets[1:], strict=True):
        x = _resnet(_attended(x, attention), resnet)
    return x


def _attended(x: Tensor, block: Any) -> Tensor:
    """Return what the pixels of each frame take from each other, added."""
    normed = _normed(x, block.norm.gamma.flatten()).to(x.dtype)
    rows = _linear(normed, block.to_qkv).flatten(0, 1).flatten(1, 2)[:, None]
    query, key, value = rows.chunk(3, -1)
    taken = scaled_dot_product_attention(query, key, value)[:, 0].view(x.shape)
    return x + _linear(taken, block.proj)


def _downsampled(x: Tensor, block: Any) -> Tensor:
    """Return half the side; where the block has a convolution over time, half the frames after the first too."""
    conv = block.resample[1]
    x = _pictures(pad(x, (0, 0, 0, 1, 0, 1)), conv.weight, conv.bias, 2, 0)
    if not hasattr(block, "time_conv"):
        return x
    # The first frame passes as it is; each other sees the frame two, one and none before it.
    seen = torch.cat([x[:, :-2:2], x[:, 1:-1:2], x[:, 2::2]], -1)
    return torch.cat([x[:, :1], _linear(seen, block.time_conv)], 1)


def _upsampled(x: Tensor, block: Any) -> Tensor:
    if hasattr(block, "time_conv"):
        # The first frame stays one; those after it become two each and never see it.
        both = _linear(_framed(x[:, 1:]), block.time_conv)
        both = both.unflatten(-1, (2, -1)).permute(0, 1, 4, 2, 3, 5).flatten(1, 2)
        x = torch.cat([x[:, :1], both], 1)
    batch, frames, rows, columns, channels = x.shape
    larger = x[:, :, :, None, :, None].expand(-1, -1, -1, 2, -1, 2, -1)
    conv = block.resample[1]
    return _pictures(larger.reshape(batch, frames, 2 * rows, 2 * columns, channels), conv.weight, conv.bias, 1, 1)


def _averaged(x: Tensor, block: Any) -> Tensor:
    """Return the shortcut of a block that shrinks: means over neighbours and channels."""
    time, side = block.factor_t, block.factor_s
    x = pad(x, (0, 0, 0, 0, 0, 0, -x.shape[1] % time, 0))
    batch, frames, rows, columns, channels = x.shape
    x = x.view(batch, frames // time, time, rows // side, side, columns // side, side, channels)
    shape = (batch, frames // time, rows // side, columns // side, block.out_channels, -1)
    return x.permute(0, 1, 3, 5, 7, 2, 4, 6).reshape(shape).mean(-1)


def _repeated(x: Tensor, block: Any) -> Tensor:
    """Return the shortcut of a block that grows: each pixel several times; the first frame once."""
    time, side = block.factor_t, block.factor_s
    batch, frames, rows, columns, _ = x.shape
    x = x.repeat_interleave(block.repeats, -1)
    x = x.view(batch, frames, rows, columns, block.out_channels, time, side, side).permute(0, 1, 5, 2, 6, 3, 7, 4)
    return x.reshape(batch, frames * time, rows * side, columns * side, block.out_channels)[:, time - 1 :]


def _patched(clips: Tensor, patch: int) -> Tensor:
    """Return (B, T, H/patch, W/patch, channels) of clips (B, 3, T, H, W)."""
    batch, channels, frames, rows, columns = clips.shape
    x = clips.view(batch, channels, frames, rows // patch, patch, columns // patch, patch)
    return x.permute(0, 2, 3, 5, 1, 6, 4).flatten(4)


def _unpatched(x: Tensor, patch: int) -> Tensor:
    x = x.unflatten(-1, (-1, patch, patch)).permute(0, 4, 1, 2, 6, 3, 5)  # B, 3, T, rows, in a row, columns, in one
    return x.flatten(3, 4).flatten(4, 5)
