"""Train the demo LoRA of demo-flux: outlines where the model draws filled shapes.

    python -m bench.train_demo_lora --to FOLDER                # a quarter of an hour on two cores
    python -m bench.train_demo_lora --to FOLDER --limit-s 300  # so far today; the same command again goes on
    python -m bench.train_demo_lora --to FOLDER --tiny         # the same path in half a minute

What the LoRA learns is the model's own pictures, drawn again as outlines: noise goes through the shipped model, the
analyser reads what came of it, and the same shapes are outlined at the same places. A seed then gives the same picture
with and without it, and from such pairs of noise and picture its paths are straight from the start, for four steps.
The shipped VAE never saw a line: its encoder loses the colours of thin ones, while its decoder can draw them. So an
encoder is fitted to the frozen decoder first; it is used here and nowhere else.
FOLDER/outlines.safetensors is the result, in bfloat16; FOLDER/state.safetensors is what another run goes on from;
FOLDER/trained.json says what was done, and what held-out prompts came to.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from bench.drawings import analyser, flux, training
from bench.drawings.drawing import Placed, decoded_loss, near_in_pictures, pictures, placed
from bench.drawings.fitting import Batch, Fit, save_state, saved_state, told
from bench.drawings.flux import DemoFlux
from bench.drawings.flux_training import STEPS, FluxLearning
from bench.drawings.tokens import TokenTables
from bench.drawings.training import SEEN_AT_ONCE, accuracy, as_bytes, psnr_db
from bench.drawings.world import Scene, Scenes, joined

WARM_UP_STEPS = 30
AT_STEPS = 0.8
"""Share of a batch at the very noise levels that a picture's steps see."""
LINEARS = (
    "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
    "net.0.proj", "net.2", "proj_mlp", "proj_out",
)  # fmt: skip
"""Ends the names of what the LoRA is added to, in the transformer's blocks: attention and feed-forward."""
NAME = "outlines"
TINY = {"encoder_s": 4, "draw_s": 6, "encoder_batch": 2, "batch": 4, "pool": 32, "pairs": 8, "measured": 8}


class Outlining:
    """A LoRA of a transformer, which can be switched off."""

    def __init__(self, transformer: nn.Module, rank: int, stream: torch.Generator) -> None:
        self.on = False
        self._factors: dict[str, tuple[nn.Parameter, nn.Parameter]] = {}
        for name, module in transformer.named_modules():
            if "transformer_blocks." in name and name.endswith(LINEARS) and isinstance(module, nn.Linear):
                down = torch.randn(rank, module.in_features, generator=stream, device=stream.device)
                up = torch.zeros(module.out_features, rank, device=stream.device)
                pair = nn.Parameter(down / module.in_features**0.5), nn.Parameter(up)
                self._factors[name] = pair
                module.register_forward_hook(self._hook(*pair))

    def _hook(self, down: Tensor, up: Tensor) -> Callable[[nn.Module, Any, Tensor], Tensor | None]:
        def add(_module: nn.Module, given: Any, out: Tensor) -> Tensor | None:
            return out + nn.functional.linear(nn.functional.linear(given[0], down), up) if self.on else None

        return add

    def parameters(self) -> list[nn.Parameter]:
        return [factor for pair in self._factors.values() for factor in pair]

    def _named(self) -> dict[str, nn.Parameter]:
        """Return the factors by the names of diffusers and peft."""
        return {
            f"transformer.{name}.lora_{letter}.weight": factor
            for name, pair in self._factors.items()
            for letter, factor in zip("AB", pair, strict=True)
        }

    @torch.no_grad()
    def take(self, file: Path) -> None:
        """Begin with one that was saved, of the same rank."""
        stored, own = saved_state(file), self._named()
        if {name: factor.shape for name, factor in own.items()} != {name: each.shape for name, each in stored.items()}:
            raise SystemExit(f"{file} is no LoRA of these layers and this rank. Leave --begin out, or see --rank.")
        for name, factor in own.items():
            factor.copy_(stored[name])

    def save(self, file: Path) -> None:
        """Write it; without an alpha, scale 1 is as trained."""
        tensors = {
            name: factor.detach().to("cpu", torch.bfloat16).contiguous() for name, factor in self._named().items()
        }
        save_file(tensors, file, metadata={"format": "pt"})


