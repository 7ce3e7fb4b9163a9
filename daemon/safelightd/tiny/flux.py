"""The tiny FLUX.1 models: the real classes, 64 wide, with weights drawn from a seed."""

from __future__ import annotations

from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.controlnets.controlnet_flux import FluxControlNetModel
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from safelightd.tiny import tokens
from safelightd.tiny.weights import fill

WIDTH = 64
"""Of every Linear: quantisers want multiples of 64."""


def pipeline(key: str, *, guidance_embeds: bool) -> FluxPipeline:
    """Return the whole model; `guidance_embeds` makes it a dev, else it is a schnell."""
    return FluxPipeline(
        scheduler=scheduler(dynamic=guidance_embeds),
        vae=fill(_vae(), f"{key}/vae"),
        text_encoder=fill(_clip(), f"{key}/text_encoder"),
        text_encoder_2=fill(_t5(), f"{key}/text_encoder_2"),
        tokenizer=tokens.clip_tokenizer(),
        tokenizer_2=tokens.t5_tokenizer(),
        transformer=fill(_transformer(guidance_embeds=guidance_embeds), f"{key}/transformer"),
    )


def scheduler(*, dynamic: bool) -> FlowMatchEulerDiscreteScheduler:
    """Return schnell's settings, or dev's: it shifts its timesteps by the size of the picture."""
    return FlowMatchEulerDiscreteScheduler(
        base_image_seq_len=256,
        base_shift=0.5,
        max_image_seq_len=4096,
        max_shift=1.15,
        num_train_timesteps=1000,
        shift=3.0 if dynamic else 1.0,
        use_dynamic_shifting=dynamic,
    )


def _transformer(*, guidance_embeds: bool) -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        in_channels=WIDTH,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(8, 12, 12),
    )


def controlnet() -> FluxControlNetModel:
    """Return a ControlNet for the tiny dev; all its layers say something, where a new one's last are zero."""
    net = FluxControlNetModel(
        in_channels=WIDTH,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    )
    return fill(net, "tiny/controlnet")


def _clip() -> CLIPTextModel:
    tokenizer = tokens.clip_tokenizer()
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            projection_dim=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=tokens.CLIP_TOKENS_MAX,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def _t5() -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=tokens.T5_VOCABULARY,
            d_model=WIDTH,
            d_kv=32,
            d_ff=2 * WIDTH,
            num_layers=2,
            num_heads=2,
            feed_forward_proj="gated-gelu",
        )
    )


def _vae() -> AutoencoderKL:
    """Eight times smaller each way and 16 channels deep, as FLUX.1's own; scaling and shift are its own too."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 16, 32, 32),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=8,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
