"""From frames to the files of each format, with metadata and poster. Knows no outbox.

image    png, jpg, webp
video    mp4 with its poster, gif, webp; png: a folder of frames, 0001.png and so on
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from safelight import content
from safelight.config import OutputSection
from safelight.jobspec import JobSpec
from safelight.plan import Plan
from safelight.receipt import Output
from safelightd import metadata, verify, video, webp

Frames = Iterator[NDArray[np.uint8]]

JPEG_QUALITY = WEBP_QUALITY = 95


def suffix(spec: JobSpec) -> str:
    """Return what the name of a job's output ends with: nothing, where it is a folder of frames."""
    return "" if spec.kind == "video" and spec.output_format == "png" else f".{spec.output_format}"


def has_poster(spec: JobSpec) -> bool:
    """Whether a picture may lie beside the output: what shows GIF, WebP and PNG shows them without."""
    return spec.output_format == "mp4"


def poster_beside(output: Path) -> Path:
    """Return where the poster of an output lies, before it is published and afterwards."""
    return output.with_suffix(".jpg")


def write(
    folder: Path, frames: Frames, spec: JobSpec, plan: Plan, settings: OutputSection, check: Callable[[], None]
) -> Path:
    """Write the frames of a job, as they come, to `folder`/output.<ext> and return that; it is synced.

    Args:
        frames: one for an image, `num_frames` for a clip.
        check: called before each frame that is made here; it raises Cancelled.

    Raises:
        OSError: the disk is full or refuses.
        FfmpegFailed: anything else that ends ffmpeg.
    """
    path = folder / f"output{suffix(spec)}"
    if spec.interpolate:
        frames = _interpolated(folder / "whole.nut", frames, spec, check)
    if spec.kind == "image":
        _write_picture(path, frames, spec, plan, embed=settings.metadata)
    elif spec.output_format == "png":
        _write_folder(path, frames, spec, plan, embed=settings.metadata)
    else:
        poster = poster_beside(path) if settings.poster and has_poster(spec) else None
        _write_clip(path, frames, spec, plan, embed=settings.metadata, poster=poster)
        if poster:
            verify.poster(poster, spec)
            content.sync(poster)
    content.sync(path)
    return path


def interpolated_by(spec: JobSpec) -> str | None:
    """Return what made the frames between the model's, as receipts say it."""
    return f"ffmpeg {video.INTERPOLATION}" if spec.interpolate else None


def renamed(output: Output, path: str) -> Output:
    """Return the output under another name, its poster beside it."""
    poster = output.poster and output.poster.model_copy(update={"path": str(poster_beside(Path(path)))})
    return output.model_copy(update={"path": path, "poster": poster})


def _interpolated(whole: Path, frames: Frames, spec: JobSpec, check: Callable[[], None]) -> Frames:
    """Yield the frames of the finished clip, once all of the model's have come: the GPU does not wait for ffmpeg."""
    assert spec.fps is not None  # every model of clips has a default
    assert spec.interpolate is not None
    video.write_whole(whole, frames, fps=spec.fps, width=spec.width, height=spec.height)
    for pixels in video.interpolated(whole, times=spec.interpolate, fps=spec.fps):
        check()
        yield pixels
    whole.unlink()


def _write_clip(path: Path, frames: Frames, spec: JobSpec, plan: Plan, *, embed: bool, poster: Path | None) -> None:
    assert spec.clip_fps is not None
    shape = {"fps": spec.clip_fps, "width": spec.width, "height": spec.height}
    exif = metadata.exif(spec, plan) if embed else b""
    comment = metadata.record(spec, plan) if embed else None
    if poster:
        frames = _with_poster(frames, poster, spec, exif)
    if spec.output_format == "mp4":
        video.write_mp4(path, frames, comment=comment, **shape)
    elif spec.output_format == "gif":
        video.write_gif(path, frames, comment=comment, **shape)
    else:
        webp.write(path, frames, exif=exif, **shape)


def _with_poster(frames: Frames, poster: Path, spec: JobSpec, exif: bytes) -> Frames:
    """Yield the frames; the one in the middle becomes the poster: at its beginning a clip may be black."""
    for number, pixels in enumerate(frames):
        if number == (spec.clip_frames or 0) // 2:
            with poster.open("xb") as stream:
                Image.fromarray(pixels).save(stream, "JPEG", quality=JPEG_QUALITY, exif=exif)
        yield pixels


def _write_folder(path: Path, frames: Iterable[NDArray[np.uint8]], spec: JobSpec, plan: Plan, *, embed: bool) -> None:
    path.mkdir()
    for number, pixels in enumerate(frames, 1):
        with (path / verify.frame_name(number)).open("xb") as stream:
            Image.fromarray(pixels).save(stream, "PNG", pnginfo=metadata.png(spec, plan) if embed else None)


def _write_picture(path: Path, frames: Frames, spec: JobSpec, plan: Plan, *, embed: bool) -> None:
    (pixels,) = frames
    picture = Image.fromarray(pixels)
    exif = metadata.exif(spec, plan) if embed and spec.output_format != "png" else b""
    with path.open("xb") as stream:
        if spec.output_format == "png":
            picture.save(stream, "PNG", pnginfo=metadata.png(spec, plan) if embed else None)
        elif spec.output_format == "jpg":
            # Full colour resolution: the default halves it, which shows on red edges.
            picture.save(stream, "JPEG", quality=JPEG_QUALITY, subsampling="4:4:4", exif=exif)
        else:
            picture.save(stream, "WEBP", quality=WEBP_QUALITY, exif=exif)
