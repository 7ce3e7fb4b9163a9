"""Wan's VAE decoded strip by strip: the bits of the whole, and never many more rows at once than were asked for."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from bench import fullsize, shapes
from diffusers import AutoencoderKLWan
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from safelight import models
from safelightd.pipelines import wan, wan_vae
from safelightd.pipelines.wan_strips import UnknownLayer, in_strips

KEYS = ("wan-ti2v-5b", "wan-t2v-a14b")
CLOSE = 2e-5
"""Of float32 sums of values around one, added up in another order."""

LATENT_SHAPE = (4, 5, 16)
"""Frames, of which the first, the second and the others are decoded in ways of their own, height and width: a row of 16
floats is whole vectors of the CPU, whose rest would be rounded in another way."""


@pytest.fixture(scope="module", params=KEYS)
def whole(request: pytest.FixtureRequest) -> Any:
    """The model's own VAE, narrower, with weights and norms that leave nothing at 0 or 1."""
    torch.manual_seed(0)
    config = dict(shapes.config(models.load()[request.param], "vae", fullsize.FULL)) | {"base_dim": 8}
    if "decoder_base_dim" in config:
        config["decoder_base_dim"] = 8
    vae = AutoencoderKLWan(**config).eval().requires_grad_(requires_grad=False)
    for name, parameter in vae.named_parameters():
        if name.endswith("gamma"):
            parameter.copy_(1 + 0.2 * torch.randn_like(parameter))
    return vae


@contextmanager
def as_written() -> Iterator[None]:
    """Have sums in the order that torch's own code has, whatever the size of what they are of."""
    threads, is_used = torch.get_num_threads(), torch.backends.mkldnn.enabled
    torch.set_num_threads(1)
    torch.backends.mkldnn.enabled = False
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = is_used
        torch.set_num_threads(threads)


def split(whole: Any, rows: int, **more: Any) -> Any:
    vae = copy.deepcopy(whole)
    in_strips(vae, rows, **more)
    return vae


def latents_of(vae: Any, shape: tuple[int, int, int] = LATENT_SHAPE) -> torch.Tensor:
    return torch.randn(1, vae.config.z_dim, *shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def decoded(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    return torch.cat([part.float() for part in wan._decoded_parts(vae, latents)], dim=2)


@pytest.fixture(scope="module")
def answer(whole: Any) -> torch.Tensor:
    with as_written():
        return decoded(whole, latents_of(whole))


@pytest.mark.parametrize("rows", [8, 25, 32, 48])
def test_a_clip_in_strips_has_the_bits_of_the_whole(rows: int, whole: Any, answer: torch.Tensor) -> None:
    with as_written():
        assert torch.equal(answer, decoded(split(whole, rows), latents_of(whole)))


@pytest.mark.parametrize("shape", [(3, 1, 3), (3, 7, 5), (1, 4, 6)])
@pytest.mark.parametrize("rows", [16, 48])
def test_another_order_of_sums_is_all_that_differs(rows: int, shape: tuple[int, int, int], whole: Any) -> None:
    latents = latents_of(whole, shape)

    torch.testing.assert_close(decoded(split(whole, rows), latents), decoded(whole, latents), rtol=0, atol=CLOSE)


@torch.no_grad()
def test_diffusers_own_loop_decodes_several_clips_in_strips_one_after_the_other(whole: Any) -> None:
    vae = split(whole, 32)
    latents = latents_of(whole, (2, 4, 4)).repeat(2, 1, 1, 1, 1)
    latents[1] *= -1

    for some in (latents, latents.flip(0)):
        torch.testing.assert_close(vae.decode(some).sample, whole.decode(some).sample, rtol=0, atol=CLOSE)


def test_rounding_to_16_bit_is_no_worse_in_strips(whole: Any) -> None:
    latents = latents_of(whole, (3, 4, 6)).bfloat16()
    exact = decoded(whole, latents.float())
    off = []
    for rows in (0, 32):
        vae = copy.deepcopy(whole).to(torch.bfloat16)
        if rows:
            in_strips(vae, rows)
        wan_vae.lighten(vae)
        off.append(float((decoded(vae, latents) - exact).norm()))

    assert 0 < off[1] < 1.05 * off[0]


class Heights(TorchDispatchMode):
    """Notes how many rows each convolution is shown, by how wide they are."""

    def __init__(self) -> None:
        super().__init__()
        self.most: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution.default:
            height, width = args[0].shape[-2:]
            self.most[width] = max(self.most.get(width, 0), height)
        return func(*args, **(kwargs or {}))


def test_no_convolution_is_shown_many_more_rows_than_a_strip(whole: Any) -> None:
    latents = latents_of(whole, (2, 20, 1))
    scale = whole.config.scale_factor_spatial
    with Heights() as heights:
        decoded(split(whole, scale), latents)

    widest = max(heights.most)
    # Two rows that it has need of once more; at the bottom comes what six before had kept, all of it doubled.
    assert 8 + 2 <= heights.most[widest] <= 2 * (4 + 6) + 3
    assert widest == latents.shape[4] * 8 + 2


def test_it_asks_before_each_strip_and_stops_where_it_is_told(whole: Any) -> None:
    class Enough(Exception): ...

    asked = 0

    def ask() -> None:
        nonlocal asked
        asked += 1
        if asked == 9:
            raise Enough

    with pytest.raises(Enough):
        decoded(split(whole, 16, ask=ask), latents_of(whole, (2, 6, 2)))

    assert asked == 9


def _other_norm(decoder: Any) -> None:
    decoder.up_blocks[1].resnets[0].norm1 = nn.GroupNorm(1, decoder.up_blocks[1].resnets[0].in_dim)


def _other_stride(decoder: Any) -> None:
    decoder.up_blocks[2].resnets[1].conv2.stride = (1, 2, 2)


def _other_activation(decoder: Any) -> None:
    decoder.nonlinearity = nn.Softmax(dim=-2)


def _other_interpolation(decoder: Any) -> None:
    block = decoder.up_blocks[0]
    (block.upsampler if hasattr(block, "upsampler") else block.upsamplers[0]).resample[0].mode = "bilinear"


def _other_block(decoder: Any) -> None:
    decoder.up_blocks.insert(1, nn.Identity())


@pytest.mark.parametrize("change", [_other_norm, _other_stride, _other_activation, _other_interpolation, _other_block])
def test_a_layer_that_may_look_across_strips_is_refused_before_anything_is_decoded(change: Any, whole: Any) -> None:
    vae = copy.deepcopy(whole)
    change(vae.decoder)

    with pytest.raises(UnknownLayer, match=r"cannot be decoded in strips\. Use vae_tiling on or off\."):
        in_strips(vae, 64)
