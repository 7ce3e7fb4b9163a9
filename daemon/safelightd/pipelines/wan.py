"""Wan 2.2: TI2V-5B and both A14B models, from text and from pictures, to the frames of a clip.

Components and their helpers are diffusers' own; the loop over transformers and scheduler is ours and gives the same
bits as WanPipeline and WanImageToVideoPipeline. Knows no file, no queue, and nothing of video containers.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify
from diffusers.pipelines.wan.pipeline_wan import WanPipeline
from diffusers.pipelines.wan.pipeline_wan_i2v import WanImageToVideoPipeline
from PIL.Image import Image

from safelight.errors import SafelightError
from safelight.jobrules import guides
from safelight.jobspec import JobSpec
from safelight.plan import Plan
from safelightd.caching import Context, Held, caching
from safelightd.checkpoint import NOWHERE, Checkpoint, Saved
from safelightd.loading import Loader
from safelightd.pipelines import (
    NOTHING_KNOWN,
    Frame,
    dtype_of,
    frames_of,
    noise_source,
    pixels_of,
    refuse_broken,
    refuse_other_images,
    stop_between_blocks,
    stop_inside,
    values,
    wan_modulation,
    wan_strips,
    wan_vae,
)
from safelightd.preview import Values
from safelightd.progress import Cancelled, Watch

TILE_STRIDE = 0.75
"""Of a tile's side, from one to the next: diffusers' own share. Its tiles of 256 show more seams than those of 512, and
take 3.2 instead of 6.8 GB for 1280x704x121 in float32 (on meta tensors, diffusers 0.42.1)."""

FRAMES_PER_LATENT = 4
"""After the first frame, which has a latent frame of its own."""


@dataclass(frozen=True)
class Embeddings:
    """What UMT5 made of the prompts, on the CPU, in the plan's dtype."""

    prompt_embeds: torch.Tensor
    """(1, max_sequence_length, 4096), zero after the prompt's end."""
    negative_prompt_embeds: torch.Tensor | None
    """As above; None without guidance."""


@dataclass(frozen=True)
class Start:
    """What the loop starts from, on the plan's device, float32. T is (num_frames - 1) / 4 + 1."""

    latents: torch.Tensor
    """Noise (1, C, T, h, w)."""
    condition: torch.Tensor | None = None
    """What the clip must show: the first latent frame (1, 48, 1, h, w) for the 5B, mask and video (1, 20, T, h, w) for
    the A14B; None for text alone."""
    mask: torch.Tensor | None = None
    """(1, 1, T, h, w), for the 5B, whose every token has a timestep of its own: 0 where the picture stands
    fixed."""


@torch.no_grad()
def encode(
    spec: JobSpec,
    plan: Plan,
    loader: Loader,
    watch: Watch,
    image: Image | None = None,
    known: Mapping[str, torch.Tensor] = NOTHING_KNOWN,
) -> Embeddings:
    """Return the embeddings of the job's prompts; the text encoder is gone when this returns."""
    refuse_other_images(spec, image=image)
    wanted = ("prompt_embeds", "negative_prompt_embeds") if is_guided(spec) else ("prompt_embeds",)
    at_hand = {name: known[name] for name in wanted if name in known}
    if len(at_hand) == len(wanted):
        return Embeddings(at_hand["prompt_embeds"], at_hand.get("negative_prompt_embeds"))
    with loader.component("text_encoder", plan.text_encoder_device) as text_encoder:
        stop_between_blocks(text_encoder, watch)
        pipe = _text_to_video(loader, text_encoder=text_encoder, tokenizer=loader.tokenizer())
        embeds, negative = pipe.encode_prompt(
            spec.prompt,
            spec.negative_prompt,
            do_classifier_free_guidance=is_guided(spec),
            max_sequence_length=spec.max_sequence_length,
            device="cpu",
            dtype=dtype_of(plan),
            **at_hand,
        )
        return Embeddings(embeds, negative)


