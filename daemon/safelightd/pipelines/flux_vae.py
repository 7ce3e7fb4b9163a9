"""FLUX's VAE strip by strip: the sums of a whole decode in two fifths of its memory, and no seams.

A tile of diffusers' has a mean and a deviation of its own in every group norm, and attends to itself alone: demo-flux,
whose pictures two tiles of 64 go into each way, drew 42 of 100 prompts wrong so (H100, torch 2.11.0+cu130, 2026-11-26).
Here every layer goes over the whole picture, from edge to edge and so many rows at a time, before the next one begins.
Norms measure all rows first; a convolution is shown the row above and below; attention, which is at an eighth of the
picture's side, is left whole. What is left to differ is how a library rounds sums of another shape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import nn
from torch.nn import functional

from safelight.plan import Plan

Rows = Callable[[int, int], torch.Tensor]
"""Rows of what a convolution is shown, from the first one to before the last."""


def _go_on() -> None: ...


def lessen(vae: Any, plan: Plan, ask: Callable[[], None] = _go_on) -> None:
    """Make FLUX's VAE take less memory at once, as the plan has it.

    Args:
        ask: is called before each strip, and may raise.
    """
    if plan.vae_strip_rows:
        in_strips(vae, plan.vae_strip_rows, ask)
    if plan.vae_tiling:
        in_tiles(vae, plan.vae_tile_pixels)


def in_tiles(vae: Any, side: int) -> None:
    """Make it work in diffusers' own tiles of so many pixels; of its 1024 none is smaller than a picture of that."""
    vae.enable_tiling()
    vae.tile_sample_min_size = side
    vae.tile_latent_min_size = side // 8


def in_strips(vae: Any, rows: int, ask: Callable[[], None] = _go_on) -> None:
    """Make an AutoencoderKL take so many rows at a time, of one picture, to encode and to decode.

    A layer of another kind than FLUX's stays as it is: its result is the same, and its memory that of the whole.

    Args:
        ask: is called before each strip, and may raise.
    """
    for part in (*vae.encoder.modules(), *vae.decoder.modules()):
        if type(part) is ResnetBlock2D and _is_plain(part):
            part.__class__ = _Resnet
            part.conv1.padding = part.conv2.padding = (0, 1)  # of rows each strip brings its own
        elif type(part) is Upsample2D and part.norm is None and part.use_conv and part.interpolate:
            part.__class__ = _Upsample
            part.conv.padding = (0, 1)
        elif type(part) is Downsample2D and part.norm is None and part.use_conv and part.padding == 0:
            part.__class__ = _Downsample
        else:
            continue
        part.rows, part.ask = rows, ask
    for coder in (vae.encoder, vae.decoder):
        if isinstance(coder.conv_act, nn.SiLU):
            coder.conv_act.inplace = True  # it follows a norm, whose result nobody else needs


def _is_plain(block: Any) -> bool:
    return (
        block.time_emb_proj is None
        and block.time_embedding_norm in ("default", "group")  # the decoder's word for a plain norm
        and block.upsample is block.downsample is None
        and block.output_scale_factor == 1
        and isinstance(block.nonlinearity, nn.SiLU)
    )


class _InStrips:
    rows: int
    ask: Callable[[], None]

    def strips(self, x: torch.Tensor) -> Iterator[tuple[int, int]]:
        """Yield where each strip of (1, C, H, W) begins, and ends."""
        for top, bottom in _strips(x, self.rows):
            self.ask()
            yield top, bottom


class _Resnet(_InStrips, ResnetBlock2D):  # type: ignore[misc] # diffusers has no types
    """Holds its input and one more of its size: where it has no shortcut, its result takes the input's place."""

    def forward(
        self,
        input_tensor: torch.Tensor,
        temb: torch.Tensor | None = None,  # noqa: ARG002 - a VAE has no timesteps
    ) -> torch.Tensor:
        x = input_tensor
        normed = _activated(self.norm1, x, self.rows)
        hidden = x.new_empty(1, self.out_channels, *x.shape[2:])
        for top, bottom in self.strips(x):
            hidden[:, :, top:bottom] = self.conv1(_bordered(normed, top, bottom, x.shape[2]))
        normed = _activated(self.norm2, hidden, self.rows)
        made = x if self.conv_shortcut is None else torch.empty_like(hidden)
        for top, bottom in self.strips(x):
            strip = x[:, :, top:bottom]
            kept = strip if self.conv_shortcut is None else self.conv_shortcut(strip)
            made[:, :, top:bottom] = kept + self.conv2(_bordered(normed, top, bottom, x.shape[2]))
        return made


