"""Wan's decoder with fewer passes over memory, beside diffusers' own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from bench import fullsize, shapes
from diffusers import AutoencoderKLWan

from safelight import models
from safelightd.pipelines import wan, wan_vae

KEYS = ("wan-ti2v-5b", "wan-t2v-a14b")
LATENT_SHAPE = (3, 4, 6)
"""Frames, of which the first and the second are decoded in ways of their own, height and width."""


def _vae(key: str) -> Any:
    """The model's own VAE, narrower, with weights that show whether gamma counts."""
    torch.manual_seed(0)
    config = dict(shapes.config(models.load()[key], "vae", fullsize.FULL)) | {"base_dim": 16}
    if "decoder_base_dim" in config:
        config["decoder_base_dim"] = 16
    vae = AutoencoderKLWan(**config).eval()
    with torch.no_grad():
        for name, parameter in vae.named_parameters():
            if name.endswith("gamma"):
                parameter.copy_(1 + 0.2 * torch.randn_like(parameter))
    return vae.to(torch.bfloat16).float()


@torch.no_grad()
def _decoded(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    return torch.cat([part.float() for part in wan._decoded_parts(vae, latents)], dim=2)


@pytest.mark.parametrize("key", KEYS)
def test_in_16_bit_it_is_as_near_to_float32_as_diffusers_own_is(key: str) -> None:
    exact = _vae(key)
    stock = copy.deepcopy(exact).to(torch.bfloat16)
    light = copy.deepcopy(stock)
    wan_vae.lighten(light)
    latents = torch.randn(1, exact.config.z_dim, *LATENT_SHAPE).to(torch.bfloat16)
    wanted = _decoded(exact, latents.float())

    def apart(vae: Any) -> float:
        return float((_decoded(vae, latents) - wanted).norm() / wanted.norm())

    assert 0 < apart(light) <= 1.1 * apart(stock)
    assert not torch.equal(_decoded(light, latents), _decoded(stock, latents))  # it is another way


def test_in_float32_nothing_is_changed() -> None:
    vae = _vae(KEYS[0])
    classes = [type(part) for part in vae.modules()]
    wan_vae.lighten(vae)
    assert [type(part) for part in vae.modules()] == classes