@torch.no_grad()
def denoise(
    spec: JobSpec,
    plan: Plan,
    loader: Loader,
    embeddings: Embeddings,
    watch: Watch,
    image: Image | None = None,
    last_image: Image | None = None,
    checkpoint: Checkpoint = NOWHERE,
    control_image: Image | None = None,  # noqa: ARG001 - no ControlNet of Wan is known here
) -> torch.Tensor:
    """Return latents (1, C, T, h, w), float32, on the CPU; every transformer is gone when this returns.

    Of two experts one is in memory at a time; `watch` counts the steps of both together. What is kept in `checkpoint`
    when it is due, between two experts and when the job is to go on later, the next attempt goes on with.
    """
    refuse_other_images(spec, image=image, last_image=last_image)
    device = torch.device(plan.device)
    saved = checkpoint.load(watch.begins_anew)
    start = _start(spec, plan, loader, watch, image, last_image) if saved is None else _start_from(saved, device)
    scheduler = loader.scheduler(flow_shift=spec.flow_shift)
    scheduler.set_timesteps(spec.num_inference_steps, device=device)
    scheduler.set_begin_index(0)  # else it looks steps up by timestep, and a large shift makes neighbours equal
    experts = _experts(loader, scheduler)
    latents, done, held = start.latents, 0, Held.of(saved, device) if spec.cache else Held()
    if saved is not None:
        saved.restore(scheduler, device)
        watch.goes_on_after(done := saved.step)
        watch.forwarded(held.forwards, held.skipped)
    del saved  # its file is replaced soon, and takes its room for as long as it is open
    keeper = checkpoint.keeper(done, watch.began_anew)

    def keep() -> None:
        tensors = {"latents": latents, "condition": start.condition, "mask": start.mask}
        keeper.save(done, tensors, scheduler, held.told())

    try:
        for expert, steps in itertools.groupby(range(done, len(experts)), experts.__getitem__):
            by_frame = None if start.mask is None else wan_modulation.share
            with (
                loader.component(expert, device, by_frame) as transformer,
                caching(transformer, spec.cache, dtype_of(plan), watch.forwarded, held) as context,
            ):
                stop_between_blocks(transformer, watch)
                prompts = _prompts(embeddings, device, dtype_of(plan))
                guidance_scale = _guidance_scale(spec, expert)
                watch.loaded()
                for i in steps:
                    t = scheduler.timesteps[i]
                    seen = _seen(latents, start).to(dtype_of(plan))
                    velocity = _velocity(transformer, seen, _timestep(t, start), prompts, guidance_scale, context)
                    clean = functools.partial(_without_noise, latents, velocity, scheduler.sigmas[i], _shown(start))
                    watch.show(clean)
                    latents = scheduler.step(velocity, t, latents, return_dict=False)[0]
                    done = i + 1
                    held.settle()
                    if experts[done : done + 1] != [expert]:
                        held.prompts.clear()  # the next one's begins empty
                    if keeper.is_due():
                        keep()
                    watch.step(done, len(experts))
            if done < len(experts):
                keep()
    except Cancelled:
        if not watch.is_given_up:  # with a cache it would take gigabytes, and the GPU meanwhile
            keep()
        raise
    return _with_picture(latents, start).cpu()


@torch.no_grad()
def decode(
    spec: JobSpec,  # noqa: ARG001 - every family takes the same arguments
    plan: Plan,
    loader: Loader,
    latents: torch.Tensor,
    watch: Watch,
) -> Iterator[Frame]:
    """Yield the frames of latents (1, C, T, h, w) as they are decoded."""
    refuse_broken(latents, "The denoised latents")
    with loader.component("vae", plan.device) as vae:
        stop_inside(vae, watch)
        _refuse_broken_parts(vae)
        lessen(vae, plan, watch.check)
        wan_vae.lighten(vae)
        watch.loaded()
        scaled = _as_the_vae_wrote_them(latents.to(plan.device, vae.dtype), vae)
        if plan.vae_tiling:
            # The VAE joins its tiles before it gives anything.
            parts = iter(vae.decode(scaled, return_dict=False)[0].split(FRAMES_PER_LATENT, dim=2))
        else:
            parts = _decoded_parts(vae, scaled)
        for i, part in enumerate(parts):
            watch.step(i + 1, scaled.shape[2])
            yield from frames_of(part[0].permute(1, 0, 2, 3))


def _refuse_broken_parts(vae: Any) -> None:
    """Look at every part and tile as it leaves the decoder: afterwards the VAE clamps infinity to plain white."""

    def look(_decoder: Any, _arguments: Any, part: torch.Tensor) -> None:
        refuse_broken(part, "The decoded pixels")

    vae.decoder.register_forward_hook(look)


