"""Pictures and clips of scenes, drawn in batches: true colours, soft edges, a little jitter that the seed decides."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import max_pool2d

from bench.drawings.world import CELLS, COLOURS, DIRECTIONS, Scenes

SIDE = 128
"""Pixels of a picture's side; every length below is of that grid."""
ONE_HALF_SIZES = (14.0, 24.0, 36.0)
"""Half of a shape's side, small to large, where it is alone."""
TWO_HALF_SIZES = (14.0, 20.0, 27.0)
CLIP_HALF_SIZES = (26.0, 32.0, 40.0)
"""Larger: the VAE of a clip packs 16x16 pixels of four frames into 48 numbers."""
OFF_CENTRE = 36.0
"""Of a shape on the left."""
APART = 31.0
"""Of each of two shapes from the centre."""
BORDER = 5.0
JITTER = 3.0
SIZE_JITTER = 0.06

PATH = 48.0
"""How far a shape moves in a clip."""
GROWTH = 1.6
"""Largest side over the smallest, of a shape that grows or shrinks."""

STAR_INNER = 0.42
"""Inner radius of a star, of its outer one."""


@dataclass(frozen=True)
class Placed:
    """Where the shapes are. In pixels from the picture's centre, x to the right and y down."""

    centre: Tensor
    """(B, 2, 2): of each shape, x and y."""
    half_size: Tensor
    """(B, 2)."""


@cache
def _table(values: tuple[Any, ...], device: torch.device) -> Tensor:
    """Return a table of numbers on a device; once, since to bring it there waits for the GPU."""
    return torch.tensor(values, device=device, dtype=torch.float32)


def placed(scenes: Scenes, stream: torch.Generator) -> Placed:
    """Return where the shapes of pictures are."""
    device = scenes.count.device
    two = (scenes.count == 2)[:, None]
    sizes = torch.where(two, _table(TWO_HALF_SIZES, device)[scenes.size], _table(ONE_HALF_SIZES, device)[scenes.size])
    half = sizes * (1 + SIZE_JITTER * _either_way(stream, *sizes.shape))
    off = (SIDE / 2 - BORDER - half[:, :1]).clamp(max=OFF_CENTRE)
    alone = _table(CELLS, device)[scenes.position] * off
    direction = _table(DIRECTIONS, device)[scenes.relation] * APART
    both = torch.stack([direction, -direction], 1)
    centre = torch.where(two[..., None], both, alone[:, None].expand_as(both))
    return Placed(centre + JITTER * _either_way(stream, *centre.shape), half)


def path(scenes: Scenes, num_frames: int, stream: torch.Generator) -> list[Placed]:
    """Return where the shape of each clip is, frame by frame: it starts anywhere from where its way stays inside."""
    device = scenes.count.device
    count = len(scenes)
    half = _table(CLIP_HALF_SIZES, device)[scenes.size[:, :1]]
    half = half * (1 + SIZE_JITTER * _either_way(stream, count, 1))
    moves = _table((*DIRECTIONS, (0, 0), (0, 0), (0, 0)), device)[scenes.motion]
    grows = _table((1.0, 1.0, 1.0, 1.0, GROWTH, 1 / GROWTH, 1.0), device)[scenes.motion, None]
    half = half / grows.sqrt()  # a shape is of its size half-way
    largest = torch.maximum(half, half * grows)
    free = (SIDE / 2 - BORDER - largest).clamp(min=0)
    way = torch.minimum(torch.full_like(free, PATH), 2 * free)
    middle = _either_way(stream, count, 2) * (free - (moves.abs() * way) / 2).clamp(min=0)
    frames = []
    for i in range(num_frames):
        share = i / max(num_frames - 1, 1)
        centre = middle + moves * way * (share - 0.5)
        now = half * grows**share
        frames.append(Placed(centre[:, None].expand(count, 2, 2), now.expand(count, 2)))
    return frames


def pictures(scenes: Scenes, where: Placed, *, outline: bool = False, side: int = SIDE) -> Tensor:
    """Return (B, 3, side, side), -1 to 1: the middle of it. An `outline` leaves the inside as the background is."""
    device = scenes.count.device
    grid = torch.arange(side, device=device) + 0.5 - side / 2
    x = grid[None, None, None, :] - where.centre[..., 0, None, None]
    y = grid[None, None, :, None] - where.centre[..., 1, None, None]
    half = where.half_size[..., None, None]
    shape = scenes.shape[..., None, None]
    depth = torch.where(shape == 0, _circle(x, y, half), _square(x, y, half))
    depth = torch.where(shape == 2, _triangle(x, y, half), depth)
    depth = torch.where(shape == 3, _star(x, y, half), depth)
    if outline:
        line = (_table(OUTLINE_SHARES, device)[shape] * half).clamp(max=OUTLINE)
        depth = torch.minimum(depth, line - depth)
    cover = (depth + 0.5).clamp(0, 1)
    cover = cover * (torch.arange(2, device=device) < scenes.count[:, None])[..., None, None]
    rgb = _table(tuple(COLOURS.values()), device) / 127.5 - 1
    picture = rgb[scenes.background][:, :, None, None].expand(-1, 3, side, side)
    for i in range(2):
        picture = picture + (rgb[scenes.colour[:, i]][:, :, None, None] - picture) * cover[:, i : i + 1]
    return picture


