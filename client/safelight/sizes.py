"""The size of a job that has a picture and writes none: the picture's shape, and the pixels of the default. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from safelight.models import ModelFacts

ALIKE = 0.04
"""Shapes that differ by less are one: 16:9 is 2.3 % from 1280x704, which nobody sees, and clips of one size share what
is compiled and what was learned of their time."""


class Size(NamedTuple):
    """Of a picture, in pixels."""

    width: int
    height: int


@dataclass(frozen=True)
class KeptPicture:
    """A picture among the inputs, as far as a job needs to know it."""

    digest: str
    size: Size
    """As it is seen: what its EXIF says of how the camera was held is heeded."""


def of_picture(picture: Size, facts: ModelFacts, backend: str | None = None) -> Size:
    """Return the size that a job gets of its picture: legal, and of the sizes in question the nearest in shape.

    It has no more pixels than the model's default, so that time and memory stay those of the default; a picture of
    about the default's shape, or of that turned, gets the default, or that turned.

    Args:
        backend: of the job; Wan's own program knows a few sizes alone.
    """
    default = Size(facts.defaults.width, facts.defaults.height)
    if backend == "wan-cli" and facts.wan_cli:
        sizes = [Size(size.width, size.height) for size in facts.wan_cli.sizes]
    else:
        usual = min(default, Size(default.height, default.width), key=lambda size: _unlike(size, picture))
        sizes = [usual] if _unlike(usual, picture) < ALIKE else [*_legal(picture, facts)]
    most = _pixels(facts)

    def cost(size: Size) -> tuple[bool, float, int]:
        pixels = size.width * size.height
        return pixels > most, _unlike(size, picture), -pixels

    return min(sizes, key=cost)


def _unlike(one: Size, other: Size) -> float:
    """Return by what share two shapes differ."""
    return abs(math.log(one.width / one.height * other.height / other.width))


def _pixels(facts: ModelFacts) -> int:
    return min(facts.defaults.width * facts.defaults.height, facts.pixels_max)


def _legal(picture: Size, facts: ModelFacts) -> Iterator[Size]:
    """Yield the sizes around the one that has the picture's shape and the default's pixels, were any number legal.

    Where a side would be too long both are shortened, and where one would be too short it alone is lengthened: of what
    is narrower than any legal size, the narrowest is the nearest.
    """
    shape, most = picture.width / picture.height, _pixels(facts)
    width, height = math.sqrt(most * shape), math.sqrt(most / shape)
    shortened = min(1.0, facts.size_max / max(width, height))
    width, height = (max(side * shortened, facts.size_min) for side in (width, height))
    width, height = min(width, most / height), min(height, most / width)
    for one in _around(width, facts):
        for other in _around(height, facts):
            yield Size(one, other)


def _around(side: float, facts: ModelFacts) -> tuple[int, int]:
    """Return the legal sides next to `side`, below it and above."""
    below = int(side) // facts.size_multiple * facts.size_multiple
    low, high = (min(max(legal, facts.size_min), facts.size_max) for legal in (below, below + facts.size_multiple))
    return low, high
