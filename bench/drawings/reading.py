"""Teaching text encoders to read, before anything is drawn: of each word, what the shape that it tells of is like.

The text encoders of real models were trained on text beforehand, know that "red" belongs to "circle", and stand still
while the transformer learns. Trained together with it, T5 ended with words from which not even their colour could be
read: which of two shapes is the left one was a coin's toss after 8.5 million pictures (H100, 2026-11-26). The heads
that answer are thrown away.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from bench.drawings.fitting import Batch, Fit, told
from bench.drawings.training import Training, share
from bench.drawings.world import (
    CELLS,
    COLOURS,
    DIRECTIONS,
    MOTIONS,
    NUMBER,
    SHAPE_COLOURS,
    SHAPES,
    SIZES,
    Scenes,
    World,
)

QUESTIONS = {
    "colour": SHAPE_COLOURS,
    "shape": len(SHAPES),
    "size": len(SIZES),
    "column": 3,
    "row": 3,
    "motion": len(MOTIONS),
}
"""Of a shape, with the number of answers."""
BATCH = 512


class Heads(nn.Module):
    """What answers: from each word's embedding, and from one embedding for all of a caption."""

    def __init__(self, width: int, *, pooled: bool) -> None:
        super().__init__()
        self.words = nn.Linear(width, sum(QUESTIONS.values()))
        self.background = nn.Linear(width, len(COLOURS))
        self.first = nn.Linear(width, sum(QUESTIONS.values())) if pooled else None
        self.second = nn.Linear(width, sum(QUESTIONS.values())) if pooled else None


def answers(scenes: Scenes) -> Tensor:
    """Return (B, 2, questions): what the two shapes of each scene are like."""
    device = scenes.count.device
    cells, ways = torch.tensor(CELLS, device=device), torch.tensor(DIRECTIONS, device=device)
    alone, first = cells[scenes.position], ways[scenes.relation]
    where = torch.where((scenes.count == 2)[:, None, None], torch.stack([first, -first], 1), alone[:, None]) + 1
    own = torch.stack([scenes.colour, scenes.shape, scenes.size], 2)
    motion = scenes.motion[:, None, None].expand(-1, 2, 1)
    return torch.cat([own, where, motion], 2)


Embed = Callable[[Batch], tuple[Tensor, Tensor, Tensor | None]]


@dataclass(frozen=True)
class Reading:
    """What teaches text encoders to read."""

    fit: Fit
    batches: Callable[[], Batch]
    measured: Callable[[int], dict[str, float]]
    """Return, of so many held-out captions, the share of answers that are right, by question, in percent."""


def reading(it: Training, seconds: float, modules: list[nn.Module], embed: Embed, width: int) -> Reading:
    """Return what teaches text encoders to read.

    Args:
        embed: of a batch (`t5`, `clip`, `words`), the embeddings of each word (B, words, width), one of all of them
            (B, width), and CLIP's (B, width) where there is one.
    """
    probe = embed(read_batch(it, 2))
    heads = Heads(width, pooled=probe[2] is not None).to(it.device)

    def loss(batch: Batch) -> Tensor:
        with it.autocast():
            words, whole, pooled = embed(batch)
            said = heads.words(words)
            background = heads.background(whole)
            shapes = [] if pooled is None or heads.first is None or heads.second is None else [
                (heads.first(pooled), 0), (heads.second(pooled), 1), (heads.background(pooled), None)
            ]  # fmt: skip
        right = torch.where(batch["owner"][..., None] > 0, _told(batch), -1)
        total = _asked(said.flatten(0, 1), right.flatten(0, 1))
        total = total + cross_entropy(background.float(), batch["background"])
        for answer, shape in shapes:
            if shape is None:
                total = total + cross_entropy(answer.float(), batch["background"])
            else:
                there = (batch["count"] > shape)[:, None]
                total = total + _asked(answer, torch.where(there, batch["answers"][:, shape], -1))
        return total

    parameters = [parameter for module in (*modules, heads) for parameter in module.parameters()]
    fit = Fit("read", parameters, loss, lr=2e-3, seconds=seconds, ema_decay=0.995)

    @torch.no_grad()
    def measured(count: int) -> dict[str, float]:
        world = World(it.device, 4322)
        batch = _questions(it, world, world.scenes(count, "held out", clip=it.clip))
        with it.autocast():
            words, whole, _ = embed(batch)
            said, background = heads.words(words), heads.background(whole)
        right = _told(batch)
        found = {"background": share((background.argmax(-1) == batch["background"]).tolist())}
        for i, (name, answer) in enumerate(zip(QUESTIONS, said.split(list(QUESTIONS.values()), -1), strict=True)):
            asked = (batch["owner"] > 0) & (right[..., i] >= 0)
            found[name] = share((answer.argmax(-1) == right[..., i])[asked].tolist())
        return found

    return Reading(fit, lambda: read_batch(it, BATCH if it.device == "cuda" else 8), measured)


def measure_reading(it: Training, reading: Reading) -> None:
    """Say what text encoders tell of held-out captions, where they learned at all."""
    if reading.fit.steps:
        it.found["reading"] = reading.measured(it.arguments.measured)
        told(f"the text encoders tell, of held-out captions: {it.found['reading']}")


def _told(batch: Batch) -> Tensor:
    """Return (B, words, questions): of each word's shape, what is right."""
    return batch["answers"].gather(1, (batch["owner"] - 1).clamp(min=0)[..., None].expand(-1, -1, len(QUESTIONS)))


def read_batch(it: Training, count: int) -> Batch:
    """Return captions of training with the right answers."""
    return _questions(it, it.world, it.scenes[it.whole(len(it.scenes), count)])


def _questions(it: Training, world: World, scenes: Scenes) -> Batch:
    captions, owner = world.captions_of(scenes, clip=it.clip)
    right = answers(scenes)
    # What a caption leaves open has no answer.
    ordered = ~(captions == NUMBER["and"]).any(1)
    right[..., 3:5] = torch.where(ordered[:, None, None], right[..., 3:5], -1)
    return {
        "t5": it.tables.for_t5(captions), "clip": it.tables.for_clip(captions), "words": captions, "owner": owner,
        "answers": right, "background": scenes.background, "count": scenes.count,
    }  # fmt: skip


def _asked(said: Tensor, right: Tensor) -> Tensor:
    """Return the loss of all questions; -1 is not asked."""
    total = said.new_zeros((), dtype=torch.float32)
    for i, (answer, options) in enumerate(
        zip(said.split(list(QUESTIONS.values()), 1), QUESTIONS.values(), strict=True)
    ):
        asked = right[:, i]
        weight = (asked >= 0).float()
        each = cross_entropy(answer.float(), asked.clamp(min=0, max=options - 1), reduction="none")
        total = total + (each * weight).sum() / weight.sum().clamp(min=1)
    return total
