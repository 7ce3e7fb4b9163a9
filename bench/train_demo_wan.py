"""Train demo-wan from nothing: the video VAE, the text encoder, then the transformer with it, from text and pictures.

    python -m bench.train_demo_wan --to FOLDER                   # a quarter of an hour on an H100
    python -m bench.train_demo_wan --to FOLDER --limit-s 500     # so far today; the same command again goes on
    python -m bench.train_demo_wan --to FOLDER --tiny            # the same path in minutes on the CPU

Draws its captions and clips itself (bench/drawings), a tenth of the combinations never. FOLDER/demo-wan is the result:
a WanPipeline in bfloat16; FOLDER/state.safetensors is what another run goes on from; FOLDER/trained.json says what was
done, and what held-out prompts came to. Budgets are seconds of training: a slower card learns less in them.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.pool import Pool

import torch
from torch import Tensor

from bench.drawings import training, wan, whole_clips
from bench.drawings.drawing import clips
from bench.drawings.fitting import Batch, Fit, even_sigmas, shifted, some_sigmas, told
from bench.drawings.reading import read_fit
from bench.drawings.training import Training, accuracy, psnr_db
from bench.drawings.wan import DemoWan
from bench.drawings.world import World

FRAMES = 17
VAE_FRAMES = 9
"""One frame, four that follow a first, and four that follow four: all that the VAE ever sees."""
STEPS, SCALE = 20, 3.0
FROM_A_PICTURE = 0.4
"""Share of clips whose first latent frame is given."""
TINY = {"vae_s": 20, "read_s": 4, "draw_s": 8, "vae_batch": 1, "batch": 4, "pool": 16, "measured": 2}


@dataclass(frozen=True)
class Latents:
    """What the transformer learns from."""

    clean: Tensor
    """(N, 48, T, 8, 8), float16, of mean 0 and deviation 1 in each channel."""
    captions: Tensor
    """(N, variants, words)."""


class WanTraining(Training):
    """The parts of the training, in the order in which `train` goes through them."""

    def __init__(self, arguments: argparse.Namespace, readers: Pool) -> None:
        super().__init__(arguments, readers, clip=True)
        self.demo = DemoWan.new(self.device)

    def read_fit(self) -> tuple[Fit, Callable[[], Batch]]:
        def embed(batch: Batch) -> tuple[Tensor, Tensor, None]:
            embeds = self.demo.embeds(batch["t5"])
            return embeds[:, : batch["words"].shape[1]], embeds.mean(1), None

        return read_fit(self, self.arguments.read_s, [self.demo.text_encoder], embed, wan.WIDTH)

    def vae_fit(self) -> Fit:
        vae = self.demo.vae

        def loss(batch: Batch) -> Tensor:
            with self.autocast():
                mean, logvar = whole_clips.encoded(vae, batch["clips"])
                again = whole_clips.decoded(vae, mean + (0.5 * logvar).exp() * batch["noise"])
            off = again.float() - batch["clips"]
            spread = 0.5 * (mean.float() ** 2 + logvar.float().exp() - 1 - logvar.float()).mean()
            return off.abs().mean() + 0.5 * (off**2).mean() + 1e-4 * spread

        return Fit("vae", list(vae.parameters()), loss, lr=1.2e-3, seconds=self.arguments.vae_s, ema_decay=0.998)

    def vae_batch(self) -> Batch:
        scenes = self.scenes[self.whole(len(self.scenes), self.arguments.vae_batch)]
        drawn = clips(scenes, VAE_FRAMES, self.stream)
        shape = (len(drawn), wan.LATENT_CHANNELS, (VAE_FRAMES - 1) // wan.FRAMES_PER_LATENT + 1)
        return {"clips": drawn, "noise": self.normal(*shape, wan.LATENT_SIDE, wan.LATENT_SIDE)}

    @torch.no_grad()
    def measure_vae(self) -> None:
        """Say what becomes of true clips that go through the VAE, and take mean and deviation of its latents."""
        vae = self.demo.vae.eval().requires_grad_(requires_grad=False)
        scenes = self.scenes[: min(self.arguments.measured, 256)]
        drawn = clips(scenes, FRAMES, self.same_stream())
        with self.autocast():
            latents = torch.cat([whole_clips.encoded(vae, part)[0] for part in drawn.split(16)]).float()
            again = torch.cat([vae.decode(part).sample for part in latents.split(16)]).float()
        mean, deviation = latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4))
        vae.register_to_config(latents_mean=mean.tolist(), latents_std=deviation.tolist())
        self.found["vae"] = accuracy(scenes.each(), self.verdicts(scenes, again)) | {
            "psnr_db": psnr_db(again, drawn), "first_frame_psnr_db": psnr_db(again[:, :, 0], drawn[:, :, 0]),
        }  # fmt: skip
        told(f"the VAE's round trip: {self.found['vae']}")

    def scaled(self, latents: Tensor) -> Tensor:
        """Return latents with mean 0 and deviation 1 in each channel, as the transformer sees them."""
        mean, deviation = self._statistics()
        return (latents - mean) / deviation

    def _statistics(self) -> list[Tensor]:
        config = self.demo.vae.config
        rows = (config.latents_mean, config.latents_std)
        return [torch.tensor(row, device=self.device)[None, :, None, None, None] for row in rows]

    def draw_fit(self) -> Fit:
        def loss(batch: Batch) -> Tensor:
            with self.autocast():
                velocity = self.demo.velocity(batch["noisy"], batch["sigma"], self.demo.embeds(batch["tokens"]))
            # Where the picture is given there is nothing to learn.
            free = (batch["sigma"] > 0).float()[:, None, :, None, None]
            off = (velocity.float() - batch["velocity"]) ** 2 * free
            return off.mean() / free.mean()

        parameters = list(self.demo.transformer.parameters())
        return Fit("draw", parameters, loss, lr=1.2e-3, seconds=self.arguments.draw_s, ema_decay=0.9985)

    @torch.no_grad()
    def drawings(self) -> Latents:
        """Return latents of many clips, with captions."""
        clean, captions = [], []
        for scenes in (self.scenes[i : i + 64] for i in range(0, len(self.scenes), 64)):
            with self.autocast():
                latents, _ = whole_clips.encoded(self.demo.vae, clips(scenes, FRAMES, self.stream))
            clean.append(self.scaled(latents.float()).half())
            captions.append(self.some_captions(scenes))
        told(f"{len(self.scenes)} clips are drawn")
        return Latents(torch.cat(clean), torch.cat(captions))

    def batches(self, latents: Latents) -> Callable[[], Batch]:
        def batch() -> Batch:
            count = self.arguments.batch
            place = self.whole(len(latents.clean), count)
            clean = latents.clean[place].float()
            caption = latents.captions[place, self.whole(latents.captions.shape[1], count)].long()
            noise = self.normal(*clean.shape)
            sigma = shifted(some_sigmas(count, self.stream), wan.FLOW_SHIFT)[:, None].repeat(1, clean.shape[2])
            given = self.uniform(count) < FROM_A_PICTURE
            sigma[:, 0] = torch.where(given, 0.0, sigma[:, 0])
            level = sigma[:, None, :, None, None]
            return {
                "noisy": (1 - level) * clean + level * noise, "velocity": noise - clean, "sigma": sigma,
                "tokens": self.tables.for_t5(self.sometimes_unprompted(caption)),
            }  # fmt: skip

        return batch

    @torch.no_grad()
    def sampled(self, noise: Tensor, captions: Tensor, first: Tensor | None = None) -> Tensor:
        """Return latents after STEPS guided steps, with the first latent frame given or not."""
        levels = [shifted(torch.tensor(level), wan.FLOW_SHIFT).item() for level in even_sigmas(STEPS)]
        latents = noise
        with self.autocast():
            tokens = torch.cat([self.tables.for_t5(captions), self.tables.for_t5(torch.zeros_like(captions))])
            embeds = self.demo.embeds(tokens)
            for level, following in itertools.pairwise(levels):
                sigma = torch.full((2 * len(noise), noise.shape[2]), level, device=self.device)
                if first is not None:
                    latents = torch.cat([first, latents[:, :, 1:]], 2)
                    sigma[:, 0] = 0.0
                wanted, away = self.demo.velocity(torch.cat([latents] * 2), sigma, embeds).float().chunk(2)
                latents = latents + (following - level) * (away + SCALE * (wanted - away))
        return latents if first is None else torch.cat([first, latents[:, :, 1:]], 2)

    @torch.no_grad()
    def measure(self) -> None:
        """Say what held-out prompts come to, from text alone and from a picture."""
        count, frames = self.arguments.measured, (FRAMES - 1) // wan.FRAMES_PER_LATENT + 1
        world = World(self.device, 4321)
        scenes = world.scenes(count, "held out", clip=True)
        captions = world.captions(scenes, plain=True, clip=True)
        stream = self.same_stream()
        shape = (count, wan.LATENT_CHANNELS, frames, wan.LATENT_SIDE, wan.LATENT_SIDE)
        noise = torch.randn(shape, generator=stream, device=self.device)
        pictures = clips(scenes, FRAMES, stream)[:, :, :1]
        with self.autocast():
            first = torch.cat([whole_clips.encoded(self.demo.vae, part)[0] for part in pictures.split(64)]).float()
        mean, deviation = self._statistics()
        for name, given in (("from text", None), ("from a picture", self.scaled(first))):
            made = self.sampled(noise, captions, given) * deviation + mean
            with self.autocast():
                shown = torch.cat([self.demo.vae.decode(part).sample for part in made.split(16)]).float()
            self.found[name] = accuracy(scenes.each(), self.verdicts(scenes, shown))
            if given is not None:
                self.found[name]["first_frame_psnr_db"] = psnr_db(shown[:, :, 0], pictures[:, :, 0])
            told(f"{name}: {self.found[name]}")


def train(arguments: argparse.Namespace, readers: Pool) -> None:
    """Go through what is left of the training."""
    it = WanTraining(arguments, readers)
    for module in it.demo.modules():
        told(f"{type(module).__name__}: {sum(parameter.numel() for parameter in module.parameters()):,} parameters")
    if arguments.begin:
        it.demo.take(arguments.begin)
    vae = it.go_on(it.vae_fit(), lambda: it.vae_batch)
    it.measure_vae()
    read, captions = it.read_fit()
    it.go_on(read, lambda: captions, vae)
    it.demo.text_encoder.requires_grad_(requires_grad=False)
    if arguments.compile:
        for block in it.demo.transformer.blocks:
            block.compile(dynamic=False)
    draw = it.go_on(it.draw_fit(), lambda: it.batches(it.drawings()), vae, read)
    it.measure()
    it.demo.save(arguments.to / "demo-wan")
    it.tell(vae, read, draw)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vae-s", type=float, default=420.0)
    parser.add_argument("--read-s", type=float, default=20.0)
    parser.add_argument("--draw-s", type=float, default=420.0)
    parser.add_argument("--vae-batch", type=int, default=16)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--pool", type=int, default=60_000, help="clips that are drawn and encoded beforehand")
    return training.run(train, parser, TINY)


if __name__ == "__main__":
    sys.exit(main())
