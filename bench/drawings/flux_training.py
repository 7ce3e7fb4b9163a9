"""What the trainings of demo-flux and of its LoRA share: pictures as latents and back, batches, a loss, four steps."""

from __future__ import annotations

import argparse
import itertools
from multiprocessing.pool import Pool

import torch
from torch import Tensor

from bench.drawings import flux
from bench.drawings.fitting import Batch, even_sigmas, some_sigmas
from bench.drawings.flux import DemoFlux, patches, unpatched
from bench.drawings.training import Training
from bench.drawings.world import SHAPES, Scenes, World, joined

STEPS = 4
"""Of a picture, as schnell's."""
DECODED_AT_ONCE = 128


HARDEST = 3
"""How often small stars are shown for one time of the others: their tips are three pixels wide, and nine of nine single
shapes that came out wrong before were theirs."""
STAR, SMALL = SHAPES.index("star"), 0


def hardest(scenes: Scenes) -> Tensor:
    """Return (B,) whether a scene has a small star."""
    shown = torch.arange(2, device=scenes.count.device) < scenes.count[:, None]
    return ((scenes.shape == STAR) & (scenes.size == SMALL) & shown).any(1)


class FluxLearning(Training):
    """The state of one run of a training that has the modules of demo-flux."""

    demo: DemoFlux

    def __init__(self, arguments: argparse.Namespace, readers: Pool) -> None:
        super().__init__(arguments, readers, clip=False)
        hard = self.scenes[hardest(self.scenes)]
        self.scenes = joined([self.scenes, *[hard] * (HARDEST - 1)])

    def packed(self, latents: Tensor) -> Tensor:
        """Return (B, PATCHES, PATCH_CHANNELS), float16, of the VAE's latents (B, 16, 16, 16)."""
        vae = self.demo.vae
        return patches((latents - vae.config.shift_factor) * vae.config.scaling_factor).half()

    @torch.no_grad()
    def decoded(self, packed: Tensor) -> Tensor:
        """Return pictures of packed latents."""
        vae = self.demo.vae
        scaled = unpatched(packed.float()) / vae.config.scaling_factor + vae.config.shift_factor
        with self.autocast():
            return torch.cat([vae.decode(part).sample for part in scaled.split(DECODED_AT_ONCE)]).float()

    def noisy(self, clean: Tensor, noise: Tensor, captions: Tensor, at_steps: float) -> Batch:
        """Return a batch; a share of it is at the very noise levels that a picture's steps see."""
        count = len(clean)
        stepped = 1 - self.whole(STEPS, count) / STEPS
        sigma = torch.where(self.uniform(count) < at_steps, stepped, some_sigmas(count, self.stream))
        level = sigma[:, None, None]
        return {
            "noisy": (1 - level) * clean + level * noise, "velocity": noise - clean, "sigma": sigma,
            "t5": self.tables.for_t5(captions), "clip": self.tables.for_clip(captions),
        }  # fmt: skip

    def velocity_loss(self, batch: Batch) -> Tensor:
        with self.autocast():
            velocity = self.demo.velocity(batch["noisy"], batch["sigma"], batch["t5"], batch["clip"])
        return ((velocity.float() - batch["velocity"]) ** 2).mean()

    @torch.no_grad()
    def sampled(self, noise: Tensor, captions: Tensor, steps: int, scale: Tensor | None = None) -> Tensor:
        """Return packed latents after so many steps, guided by `scale` (B,) where it is given."""
        with self.autocast():
            t5, clip = self.tables.for_t5(captions), self.tables.for_clip(captions)
            if scale is not None:
                nothing = torch.zeros_like(captions)
                t5 = torch.cat([t5, self.tables.for_t5(nothing)])
                clip = torch.cat([clip, self.tables.for_clip(nothing)])
            embeds, pooled = self.demo.text_encoder_2(t5)[0], self.demo.text_encoder(clip).pooler_output
            latents = noise
            levels = even_sigmas(steps)
            for level, following in itertools.pairwise(levels):
                times = 1 if scale is None else 2
                sigma = torch.full((times * len(noise),), level, device=self.device)
                velocity = self.demo.velocity_of(torch.cat([latents] * times), sigma, embeds, pooled).float()
                if scale is not None:
                    wanted, away = velocity.chunk(2)
                    velocity = away + scale[:, None, None] * (wanted - away)
                latents = latents + (following - level) * velocity
        return latents

    def asked(self) -> tuple[Scenes, Tensor, Tensor]:
        """Return held-out scenes, plain captions and noise: the same each time."""
        count = self.arguments.measured
        world = World(self.device, 4321)
        scenes = world.scenes(count, "held out")
        noise = torch.randn(count, flux.PATCHES, flux.PATCH_CHANNELS, generator=self.same_stream(), device=self.device)
        return scenes, world.captions(scenes, plain=True), noise
