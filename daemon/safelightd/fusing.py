"""Adding a LoRA to a weight: in float32, all of them together, rounded once, where the weight lies. Knows no file.

What is fused has the shapes and takes the time of what is not; compiled code does not notice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

AT_ONCE = 2**22
"""Weights that are changed together: 32 MiB in float32, the sum and what is added."""


@dataclass(frozen=True)
class Change:
    """What one LoRA adds to one weight: scale * up @ down, or, without `down`, scale * up."""

    scale: float
    up: torch.Tensor
    """(out, rank), or of the weight's own shape; in any floating dtype, on the CPU."""
    down: torch.Tensor | None = None
    """(rank, in), what is behind the weight's first dimension counted together."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what it adds."""
        return tuple(self.up.shape) if self.down is None else (self.up.shape[0], self.down.shape[1])

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether it can be added to a weight of this shape."""
        if self.down is None:
            return self.shape == shape
        ranks_agree = self.up.ndim == self.down.ndim == 2 and self.up.shape[1] == self.down.shape[0]
        return ranks_agree and len(shape) > 1 and self.shape == (shape[0], math.prod(shape[1:]))


@torch.no_grad()
def fuse(weight: torch.Tensor, changes: Sequence[Change], device: torch.device) -> None:
    """Add `changes` to `weight` in place.

    Args:
        weight: contiguous, of any floating dtype, on any device.
        device: computes; a weight in pinned RAM passes through the GPU, and gets the bits of one that lies there. It
            has them when the current stream has come so far: what is read next need not wait for the GPU.
    """
    rows = weight.view(weight.shape[0], -1)
    factors = [
        (change.scale, _there(change.up, device).view(rows.shape[0], -1), change.down if change.down is None else
         _there(change.down, device))
        for change in changes
    ]  # fmt: skip
    is_queued = weight.is_pinned()
    step = max(AT_ONCE // rows.shape[1], 1)
    for begin in range(0, rows.shape[0], step):
        part = rows[begin : begin + step]
        total = part.to(device, torch.float32, non_blocking=True)  # else the CPU widens it, and twice the bytes pass
        for scale, up, down in factors:
            piece = up[begin : begin + step]
            total = total + scale * piece if down is None else torch.addmm(total, piece, down, alpha=scale)
        part.copy_(total.to(weight.dtype), non_blocking=is_queued)


def _there(factor: torch.Tensor, device: torch.device) -> torch.Tensor:
    # Copied also on the CPU: in a file's bytes they lie anywhere, and BLAS rounds by where they lie.
    return factor.to(device, torch.float32, copy=True, non_blocking=True).contiguous()
