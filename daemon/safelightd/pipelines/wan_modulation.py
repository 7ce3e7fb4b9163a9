"""Wan 5B with a timestep and a modulation for each latent frame, not for each token. Same bits, less memory and work.

diffusers embeds a timestep for each token of TI2V-5B, which are 27,280 in a clip of 1280x704x121: 1 GiB of modulation
in bfloat16 where it is made, and six vectors of it in float32 for each token in each block. But all tokens of a frame
share theirs: t, or 0 where the frame is the given picture. So a shared transformer is given one timestep or two.

They cannot be embedded as one row or two: on a CPU a product is rounded by how many rows it has. At the 5B's widths
(256, 3072, 18432) in float32, up to 15 rows differ from 27,280 with one thread and up to 384 with two or more; with the
kernels for AVX2 up to 16 and up to 640; in bfloat16 up to 320. 1024 and 2048 rows gave the bits of 1560 and of 27,280
in all of this (oneMKL and oneDNN of torch 2.13, a CPU with AVX-512, 1 to 16 threads; 2026-11-26). Where 64 is the width
they did but for the kernels for AVX2 with two threads. On a GPU nobody has compared them yet.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from torch import nn

ROWS_MAX = 1024
"""That are embedded: fewer are rounded otherwise than all, as is said above. 36 MiB of modulation in bfloat16."""


class FrameModulatedBlock(WanTransformerBlock):  # type: ignore[misc] # diffusers has no types
    """diffusers' block for tokens whose modulation comes a latent frame at a time."""

    def forward(
        self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, temb: torch.Tensor, rotary_emb: Any
    ) -> torch.Tensor:
        """Return the next hidden states.

        Args:
            hidden_states: (1, tokens, width), frame after frame.
            temb: (1, frames, 6, width).
        """
        frames = temb.shape[1]
        rows = (self.scale_shift_table.unsqueeze(0) + temb.float()).chunk(6, dim=2)  # each (1, frames, 1, width)
        shift, scale, gate, shift_ff, scale_ff, gate_ff = rows

        seen = _modulated(self.norm1(hidden_states.float()), scale, shift, frames).type_as(hidden_states)
        attended = self.attn1(seen, None, None, rotary_emb)
        hidden_states = (hidden_states.float() + _times(attended, gate, frames)).type_as(hidden_states)

        seen = self.norm2(hidden_states.float()).type_as(hidden_states)
        hidden_states = hidden_states + self.attn2(seen, encoder_hidden_states, None, None)

        seen = _modulated(self.norm3(hidden_states.float()), scale_ff, shift_ff, frames).type_as(hidden_states)
        fed = self.ffn(seen)
        return (hidden_states.float() + _times(fed.float(), gate_ff, frames)).type_as(hidden_states)


def share(transformer: nn.Module) -> None:
    """Make a WanTransformer3DModel take timesteps (1, 1), of the whole clip, or (1, 2), of the first latent frame and
    of all others; call it before anything hooks or compiles its blocks."""
    model: Any = transformer
    clip = Shape(0, 0)

    def measure(_transformer: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        nonlocal clip
        frames, height, width = (
            side // patch for side, patch in zip(given[0].shape[2:], model.config.patch_size, strict=True)
        )
        clip = Shape(frames, height * width)

    def repeat(_embedder: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
        timesteps, *prompts = given  # (1,) or (2,)
        first, others = timesteps[:1].expand(clip.rows_of_first), timesteps[-1:].expand(clip.rows - clip.rows_of_first)
        return (torch.cat([first, others]), *prompts), {**named, "timestep_seq_len": clip.rows}

    def spread(_embedder: nn.Module, _given: Any, made: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        temb, modulation, *prompts = made  # (1, rows, width), (1, rows, 6 x width)
        by_token = clip.by_frame(temb).unsqueeze(2).expand(-1, -1, clip.tokens_a_frame, -1).flatten(1, 2)
        return by_token, clip.by_frame(modulation), *prompts

    model.register_forward_pre_hook(measure)
    model.condition_embedder.register_forward_pre_hook(repeat, with_kwargs=True)
    model.condition_embedder.register_forward_hook(spread)
    for block in model.blocks:
        block.__class__ = FrameModulatedBlock


@dataclass(frozen=True)
class Shape:
    """Of a clip in tokens, and of what is embedded for it: rows of its first frame's timestep, then of the others'."""

    frames: int
    tokens_a_frame: int

    @property
    def rows(self) -> int:
        return min(self.frames * self.tokens_a_frame, ROWS_MAX)

    @property
    def rows_of_first(self) -> int:
        return min(self.tokens_a_frame, self.rows // 2)

    def by_frame(self, embedded: torch.Tensor) -> torch.Tensor:
        """Return (1, frames, width) of (1, rows, width)."""
        first, other = embedded[:, :1], embedded[:, self.rows_of_first :][:, :1]
        return torch.cat([first, other.expand(-1, self.frames - 1, -1)], dim=1)


def _modulated(normed: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, frames: int) -> torch.Tensor:
    modulated: torch.Tensor = normed.unflatten(1, (frames, -1)) * (1 + scale) + shift
    return modulated.flatten(1, 2)


def _times(tokens: torch.Tensor, gate: torch.Tensor, frames: int) -> torch.Tensor:
    gated: torch.Tensor = tokens.unflatten(1, (frames, -1)) * gate
    return gated.flatten(1, 2)
