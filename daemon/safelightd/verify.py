"""Whether a result is worth having: decoded again from its file, and refused where it is broken.

What a picture shows is not judged. Black, flat and NaN are what a model in the wrong precision makes; wrong sizes,
missing frames and undecodable files are what a bug or a bad disk makes.

`FLAT_RANGE_MAX` is a figure between what was measured (1280x704, PNG, JPEG and WebP at quality 95, H.264 at CRF 10;
2026-11-22). Widest range of a colour channel after the round trip, of 255:

    one colour                              0     noise of one step around grey        10
    black and white noise of one step       3     fog (standard deviation 2.4)         15
    a gradient from 0 to 8                  8     a gradient from 0 to 16              16
                                                  a dark photo (mean 6, brightest 19)  17
                                                  stars, the brightest of 51           51
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageSequence

from safelight.errors import SafelightError
from safelight.jobspec import JobSpec
from safelightd import video, webp

FLAT_RANGE_MAX = 12
"""A frame whose every channel stays within so many steps of 255 shows nothing: see above."""

DEAD_FRAMES_MAX = 0.5
"""The share of black or flat frames that a clip may have: a fade from black is short, a decode that broke down loses
all frames, or all after the first latent's."""

_FORMATS = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP", "gif": "GIF"}


class Refused(SafelightError):
    """The result is broken: black, flat, not a number, of a wrong size or length, or undecodable."""


def frame(values: NDArray[Any], spec: JobSpec) -> NDArray[np.uint8]:
    """Return one decoded frame as the pixels to write.

    Args:
        values: (height, width, 3), uint8, or float in 0..1 as diffusers' `output_type="np"`; NaN can be seen in
            floats only.

    Raises:
        Refused: it has another size, or values that are no numbers.
        ValueError: floats outside 0..1.
    """
    if values.shape != (spec.height, spec.width, 3):
        size = "x".join(str(side) for side in values.shape)
        raise Refused(f"A frame is {size}, {spec.height}x{spec.width}x3 was asked for.")
    if values.dtype == np.uint8:
        return values
    lost = values.size - np.count_nonzero(np.isfinite(values))
    if lost:
        raise Refused(f"{lost / values.size:.1%} of a frame is NaN or infinite: a number overflowed in the model.")
    if values.min() < 0 or values.max() > 1:
        raise ValueError(f"a frame has values from {values.min()} to {values.max()}, not within 0..1")
    return np.rint(values.astype(np.float32) * 255).astype(np.uint8)


def output(path: Path, spec: JobSpec) -> None:
    """Decode the file of a job and raise Refused unless it is what was asked for and shows something."""
    check = clip if spec.kind == "video" else image
    check(path, spec)


