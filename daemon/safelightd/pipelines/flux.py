"""FLUX.1 schnell and dev: prompts to embeddings, embeddings to latents, latents to one picture.

Components and their helpers are diffusers' own; the loop over transformer and scheduler is ours and gives the same
bits as FluxPipeline, FluxImg2ImgPipeline, FluxControlNetPipeline and FluxControlNetImg2ImgPipeline. Knows no file,
no queue, and nothing of where a picture goes.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline, calculate_shift, retrieve_timesteps
from diffusers.pipelines.flux.pipeline_flux_img2img import FluxImg2ImgPipeline
from PIL.Image import Image

from safelight.errors import SafelightError
from safelight.jobspec import JobSpec
from safelight.plan import Plan
from safelightd.caching import caching
from safelightd.checkpoint import NOWHERE, Checkpoint
from safelightd.loading import Loader
from safelightd.pipelines import (
    NOTHING_KNOWN,
    Frame,
    dtype_of,
    flux_controlnet,
    frames_of,
    noise_source,
    pixels_of,
    refuse_broken,
    refuse_other_images,
    stop_between_blocks,
    stop_inside,
    values,
)
from safelightd.pipelines.flux_vae import lessen
from safelightd.preview import Values
from safelightd.progress import Watch

VAE_SCALE_FACTOR = 8
"""Pixels of a picture to one of its latents."""


@dataclass(frozen=True)
class Embeddings:
    """What CLIP and T5 made of the prompts, on the CPU, in the plan's dtype."""

    prompt_embeds: torch.Tensor
    """(1, max_sequence_length, 4096): T5's, of prompt_2 or else prompt."""
    pooled_prompt_embeds: torch.Tensor
    """(1, 768): CLIP's, of prompt."""
    negative_prompt_embeds: torch.Tensor | None = None
    """As above, of negative_prompt; only with true_cfg_scale above 1."""
    negative_pooled_prompt_embeds: torch.Tensor | None = None


@torch.no_grad()
def encode(
    spec: JobSpec,
    plan: Plan,
    loader: Loader,
    watch: Watch,
    image: Image | None = None,
    known: Mapping[str, torch.Tensor] = NOTHING_KNOWN,
) -> Embeddings:
    """Return the embeddings of the job's prompts; both text encoders are gone when this returns."""
    refuse_other_images(spec, image=image)
    prompts = {"": (spec.prompt, spec.prompt_2)}
    if is_guided(spec):
        prompts["negative_"] = (spec.negative_prompt or "", None)
    unknown = {name: texts for name, texts in prompts.items() if f"{name}prompt_embeds" not in known}
    made = _encoded(unknown, spec, plan, loader, watch) if unknown else {}
    return Embeddings(**{**known, **made})


def _encoded(
    prompts: Mapping[str, tuple[str, str | None]], spec: JobSpec, plan: Plan, loader: Loader, watch: Watch
) -> dict[str, torch.Tensor]:
    """Return the fields that these prompts make, each named after its prompt."""
    device, dtype = plan.text_encoder_device, dtype_of(plan)
    made: dict[str, torch.Tensor] = {}
    with loader.component("text_encoder", device) as clip, loader.component("text_encoder_2", device) as t5:
        stop_between_blocks(clip, watch)
        stop_between_blocks(t5, watch)
        pipe = _pipeline(
            text_encoder=clip,
            text_encoder_2=t5,
            tokenizer=loader.tokenizer("tokenizer"),
            tokenizer_2=loader.tokenizer("tokenizer_2"),
        )
        for name, texts in prompts.items():
            embeds, pooled, _ = pipe.encode_prompt(*texts, device="cpu", max_sequence_length=spec.max_sequence_length)
            made[f"{name}prompt_embeds"] = embeds.to(dtype)
            made[f"{name}pooled_prompt_embeds"] = pooled.to(dtype)
    return made