OUTLINE = 6.0
"""How thick a line is that an outline is drawn with."""
OUTLINE_SHARES = (0.4, 0.4, 0.3, 0.2)
"""How thick it is at most, by shape, of half the shape's side: so that small ones, and stars, are not full of it."""


def clips(scenes: Scenes, num_frames: int, stream: torch.Generator) -> Tensor:
    """Return (B, 3, num_frames, SIDE, SIDE), -1 to 1."""
    return _filmed(scenes, path(scenes, num_frames, stream), SIDE)


def parts_of_clips(scenes: Scenes, num_frames: int, seen: int, side: int, stream: torch.Generator) -> Tensor:
    """Return (B, 3, seen, side, side), -1 to 1: some frames of a clip, and of them a square with some of the shape."""
    frames = path(scenes, num_frames, stream)
    # One start for all of a batch: where it is must not come back from the device.
    start = int(torch.randint(num_frames - seen + 1, ()))
    frames = frames[start : start + seen]
    if side < SIDE:
        centre = frames[seen // 2].centre[:, 0]
        corner = (centre + _either_way(stream, len(scenes), 2) * side / 2).clamp(-(SIDE - side) / 2, (SIDE - side) / 2)
        frames = [Placed(where.centre - corner.round()[:, None], where.half_size) for where in frames]
    return _filmed(scenes, frames, side)


NEAR = 4
"""Pixels beside a shape that are near it."""


def near_shapes(scenes: Scenes, drawn: Tensor) -> Tensor:
    """Return (B, 1, T, H, W), 1 where drawn clips (B, 3, T, H, W) show a shape or are near one, 0 elsewhere."""
    rgb = _table(tuple(COLOURS.values()), scenes.count.device) / 127.5 - 1
    background = rgb[scenes.background][:, :, None, None, None]
    shown = ((drawn - background).abs().amax(1) > 0.05).float()
    wide = max_pool2d(shown, (2 * NEAR + 1, 1), 1, (NEAR, 0))
    return max_pool2d(wide, (1, 2 * NEAR + 1), 1, (0, NEAR))[:, None]


NEAR_COUNTS = 3.0
"""How much more a pixel of a shape or beside it counts to a VAE than one of the background, added to 1: most of a
picture is background, and what is asked for is in the rest."""


def decoded_loss(decoded: Tensor, drawn: Tensor, near: Tensor) -> Tensor:
    """Return how far pictures or clips are from those that were drawn; `near` is near_shapes' answer."""
    off = decoded.float() - drawn
    weight = 1 + NEAR_COUNTS * near
    loss: Tensor = ((off.abs() + 0.5 * off**2) * weight).mean() / weight.mean()
    return loss


def near_in_pictures(scenes: Scenes, drawn: Tensor) -> Tensor:
    """Return near_shapes' answer for pictures (B, 3, H, W): (B, 1, H, W)."""
    return near_shapes(scenes, drawn[:, :, None])[:, :, 0]


def _filmed(scenes: Scenes, frames: list[Placed], side: int) -> Tensor:
    """Return (B, 3, frames, side, side), drawn at once: a frame alone is too little for a GPU."""
    again = torch.arange(len(scenes), device=scenes.count.device).repeat_interleave(len(frames))
    where = Placed(
        torch.stack([frame.centre for frame in frames], 1).flatten(0, 1),
        torch.stack([frame.half_size for frame in frames], 1).flatten(0, 1),
    )
    drawn: Tensor = pictures(scenes[again], where, side=side).unflatten(0, (len(scenes), len(frames)))
    return drawn.movedim(1, 2)


def _circle(x: Tensor, y: Tensor, half: Tensor) -> Tensor:
    """Return how deep inside a point is, in pixels; outside it is negative. So do the others."""
    return half - (x * x + y * y).sqrt()


def _square(x: Tensor, y: Tensor, half: Tensor) -> Tensor:
    return half - torch.maximum(x.abs(), y.abs())


def _triangle(x: Tensor, y: Tensor, half: Tensor) -> Tensor:
    """As high as it is wide, a tip up."""
    side = ((y + half) / 2 - x.abs()) * (2 / math.sqrt(5))
    return torch.minimum(side, half - y)


def _star(x: Tensor, y: Tensor, half: Tensor) -> Tensor:
    """Five tips, one up, as wide as the others: 2 sin 72° outer radii."""
    outer = half / math.sin(math.radians(72))
    y = y - outer * (1 - math.cos(math.radians(36))) / 2  # its middle is above its centre
    tenth = math.pi / 5
    angle = torch.atan2(x, -y)
    turned = ((angle + tenth) % (2 * tenth) - tenth).abs()
    radius = (x * x + y * y).sqrt()
    along, across = radius * turned.cos(), radius * turned.sin()
    # The edge from a tip at (outer, 0) to the notch beside it.
    notch_along, notch_across = STAR_INNER * math.cos(tenth), STAR_INNER * math.sin(tenth)
    length = math.hypot(1 - notch_along, notch_across)
    return ((outer - along) * notch_across - across * (1 - notch_along)) / length


def _either_way(stream: torch.Generator, *shape: int) -> Tensor:
    return 2 * torch.rand(shape, generator=stream, device=stream.device) - 1
