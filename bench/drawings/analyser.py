"""Reads scenes back out of pictures and clips: colours, shapes, sizes, places, motions. Numpy alone; it learns nothing.

On true drawings it reads everything right (tests/integration/test_drawings.py). What is not a clear shape of one
colour is "no shape", so that noise does not pass for one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.drawings.drawing import CLIP_HALF_SIZES, ONE_HALF_SIZES, SIDE, STAR_INNER, TWO_HALF_SIZES
from bench.drawings.world import CELLS, COLOURS, DIRECTIONS, MOTIONS, SHAPES, STILL, Scene

Picture = NDArray[np.uint8]
"""(SIDE, SIDE, 3)."""
Mask = NDArray[np.bool_]

NO_SHAPE = -1
AREA_MIN = 60
"""Pixels of the smallest thing that counts: a star of half size 10 has 130."""
LIKENESS_MIN = 0.85
"""Intersection over union of a thing and the nearest shape. True drawings have 0.92 and more (3,000 of them)."""
OFF_MIDDLE = 9.0
"""Pixels from the middle at which a thing is no longer in it."""
STILL_MAX = 5.0
"""Pixels that something moves, from first frame to last, and still stands still."""
GROWN = 1.25
FRINGE = 2
HOLLOW_MIN = 0.03
"""Share of an outline's area in which the background shows. True ones have 0.19 and more (3,000 drawings); what is
filled has nothing."""

_RGB = np.array(list(COLOURS.values()), np.float32)


@dataclass(frozen=True)
class Thing:
    """A shape that was found. Lengths in pixels from the picture's centre, x to the right and y down."""

    colour: int
    shape: int
    x: float
    y: float
    half_size: float
    is_outline: bool
    """Whether the background shows inside."""


@dataclass(frozen=True)
class Found:
    """What a picture shows."""

    background: int
    things: tuple[Thing, ...]

    def of(self, colour: int) -> Thing | None:
        return next((thing for thing in self.things if thing.colour == colour), None)


def read(picture: Picture) -> Found:
    """Return what a picture shows: a background, and a thing for each other colour that there is enough of."""
    pixels = picture.astype(np.float32)
    nearest = _nearest(pixels, np.arange(len(_RGB)))
    edge = np.concatenate([nearest[:3].ravel(), nearest[-3:].ravel(), nearest[:, :3].ravel(), nearest[:, -3:].ravel()])
    background = int(np.bincount(edge, minlength=len(_RGB)).argmax())
    # The soft edge between two colours looks like a third one, but is thin.
    cores = {colour: _worn(nearest == colour) for colour in range(len(_RGB)) if colour != background}
    present = {colour: core for colour, core in cores.items() if core.sum() >= AREA_MIN / 2}
    labels = _nearest(pixels, np.array([background, *present]))
    things = []
    for label, (colour, core) in enumerate(present.items(), 1):
        thing = _thing(colour, labels == label, core, labels == 0)
        if thing is not None:
            things.append(thing)
    return Found(background, tuple(things))


def verdict(scene: Scene, found: Found, *, clip: bool = False, outline: bool = False) -> dict[str, bool]:
    """Return, by attribute, whether a picture shows what was asked for: filled shapes, or outlines of them."""
    wanted = range(scene.count)
    things = [found.of(scene.colour[i]) for i in wanted]
    all_there = all(thing is not None for thing in things)
    sizes = CLIP_HALF_SIZES if clip else ONE_HALF_SIZES if scene.count == 1 else TWO_HALF_SIZES
    answer = {
        "count": len(found.things) == scene.count,
        "background": found.background == scene.background,
        "colour": all_there,
        "shape": all(
            thing is not None and thing.shape == scene.shape[i] and thing.is_outline == outline
            for i, thing in enumerate(things)
        ),
        "size": all(thing is not None and _size(thing, sizes) == scene.size[i] for i, thing in enumerate(things)),
    }
    if not clip:
        answer["position"] = all_there and _is_placed(scene, [thing for thing in things if thing is not None])
    return answer | {"all": all(answer.values())}


