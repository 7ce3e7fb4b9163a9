"""Train demo-wan from nothing: the video VAE, the text encoder, then the transformer with it.

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
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.pool import Pool
from typing import Protocol

import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException
from torch._inductor.exc import InductorError

from bench.drawings import framewise, training, wan, whole_clips
from bench.drawings.drawing import SIDE, clips, decoded_loss, near_shapes, parts_of_clips
from bench.drawings.fitting import Batch, Fit, even_sigmas, matrices, shifted, some_sigmas, told
from bench.drawings.reading import Reading, measure_reading, reading
from bench.drawings.tokens import TokenTables
from bench.drawings.training import Training, accuracy, psnr_db
from bench.drawings.wan import DemoWan
from bench.drawings.world import CAPTION_WORDS, World

FRAMES = 17
STEPS = 20
DRAWN_AT_ONCE = 128
FIRST_FRAME = 6.0
"""How much the first latent frame counts: all of one picture, where the others have what four of them change."""
FROM_A_PICTURE = 0.15
"""Share of clips whose first latent frame is given; what little it takes to learn that is learned soon."""
TINY = {
    "vae_s": 4, "vae_whole_s": 4, "read_s": 4, "draw_s": 4, "vae_batch": 1, "vae_whole_batch": 1, "batch": 4,
    "pool": 8, "measured": 2,
}  # fmt: skip


@dataclass(frozen=True)
class Part:
    """What the VAE learns from: so many frames of a clip, and a square of them."""

    frames: int
    side: int


CROP = Part(9, 64)
"""One frame, four that follow a first, and four that follow four: all that the VAE ever does, an eighth of a clip."""
WHOLE = Part(FRAMES, SIDE)
"""Where borders are, and how far it is to them."""


@dataclass(frozen=True)
class Latents:
    """What the transformer learns from."""

    clean: Tensor
    """(N, 48, T, 8, 8), float16, of mean 0 and deviation 1 in each channel."""
    captions: Tensor
    """(N, variants, T5_TOKENS, WIDTH), float16: the text encoder stands still."""
    nothing: Tensor
    """(1, T5_TOKENS, WIDTH): of no caption."""


class Switch(Protocol):
    """Has something compiled, or not."""

    def __call__(self, *, compiled: bool) -> None: ...


class WanTraining(Training):
    """The parts of the training, in the order in which `train` goes through them."""

    def __init__(self, arguments: argparse.Namespace, readers: Pool) -> None:
        super().__init__(arguments, readers, clip=True)
        self.demo = DemoWan.new(self.device)
        self.block: framewise.Block = framewise.block_applied
        self.vae_fits: list[Fit] = []

    def compiled_if_it_can_be(self, fit: Fit, batch: Batch, switch: Switch) -> None:
        """Compile what a fit goes through where the compiler copes with it: without, it is only slower."""
        switch(compiled=True)
        try:
            fit.gradients(batch)
        except (TorchDynamoException, InductorError) as error:
            told(f"{fit.name} goes on without being compiled: {str(error).strip().splitlines()[0]}")
            switch(compiled=False)
        else:
            told(f"{fit.name} is compiled")

    def reading(self) -> Reading:
        def embed(batch: Batch) -> tuple[Tensor, Tensor, None]:
            embeds = self.demo.embeds(batch["t5"])
            return embeds[:, : batch["words"].shape[1]], embeds.mean(1), None

        return reading(self, self.arguments.read_s, [self.demo.text_encoder], embed, wan.WIDTH)

    def vae_fit(self, name: str, seconds: float, lr: float) -> Fit:
        vae = self.demo.vae
        parts = [vae.post_quant_conv, vae.decoder] if self.keeps_latents else [vae]

        def loss(batch: Batch) -> Tensor:
            with self.autocast():
                with torch.set_grad_enabled(not self.keeps_latents):
                    mean, logvar = whole_clips.encoded(vae, batch["clips"])
                again = whole_clips.decoded(vae, mean + (0.5 * logvar).exp() * batch["noise"])
            spread = 0.5 * (mean.float() ** 2 + logvar.float().exp() - 1 - logvar.float()).mean()
            return decoded_loss(again, batch["clips"], batch["near"]) + 1e-4 * spread

        parameters = [parameter for part in parts for parameter in part.parameters()]
        return Fit(name, parameters, loss, lr=lr, seconds=seconds, ema_decay=0.998)

    def train_vae(self) -> None:
        """Go through both parts: many squares of clips, then whole ones."""
        arguments = self.arguments
        for name, seconds, lr, part, count in (
            ("vae", arguments.vae_s, 6e-4, CROP, arguments.vae_batch),
            ("vae whole", arguments.vae_whole_s, 3e-4, WHOLE, arguments.vae_whole_batch),
        ):
            fit = self.vae_fit(name, seconds, lr)
            batches = self.vae_batches(part, count)

            def ready(fit: Fit = fit, batches: Callable[[], Batch] = batches) -> Callable[[], Batch]:
                if arguments.compile:
                    self.compiled_if_it_can_be(fit, batches(), whole_clips.activate)
                return batches

            self.vae_fits.append(self.go_on(fit, ready, *self.vae_fits))
        whole_clips.activate(compiled=False)

    def vae_batches(self, part: Part, count: int) -> Callable[[], Batch]:
        shape = (count, wan.LATENT_CHANNELS, (part.frames - 1) // wan.FRAMES_PER_LATENT + 1, *[part.side // 16] * 2)

        def batch() -> Batch:
            scenes = self.scenes[self.whole(len(self.scenes), count)]
            drawn = parts_of_clips(scenes, FRAMES, part.frames, part.side, self.stream)
            return {"clips": drawn, "near": near_shapes(scenes, drawn), "noise": self.normal(*shape)}

        return batch

    @torch.no_grad()
    def measure_vae(self) -> None:
        """Say what becomes of true clips that go through the VAE; take its latents' mean and deviation if it is new."""
        vae = self.demo.vae.eval().requires_grad_(requires_grad=False)
        scenes = self.scenes[: min(self.arguments.measured, 256)]
        drawn = clips(scenes, FRAMES, self.same_stream())
        with self.autocast():
            latents = torch.cat([whole_clips.encoded(vae, part)[0] for part in drawn.split(16)]).float()
            again = torch.cat([vae.decode(part).sample for part in latents.split(16)]).float()
        if any(fit.steps for fit in self.vae_fits) and not self.keeps_latents:
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
                velocity = self.velocity(batch["noisy"], batch["sigma"], batch["embeds"], self.block)
            # Where the picture is given there is nothing to learn.
            free = (batch["sigma"] > 0).float()[:, None, :, None, None]
            free[:, :, 0] *= FIRST_FRAME
            off = (velocity.float() - batch["velocity"]) ** 2 * free
            return off.mean() / free.mean()

        transformer = self.demo.transformer
        return Fit(
            "draw", list(transformer.parameters()), loss, lr=self.arguments.lr, seconds=self.arguments.draw_s,
            ema_decay=0.9985, orthogonal=matrices(transformer.blocks),
        )  # fmt: skip

    def velocity(self, noisy: Tensor, sigma: Tensor, embeds: Tensor, block: framewise.Block) -> Tensor:
        return framewise.velocity(self.demo.transformer, noisy, sigma, embeds, block)

    def train_transformer(self, read: Fit) -> Fit:
        fit = self.draw_fit()

        def switch(*, compiled: bool) -> None:
            as_it_is = framewise.block_applied
            self.block = torch.compile(as_it_is, dynamic=False) if compiled else as_it_is

        def ready() -> Callable[[], Batch]:
            batches = self.batches(self.drawings())
            if self.arguments.compile:
                self.compiled_if_it_can_be(fit, batches(), switch)
            return batches

        return self.go_on(fit, ready, *self.vae_fits, read)

    @torch.no_grad()
    def drawings(self) -> Latents:
        """Return latents of many clips, with captions."""
        clean: list[Tensor] = []
        captions: list[Tensor] = []
        until = time.monotonic() + self.arguments.pool_s
        for scenes in (self.scenes[i : i + DRAWN_AT_ONCE] for i in range(0, len(self.scenes), DRAWN_AT_ONCE)):
            if clean and time.monotonic() > until:
                break
            with self.autocast():
                latents, _ = whole_clips.encoded(self.demo.vae, clips(scenes, FRAMES, self.stream))
                said = [
                    self.demo.embeds(self.tables.for_t5(way)) for way in self.some_captions(scenes).long().unbind(1)
                ]
            clean.append(self.scaled(latents.float()).half())
            captions.append(torch.stack(said, 1).half())
        captionless = torch.zeros(1, CAPTION_WORDS, dtype=torch.long, device=self.device)
        with self.autocast():
            nothing = self.demo.embeds(self.tables.for_t5(captionless))
        told(f"{sum(map(len, clean))} clips are drawn")
        return Latents(torch.cat(clean), torch.cat(captions), nothing.float())

    def batches(self, latents: Latents) -> Callable[[], Batch]:
        def batch() -> Batch:
            count = self.arguments.batch
            place = self.whole(len(latents.clean), count)
            clean = latents.clean[place].float()
            embeds = latents.captions[place, self.whole(latents.captions.shape[1], count)].float()
            unprompted = self.unprompted(count)[:, None, None]
            noise = self.normal(*clean.shape)
            sigma = shifted(some_sigmas(count, self.stream), wan.FLOW_SHIFT)[:, None].repeat(1, clean.shape[2])
            given = self.uniform(count) < FROM_A_PICTURE
            sigma[:, 0] = torch.where(given, 0.0, sigma[:, 0])
            level = sigma[:, None, :, None, None]
            return {
                "noisy": (1 - level) * clean + level * noise, "velocity": noise - clean, "sigma": sigma,
                "embeds": torch.where(unprompted, latents.nothing, embeds),
            }  # fmt: skip

        return batch

    @torch.no_grad()
    def sampled(self, noise: Tensor, captions: Tensor, guidance_scale: float, first: Tensor | None = None) -> Tensor:
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
                velocity = self.velocity(torch.cat([latents] * 2), sigma, embeds, framewise.block_applied)
                wanted, away = velocity.float().chunk(2)
                latents = latents + (following - level) * (away + guidance_scale * (wanted - away))
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
        ways = itertools.product((("from text", None), ("from a picture", self.scaled(first))), self.arguments.guided)
        for (kind, given), guidance_scale in ways:
            name = f"{kind}, guidance_scale {guidance_scale:g}"
            made = self.sampled(noise, captions, guidance_scale, given) * deviation + mean
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
        it.demo.take(arguments.begin, arguments.keep)
        it.tables = TokenTables.of(it.device, t5=it.demo.tokenizer)
    it.train_vae()
    it.measure_vae()
    taught = it.reading()
    read = it.go_on(taught.fit, lambda: taught.batches, *it.vae_fits)
    measure_reading(it, taught)
    it.demo.text_encoder.requires_grad_(requires_grad=False)
    draw = it.train_transformer(read)
    if draw.steps:
        it.measure()
    it.demo.save(arguments.to / "demo-wan")
    it.tell(*it.vae_fits, read, draw)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vae-s", type=float, default=120.0, help="of the VAE with squares of clips")
    parser.add_argument("--vae-whole-s", type=float, default=240.0, help="of the VAE with whole clips")
    parser.add_argument("--read-s", type=float, default=25.0)
    parser.add_argument("--draw-s", type=float, default=430.0)
    parser.add_argument("--vae-batch", type=int, default=32)
    parser.add_argument("--vae-whole-batch", type=int, default=8)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--lr", type=float, default=1.5e-3, help="of the transformer, at most")
    parser.add_argument("--guided", type=float, nargs="+", default=[1.5, 3.0], metavar="GUIDANCE_SCALE")
    parser.add_argument("--pool", type=int, default=60_000, help="clips that are drawn and encoded beforehand")
    parser.add_argument("--pool-s", type=float, default=60.0, help="at most for that; there are fewer clips then")
    return training.run(train, parser, TINY, kept=list(wan.MODULES))


if __name__ == "__main__":
    sys.exit(main())
