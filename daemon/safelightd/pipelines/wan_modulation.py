"""Wan 5B's blocks with one modulation a latent frame instead of one a token. Same bits, less memory.

diffusers gives each token of TI2V-5B a timestep of its own, and so six vectors of modulation in float32 to each of
27,280 tokens of a clip of 1280x704x121, in each block: 14.5 GiB in all, where one timestep for all takes 11.5 (H100,
torch 2.11, 2026-11-22). But all tokens of a frame share theirs: it is t, or 0 where the frame is the given picture.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from torch import nn


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
    """Make a WanTransformer3DModel modulate by frame; call it before anything hooks or compiles its blocks."""
    model: Any = transformer
    frames = [0]

    def count(_transformer: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        frames[0] = given[0].shape[2] // model.config.patch_size[0]

    def thin(_embedder: nn.Module, _given: Any, made: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        temb, modulation, *prompts = made  # (1, tokens, width), (1, tokens, 6 x width)
        return temb, modulation.unflatten(1, (frames[0], -1))[:, :, 0].clone(), *prompts

    model.register_forward_pre_hook(count)
    model.condition_embedder.register_forward_hook(thin)
    for block in model.blocks:
        block.__class__ = FrameModulatedBlock


def _modulated(normed: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, frames: int) -> torch.Tensor:
    modulated: torch.Tensor = normed.unflatten(1, (frames, -1)) * (1 + scale) + shift
    return modulated.flatten(1, 2)


def _times(tokens: torch.Tensor, gate: torch.Tensor, frames: int) -> torch.Tensor:
    gated: torch.Tensor = tokens.unflatten(1, (frames, -1)) * gate
    return gated.flatten(1, 2)
