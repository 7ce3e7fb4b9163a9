"""Random weights that are the same on every machine, scaled so that signals neither die nor explode."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)


@torch.no_grad()
def fill(module: M, name: str, gains: Mapping[str, float] = MappingProxyType({})) -> M:
    """Return `module` with every parameter drawn anew from a stream that `name` seeds.

    `gains` makes the parameters louder whose names end so. Norm scales become 1; the rest is uniform with the
    variance 1 / fan_in. Uniform, because torch makes such numbers of integers with exact arithmetic alone: a normal
    distribution would go through each machine's own logarithm.
    """
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
    stream = torch.Generator().manual_seed(seed)
    for path, parameter in sorted(module.named_parameters()):
        if _is_norm_scale(path, parameter):
            parameter.fill_(1.0)
            continue
        fan_in = parameter.numel() // parameter.shape[0]
        bound = BIAS_BOUND if parameter.ndim == 1 else math.sqrt(3 / fan_in)
        bound *= next((gain for end, gain in gains.items() if path.endswith(end)), 1.0)
        parameter.copy_(torch.rand(parameter.shape, generator=stream).sub_(0.5).mul_(2 * bound))
    return module


BIAS_BOUND = 0.1
"""Small beside signals of size 1, and not zero, so that a forgotten bias shows."""


def _is_norm_scale(path: str, parameter: nn.Parameter) -> bool:
    return path.endswith(".gamma") or (path.endswith("weight") and parameter.ndim == 1)