@torch.no_grad()
def denoise(
    spec: JobSpec,
    plan: Plan,
    loader: Loader,
    embeddings: Embeddings,
    watch: Watch,
    image: Image | None = None,
    last_image: Image | None = None,
    checkpoint: Checkpoint = NOWHERE,  # noqa: ARG001 - a picture takes less than what lies between two
    control_image: Image | None = None,
) -> torch.Tensor:
    """Return packed latents (1, (H/16)(W/16), 64) on the CPU; transformer and ControlNet are gone when this returns."""
    refuse_other_images(spec, image=image, last_image=last_image)
    device, dtype = torch.device(plan.device), dtype_of(plan)
    scheduler = loader.scheduler()
    timesteps = _timesteps(scheduler, spec, device)
    noise = noise_source(spec)
    condition = flux_controlnet.condition(spec, plan, loader, watch, control_image, noise)
    latents, image_ids = _start(spec, plan, loader, watch, scheduler, timesteps, image, noise)
    skipped = spec.num_inference_steps - len(timesteps)
    with (
        flux_controlnet.leading(spec, loader, condition, device, watch) as lead,
        loader.component("transformer", device) as transformer,
        caching(transformer, spec.cache, dtype, watch.forwarded) as context,
    ):
        stop_between_blocks(transformer, watch)
        constant = {
            "guidance": _guidance(spec, transformer, device),
            "txt_ids": torch.zeros(embeddings.prompt_embeds.shape[1], 3, device=device, dtype=dtype),
            "img_ids": image_ids,
        }
        prompt = _conditions(embeddings.prompt_embeds, embeddings.pooled_prompt_embeds, device) | constant
        negative = _conditions(embeddings.negative_prompt_embeds, embeddings.negative_pooled_prompt_embeds, device)
        watch.loaded()
        for i, t in enumerate(timesteps):
            timestep = t.expand(1).to(dtype) / 1000
            led = lead(i, len(timesteps), latents, timestep, prompt)
            with context(0):
                velocity = transformer(latents, timestep=timestep, **prompt, **led, return_dict=False)[0]
            if is_guided(spec):
                with context(1):
                    away = transformer(latents, timestep=timestep, **negative, **constant, **led, return_dict=False)[0]
                velocity = away + spec.true_cfg_scale * (velocity - away)
            watch.show(functools.partial(_without_noise, spec, latents, velocity, scheduler.sigmas[skipped + i]))
            latents = scheduler.step(velocity, t, latents, return_dict=False)[0]
            watch.step(i + 1, len(timesteps))
    return latents.cpu()


@torch.no_grad()
def decode(spec: JobSpec, plan: Plan, loader: Loader, latents: torch.Tensor, watch: Watch) -> Iterator[Frame]:
    """Yield the one picture of packed latents (1, (H/16)(W/16), 64)."""
    refuse_broken(latents, "The denoised latents")
    with loader.component("vae", plan.device) as vae:
        stop_inside(vae, watch)
        lessen(vae, plan, watch.check)
        watch.loaded()
        pipe = _pipeline(vae=vae)
        unpacked = pipe._unpack_latents(  # noqa: SLF001 - the pipeline offers no other way to unpack
            latents, spec.height, spec.width, pipe.vae_scale_factor
        )
        unpacked = unpacked.to(vae.dtype)
        scaled = (unpacked / vae.config.scaling_factor) + vae.config.shift_factor
        pictures = vae.decode(scaled.to(plan.device), return_dict=False)[0]
        watch.step(1, 1)
        yield from frames_of(pictures)


@torch.no_grad()
def encoded_pictures(pictures: Sequence[Frame], plan: Plan, loader: Loader, watch: Watch) -> list[Values]:
    """Return latents (16, H/8, W/8) of each picture (H, W, 3)."""
    with loader.component("vae", plan.device) as vae:
        stop_inside(vae, watch)
        latents = [vae.encode(pixels_of(picture, vae)).latent_dist.mode() for picture in pictures]
        return [values((of[0] - vae.config.shift_factor) * vae.config.scaling_factor) for of in latents]