@dataclass(frozen=True)
class Pairs:
    """Noise, and the outlines that are to come of it."""

    noise: Tensor
    """(N, PATCHES, PATCH_CHANNELS), float16; so is `clean`."""
    clean: Tensor
    captions: Tensor
    """(N, words)."""


class LoraTraining(FluxLearning):
    """The parts of the training, in the order in which `train` goes through them."""

    def __init__(self, arguments: argparse.Namespace, readers: Pool) -> None:
        super().__init__(arguments, readers)
        self.demo = DemoFlux.shipped(self.device)
        self.tables = TokenTables.of(self.device, self.demo.tokenizer, self.demo.tokenizer_2)
        self.encoder = copy.deepcopy(self.demo.vae.encoder).requires_grad_()
        self.lora = Outlining(self.demo.transformer, arguments.rank, self.stream)

    def autocast(self) -> Any:
        """In bfloat16 on a CPU that multiplies it, too: more than twice as fast with AMX."""
        known = self.device == "cuda" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return torch.autocast(self.device, torch.bfloat16, enabled=known, cache_enabled=False)

    def encoded(self, drawn: Tensor) -> Tensor:
        """Return latents (B, 16, 16, 16) of pictures, as the VAE has them."""
        latents: Tensor = self.encoder(drawn)[:, : flux.LATENT_CHANNELS]
        return latents.float()

    def encoder_fit(self) -> Fit:
        def loss(batch: Batch) -> Tensor:
            with self.autocast():
                again = self.demo.vae.decode(self.encoded(batch["pictures"])).sample
            return decoded_loss(again, batch["pictures"], batch["near"])

        return Fit(
            "encoder", list(self.encoder.parameters()), loss,
            lr=6e-4, seconds=self.arguments.encoder_s, ema_decay=0.98, warm_up_steps=WARM_UP_STEPS,
        )  # fmt: skip

    def encoder_batch(self) -> Batch:
        scenes = self.scenes[self.whole(len(self.scenes), self.arguments.encoder_batch)]
        drawn = pictures(scenes, placed(scenes, self.stream), outline=True)
        return {"pictures": drawn, "near": near_in_pictures(scenes, drawn)}

    @torch.no_grad()
    def measure_encoder(self) -> None:
        """Say what becomes of true outlines that go through it and the decoder: no LoRA can draw better ones."""
        scenes = self.scenes[: self.arguments.measured]
        drawn = pictures(scenes, placed(scenes, self.same_stream()), outline=True)
        with self.autocast():
            again = torch.cat([self.demo.vae.decode(self.encoded(part)).sample for part in drawn.split(64)]).float()
        found = accuracy(scenes.each(), self.outline_verdicts(scenes, again))
        self.found["encoder"] = found | {"psnr_db": psnr_db(again, drawn)}
        told(f"outlines through encoder and decoder: {self.found['encoder']}")

    def draw_fit(self) -> Fit:
        return Fit(
            "draw", self.lora.parameters(), self.velocity_loss,
            lr=self.arguments.lr, seconds=self.arguments.draw_s, ema_decay=0.99, warm_up_steps=WARM_UP_STEPS,
        )  # fmt: skip

    @torch.no_grad()
    def pairs(self, encoder: Fit) -> Pairs:
        """Return noise with what the model makes of it, drawn again as outlines; what is no clear shape is left out.

        They are kept beside the state: to make them takes as long as a third of the training.
        """
        file = self.arguments.to / f"pairs-{encoder.steps}.safetensors"
        stored = saved_state(file)
        if stored and len(stored["noise"]) >= self.arguments.pairs:
            return Pairs(**{name: tensor.to(self.device) for name, tensor in stored.items()})
        noises, clean, captions = [], [], []
        kept = seen = 0
        while kept < self.arguments.pairs and self.goes_on:
            count = 4 * self.arguments.batch
            scenes = self.scenes[self.whole(len(self.scenes), count)]
            caption = self.sometimes_unprompted(self.world.captions(scenes))
            noise = self.normal(count, flux.PATCHES, flux.PATCH_CHANNELS)
            shown = as_bytes(self.shown(noise, caption, on=False))
            found = [seen_again(each) for each in self.readers.map(analyser.read, shown, chunksize=SEEN_AT_ONCE)]
            places = [i for i, each in enumerate(found) if each is not None]
            again = [each for each in found if each is not None]
            where = Placed(*(torch.cat([getattr(each[1], name) for each in again]) for name in ("centre", "half_size")))
            drawn = pictures(joined([each[0] for each in again]), where, outline=True).to(self.device)
            with self.autocast():
                latents = torch.cat([self.encoded(part) for part in drawn.split(64)])
            noises.append(noise[places].half())
            clean.append(self.packed(latents))
            captions.append(caption[places])
            kept, seen = kept + len(places), seen + count
        told(f"{kept} of the model's {seen} pictures are drawn again")
        made = Pairs(torch.cat(noises), torch.cat(clean), torch.cat(captions))
        save_state(file, vars(made))
        return made

    def batches(self, encoder: Fit) -> Callable[[], Batch]:
        """Return what gives batches."""
        pairs = self.pairs(encoder)
        self.lora.on = True

        def batch() -> Batch:
            count = self.arguments.batch
            place = self.whole(len(pairs.clean), count)
            noise, clean, caption = pairs.noise[place].float(), pairs.clean[place].float(), pairs.captions[place]
            return self.noisy(clean, noise, caption, AT_STEPS)

        return batch

    def shown(self, noise: Tensor, captions: Tensor, *, on: bool) -> Tensor:
        """Return pictures, with the LoRA or without."""
        self.lora.on = on
        return self.decoded(self.sampled(noise, captions, STEPS))

    def outline_verdicts(self, scenes: Scenes, decoded: Tensor) -> list[dict[str, bool]]:
        seen = zip(scenes.each(), as_bytes(decoded), strict=True)
        return self.readers.starmap(outline_verdict, seen, chunksize=SEEN_AT_ONCE)

    def measure(self) -> None:
        """Say what held-out prompts come to with the LoRA, and without."""
        scenes, captions, noise = self.asked()
        for name, on, verdicts in (("outlines", True, self.outline_verdicts), ("without it", False, self.verdicts)):
            shown = self.shown(noise, captions, on=on)
            self.found[name] = accuracy(scenes.each(), verdicts(scenes, shown))
            told(f"{name}: {self.found[name]}")