def clip_verdict(scene: Scene, frames: Sequence[Picture]) -> dict[str, bool]:
    """Return, by attribute, whether a clip shows what was asked for; the first and the last frame must agree on it."""
    middle = verdict(scene, read(frames[len(frames) // 2]), clip=True)
    first, last = read(frames[0]), read(frames[-1])
    ends = [verdict(scene, found, clip=True) for found in (first, last)]
    answer = {
        name: middle[name] and all(end[name] for end in ends) for name in ("count", "background", "colour", "shape")
    }
    answer["size"] = middle["size"]
    answer["motion"] = motion(first.of(scene.colour[0]), last.of(scene.colour[0])) == scene.motion
    return answer | {"all": all(answer.values()), "asked": answer["colour"] and answer["shape"] and answer["motion"]}


def motion(first: Thing | None, last: Thing | None) -> int | None:
    """Return what a thing does between two frames, a place in MOTIONS; None where it is not seen twice."""
    if first is None or last is None:
        return None
    right, down = last.x - first.x, last.y - first.y
    grown = last.half_size / first.half_size
    if max(grown, 1 / grown) > GROWN:
        return MOTIONS.index("growing" if grown > 1 else "shrinking")
    if math.hypot(right, down) <= STILL_MAX:
        return STILL
    along = (math.copysign(1, right), 0) if abs(right) > abs(down) else (0, math.copysign(1, down))
    return DIRECTIONS.index((int(along[0]), int(along[1])))


def _nearest(pixels: NDArray[np.float32], colours: NDArray[Any]) -> NDArray[Any]:
    """Return (SIDE, SIDE): for each pixel the place in `colours` of the nearest one."""
    rgb = _RGB[colours]
    distance = (rgb**2).sum(1) - 2 * (pixels.reshape(-1, 3) @ rgb.T)
    nearest: NDArray[Any] = distance.argmin(1).reshape(pixels.shape[:2])
    return nearest


def _worn(mask: Mask) -> Mask:
    """Return a mask without the pixels at its edge."""
    worn = mask.copy()
    worn[1:] &= mask[:-1]
    worn[:-1] &= mask[1:]
    worn[:, 1:] &= mask[:, :-1]
    worn[:, :-1] &= mask[:, 1:]
    return worn


def _thing(colour: int, mask: Mask, core: Mask, background: Mask) -> Thing | None:
    rows, columns = np.nonzero(core)
    window = _grown(rows, FRINGE), _grown(columns, FRINGE)
    seen = np.zeros_like(mask)
    seen[window] = mask[window]
    if seen.sum() < AREA_MIN:
        return None
    inside = _enclosed(seen)
    hollow = float((inside & background).sum())
    seen |= inside
    area = float(seen.sum())
    is_outline = hollow >= HOLLOW_MIN * area
    rows, columns = np.nonzero(seen)
    middle = (float(columns.mean()) + 0.5 - SIDE / 2, float(rows.mean()) + 0.5 - SIDE / 2)
    window = _grown(rows, MARGIN), _grown(columns, MARGIN)
    # Of each shape the one that has this area and this middle: a stray pixel hardly moves either.
    fits = []
    for shape in range(len(SHAPES)):
        half = math.sqrt(area / _AREAS[shape])
        thing = Thing(colour, shape, middle[0], middle[1] - _SUNK[shape] * half, half, is_outline)
        drawn = _drawn(thing, window)
        both = (seen[window] & drawn).sum()
        fits.append((both / (area + drawn.sum() - both), thing))
    likeness, thing = max(fits, key=lambda fit: fit[0])
    return thing if likeness >= LIKENESS_MIN else replace(thing, shape=NO_SHAPE)


def _enclosed(mask: Mask) -> Mask:
    """Return what lies inside of a mask: neither it, nor joined to the picture's edge beside it."""
    free = ~mask
    outside = np.zeros_like(mask)
    outside[[0, -1]], outside[:, [0, -1]] = free[[0, -1]], free[:, [0, -1]]
    reached = 0
    while (count := int(outside.sum())) != reached:
        reached = count
        # A sweep each way takes all that is in a straight line, so that a few of them are enough.
        for one, other in ((outside, free), (outside.T, free.T)):
            _sweep(one, other)
            _sweep(one[::-1], other[::-1])
    return free & ~outside


def _sweep(outside: Mask, free: Mask) -> None:
    """Let each row of `outside` take what is free beside it in the next one."""
    for i in range(1, len(outside)):
        outside[i] |= outside[i - 1] & free[i]


def _grown(places: NDArray[Any], by: int) -> slice:
    return slice(max(int(places.min()) - by, 0), int(places.max()) + by + 1)


MARGIN = 16
"""Pixels about a thing in which a shape of its area may lie."""
_TENTH = math.pi / 5
_OUTER = 1 / math.sin(2 * _TENTH)
"""Outer radius of a star, in half sizes."""
_AREAS = (math.pi, 4.0, 2.0, 5 * STAR_INNER * math.sin(_TENTH) * _OUTER**2)
"""Of each shape, in half sizes squared."""
_SUNK = (0.0, 0.0, 1 / 3, _OUTER * (1 - math.cos(_TENTH)) / 2)
"""How far each shape's centre of mass is below the middle of its box, in half sizes."""


def _drawn(thing: Thing, window: tuple[slice, slice]) -> Mask:
    """Return a part of the picture: the shape as bench/drawings/drawing.py draws it, without soft edges."""
    grid = np.arange(SIDE) + 0.5 - SIDE / 2
    across = (grid[None, window[1]] - thing.x) / thing.half_size
    down = (grid[window[0], None] - thing.y) / thing.half_size
    match SHAPES[thing.shape]:
        case "circle":
            inside = across**2 + down**2 <= 1
        case "square":
            inside = np.maximum(np.abs(across), np.abs(down)) <= 1
        case "triangle":
            inside = (np.abs(across) <= (down + 1) / 2) & (down <= 1)
        case _:
            across, down = across / _OUTER, (down - _SUNK[thing.shape]) / _OUTER
            turned = np.abs((np.arctan2(across, -down) + _TENTH) % (2 * _TENTH) - _TENTH)
            radius = np.hypot(across, down)
            notch_along, notch_across = STAR_INNER * math.cos(_TENTH), STAR_INNER * math.sin(_TENTH)
            inside = (1 - radius * np.cos(turned)) * notch_across >= radius * np.sin(turned) * (1 - notch_along)
    return inside


def _size(thing: Thing, sizes: Sequence[float]) -> int:
    return int(np.argmin([abs(math.log(thing.half_size / size)) for size in sizes]))


def _is_placed(scene: Scene, things: Sequence[Thing]) -> bool:
    if scene.count == 1:
        thing = things[0]
        cell = tuple(0 if abs(way) <= OFF_MIDDLE else int(math.copysign(1, way)) for way in (thing.x, thing.y))
        return cell == CELLS[scene.position]
    right, down = things[0].x - things[1].x, things[0].y - things[1].y
    along = (math.copysign(1, right), 0) if abs(right) > abs(down) else (0, math.copysign(1, down))
    return along == DIRECTIONS[scene.relation]
