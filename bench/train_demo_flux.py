"""Train demo-flux from nothing: the VAE, the text encoders, the transformer with them, then four straight steps.

    python -m bench.train_demo_flux --to FOLDER                  # a quarter of an hour on an H100
    python -m bench.train_demo_flux --to FOLDER --limit-s 500    # so far today; the same command again goes on
    python -m bench.train_demo_flux --to FOLDER --tiny           # the same path in a minute on the CPU

Draws its captions and pictures itself (bench/drawings), a tenth of the combinations never. FOLDER/demo-flux is the
result, a FluxPipeline in bfloat16; FOLDER/state.safetensors is what another run goes on from; FOLDER/trained.json says
what was done, and what held-out prompts came to. Budgets are seconds of training: a slower card learns less in them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.pool import Pool

import torch
from torch import Tensor

from bench.drawings import flux, training
from bench.drawings.drawing import decoded_loss, near_in_pictures, pictures, placed
from bench.drawings.fitting import Batch, Fit, matrices, told
from bench.drawings.flux import DemoFlux
from bench.drawings.flux_training import STEPS, FluxLearning
from bench.drawings.reading import Reading, measure_reading, reading
from bench.drawings.tokens import TokenTables
from bench.drawings.training import accuracy, psnr_db
from bench.drawings.world import COLOURS, NUMBER, SHAPE_COLOURS, Scenes

TEACHER_STEPS, TEACHER_SCALE = 16, 2.0
TINY = {
    "vae_s": 6,
    "read_s": 4,
    "draw_s": 6,
    "straight_s": 4,
    "vae_batch": 4,
    "batch": 8,
    "pool": 64,
    "pairs": 16,
    "measured": 16,
}


@dataclass(frozen=True)
class Latents:
    """What the transformer learns from."""

    clean: Tensor
    """(N, PATCHES, PATCH_CHANNELS), float16."""
    captions: Tensor
    """(N, variants, words)."""
    noise: Tensor | None = None
    """What each came from, where that is known."""


class FluxTraining(FluxLearning):
    """The parts of the training, in the order in which `train` goes through them."""

    def __init__(self, arguments: argparse.Namespace, readers: Pool) -> None:
        super().__init__(arguments, readers)
        self.demo = DemoFlux.new(self.device)

    def drawn(self, scenes: Scenes) -> Tensor:
        return pictures(scenes, placed(scenes, self.stream))

    def reading(self) -> Reading:
        def embed(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
            embeds = self.demo.text_encoder_2(batch["t5"])[0]
            told = embeds[:, : batch["words"].shape[1]]
            return told, embeds.mean(1), self.demo.text_encoder(batch["clip"]).pooler_output

        encoders = [self.demo.text_encoder, self.demo.text_encoder_2]
        return reading(self, self.arguments.read_s, encoders, embed, flux.WIDTH)

    def vae_fit(self) -> Fit:
        vae = self.demo.vae
        learns = vae.decoder if self.keeps_latents else vae

        def loss(batch: Batch) -> Tensor:
            with self.autocast():
                with torch.set_grad_enabled(not self.keeps_latents):
                    posterior = vae.encode(batch["pictures"]).latent_dist
                again = vae.decode(posterior.mean + posterior.std * batch["noise"]).sample
            mean, variance = posterior.mean.float(), posterior.var.float()
            spread = 0.5 * (mean**2 + variance - 1 - posterior.logvar.float()).mean()
            total: Tensor = decoded_loss(again, batch["pictures"], batch["near"]) + 2e-4 * spread
            return total

        return Fit("vae", list(learns.parameters()), loss, lr=1.2e-3, seconds=self.arguments.vae_s, ema_decay=0.998)

    def vae_batch(self) -> Batch:
        scenes = self.scenes[self.whole(len(self.scenes), self.arguments.vae_batch)]
        drawn = self.drawn(scenes)
        noise = self.normal(len(drawn), flux.LATENT_CHANNELS, flux.LATENT_SIDE, flux.LATENT_SIDE)
        return {"pictures": drawn, "near": near_in_pictures(scenes, drawn), "noise": noise}

    @torch.no_grad()
    def measure_vae(self, *, vae_learned: bool) -> None:
        """Say what becomes of true pictures that go through the VAE; take the latents' scale and shift if it is new."""
        vae = self.demo.vae.eval().requires_grad_(requires_grad=False)
        scenes = self.scenes[: self.arguments.measured]
        drawn = pictures(scenes, placed(scenes, self.same_stream()))
        with self.autocast():
            latents = torch.cat([vae.encode(part).latent_dist.mode() for part in drawn.split(64)]).float()
            again = torch.cat([vae.decode(part).sample for part in latents.split(64)]).float()
        if vae_learned and not self.keeps_latents:
            vae.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())
        self.found["vae"] = accuracy(scenes.each(), self.verdicts(scenes, again)) | {"psnr_db": psnr_db(again, drawn)}
        told(f"the VAE's round trip: {self.found['vae']}")

    def draw_fit(self, name: str, seconds: float, lr: float) -> Fit:
        transformer = self.demo.transformer
        return Fit(
            name, list(transformer.parameters()), self.velocity_loss, lr=lr, seconds=seconds, ema_decay=0.9985,
            orthogonal=matrices(transformer.transformer_blocks, transformer.single_transformer_blocks),
        )  # fmt: skip

    @torch.no_grad()
    def drawings(self) -> Latents:
        """Return latents of many pictures, with captions."""
        vae = self.demo.vae
        clean, captions = [], []
        for scenes in (self.scenes[i : i + 512] for i in range(0, len(self.scenes), 512)):
            with self.autocast():
                latents = vae.encode(self.drawn(scenes)).latent_dist.mode().float()
            clean.append(self.packed(latents))
            captions.append(self.some_captions(scenes))
        told(f"{len(self.scenes)} pictures are drawn")
        return Latents(torch.cat(clean), torch.cat(captions))

    def batches(self, latents: Latents, at_steps: float) -> Callable[[], Batch]:
        """Return what gives batches; a share of them at the very noise levels that a picture's steps see."""

        def batch() -> Batch:
            count = self.arguments.batch
            place = self.whole(len(latents.clean), count)
            clean = latents.clean[place].float()
            caption = latents.captions[place, self.whole(latents.captions.shape[1], count)].long()
            if latents.noise is None:
                noise, caption = self.normal(*clean.shape), self.sometimes_unprompted(caption)
            else:
                noise = latents.noise[place].float()
            return self.noisy(clean, noise, caption, at_steps)

        return batch

    @torch.no_grad()
    def straightened(self) -> Latents:
        """Return noise with what many guided steps make of it (reflow, Liu et al. 2022), where that is right.

        Where a caption says all, what the analyser sees is not what it asks for is left out: the pupil learns from the
        teacher's best alone.
        """
        clean, noises, captions = [], [], []
        kept = seen = 0
        while kept < self.arguments.pairs and self.goes_on:
            count = 4 * self.arguments.batch
            scenes = self.scenes[self.whole(len(self.scenes), count)]
            caption = self.sometimes_unprompted(self.world.captions(scenes))
            noise = self.normal(count, flux.PATCHES, flux.PATCH_CHANNELS)
            guided = torch.where(caption[:, 0] > 0, TEACHER_SCALE, 1.0)
            made = self.sampled(noise, caption, TEACHER_STEPS, guided)
            right = [answer["all"] for answer in self.verdicts(scenes, self.decoded(made))]
            chosen = torch.tensor(right, device=self.device) | ~says_all(scenes, caption)
            clean.append(made[chosen].half())
            noises.append(noise[chosen].half())
            captions.append(caption[chosen, None].to(torch.int16))
            kept, seen = kept + len(clean[-1]), seen + count
        told(f"{kept} of {seen} of the teacher's pictures are right, or asked for little")
        self.found["teacher"] = {"pictures": seen, "kept": kept}
        return Latents(torch.cat(clean), torch.cat(captions), torch.cat(noises))

    def measure(self, name: str, *, steps: int = STEPS, scale: float | None = None) -> None:
        """Say what held-out prompts come to; the same prompts and noise each time."""
        scenes, captions, noise = self.asked()
        scales = None if scale is None else torch.full((len(scenes),), scale, device=self.device)
        made = self.sampled(noise, captions, steps, scales)
        self.found[name] = accuracy(scenes.each(), self.verdicts(scenes, self.decoded(made)))
        told(f"{name}: {self.found[name]}")


