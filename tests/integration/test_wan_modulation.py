"""Wan 5B's blocks, modulated by frame, against diffusers' own, modulated by token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel

from safelightd.pipelines import wan_modulation

FRAMES, SIDE = 5, 8
TOKENS_A_FRAME = SIDE * SIDE // 4


@pytest.fixture
def both() -> tuple[Any, Any]:
    """The same transformer twice, the second one shared."""
    made = []
    for _ in range(2):
        torch.manual_seed(7)
        transformer = WanTransformer3DModel(
            num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=16, num_layers=3, ffn_dim=64,
            text_dim=32, freq_dim=32, patch_size=(1, 2, 2),
        ).eval()  # fmt: skip
        for parameter in transformer.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
        made.append(transformer)
    wan_modulation.share(made[1])
    return made[0], made[1]


def timesteps(*, with_picture: bool) -> torch.Tensor:
    """What the loop gives: one a token, 0 for those of a given picture."""
    every = torch.full((1, FRAMES * TOKENS_A_FRAME), 431.0)
    every[:, : TOKENS_A_FRAME if with_picture else 0] = 0.0
    return every


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_picture", [False, True])
def test_modulation_by_frame_gives_the_bits_of_modulation_by_token(
    with_picture: bool, dtype: torch.dtype, both: tuple[Any, Any]
) -> None:
    latents = torch.randn(1, 16, FRAMES, SIDE, SIDE, generator=torch.manual_seed(1)).to(dtype)
    prompt = torch.randn(1, 16, 32, generator=torch.manual_seed(2)).to(dtype)
    stock, ours = (
        transformer.to(dtype)(latents, timesteps(with_picture=with_picture), prompt, return_dict=False)[0]
        for transformer in both
    )

    assert torch.equal(stock, ours)


@torch.no_grad()
def test_a_block_is_given_one_modulation_a_frame(both: tuple[Any, Any]) -> None:
    _, ours = both
    seen = []
    ours.blocks[1].register_forward_pre_hook(lambda _block, given: seen.append(tuple(given[2].shape)))
    ours(torch.randn(1, 16, FRAMES, SIDE, SIDE), timesteps(with_picture=True), torch.randn(1, 16, 32))

    assert seen == [(1, FRAMES, 6, 24)]