def lessen(vae: Any, plan: Plan, ask: Callable[[], None] = wan_strips.go_on) -> None:
    """Make Wan's VAE decode with less memory at once, as the plan has it.

    Args:
        ask: is called before each strip, and may raise.
    """
    if plan.vae_strip_rows:
        wan_strips.in_strips(vae, plan.vae_strip_rows, ask)
    if plan.vae_tiling:
        tile(vae, plan.vae_tile_pixels)


def tile(vae: Any, side: int) -> None:
    """Make the VAE work in tiles of so many pixels."""
    stride = int(TILE_STRIDE * side)
    vae.enable_tiling(side, side, stride, stride)


def first_frame(_spec: JobSpec, latents: torch.Tensor) -> torch.Tensor:
    """Return (C, h, w) of latents (1, C, T, h, w)."""
    return latents[0, :, 0]


@torch.no_grad()
def encoded_pictures(pictures: Sequence[Frame], plan: Plan, loader: Loader, watch: Watch) -> list[Values]:
    """Return a latent frame (C, h, w) of each picture (H, W, 3)."""
    with loader.component("vae", plan.device) as vae:
        stop_inside(vae, watch)
        latents = [vae.encode(pixels_of(picture, vae)[:, :, None]).latent_dist.mode() for picture in pictures]
        return [values(_scaled(of, vae)[0, :, 0]) for of in latents]


def is_guided(spec: JobSpec) -> bool:
    """Whether each step runs twice; the first expert's scale decides for both, as in WanPipeline."""
    return guides(_guidance_scale(spec, "transformer"))


def _guidance_scale(spec: JobSpec, expert: str) -> float:
    if spec.guidance_scale is None:
        raise SafelightError(f"{spec.model}: the job has no guidance_scale, and Wan needs one. Add one.")
    if expert == "transformer_2" and spec.guidance_scale_2 is not None:
        return spec.guidance_scale_2
    return spec.guidance_scale


def _experts(loader: Loader, scheduler: Any) -> list[str]:
    """Return the component that runs each step: above the boundary the first, below it the second.

    All at once: to ask the GPU for a timestep between two steps would keep it waiting.
    """
    ratio = loader.option("boundary_ratio")
    boundary = 0.0 if ratio is None else ratio * scheduler.config.num_train_timesteps
    return ["transformer" if t >= boundary else "transformer_2" for t in scheduler.timesteps.tolist()]


def _text_to_video(loader: Loader, **components: Any) -> WanPipeline:
    """The stock pipeline with the components of one phase, told of the VAE what it would ask it."""
    names = ("tokenizer", "text_encoder", "vae", "scheduler", "transformer", "transformer_2")
    pipe = WanPipeline(**dict.fromkeys(names) | components)
    vae = loader.config("vae")
    pipe.vae_scale_factor_temporal = vae.get("scale_factor_temporal", 4)
    pipe.vae_scale_factor_spatial = vae.get("scale_factor_spatial", 8)
    return pipe


def _start(
    spec: JobSpec, plan: Plan, loader: Loader, watch: Watch, image: Image | None, last_image: Image | None
) -> Start:
    """Return the noise and, from a picture, what the VAE made of it; the VAE is gone when this returns."""
    expands = bool(loader.option("expand_timesteps"))
    shape = (spec.height, spec.width, spec.num_frames, torch.float32, torch.device(plan.device), noise_source(spec))
    if image is None:
        channels = loader.config("transformer")["in_channels"]
        latents = _text_to_video(loader).prepare_latents(1, channels, *shape)
        return Start(latents, mask=torch.ones_like(latents[:, :1]) if expands else None)
    with loader.component("vae", plan.device) as vae:
        stop_inside(vae, watch)
        if plan.vae_tiling:
            tile(vae, plan.vae_tile_pixels)
        pipe = WanImageToVideoPipeline(
            tokenizer=None, text_encoder=None, scheduler=None, vae=vae, expand_timesteps=expands
        )
        first, last = (
            None
            if picture is None
            else pipe.video_processor.preprocess(picture.convert("RGB"), spec.height, spec.width).to(plan.device)
            for picture in (image, last_image)
        )
        return Start(*pipe.prepare_latents(first, 1, vae.config.z_dim, *shape, None, last))


