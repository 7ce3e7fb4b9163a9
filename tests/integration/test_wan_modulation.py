"""Wan 5B's blocks, modulated by frame, against diffusers' own, modulated by token."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel

from safelightd.pipelines import wan_modulation

FRAMES = 5
SIDES = {"all rows": 8, "fewer rows than tokens": 32}
"""Of a latent frame: with 16 tokens and with 256."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Products this small are rounded by how their rows are shared out."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def both() -> tuple[Any, Any]:
    """The same transformer twice, the second one shared."""
    made = []
    for _ in range(2):
        torch.manual_seed(7)
        transformer = WanTransformer3DModel(
            num_attention_heads=2, attention_head_dim=32, in_channels=16, out_channels=16, num_layers=3, ffn_dim=64,
            text_dim=32, freq_dim=32, patch_size=(1, 2, 2),
        ).eval()  # fmt: skip
        for parameter in transformer.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
        made.append(transformer)
    wan_modulation.share(made[1])
    return made[0], made[1]


def timesteps(side: int, *, with_picture: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """One a token, as diffusers has them, 0 for those of a given picture; and what our loop gives."""
    tokens_a_frame = side * side // 4
    every = torch.full((1, FRAMES * tokens_a_frame), 431.0)
    every[:, : tokens_a_frame if with_picture else 0] = 0.0
    return every, torch.tensor([[0.0, 431.0]] if with_picture else [[431.0]])


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_picture", [False, True])
@pytest.mark.parametrize("side", SIDES.values(), ids=SIDES)
def test_modulation_by_frame_gives_the_bits_of_modulation_by_token(
    side: int, with_picture: bool, dtype: torch.dtype, both: tuple[Any, Any]
) -> None:
    latents = torch.randn(1, 16, FRAMES, side, side, generator=torch.manual_seed(1)).to(dtype)
    prompt = torch.randn(1, 16, 32, generator=torch.manual_seed(2)).to(dtype)
    stock, ours = (
        transformer.to(dtype)(latents, given, prompt, return_dict=False)[0]
        for transformer, given in zip(both, timesteps(side, with_picture=with_picture), strict=True)
    )

    assert torch.equal(stock, ours)


@torch.no_grad()
@pytest.mark.parametrize("with_picture", [False, True])
@pytest.mark.parametrize(("side", "rows"), [(8, 80), (32, wan_modulation.ROWS_MAX), (64, wan_modulation.ROWS_MAX)])
def test_no_more_timesteps_are_embedded_than_bits_need_and_a_block_gets_one_modulation_a_frame(
    side: int, rows: int, with_picture: bool, both: tuple[Any, Any]
) -> None:
    _, ours = both
    embedded, modulations = [], []
    ours.condition_embedder.time_proj.register_forward_hook(lambda *told: embedded.append(tuple(told[2].shape)))
    ours.blocks[1].register_forward_pre_hook(lambda _block, given: modulations.append(tuple(given[2].shape)))
    _, given = timesteps(side, with_picture=with_picture)
    ours(torch.randn(1, 16, FRAMES, side, side), given, torch.randn(1, 16, 32))

    assert embedded == [(1, rows, 6 * 64)]
    assert modulations == [(1, FRAMES, 6, 64)]


@torch.no_grad()
def test_a_clip_of_one_frame_and_one_token_gives_the_bits_of_stock(both: tuple[Any, Any]) -> None:
    latents, prompt = torch.randn(1, 16, 1, 2, 2), torch.randn(1, 16, 32)
    stock, ours = (transformer(latents, torch.tensor([[431.0]]), prompt, return_dict=False)[0] for transformer in both)

    assert torch.equal(stock, ours)
