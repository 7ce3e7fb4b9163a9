"""The tiny Wan 2.2 models: the real classes, 64 wide, with weights drawn from a seed."""

from __future__ import annotations

from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from diffusers.pipelines.wan.pipeline_wan import WanPipeline
from diffusers.pipelines.wan.pipeline_wan_i2v import WanImageToVideoPipeline
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from transformers import UMT5Config, UMT5EncoderModel

from safelightd.tiny import tokens
from safelightd.tiny.weights import fill

WIDTH = 64
"""Of every Linear: quantisers want multiples of 64."""

SMALL_LATENTS = 48
"""Channels of the latents of Wan 2.2's own VAE (TI2V-5B); the A14B models use Wan 2.1's with 16."""

TEXT_GAIN = 16.0
"""A prompt of ten letters is lost among 512 places of padding: at 1 another prompt changed a frame by 2 grey levels
of 255 on average, at 16 by 6."""


def ti2v(key: str) -> WanPipeline:
    """Return the flavour of TI2V-5B: one transformer, a timestep for every token, a VAE that packs 4x16x16."""
    return WanPipeline(
        **_shared(key, flow_shift=5.0),
        vae=fill(_vae_2_2(), f"{key}/vae"),
        transformer=_transformer(key, "transformer", SMALL_LATENTS, SMALL_LATENTS),
        expand_timesteps=True,
    )


def t2v_a14b(key: str) -> WanPipeline:
    """Return the flavour of T2V-A14B: two experts that change over at 0.875 of the noise."""
    return WanPipeline(
        **_shared(key, flow_shift=12.0),
        vae=fill(_vae_2_1(), f"{key}/vae"),
        transformer=_transformer(key, "transformer", 16, 16),
        transformer_2=_transformer(key, "transformer_2", 16, 16),
        boundary_ratio=0.875,
    )


def i2v_a14b(key: str) -> WanImageToVideoPipeline:
    """Return the flavour of I2V-A14B: 16 channels of noise, 4 of mask and 16 of picture go into two experts."""
    return WanImageToVideoPipeline(
        **_shared(key, flow_shift=5.0),
        vae=fill(_vae_2_1(), f"{key}/vae"),
        transformer=_transformer(key, "transformer", 36, 16),
        transformer_2=_transformer(key, "transformer_2", 36, 16),
        boundary_ratio=0.9,
    )


def scheduler(*, flow_shift: float) -> UniPCMultistepScheduler:
    """Return the settings of the Wan-AI repositories; they differ in the shift alone."""
    return UniPCMultistepScheduler(
        num_train_timesteps=1000,
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=flow_shift,
    )


def _shared(key: str, *, flow_shift: float) -> dict[str, object]:
    return {
        "scheduler": scheduler(flow_shift=flow_shift),
        "tokenizer": tokens.t5_tokenizer(),
        "text_encoder": fill(_umt5(), f"{key}/text_encoder"),
    }


def _umt5() -> UMT5EncoderModel:
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=tokens.T5_VOCABULARY,
            d_model=WIDTH,
            d_kv=32,
            d_ff=2 * WIDTH,
            num_layers=2,
            num_heads=2,
            feed_forward_proj="gated-gelu",
        )
    )


def _transformer(key: str, name: str, in_channels: int, out_channels: int) -> WanTransformer3DModel:
    transformer = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=32,
        in_channels=in_channels,
        out_channels=out_channels,
        text_dim=WIDTH,
        freq_dim=WIDTH,
        ffn_dim=2 * WIDTH,
        num_layers=2,
    )
    return fill(transformer, f"{key}/{name}", {"attn2.to_out.0.weight": TEXT_GAIN})


def _vae_2_1() -> AutoencoderKLWan:
    """Packs 4x8x8 into 16 channels; mean and deviation of the latents are Wan 2.1's own, the class's defaults."""
    return AutoencoderKLWan(base_dim=8, dim_mult=[1, 1, 2, 2], num_res_blocks=1)


def _vae_2_2() -> AutoencoderKLWan:
    """Packs 4x16x16 into 48 channels. No two channels share mean and deviation, so that a wrong order shows."""
    places = [place / (SMALL_LATENTS - 1) for place in range(SMALL_LATENTS)]
    return AutoencoderKLWan(
        base_dim=8,
        dim_mult=[1, 1, 2, 2],
        num_res_blocks=1,
        z_dim=SMALL_LATENTS,
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=16,
        latents_mean=[place - 0.5 for place in places],
        latents_std=[0.5 + place for place in places],
    )