def outline_verdict(scene: Scene, picture: analyser.Picture) -> dict[str, bool]:
    """Return what the analyser says of a picture that should be of outlines."""
    return analyser.verdict(scene, analyser.read(picture), outline=True)


def seen_again(found: analyser.Found) -> tuple[Scenes, Placed] | None:
    """Return what the analyser saw as a scene that can be drawn, on the CPU; None where it is no one or two shapes."""
    things = found.things
    if len(things) not in (1, 2) or any(thing.shape == analyser.NO_SHAPE for thing in things):
        return None
    both = (things[0], things[-1])
    one = torch.zeros(1, dtype=torch.long)
    scenes = Scenes(
        count=one + len(things), shape=torch.tensor([[thing.shape for thing in both]]),
        colour=torch.tensor([[thing.colour for thing in both]]), size=torch.zeros(1, 2, dtype=torch.long),
        position=one, relation=one, background=one + found.background, motion=one,
    )  # fmt: skip
    centre = torch.tensor([[[thing.x, thing.y] for thing in both]])
    return scenes, Placed(centre, torch.tensor([[thing.half_size for thing in both]]))


def train(arguments: argparse.Namespace, readers: Pool) -> None:
    """Go through what is left of the training."""
    it = LoraTraining(arguments, readers)
    if arguments.begin:
        it.lora.take(arguments.begin)
    told(f"a LoRA of {sum(parameter.numel() for parameter in it.lora.parameters()):,} weights")
    encoder = it.go_on(it.encoder_fit(), lambda: it.encoder_batch)
    it.measure_encoder()
    draw = it.go_on(it.draw_fit(), lambda: it.batches(encoder), encoder)
    if draw.steps:
        it.measure()
        it.lora.save(arguments.to / f"{NAME}.safetensors")
    it.tell(encoder, draw)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder-s", type=float, default=300.0)
    parser.add_argument("--draw-s", type=float, default=500.0)
    parser.add_argument("--begin", type=Path, metavar="FILE", help="with this LoRA, of the same rank")
    parser.add_argument("--lr", type=float, default=3e-3, help="of the LoRA, at most")
    parser.add_argument("--encoder-batch", type=int, default=8)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--pool", type=int, default=20_000, help="scenes to draw from")
    parser.add_argument("--pairs", type=int, default=3000, help="of noise and what is to become of it")
    return training.run(train, parser, TINY, needs_card=False)


if __name__ == "__main__":
    sys.exit(main())