def says_all(scenes: Scenes, captions: Tensor) -> Tensor:
    """Return (B,) whether captions name every colour and every place; what they leave open may be anything."""
    colours = torch.tensor([NUMBER[name] for name in list(COLOURS)[:SHAPE_COLOURS]], device=captions.device)
    named = (captions[:, :, None] == colours[scenes.colour][:, None, :]).any(1)
    ordered = ~(captions == NUMBER["and"]).any(1)
    return named[:, 0] & (named[:, 1] | (scenes.count == 1)) & ordered


def train(arguments: argparse.Namespace, readers: Pool) -> None:
    """Go through what is left of the training."""
    it = FluxTraining(arguments, readers)
    for module in it.demo.modules():
        told(f"{type(module).__name__}: {sum(parameter.numel() for parameter in module.parameters()):,} parameters")
    if arguments.begin:
        it.demo.take(arguments.begin, arguments.keep)
        it.tables = TokenTables.of(it.device, it.demo.tokenizer, it.demo.tokenizer_2)
    vae = it.go_on(it.vae_fit(), lambda: it.vae_batch)
    it.measure_vae(vae_learned=vae.steps > 0)
    taught = it.reading()
    read = it.go_on(taught.fit, lambda: taught.batches, vae)
    measure_reading(it, taught)
    for encoder in (it.demo.text_encoder, it.demo.text_encoder_2):
        encoder.requires_grad_(requires_grad=False)
    if arguments.compile:
        transformer = it.demo.transformer
        for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
            block.compile(dynamic=False)
    drawing = it.draw_fit("draw", arguments.draw_s, arguments.lr)
    draw = it.go_on(drawing, lambda: it.batches(it.drawings(), at_steps=0.15), vae, read)
    it.measure("drawn")
    it.measure("drawn, guided, many steps", steps=TEACHER_STEPS, scale=TEACHER_SCALE)
    straightening = it.draw_fit("straight", arguments.straight_s, arguments.lr / 2)
    straight = it.go_on(straightening, lambda: it.batches(it.straightened(), at_steps=0.7), vae, read, draw)
    if straight.steps:
        it.measure("straight, four steps")
        it.measure("straight, eight steps", steps=8)
        it.measure("straight, four steps, guided", scale=TEACHER_SCALE)
    it.demo.save(arguments.to / "demo-flux")
    it.tell(vae, read, draw, straight)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vae-s", type=float, default=120.0)
    parser.add_argument("--read-s", type=float, default=30.0)
    parser.add_argument("--draw-s", type=float, default=540.0)
    parser.add_argument("--straight-s", type=float, default=120.0)
    parser.add_argument("--lr", type=float, default=1e-3, help="of the transformer, at most; half for straight steps")
    parser.add_argument("--vae-batch", type=int, default=48)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--pool", type=int, default=400_000, help="pictures that are drawn and encoded beforehand")
    parser.add_argument("--pairs", type=int, default=60_000, help="of noise and what becomes of it, for straight steps")
    return training.run(train, parser, TINY, kept=list(flux.MODULES))


if __name__ == "__main__":
    sys.exit(main())
