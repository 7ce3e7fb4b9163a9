"""demo-wan: the classes of Wan 2.2 TI2V-5B, small enough to train in minutes, and how the training sees them."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from diffusers.pipelines.wan.pipeline_wan import WanPipeline
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from torch import Tensor, nn
from transformers import T5TokenizerFast, UMT5Config, UMT5EncoderModel

from bench.drawings.taking import take
from bench.drawings.tokens import rounded_up, t5_tokenizer

WIDTH = 128
"""Of the text encoder."""
TEXT_LAYERS = 1
DECODER_DIM = 16
"""Of the VAE's decoder: with 32 a round trip kept 40.8 dB, with 16 it keeps 40.1, in a quarter of the weights."""
HEADS, HEAD_DIM, LAYERS, FFN_DIM = 8, 32, 6, 320
"""Of the transformer. A token is 2x2 latents of 48 channels, and what it predicts of them is mostly their noise, 192
numbers that know nothing of each other: a width of less than 192 cannot carry it. With 128 and eight layers a third of
it stayed in every clip, and shapes melted (61 of 100 right). And 16 tokens of a frame must agree on one shape, which
takes depth: with 256 and three layers squares were rectangles (83), with six they are not (97)."""
LATENT_CHANNELS = 48
LATENT_SIDE = 8
FRAMES_PER_LATENT = 4
FLOW_SHIFT = 3.0

MODULES: dict[str, Any] = {
    "vae": AutoencoderKLWan, "text_encoder": UMT5EncoderModel, "transformer": WanTransformer3DModel,
}  # fmt: skip


@dataclass
class DemoWan:
    """The modules, in float32, and the tokenizer."""

    vae: Any
    text_encoder: Any
    transformer: Any
    tokenizer: Any

    @classmethod
    def new(cls, device: str) -> DemoWan:
        """Return untrained modules: random, as the classes draw them, with an output that begins as nothing."""
        tokenizer = t5_tokenizer()
        made = cls(_vae(), _umt5(tokenizer), _transformer(), tokenizer)
        for module in made.modules():
            module.to(device)
        return made

    def modules(self) -> list[nn.Module]:
        return [self.vae, self.text_encoder, self.transformer]

    def take(self, folder: Path, names: Iterable[str] = MODULES) -> None:
        """Begin with modules of a saved pipeline, and with its tokenizer where its text encoder stays."""
        stored = take(self, folder, MODULES, names)
        if "text_encoder" in stored:
            # Its own: a number need not mean the same word there as in a tokenizer that is made today.
            self.tokenizer = T5TokenizerFast.from_pretrained(folder, subfolder="tokenizer", local_files_only=True)
        if "vae" in stored:
            self.vae.register_to_config(**{row: stored["vae"].config[row] for row in ("latents_mean", "latents_std")})

    def embeds(self, tokens: Tensor) -> Tensor:
        """Return (B, length, WIDTH) of token rows, zero after each prompt's end, as WanPipeline pads."""
        mask = (tokens > 0).long()
        embeds: Tensor = self.text_encoder(tokens, mask).last_hidden_state * mask[..., None]
        return embeds

    def save(self, folder: Path) -> None:
        """Write a WanPipeline in bfloat16."""
        vae, text_encoder, transformer = (
            copy.deepcopy(module).to("cpu", torch.bfloat16).eval() for module in self.modules()
        )
        WanPipeline(
            vae=vae, text_encoder=text_encoder, transformer=transformer, tokenizer=self.tokenizer,
            scheduler=scheduler(), expand_timesteps=True,
        ).save_pretrained(folder, safe_serialization=True)  # fmt: skip


def scheduler() -> UniPCMultistepScheduler:
    return UniPCMultistepScheduler(
        num_train_timesteps=1000, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=FLOW_SHIFT
    )


def _vae() -> AutoencoderKLWan:
    return AutoencoderKLWan(
        base_dim=16, decoder_base_dim=DECODER_DIM, dim_mult=[1, 2, 2, 2], num_res_blocks=1, z_dim=LATENT_CHANNELS,
        is_residual=True, in_channels=12, out_channels=12, patch_size=2, scale_factor_spatial=16,
        latents_mean=[0.0] * LATENT_CHANNELS, latents_std=[1.0] * LATENT_CHANNELS,
    )  # fmt: skip


def _umt5(tokenizer: Any) -> UMT5EncoderModel:
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=rounded_up(len(tokenizer)), d_model=WIDTH, d_kv=32, d_ff=WIDTH, num_layers=TEXT_LAYERS,
            num_heads=4, feed_forward_proj="gated-gelu", dropout_rate=0.0,
        )
    )  # fmt: skip


def _transformer() -> WanTransformer3DModel:
    transformer = WanTransformer3DModel(
        num_attention_heads=HEADS, attention_head_dim=HEAD_DIM, in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS, text_dim=WIDTH, freq_dim=WIDTH, ffn_dim=FFN_DIM, num_layers=LAYERS,
    )  # fmt: skip
    with torch.no_grad():
        transformer.proj_out.weight.zero_()
        transformer.proj_out.bias.zero_()
    return transformer
