"""FLUX's VAE strip by strip: the numbers of the whole, and never more rows at once than were asked for."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from safelightd.pipelines.flux_vae import in_strips

CLOSE = 2e-5
"""Of float32 sums of values around one, added up in another order."""


@pytest.fixture(scope="module")
def whole() -> Any:
    """FLUX's VAE, a few channels wide, with weights and norms that leave nothing at 0 or 1."""
    torch.manual_seed(5)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 16, 16), layers_per_block=2, latent_channels=4, norm_num_groups=4,
        use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip
    for parameter in vae.parameters():
        nn.init.normal_(parameter, mean=0.1, std=0.3) if parameter.dim() == 1 else nn.init.xavier_normal_(parameter)
    return vae.eval().requires_grad_(requires_grad=False)


def split(whole: Any, rows: int) -> Any:
    vae = copy.deepcopy(whole)
    in_strips(vae, rows)
    return vae


@pytest.mark.parametrize(("height", "width"), [(16, 12), (5, 24), (1, 1)])
@pytest.mark.parametrize("rows", [1, 2, 5, 16, 1000])
def test_a_picture_in_strips_is_the_whole_one(rows: int, height: int, width: int, whole: Any) -> None:
    latents = torch.randn(1, 4, height, width, generator=torch.manual_seed(1))

    torch.testing.assert_close(
        split(whole, rows).decode(latents).sample, whole.decode(latents).sample, rtol=0, atol=CLOSE
    )


@pytest.mark.parametrize(("height", "width"), [(64, 40), (20, 96), (4, 4)])
@pytest.mark.parametrize("rows", [1, 3, 16, 1000])
def test_a_picture_encoded_in_strips_is_the_whole_one(rows: int, height: int, width: int, whole: Any) -> None:
    pixels = torch.rand(1, 3, height, width, generator=torch.manual_seed(2)) * 2 - 1

    torch.testing.assert_close(
        split(whole, rows).encode(pixels).latent_dist.mean, whole.encode(pixels).latent_dist.mean, rtol=0, atol=CLOSE
    )


def test_norms_whose_strips_are_far_apart_lose_no_digits(whole: Any) -> None:
    """A strip of 1,000 and one of 1,001 have a deviation of a half, which a sum of squares in float32 cannot tell."""
    norm = nn.GroupNorm(4, 16)
    x = torch.full((1, 16, 8, 8), 1000.0)
    x[:, :, 4:] += 1
    x += torch.randn(x.shape, generator=torch.manual_seed(3)) * 0.01
    block = ResnetBlock2D(in_channels=16, out_channels=16, temb_channels=None, groups=4)
    block.norm1 = norm
    holder = copy.deepcopy(whole)
    holder.decoder.up_blocks[0].resnets[0] = block.eval().requires_grad_(requires_grad=False)
    apart = split(holder, 4).decoder.up_blocks[0].resnets[0]

    torch.testing.assert_close(apart(x.clone(), None), block(x, None), rtol=0, atol=5e-4)


def test_rounding_to_16_bit_is_no_worse_in_strips(whole: Any) -> None:
    latents = torch.randn(1, 4, 32, 32, generator=torch.manual_seed(4))
    exact = whole.decode(latents).sample
    half = copy.deepcopy(whole).to(torch.bfloat16)
    off = [
        (vae.decode(latents.bfloat16()).sample.float() - exact).abs().mean().item() for vae in (half, split(half, 16))
    ]

    assert 0 < off[1] < 1.1 * off[0]


@pytest.mark.parametrize("rows", [8, 16])
def test_no_layer_but_attention_and_the_last_is_shown_more_rows_than_a_strip(rows: int, whole: Any) -> None:
    vae = split(whole, rows)
    seen: list[tuple[str, int]] = []
    for name, part in vae.named_modules():
        if isinstance(part, nn.Conv2d):
            part.register_forward_pre_hook(lambda _part, given, name=name: seen.append((name, given[0].shape[2])))

    pixels = vae.decode(torch.randn(1, 4, 16, 16)).sample
    vae.encode(pixels)

    once = {"encoder.conv_in", "decoder.conv_out"}  # of three channels
    inside = {name: high for name, high in seen if name not in once and not name.endswith(("conv_in", "conv_out"))}
    assert len(inside) > 30
    assert max(inside.values()) <= 2 * rows + 1  # to halve the rows, twice as many go in
    assert max(high for name, high in inside.items() if "downsamplers" not in name) <= rows + 2


def test_a_layer_of_another_kind_stays_as_it_is(whole: Any) -> None:
    vae = copy.deepcopy(whole)
    other = vae.decoder.up_blocks[1].resnets[0]
    other.output_scale_factor = 2.0
    latents = torch.randn(1, 4, 8, 8, generator=torch.manual_seed(6))
    expected = vae.decode(latents).sample

    in_strips(vae, 4)

    assert type(other) is ResnetBlock2D
    torch.testing.assert_close(vae.decode(latents).sample, expected, rtol=0, atol=CLOSE)