def _pipeline(**components: Any) -> FluxPipeline:
    """The stock pipeline with the components of one phase: what its helpers need and no more."""
    names = ("scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "transformer")
    return FluxPipeline(**dict.fromkeys(names) | components)


def first_frame(spec: JobSpec, latents: torch.Tensor) -> torch.Tensor:
    """Return (16, H/8, W/8) of packed latents (1, (H/16)(W/16), 64)."""
    unpacked: torch.Tensor = FluxPipeline._unpack_latents(  # noqa: SLF001 - there is no other way to unpack
        latents, spec.height, spec.width, VAE_SCALE_FACTOR
    )
    return unpacked[0]


def _without_noise(spec: JobSpec, latents: torch.Tensor, velocity: torch.Tensor, sigma: torch.Tensor) -> Values:
    """Return what the picture's latents would be if the rest of the way were straight."""
    return values(first_frame(spec, latents - sigma.to(latents.device) * velocity))


def is_guided(spec: JobSpec) -> bool:
    """Whether each step runs twice: with a true_cfg_scale above 1, as in FluxPipeline."""
    return spec.negative_prompt is not None and spec.true_cfg_scale is not None and spec.true_cfg_scale > 1


def _conditions(embeds: torch.Tensor | None, pooled: torch.Tensor | None, device: torch.device) -> dict[str, Any]:
    if embeds is None or pooled is None:
        return {}
    return {"encoder_hidden_states": embeds.to(device), "pooled_projections": pooled.to(device)}


def _guidance(spec: JobSpec, transformer: Any, device: torch.device) -> torch.Tensor | None:
    """Return what dev reads its guidance from; schnell reads none."""
    if not transformer.config.guidance_embeds:
        return None
    if spec.guidance_scale is None:
        raise SafelightError(f"{spec.model}: its weights take a guidance_scale, and the job has none. Add one.")
    return torch.full([1], spec.guidance_scale, device=device, dtype=torch.float32)


def _start(
    spec: JobSpec, plan: Plan, loader: Loader, watch: Watch, scheduler: Any, timesteps: torch.Tensor,
    image: Image | None, noise: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return packed latents to start from, and the places of their tokens: noise, or a picture with noise over it.

    The VAE is gone when this returns.
    """
    device, dtype, channels = (
        torch.device(plan.device),
        dtype_of(plan),
        loader.config("transformer")["in_channels"] // 4,
    )
    latents: torch.Tensor
    if image is None:
        latents, places = _pipeline().prepare_latents(1, channels, spec.height, spec.width, dtype, device, noise)
        return latents, places
    with loader.component("vae", device) as vae:
        stop_inside(vae, watch)
        lessen(vae, plan, watch.check)
        names = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "transformer")
        pipe = FluxImg2ImgPipeline(scheduler=scheduler, vae=vae, **dict.fromkeys(names))
        pixels = pipe.image_processor.preprocess(image, height=spec.height, width=spec.width)
        latents, places = pipe.prepare_latents(
            pixels, timesteps[:1], 1, channels, spec.height, spec.width, vae.dtype, device, noise
        )
    return latents.to(dtype), places.to(dtype)


def _timesteps(scheduler: Any, spec: JobSpec, device: torch.device) -> torch.Tensor:
    """Set the scheduler to its start and return its timesteps, shifted by the picture's size where it does that.

    The first ones are left out where a picture is started from: as many as its strength spares.
    """
    config, steps = scheduler.config, spec.num_inference_steps
    tokens = (spec.height // (2 * VAE_SCALE_FACTOR)) * (spec.width // (2 * VAE_SCALE_FACTOR))
    shift = calculate_shift(
        tokens,
        config.get("base_image_seq_len", 256),
        config.get("max_image_seq_len", 4096),
        config.get("base_shift", 0.5),
        config.get("max_shift", 1.15),
    )
    sigmas = None if config.get("use_flow_sigmas") else np.linspace(1.0, 1 / steps, steps)
    timesteps, _ = retrieve_timesteps(scheduler, steps, device, sigmas=sigmas, mu=shift)
    scheduler.set_begin_index(steps - spec.steps_run)
    assert isinstance(timesteps, torch.Tensor)
    return timesteps[steps - spec.steps_run :]
