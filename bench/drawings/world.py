"""Scenes of one or two shapes, and the captions that ask for them: random, in batches, as whole numbers.

A caption is a row of word numbers; each word is one token of both tokenizers (bench/drawings/tokens.py), so that a
batch is tokenized by looking words up. Knows no pixel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor

SHAPES = ("circle", "square", "triangle", "star")
COLOURS = {
    "red": (220, 40, 40), "green": (40, 160, 60), "blue": (40, 70, 220), "yellow": (245, 220, 50),
    "orange": (250, 140, 30), "purple": (130, 50, 170), "pink": (250, 150, 190), "cyan": (60, 200, 220),
    "white": (255, 255, 255), "black": (15, 15, 15), "gray": (130, 130, 130), "brown": (120, 75, 40),
}  # fmt: skip
"""RGB, 0 to 255. The first `SHAPE_COLOURS` colour shapes; all of them are backgrounds."""
SHAPE_COLOURS = 8
PLAIN = ("white", "black", "gray")
"""Two backgrounds of three are one of these."""

SIZES = (("small", "tiny"), ("", "medium"), ("large", "big"))
CENTRE, LEFT, RIGHT, TOP, BOTTOM = range(5)
POSITIONS = (
    ("", "in the centre", "in the center", "in the middle"),
    ("on the left", "at the left"),
    ("on the right", "at the right"),
    ("at the top",),
    ("at the bottom",),
    ("in the top left corner", "at the top left"),
    ("in the top right corner", "at the top right"),
    ("in the bottom left corner", "at the bottom left"),
    ("in the bottom right corner", "at the bottom right"),
)
CELLS = ((0, 0), (-1, 0), (1, 0), (0, -1), (0, 1), (-1, -1), (1, -1), (-1, 1), (1, 1))
"""Column and row of each position."""
RELATIONS = (
    ("left of", "to the left of"),
    ("right of", "to the right of"),
    ("above", "over"),
    ("below", "under"),
)
"""Of the first shape to the second."""
DIRECTIONS = ((-1, 0), (1, 0), (0, -1), (0, 1))
MOTIONS = ("moving left", "moving right", "moving up", "moving down", "growing", "shrinking", "standing still")
STILL = 6
PREFIXES = ("", "a picture of", "a drawing of")

_PHRASES = (
    *PREFIXES, *SHAPES, *COLOURS, *MOTIONS, "a", "an", "and", "background", "grey", "on", "with",
    *(word for words in (*SIZES, *POSITIONS, *RELATIONS) for word in words),
)  # fmt: skip
WORDS = tuple(sorted({word for phrase in _PHRASES for word in phrase.split()}))
"""All that the demo models understand."""
MARKS = (",", ".")
PIECES = ("", *WORDS, *MARKS)
"""What a number in a caption stands for; 0 is no word."""
NUMBER = {piece: i for i, piece in enumerate(PIECES)}
CAPTION_WORDS = 24
"""Of the longest caption."""

HELD_OUT_ONE_IN = 10
TWO_SHARE = 0.65
"""Of pictures with two shapes."""


@dataclass(frozen=True)
class Scenes:
    """A batch of scenes, as whole numbers: places in the tables above. B is their number."""

    count: Tensor
    """(B,), 1 or 2."""
    shape: Tensor
    """(B, 2); of one shape the second column says nothing."""
    colour: Tensor
    """(B, 2)."""
    size: Tensor
    """(B, 2)."""
    position: Tensor
    """(B,), of one shape."""
    relation: Tensor
    """(B,), of two."""
    background: Tensor
    """(B,), a colour."""
    motion: Tensor
    """(B,), of one shape in a clip."""

    def __len__(self) -> int:
        return len(self.count)

    def __getitem__(self, places: Tensor | slice) -> Scenes:
        return Scenes(*(getattr(self, field.name)[places] for field in fields(self)))

    def each(self) -> list[Scene]:
        """Return them one by one."""
        columns = [getattr(self, field.name).tolist() for field in fields(self)]
        return [Scene(*row) for row in zip(*columns, strict=True)]


@dataclass(frozen=True)
class Scene:
    """One scene: the fields of `Scenes`."""

    count: int
    shape: Sequence[int]
    colour: Sequence[int]
    size: Sequence[int]
    position: int
    relation: int
    background: int
    motion: int


def joined(parts: Sequence[Scenes]) -> Scenes:
    """Return one batch of several."""
    return Scenes(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(Scenes)))


Which = Literal["training", "held out", "all"]


class World:
    """Draws scenes and captions from one stream of random numbers, on one device."""

    def __init__(self, device: str, seed: int) -> None:
        self.device = device
        self._stream = torch.Generator(device).manual_seed(seed)
        self._sizes = self._table(SIZES, 1)
        self._positions = self._table(POSITIONS, 5)
        self._relations = self._table(RELATIONS, 4)
        self._motions = self._table([[motion] for motion in MOTIONS], 2)[:, 0]
        self._prefixes = self._table([PREFIXES], 3)[0]
        self._colours = torch.tensor([NUMBER[colour] for colour in COLOURS], device=device)
        self._shapes = torch.tensor([NUMBER[shape] for shape in SHAPES], device=device)

    def scenes(self, count: int, which: Which = "all", *, clip: bool = False) -> Scenes:
        """Return random scenes; of a `clip`, they have one shape each.

        `which` leaves out the combinations that training never sees, or everything else.
        """
        parts: list[Scenes] = []
        missing = count
        while missing > 0:
            drawn = self._scenes(max(2 * count, 256) if which != "held out" else 24 * count, clip=clip)
            if which != "all":
                chosen = held_out(drawn) == (which == "held out")
                if clip and which == "held out":
                    # Who stands still is asked for without a place, and was seen elsewhere.
                    chosen &= drawn.motion != STILL
                drawn = drawn[chosen]
            parts.append(drawn[:missing])
            missing -= len(parts[-1])
        return joined(parts)

    def _scenes(self, count: int, *, clip: bool) -> Scenes:
        colour = self._uniform(count, SHAPE_COLOURS).argsort(1)[:, :2]
        liking = self._uniform(count, len(COLOURS))
        plain = [list(COLOURS).index(name) for name in PLAIN]
        liking[:, plain] += 0.5
        liking.scatter_(1, colour, -1.0)  # no shape is drawn on its own colour
        two = self._uniform(count) < (0.0 if clip else TWO_SHARE)
        return Scenes(
            count=1 + two.long(),
            shape=self._whole(len(SHAPES), count, 2),
            colour=colour,
            size=self._whole(len(SIZES), count, 2),
            position=self._whole(len(POSITIONS), count),
            relation=self._whole(len(RELATIONS), count),
            background=liking.argmax(1),
            motion=self._whole(len(MOTIONS), count) if clip else torch.full_like(two, STILL, dtype=torch.long),
        )

    def captions(self, scenes: Scenes, *, plain: bool = False, clip: bool = False) -> Tensor:
        """Return (B, CAPTION_WORDS) word numbers, zeros last."""
        return self.captions_of(scenes, plain=plain, clip=clip)[0]

    def captions_of(self, scenes: Scenes, *, plain: bool = False, clip: bool = False) -> tuple[Tensor, Tensor]:
        """Return captions, and of each word which shape it tells of: 1 or 2, 0 where of none.

        A `plain` caption says every attribute, in the first of its words. Others leave out the colour now and then
        (any will do), order ("and": any will do), what is usual (medium, centre, white), or begin with a prefix.
        """
        count = len(scenes)
        nothing = torch.zeros(count, 1, dtype=torch.long, device=self.device)

        def sometimes(share: float) -> Tensor:
            return self._uniform(count) < (0.0 if plain else share)

        def word(piece: str, where: Tensor | None = None) -> Tensor:
            said = nothing + NUMBER[piece]
            return said if where is None else torch.where(where[:, None], said, nothing)

        def said(table: Tensor, row: Tensor) -> Tensor:
            return table[row, 0 if plain else self._whole(table.shape[1], count)]

        def thing(i: int) -> Tensor:
            size = said(self._sizes, scenes.size[:, i])
            colour = torch.where(sometimes(0.06), 0, self._colours[scenes.colour[:, i]])[:, None]
            first = torch.where(size > 0, size, colour)
            an = (first == NUMBER["orange"])[:, 0]
            return torch.cat([word("a", ~an) + word("an", an), size, colour, self._shapes[scenes.shape[:, i], None]], 1)

        two = (scenes.count == 2)[:, None]
        relation = said(self._relations, scenes.relation)
        joint = torch.where(sometimes(0.1)[:, None], torch.cat([word("and"), *[nothing] * 3], 1), relation)
        if clip:
            middle = said(self._motions[:, None], scenes.motion)
        else:
            position = said(self._positions, scenes.position)
            middle = torch.where(two, torch.cat([joint, nothing], 1), position)
        prefix = torch.where(sometimes(0.2)[:, None], said(self._prefixes[None], nothing[:, 0]), 0)
        end = word(".", sometimes(0.1))
        parts = [prefix, thing(0), middle, thing(1) * two, self._background(scenes, sometimes), end]
        owners = [torch.full_like(part, {1: 1, 3: 2}.get(i, 0)) for i, part in enumerate(parts)]
        row = torch.cat(parts, 1)
        order = words_first(row)
        owner = torch.cat(owners, 1) * (row > 0)
        return row.gather(1, order)[:, :CAPTION_WORDS], owner.gather(1, order)[:, :CAPTION_WORDS]

    def _background(self, scenes: Scenes, sometimes: object) -> Tensor:
        assert callable(sometimes)
        colour = self._colours[scenes.background]
        grey = (colour == NUMBER["gray"]) & sometimes(0.3)
        colour = torch.where(grey, NUMBER["grey"], colour)
        an = colour == NUMBER["orange"]
        comma, joined_by_with = sometimes(0.1), sometimes(0.1)
        first = torch.where(joined_by_with, NUMBER["with"], NUMBER["on"])
        first = torch.where(comma, NUMBER[","], first)
        article = torch.where(an, NUMBER["an"], NUMBER["a"])
        short = ~comma & ~joined_by_with & sometimes(0.2)  # "on white"
        article = torch.where(short | comma, 0, article)
        last = torch.where(short, 0, NUMBER["background"])
        row = torch.stack([first, article, colour, last], 1)
        unsaid = (scenes.background == list(COLOURS).index("white")) & sometimes(0.3)
        return torch.where(unsaid[:, None], 0, row)

    def _table(self, options: Sequence[Sequence[str]], width: int) -> Tensor:
        """(rows, 12, width) word numbers: each row's phrases, repeated so that each is as likely as the others."""
        rows = []
        for phrases in options:
            numbers = [[NUMBER[word] for word in phrase.split()] for phrase in phrases]
            padded = [row + [0] * (width - len(row)) for row in numbers]
            rows.append([padded[i % len(padded)] for i in range(12)])
        return torch.tensor(rows, device=self.device)

    def _uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self._stream, device=self.device)

    def _whole(self, below: int, *shape: int) -> Tensor:
        return torch.randint(below, shape, generator=self._stream, device=self.device)