def image(path: Path, spec: JobSpec) -> None:
    """Raise Refused unless the file decodes to a picture of the asked size that shows something."""
    try:
        with Image.open(path, formats=[_FORMATS[spec.output_format]]) as picture:
            picture.load()
            size, mode = picture.size, picture.mode
            pixels = np.asarray(picture)
    except (OSError, SyntaxError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's fault, not the picture's
        raise Refused(f"The picture cannot be decoded: {error}.") from error
    if size != (spec.width, spec.height) or mode != "RGB":
        raise Refused(f"The picture is {size[0]}x{size[1]} {mode}, {spec.width}x{spec.height} RGB was asked for.")
    if is_flat(pixels):
        raise Refused(f"The picture is {_shade(pixels)}.")


def clip(path: Path, spec: JobSpec) -> None:
    """Raise Refused unless it decodes to the asked frames, at their size and rate, and most show something.

    Args:
        path: a file, or for png the folder of its frames.
    """
    frames_of = {"mp4": _frames_of_mp4, "png": _frames_of_folder}.get(spec.output_format, _frames_of_animation)
    try:
        count, dead, shade = _count_dead(frames_of(path, spec), spec)
    except (OSError, SyntaxError, ValueError, EOFError, video.FfmpegFailed) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's fault, not the clip's
        raise Refused(f"The clip cannot be decoded: {error}") from error
    if count != spec.clip_frames:
        raise Refused(f"The clip has {count} frames, {spec.clip_frames} were asked for.")
    if dead > DEAD_FRAMES_MAX * count:
        raise Refused(f"{dead} of {count} frames of the clip are {shade}.")


def poster(path: Path, spec: JobSpec) -> None:
    """Raise Refused unless the picture out of a clip decodes to its size."""
    with Image.open(path, formats=["JPEG"]) as picture:
        picture.load()
        if picture.size != (spec.width, spec.height):
            raise Refused(f"The clip's poster is {picture.size[0]}x{picture.size[1]}.")


def _frames_of_mp4(path: Path, spec: JobSpec) -> Iterator[NDArray[np.uint8]]:
    found = video.timing(path)
    if found != (wanted := video.Timing(spec.width, spec.height, spec.clip_frames or 0, spec.clip_fps or 0)):
        raise Refused(
            f"The clip is {found.width}x{found.height}, {found.num_frames} frames at {found.fps:g} a second; "
            f"{wanted.width}x{wanted.height}, {wanted.num_frames} at {wanted.fps:g} were asked for."
        )
    yield from video.read_frames(path)


def _frames_of_animation(path: Path, spec: JobSpec) -> Iterator[NDArray[np.uint8]]:
    """A GIF or a WebP says of each frame how long it is shown."""
    fps = spec.clip_fps or 0
    with Image.open(path, formats=[_FORMATS[spec.output_format]]) as animation:
        for number, picture in enumerate(ImageSequence.Iterator(animation)):
            picture.load()
            lasts, wanted = picture.info["duration"], webp.moment_ms(number + 1, fps) - webp.moment_ms(number, fps)
            if lasts != wanted:
                raise Refused(f"Frame {number + 1} of the clip lasts {lasts} ms, {wanted} were asked for.")
            yield np.asarray(picture.convert("RGB"))


def _frames_of_folder(path: Path, _spec: JobSpec) -> Iterator[NDArray[np.uint8]]:
    names = sorted(os.listdir(path))
    if names != [frame_name(number) for number in range(1, len(names) + 1)]:
        raise Refused(f"The frames of the clip are not numbered from {frame_name(1)} on.")
    for name in names:
        with Image.open(path / name, formats=["PNG"]) as picture:
            picture.load()
            if picture.mode != "RGB":
                raise Refused(f"Frame {name} of the clip is {picture.mode}, not RGB.")
            yield np.asarray(picture)


def frame_name(number: int) -> str:
    """Return the name of a frame, from 1, in the folder of a clip."""
    return f"{number:04d}.png"


def is_flat(pixels: NDArray[np.uint8]) -> bool:
    """Whether a frame shows nothing: one colour, but for the noise of its compression."""
    # One axis after the other: both at once take 100 times as long (82 ms a frame, numpy 2.4).
    low, high = pixels.min(axis=0).min(axis=0).astype(int), pixels.max(axis=0).max(axis=0).astype(int)
    return bool((high - low).max() <= FLAT_RANGE_MAX)


def _count_dead(frames: Iterable[NDArray[np.uint8]], spec: JobSpec) -> tuple[int, int, str]:
    """Return the number of frames, of those that show nothing, and what the last of these looks like."""
    count, dead, shade = 0, 0, ""
    for pixels in frames:
        if pixels.shape != (spec.height, spec.width, 3):
            raise Refused(f"A frame of the clip is {pixels.shape[1]}x{pixels.shape[0]}.")
        count += 1
        if is_flat(pixels):
            dead += 1
            shade = _shade(pixels)
    return count, dead, shade


def _shade(pixels: NDArray[np.uint8]) -> str:
    if pixels.max() <= FLAT_RANGE_MAX:
        return "black"
    red, green, blue = (round(float(channel)) for channel in pixels.mean(axis=0).mean(axis=0))
    return f"flat (all of it about #{red:02x}{green:02x}{blue:02x})"
