"""FLUX's ControlNets: what is made of the picture that leads, and what that adds to each of the transformer's blocks.

In a step in which it does not lead a ControlNet is not run: FluxControlNetPipeline runs it and adds zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.pipelines.flux.pipeline_flux_controlnet import FluxControlNetPipeline, retrieve_latents
from PIL.Image import Image

from safelight.errors import SafelightError
from safelight.jobspec import JobSpec
from safelight.plan import Plan
from safelightd.loading import Loader
from safelightd.pipelines import dtype_of, stop_between_blocks, stop_inside
from safelightd.pipelines.flux_vae import lessen
from safelightd.progress import Watch

Lead = Callable[[int, int, torch.Tensor, torch.Tensor, Mapping[str, Any]], dict[str, Any]]
"""Of step, steps, latents, timestep and the prompt's conditions: what the transformer is told besides."""


@torch.no_grad()
def condition(
    spec: JobSpec, plan: Plan, loader: Loader, watch: Watch, image: Image | None, noise: torch.Generator
) -> torch.Tensor | None:
    """Return what leads, on the plan's device and in its dtype: packed latents (1, (H/16)(W/16), 64) of the picture,
    or its pixels (1, 3, H, W) for a ControlNet that reads those. None without a ControlNet.

    The VAE draws from `noise` first, as in the stock pipeline; it is gone when this returns.
    """
    if (spec.controlnet is None) != (image is None):
        found = "none was loaded" if image is None else "one was loaded"
        raise SafelightError(f"{spec.id or spec.model}: the job's ControlNet and its picture disagree: {found}.")
    if image is None:
        return None
    config = loader.config("controlnet")
    if config.get("num_mode") is not None:
        raise SafelightError(
            f"{spec.id or spec.model}: this ControlNet asks for a mode, which is not offered. Use one without modes."
        )
    device, dtype = torch.device(plan.device), dtype_of(plan)
    with loader.component("vae", device) as vae:
        stop_inside(vae, watch)
        lessen(vae, plan, watch.check)
        names = ("scheduler", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "transformer", "controlnet")
        pipe = FluxControlNetPipeline(vae=vae, **dict.fromkeys(names))
        pixels: torch.Tensor = pipe.prepare_image(image, spec.width, spec.height, 1, 1, device, vae.dtype)
        if config.get("conditioning_embedding_channels") is not None:
            return pixels.to(dtype)
        latents = retrieve_latents(vae.encode(pixels), generator=noise)
        latents = (latents - vae.config.shift_factor) * vae.config.scaling_factor
        packed: torch.Tensor = pipe._pack_latents(  # noqa: SLF001 - the pipeline offers no other way to pack
            latents, 1, latents.shape[1], *latents.shape[2:]
        )
        return packed.to(dtype)


@contextmanager
def leading(
    spec: JobSpec, loader: Loader, condition: torch.Tensor | None, device: torch.device, watch: Watch
) -> Iterator[Lead]:
    """Have what leads each step; the ControlNet is on the device until the block ends. Without one nothing leads."""
    wanted = spec.controlnet
    if wanted is None or condition is None:
        yield lambda *_step: {}
        return
    with loader.component("controlnet", device) as net:
        stop_between_blocks(net, watch)
        own: dict[str, torch.Tensor | None] = {"guidance": None}
        if net.config.guidance_embeds:
            if spec.guidance_scale is None:
                raise SafelightError(f"{spec.model}: its ControlNet takes a guidance_scale, and the job has none.")
            own = {"guidance": torch.full([1], spec.guidance_scale, device=device, dtype=torch.float32)}

        def lead(
            step: int, steps: int, latents: torch.Tensor, timestep: torch.Tensor, prompt: Mapping[str, Any]
        ) -> dict[str, Any]:
            scale = wanted.scale_at(step, steps)
            if not scale:
                return {}
            double, single = net(
                latents, condition, conditioning_scale=scale, timestep=timestep, **{**prompt, **own}, return_dict=False
            )
            return {
                "controlnet_block_samples": double,
                "controlnet_single_block_samples": single,
                "controlnet_blocks_repeat": net.input_hint_block is not None,
            }

        yield lead