def held_out(scenes: Scenes) -> Tensor:
    """Return (B,) whether a scene's combination is one of the tenth that training never sees.

    Of one shape: colour, shape, size and position (or motion); of two: both colours, both shapes and the relation, in
    the caption's order: the same picture may have been seen as "a blue square right of a red circle".
    """
    one = _number(
        (scenes.colour[:, 0], SHAPE_COLOURS), (scenes.shape[:, 0], len(SHAPES)), (scenes.size[:, 0], len(SIZES)),
        (scenes.position, len(POSITIONS)), (scenes.motion, len(MOTIONS)),
    )  # fmt: skip
    # A clip starts anywhere, so its position is no part of what it is asked for.
    moving = _number(
        (scenes.colour[:, 0], SHAPE_COLOURS), (scenes.shape[:, 0], len(SHAPES)), (scenes.motion, len(MOTIONS))
    )
    two = _number(
        (scenes.colour[:, 0], SHAPE_COLOURS), (scenes.colour[:, 1], SHAPE_COLOURS), (scenes.shape[:, 0], len(SHAPES)),
        (scenes.shape[:, 1], len(SHAPES)), (scenes.relation, len(RELATIONS)),
    )  # fmt: skip
    key = torch.where(scenes.count == 2, two + 1_000_000, torch.where(scenes.motion == STILL, one, moving + 2_000_000))
    return (key * 2_654_435_761 % 2**32) < 2**32 // HELD_OUT_ONE_IN  # Knuth's multiplicative hash


def _number(*digits: tuple[Tensor, int]) -> Tensor:
    """Return the number with these digits, each with its own base."""
    number = torch.zeros_like(digits[0][0])
    for digit, base in digits:
        number = number * base + digit
    return number


def packed(row: Tensor) -> Tensor:
    """Return word numbers with the zeros moved to the end of each row."""
    return row.gather(1, words_first(row))


def words_first(row: Tensor) -> Tensor:
    """Return (B, places): the places of each row's words in their order, then those of its zeros."""
    return (row == 0).int().argsort(dim=1, stable=True)


def texts(captions: Tensor) -> list[str]:
    """Return captions as a person would write them."""
    lines = (" ".join(PIECES[number] for number in row if number) for row in captions.tolist())
    return [line.replace(" ,", ",").replace(" .", ".") for line in lines]
