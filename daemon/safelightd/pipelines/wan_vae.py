"""Wan's VAE in 16 bit with fewer passes over memory: the same sums, rounded less often.

Its decoder normalises 33 times a part, and diffusers does so in nine passes, several of them in float32; before each
convolution it copies what is convolved once more to put a border around it. Neither computes anything, and at 1280x704
they move 13 GB for each part of four frames.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, WanRMS_norm
from torch import nn
from torch.nn import functional

SMALLEST = 1e-12
"""What torch's normalize takes a shorter length for."""


class Norm(WanRMS_norm):  # type: ignore[misc] # diffusers has no types
    """One pass to measure, one to divide, one for gamma. Lengths and quotients are float32; the result is rounded
    twice, where diffusers rounds it three times."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        length = torch.linalg.vector_norm(
            x, dim=1 if self.channel_first else -1, keepdim=True, dtype=torch.float32
        ).clamp_min_(SMALLEST)
        normalised = torch.mul(x, length.reciprocal_().mul_(self.scale), out=torch.empty_like(x))
        normalised *= self.gamma
        return normalised if isinstance(self.bias, float) else normalised.add_(self.bias)


class Convolution(WanCausalConv3d):  # type: ignore[misc] # as above
    """Leaves the border of zeros in space to the kernel; only in time, where it lies on one side, it is joined on."""

    def forward(self, x: torch.Tensor, cache_x: torch.Tensor | None = None) -> torch.Tensor:
        wide, _, high, _, missing, _ = self._padding
        if cache_x is not None and missing > 0:
            x = torch.cat([cache_x.to(x.device), x], dim=2)
            missing -= cache_x.shape[2]
        if missing > 0:
            x = functional.pad(x, (0, 0, 0, 0, missing, 0))
        return functional.conv3d(x, self.weight, self.bias, self.stride, (0, high, wide), self.dilation, self.groups)


def lighten(vae: Any) -> None:
    """Make a decoder in 16 bit run so; in float32 it stays diffusers' own, and gives its bits."""
    if vae.dtype not in (torch.bfloat16, torch.float16):
        return
    for part in vae.decoder.modules():
        if type(part) is WanRMS_norm:
            part.__class__ = Norm
        elif type(part) is WanCausalConv3d:
            part.__class__ = Convolution
        elif isinstance(part, nn.SiLU):
            part.inplace = True  # each follows a norm, whose result nobody else needs