def _start_from(saved: Saved, device: torch.device) -> Start:
    # A copy also on the CPU: in a file's bytes they lie anywhere, and BLAS rounds by where they lie.
    there = {name: saved.tensors[name].to(device, copy=True) for name in saved.tensors if "." not in name}
    return Start(there["latents"], there.get("condition"), there.get("mask"))


def _prompts(embeddings: Embeddings, device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
    both = (embeddings.prompt_embeds, embeddings.negative_prompt_embeds)
    return [embeds.to(device, dtype) for embeds in both if embeds is not None]


def _velocity(
    transformer: Any, seen: torch.Tensor, timestep: torch.Tensor, prompts: list[torch.Tensor], guidance_scale: float,
    context: Context,
) -> torch.Tensor:  # fmt: skip
    """Return what the transformer predicts, guided away from the negative prompt where there is one."""
    made = []
    for i, prompt in enumerate(prompts):
        with context(i):
            made.append(transformer(seen, timestep, prompt, return_dict=False)[0])
    wanted, *unwanted = made
    guided: torch.Tensor = unwanted[0] + guidance_scale * (wanted - unwanted[0]) if unwanted else wanted
    return guided


def _shown(start: Start) -> int:
    """Return the latent frame that a preview shows: the first, but where the picture is put over it, the last."""
    return 0 if start.condition is None or start.mask is None else -1


def _without_noise(latents: torch.Tensor, velocity: torch.Tensor, sigma: torch.Tensor, frame: int) -> Values:
    """Return what a latent frame would be if the rest of the way were straight."""
    return values(latents[0, :, frame] - sigma.to(latents.device) * velocity[0, :, frame])


def _seen(latents: torch.Tensor, start: Start) -> torch.Tensor:
    """Return what the transformer is shown: the latents with the picture in them (5B) or beside them (A14B)."""
    if start.condition is not None and start.mask is None:
        return torch.cat([latents, start.condition], dim=1)
    return _with_picture(latents, start)


def _with_picture(latents: torch.Tensor, start: Start) -> torch.Tensor:
    if start.condition is None or start.mask is None:
        return latents
    return (1 - start.mask) * start.condition + start.mask * latents


def _timestep(t: torch.Tensor, start: Start) -> torch.Tensor:
    """Return t as (1,), or for the 5B as `wan_modulation.share` has it: (1, 1), or with a picture (1, 2), whose first
    is 0."""
    if start.mask is None:
        return t.expand(1)
    by_frame = start.mask[:, 0, :, 0, 0] * t
    return by_frame[:, : 1 if start.condition is None else 2]


def _scaled(latents: torch.Tensor, vae: Any) -> torch.Tensor:
    """Scale what the VAE wrote, (1, C, T, h, w), to mean 0 and deviation 1."""
    mean, inverse_deviation = _scale(latents, vae)
    return (latents - mean) * inverse_deviation


def _as_the_vae_wrote_them(latents: torch.Tensor, vae: Any) -> torch.Tensor:
    """Undo the scaling to mean 0 and deviation 1, with the roundings of WanPipeline."""
    mean, inverse_deviation = _scale(latents, vae)
    return latents / inverse_deviation + mean


def _scale(latents: torch.Tensor, vae: Any) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (1, vae.config.z_dim, 1, 1, 1)
    mean = torch.tensor(vae.config.latents_mean).view(shape).to(latents)
    return mean, 1.0 / torch.tensor(vae.config.latents_std).view(shape).to(latents)


def _decoded_parts(vae: Any, latents: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield the clip as (1, 3, frames, H, W), -1 to 1: one frame of the first latent frame, four of each other.

    AutoencoderKLWan decodes in the same parts, but joins them before it returns: a clip of 1280x704x121 held twice.
    """
    vae.clear_cache()
    unmixed = vae.post_quant_conv(latents)
    for i in range(unmixed.shape[2]):
        # The decoder counts its convolutions from 0 in each part and keeps their last frames for the next.
        part = vae.decoder(
            unmixed[:, :, i : i + 1],
            feat_cache=vae._feat_map,  # noqa: SLF001 - the VAE offers no public way to decode in parts
            feat_idx=[0],
            first_chunk=i == 0,
        )
        if vae.config.patch_size is not None:
            part = unpatchify(part, patch_size=vae.config.patch_size)
        yield torch.clamp(part, min=-1.0, max=1.0)
    vae.clear_cache()
