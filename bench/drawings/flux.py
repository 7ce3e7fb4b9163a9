"""demo-flux: the classes of FLUX.1, small enough to train in minutes, and how the training sees them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

from bench.drawings.taking import take
from bench.drawings.tokens import CLIP_TOKENS_MAX, clip_tokenizer, rounded_up, t5_tokenizer
from safelightd import demo_models

WIDTH = 128
LATENT_SIDE = 16
LATENT_CHANNELS = 16
PATCHES = (LATENT_SIDE // 2) ** 2
PATCH_CHANNELS = 4 * LATENT_CHANNELS
SHIPPED = Path(demo_models.__file__).parent / "demo-flux"

MODULES: dict[str, Any] = {
    "vae": AutoencoderKL, "text_encoder": CLIPTextModel, "text_encoder_2": T5EncoderModel,
    "transformer": FluxTransformer2DModel,
}  # fmt: skip


@dataclass
class DemoFlux:
    """The modules, in float32, and the tokenizers."""

    vae: Any
    text_encoder: Any
    text_encoder_2: Any
    transformer: Any
    tokenizer: Any
    tokenizer_2: Any

    @classmethod
    def new(cls, device: str) -> DemoFlux:
        """Return untrained modules: random, as the classes draw them, with transformer blocks that begin as nothing."""
        clip, t5 = clip_tokenizer(), t5_tokenizer()
        made = cls(_vae(), _clip(clip), _t5(t5), _transformer(), clip, t5)
        for module in made.modules():
            module.to(device)
        return made

    @classmethod
    def shipped(cls, device: str) -> DemoFlux:
        """Return demo-flux as it comes with the program."""

        made = cls.new(device)
        made.take(SHIPPED)
        for module in made.modules():
            module.eval().requires_grad_(requires_grad=False)
        return made

    def modules(self) -> list[nn.Module]:
        return [self.vae, self.text_encoder, self.text_encoder_2, self.transformer]

    def take(self, folder: Path, names: Sequence[str] = tuple(MODULES)) -> None:
        """Begin with modules of a saved pipeline, and with its tokenizers where its text encoders stay."""
        stored = take(self, folder, MODULES, names)
        if "vae" in stored:
            rows = {row: stored["vae"].config[row] for row in ("shift_factor", "scaling_factor")}
            self.vae.register_to_config(**rows)
        # Its own: a number need not mean the same word there as in a tokenizer that is made today.
        if "text_encoder" in stored:
            self.tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer", local_files_only=True)
        if "text_encoder_2" in stored:
            self.tokenizer_2 = T5TokenizerFast.from_pretrained(folder, subfolder="tokenizer_2", local_files_only=True)

    def velocity(self, noisy: Tensor, sigma: Tensor, t5: Tensor, clip: Tensor) -> Tensor:
        """Return what the transformer predicts of (B, PATCHES, PATCH_CHANNELS) at noise levels (B,)."""
        embeds = self.text_encoder_2(t5)[0]
        pooled = self.text_encoder(clip).pooler_output
        return self.velocity_of(noisy, sigma, embeds, pooled)

    def velocity_of(self, noisy: Tensor, sigma: Tensor, embeds: Tensor, pooled: Tensor) -> Tensor:
        side = LATENT_SIDE // 2
        image_ids = torch.zeros(side, side, 3, device=noisy.device)
        image_ids[..., 1] += torch.arange(side, device=noisy.device)[:, None]
        image_ids[..., 2] += torch.arange(side, device=noisy.device)[None]
        velocity: Tensor = self.transformer(
            hidden_states=noisy, encoder_hidden_states=embeds, pooled_projections=pooled, timestep=sigma,
            img_ids=image_ids.reshape(-1, 3), txt_ids=torch.zeros(embeds.shape[1], 3, device=noisy.device),
            return_dict=False,
        )[0]  # fmt: skip
        return velocity

    def save(self, folder: Path) -> None:
        """Write a FluxPipeline in bfloat16, as published ones are."""
        pipeline(self).save_pretrained(folder, safe_serialization=True)


def pipeline(demo: DemoFlux) -> FluxPipeline:
    """Return a pipeline with bfloat16 copies on the CPU."""
    import copy

    vae, clip, t5, transformer = (copy.deepcopy(module).to("cpu", torch.bfloat16).eval() for module in demo.modules())
    return FluxPipeline(
        scheduler=scheduler(), vae=vae, text_encoder=clip, text_encoder_2=t5, transformer=transformer,
        tokenizer=demo.tokenizer, tokenizer_2=demo.tokenizer_2,
    )  # fmt: skip


def scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Return schnell's settings."""
    return FlowMatchEulerDiscreteScheduler(
        base_image_seq_len=256, base_shift=0.5, max_image_seq_len=4096, max_shift=1.15,
        num_train_timesteps=1000, shift=1.0, use_dynamic_shifting=False,
    )  # fmt: skip


def patches(latents: Tensor) -> Tensor:
    """Return (B, PATCHES, PATCH_CHANNELS) of (B, 16, 16, 16), in FLUX's order."""
    count, channels, height, width = latents.shape
    split = latents.view(count, channels, height // 2, 2, width // 2, 2)
    return split.permute(0, 2, 4, 1, 3, 5).reshape(count, PATCHES, PATCH_CHANNELS)


def unpatched(tokens: Tensor) -> Tensor:
    """Undo `patches`."""
    side = LATENT_SIDE // 2
    split = tokens.view(len(tokens), side, side, LATENT_CHANNELS, 2, 2)
    return split.permute(0, 3, 1, 4, 2, 5).reshape(len(tokens), LATENT_CHANNELS, LATENT_SIDE, LATENT_SIDE)


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(32, 64, 64, 64), down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=1, latent_channels=LATENT_CHANNELS,
        norm_num_groups=8, sample_size=128, scaling_factor=1.0, shift_factor=0.0,
        use_quant_conv=False, use_post_quant_conv=False, force_upcast=False,
    )  # fmt: skip


def _clip(tokenizer: Any) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=rounded_up(len(tokenizer)), hidden_size=WIDTH, intermediate_size=2 * WIDTH,
            projection_dim=WIDTH, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=CLIP_TOKENS_MAX, bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip


def _t5(tokenizer: Any) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=rounded_up(len(tokenizer)), d_model=WIDTH, d_kv=32, d_ff=2 * WIDTH, num_layers=3, num_heads=4,
            feed_forward_proj="gated-gelu", tie_word_embeddings=False, dropout_rate=0.0,
        )
    )  # fmt: skip


def _transformer() -> FluxTransformer2DModel:
    transformer = FluxTransformer2DModel(
        in_channels=PATCH_CHANNELS, num_layers=3, num_single_layers=6, attention_head_dim=32, num_attention_heads=4,
        joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH, guidance_embeds=False, axes_dims_rope=(8, 12, 12),
    )  # fmt: skip
    start_as_nothing(
        transformer, ends=("norm1.linear", "norm1_context.linear", "norm.linear", "norm_out.linear", "proj_out")
    )
    return transformer


@torch.no_grad()
def start_as_nothing(transformer: nn.Module, ends: tuple[str, ...]) -> None:
    """Draw Linear weights as DiT does (Peebles & Xie 2023): Xavier, and zero where a block's output is scaled."""
    for name, module in transformer.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
        if name.endswith(ends) and not (name.endswith("proj_out") and "." in name):
            nn.init.zeros_(module.weight)