class _Upsample(_InStrips, Upsample2D):  # type: ignore[misc] # as above
    """Enlarges no more than a strip before it is convolved."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        output_size: int | None = None,  # noqa: ARG002 - twice the size is all that a VAE asks for
    ) -> torch.Tensor:
        x = hidden_states
        height, width = 2 * x.shape[2], 2 * x.shape[3]

        def enlarged(first: int, last: int) -> torch.Tensor:
            some = functional.interpolate(x[:, :, first // 2 : (last + 1) // 2], scale_factor=2.0, mode="nearest")
            return some[:, :, first % 2 : first % 2 + last - first]

        made = x.new_empty(1, self.out_channels, height, width)
        for top, bottom in self.strips(made):
            made[:, :, top:bottom] = self.conv(_bordered(enlarged, top, bottom, height))
        return made


class _Downsample(_InStrips, Downsample2D):  # type: ignore[misc] # as above
    """Puts the border, to the right and below, around a strip alone."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        x = hidden_states
        height, width = x.shape[2] // 2, x.shape[3] // 2
        made = x.new_empty(1, self.out_channels, height, width)
        for top, bottom in self.strips(made):
            some = x[:, :, 2 * top : 2 * bottom + 1]
            below = 2 * (bottom - top) + 1 - some.shape[2]
            made[:, :, top:bottom] = self.conv(functional.pad(some, (0, 1, 0, below)))
        return made


def _strips(x: torch.Tensor, rows: int) -> Iterator[tuple[int, int]]:
    height = x.shape[2]
    for top in range(0, height, rows):
        yield top, min(top + rows, height)


def _bordered(shown: Rows, top: int, bottom: int, height: int) -> torch.Tensor:
    """Return those rows with the ones above and below; beyond the picture's edge they are zero."""
    first, last = max(top - 1, 0), min(bottom + 1, height)
    missing = (first - (top - 1), bottom + 1 - last)
    some = shown(first, last)
    return functional.pad(some, (0, 0, *missing)) if any(missing) else some


def _activated(norm: nn.GroupNorm, x: torch.Tensor, rows: int) -> Rows:
    """Return what gives rows of x (1, C, H, W) normalised by the figures of all of it, and through SiLU."""
    mean, variance = (
        figure.repeat_interleave(norm.num_channels // norm.num_groups) for figure in _figures(x, norm.num_groups, rows)
    )
    weight, bias = norm.weight.float(), norm.bias.float()

    def normed(first: int, last: int) -> torch.Tensor:
        # A group norm whose figures are known is a batch norm that has learnt them.
        some = functional.batch_norm(x[:, :, first:last], mean, variance, weight, bias, training=False, eps=norm.eps)
        return functional.silu(some, inplace=True)

    return normed


def _figures(x: torch.Tensor, groups: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and variance of each group in float32, (groups,), joined from those of strips.

    By Chan, Golub and LeVeque (Updating formulae and a pairwise algorithm for computing sample variances, 1979): what
    a strip's mean is off from the whole's belongs to the variance. A sum of squares would lose it in float32.
    """
    shares, means, variances = [], [], []
    for top, bottom in _strips(x, rows):
        some = x[0, :, top:bottom].reshape(groups, -1).float()
        variance, mean = torch.var_mean(some, dim=1, correction=0)
        shares.append((bottom - top) / x.shape[2])
        means.append(mean)
        variances.append(variance)
    share = torch.tensor(shares, device=x.device)[:, None]
    apart = torch.stack(means)
    mean = (share * apart).sum(0)
    return mean, (share * (torch.stack(variances) + (apart - mean) ** 2)).sum(0)
