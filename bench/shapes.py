"""The configurations of the models' components as their authors publish them, and which classes read them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from safelight.models import ModelFacts

FLUX_CONFIGS: dict[str, dict[str, Any]] = {
    "transformer": {
        "num_layers": 19,
        "num_single_layers": 38,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "in_channels": 64,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 768,
        "guidance_embeds": False,
        "axes_dims_rope": (16, 56, 56),
    },
    "text_encoder": {
        "vocab_size": 49408,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "projection_dim": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 77,
        "eos_token_id": 513,  # of the tiny tokenizer, which reads the prompts here
    },
    "text_encoder_2": {
        "vocab_size": 32128,
        "d_model": 4096,
        "d_kv": 64,
        "d_ff": 10240,
        "num_layers": 24,
        "num_heads": 64,
        "feed_forward_proj": "gated-gelu",
    },
    "vae": {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (128, 256, 512, 512),
        "layers_per_block": 2,
        "latent_channels": 16,
        "sample_size": 1024,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
}

WAN_CONFIGS: dict[str, dict[str, Any]] = {
    "transformer": {
        "num_layers": 30,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "in_channels": 48,
        "out_channels": 48,
        "text_dim": 4096,
        "freq_dim": 256,
        "ffn_dim": 14336,
    },
    "text_encoder": FLUX_CONFIGS["text_encoder_2"] | {"vocab_size": 256384},
    "vae": {
        "base_dim": 160,
        "decoder_base_dim": 256,
        "z_dim": 48,
        "dim_mult": [1, 2, 4, 4],
        "num_res_blocks": 2,
        "temperal_downsample": [False, True, True],
        "is_residual": True,
        "in_channels": 12,
        "out_channels": 12,
        "patch_size": 2,
        "scale_factor_spatial": 16,
        "latents_mean": [0.0] * 48,
        "latents_std": [1.0] * 48,
    },
}

A14B_CONFIGS: dict[str, dict[str, Any]] = {
    "transformer": {
        "num_layers": 40,
        "attention_head_dim": 128,
        "num_attention_heads": 40,
        "in_channels": 16,
        "out_channels": 16,
        "text_dim": 4096,
        "freq_dim": 256,
        "ffn_dim": 13824,
    },
    "text_encoder": WAN_CONFIGS["text_encoder"],
    "vae": {
        "base_dim": 96,
        "z_dim": 16,
        "dim_mult": [1, 2, 4, 4],
        "num_res_blocks": 2,
        "temperal_downsample": [False, True, True],
        "latents_mean": [0.0] * 16,
        "latents_std": [1.0] * 16,
    },
}
A14B_CONFIGS["transformer_2"] = A14B_CONFIGS["transformer"]

SMALLER: dict[str, Any] = {
    "num_layers": 1,
    "num_single_layers": 1,
    "num_attention_heads": 2,
    "joint_attention_dim": 64,
    "pooled_projection_dim": 64,
    "hidden_size": 64,
    "intermediate_size": 128,
    "projection_dim": 64,
    "num_hidden_layers": 1,
    "d_model": 64,
    "d_ff": 128,
    "num_heads": 1,
    "text_dim": 64,
    "ffn_dim": 128,
    "vocab_size": 1024,
    "block_out_channels": (32, 32, 32, 32),
    "layers_per_block": 1,
    "base_dim": 8,
    "decoder_base_dim": 8,
    "num_res_blocks": 1,
}
"""What --tiny makes of the figures above."""

CLASSES = {
    "flux": {
        "transformer": "diffusers.FluxTransformer2DModel",
        "text_encoder": "transformers.CLIPTextModel",
        "text_encoder_2": "transformers.T5EncoderModel",
        "vae": "diffusers.AutoencoderKL",
    },
    "wan": {
        "transformer": "diffusers.WanTransformer3DModel",
        "transformer_2": "diffusers.WanTransformer3DModel",
        "text_encoder": "transformers.UMT5EncoderModel",
        "vae": "diffusers.AutoencoderKLWan",
    },
}


def config(facts: ModelFacts, name: str, changed: Mapping[str, Any]) -> dict[str, Any]:
    """Return a component's configuration, with those of `changed` that it has."""
    wan = A14B_CONFIGS if facts.experts == 2 else WAN_CONFIGS
    own = dict((FLUX_CONFIGS if facts.family == "flux" else wan)[name])
    if facts.image == "required" and name.startswith("transformer"):
        own["in_channels"] += 4 + own["out_channels"]  # a mask and the picture
    return {key: changed.get(key, value) for key, value in own.items()}


def components(facts: ModelFacts) -> tuple[str, ...]:
    """Return the components with weights that a model of this kind has."""
    return tuple(name for name in CLASSES[facts.family] if name in facts.components)
