"""What passes for a result and what is refused, on real files of every format."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import psutil
import pytest
from numpy.typing import NDArray
from PIL import Image

from safelight.jobspec import JobSpec
from safelightd import verify, video
from tests.integration import making

Pixels = NDArray[np.uint8]

PILLOW = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}


def _stars(spec: JobSpec) -> Pixels:
    """A night sky: all but a few pixels are black, the brightest star is dim."""
    sky = making.colour(spec)
    rng = np.random.default_rng(3)
    for _ in range(max(3, spec.width * spec.height // 15_000)):
        y, x = rng.integers(1, spec.height - 1), rng.integers(1, spec.width - 1)
        sky[y - 1 : y + 2, x - 1 : x + 2] = rng.integers(25, 52)
    return sky


def _dark_photo(spec: JobSpec) -> Pixels:
    """Mean about 6 of 255, nothing above 25."""
    y, x = np.mgrid[0 : spec.height, 0 : spec.width]
    grain = np.random.default_rng(1).normal(0, 1.5, (spec.height, spec.width))
    light = 6 + 4 * np.sin(x / 90 * 704 / spec.height) + 3 * np.cos(y / 60) + grain
    return np.repeat(np.clip(light, 0, 25).astype(np.uint8)[..., None], 3, axis=2)


def _fog(spec: JobSpec) -> Pixels:
    x = np.arange(spec.width)[None, :]
    grain = np.random.default_rng(2).normal(0, 1, (spec.height, spec.width))
    return np.repeat((190 + 4 * np.sin(x / 40) + grain).astype(np.uint8)[..., None], 3, axis=2)


def _line(spec: JobSpec) -> Pixels:
    """A drawing: one black line on white paper."""
    paper = making.colour(spec, (255, 255, 255))
    paper[:, spec.width // 2] = 0
    return paper


def _colours_only(spec: JobSpec) -> Pixels:
    """Red beside the green of the same brightness: nothing is seen without colour."""
    picture = making.colour(spec, (200, 60, 60))
    picture[:, spec.width // 2 :] = (60, 122, 60)
    return picture


ALIVE = {
    "noise": making.noise,
    "gradient": lambda spec: making.gradient(spec, 0, 255),
    "dark gradient": lambda spec: making.gradient(spec, 0, 16),
    "dark photo": _dark_photo,
    "stars": _stars,
    "fog": _fog,
    "line": _line,
    "colours only": _colours_only,
}

DEAD = {
    "black": making.colour,
    "nearly black": lambda spec: making.noise(spec) // 128,
    "white": lambda spec: making.colour(spec, (255, 255, 255)),
    "grey": lambda spec: making.colour(spec, (127, 127, 127)),
    "one colour": lambda spec: making.colour(spec, (13, 200, 77)),
    "dithered grey": lambda spec: (127 + making.noise(spec) % 3).astype(np.uint8),
}


def _save(pixels: Pixels, spec: JobSpec, folder: Path) -> Path:
    file = folder / f"output.{spec.output_format}"
    if spec.output_format == "mp4":
        _encode([pixels] * (spec.num_frames or 1), spec, file)
    else:
        Image.fromarray(pixels).save(file, PILLOW[spec.output_format], quality=95)
    return file


def _encode(frames: list[Pixels], spec: JobSpec, file: Path) -> Path:
    video.write_mp4(file, frames, fps=spec.fps or 0, width=spec.width, height=spec.height)
    return file


def _spec(output_format: str) -> JobSpec:
    size = {"width": 320, "height": 176}
    if output_format == "mp4":
        return making.clip_spec(num_frames=5, **size)
    return making.image_spec(output_format=output_format, **size)


@pytest.mark.parametrize("output_format", ["png", "jpg", "webp", "mp4"])
@pytest.mark.parametrize("name", ALIVE)
def test_picture_that_shows_something_passes(name: str, output_format: str, tmp_path: Path) -> None:
    spec = _spec(output_format)

    verify.output(_save(ALIVE[name](spec), spec, tmp_path), spec)


@pytest.mark.parametrize("output_format", ["png", "jpg", "webp", "mp4"])
@pytest.mark.parametrize("name", DEAD)
def test_picture_that_shows_nothing_is_refused(name: str, output_format: str, tmp_path: Path) -> None:
    spec = _spec(output_format)
    file = _save(DEAD[name](spec), spec, tmp_path)

    with pytest.raises(verify.Refused, match=r"is black|are black|flat \(all of it about #"):
        verify.output(file, spec)


def test_refusal_names_the_colour(tmp_path: Path) -> None:
    spec = _spec("png")

    with pytest.raises(verify.Refused, match=r"The picture is flat.*#0dc84d"):
        verify.image(_save(DEAD["one colour"](spec), spec, tmp_path), spec)


@pytest.mark.parametrize("output_format", ["png", "jpg", "webp"])
def test_picture_of_another_size_is_refused(output_format: str, tmp_path: Path) -> None:
    made, asked = _spec(output_format), making.image_spec(output_format=output_format)

    with pytest.raises(verify.Refused, match="320x176 RGB, 64x48 RGB was asked for"):
        verify.image(_save(making.noise(made), made, tmp_path), asked)


def test_picture_in_another_format_is_refused(tmp_path: Path) -> None:
    spec = _spec("png")
    file = _save(making.noise(spec), spec, tmp_path)

    with pytest.raises(verify.Refused, match="cannot be decoded"):
        verify.image(file, _spec("jpg"))


@pytest.mark.parametrize("output_format", ["png", "jpg", "webp", "mp4"])
@pytest.mark.parametrize("keep", [0.0, 0.02, 0.5, 0.99])
def test_truncated_file_is_refused(output_format: str, keep: float, tmp_path: Path) -> None:
    spec = _spec(output_format)
    file = _save(making.noise(spec), spec, tmp_path)
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * keep)])

    with pytest.raises(verify.Refused, match="cannot be decoded"):
        verify.output(file, spec)


@pytest.mark.parametrize("output_format", ["png", "mp4"])
def test_file_with_a_hole_is_refused(output_format: str, tmp_path: Path) -> None:
    """What a bad disk leaves: the right length, zeros in the middle."""
    spec = _spec(output_format)
    file = _save(making.noise(spec), spec, tmp_path)
    content = bytearray(file.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 4096] = bytes(4096)
    file.write_bytes(content)

    with pytest.raises(verify.Refused):
        verify.output(file, spec)


def test_missing_file_is_the_systems_error_not_a_refusal(tmp_path: Path) -> None:
    for spec in (_spec("png"), _spec("mp4")):
        with pytest.raises(FileNotFoundError):
            verify.output(tmp_path / "none", spec)


def test_clip_with_missing_frames_is_refused(tmp_path: Path) -> None:
    spec = making.clip_spec()
    file = _encode(list(making.moving(spec, 5)), spec, tmp_path / "a.mp4")

    with pytest.raises(verify.Refused, match="5 frames at 24 a second; 96x64, 9 at 24 were asked for"):
        verify.clip(file, spec)


def test_clip_at_another_rate_is_refused(tmp_path: Path) -> None:
    spec = making.clip_spec()
    file = _encode(list(making.moving(spec)), spec, tmp_path / "a.mp4")

    with pytest.raises(verify.Refused, match="at 24 a second"):
        verify.clip(file, making.clip_spec(fps=16))


def test_clip_of_another_size_is_refused(tmp_path: Path) -> None:
    spec = making.clip_spec()
    file = _encode(list(making.moving(spec)), spec, tmp_path / "a.mp4")

    with pytest.raises(verify.Refused, match="96x64"):
        verify.clip(file, making.clip_spec(width=64))


def test_clip_that_goes_black_after_its_first_frames_is_refused(tmp_path: Path) -> None:
    """A decode that breaks after the first latent: frames 1 to 5 are good."""
    spec = making.clip_spec(num_frames=17)
    frames = list(making.moving(spec, 5)) + [making.colour(spec)] * 12

    with pytest.raises(verify.Refused, match="12 of 17 frames of the clip are black"):
        verify.clip(_encode(frames, spec, tmp_path / "a.mp4"), spec)


def test_clip_that_fades_in_from_black_passes(tmp_path: Path) -> None:
    spec = making.clip_spec(num_frames=17)
    frames = [making.colour(spec)] * 4 + list(making.moving(spec, 13))

    verify.clip(_encode(frames, spec, tmp_path / "a.mp4"), spec)


def test_picture_that_claims_to_be_a_clip_is_refused(tmp_path: Path) -> None:
    spec = _spec("png")
    file = _save(making.noise(spec), spec, tmp_path)

    with pytest.raises(verify.Refused, match="cannot be decoded"):
        verify.clip(file, _spec("mp4"))


@pytest.mark.parametrize("lost", [float("nan"), float("inf"), -float("inf")])
def test_frame_that_is_not_a_number_is_refused(lost: float) -> None:
    """Written as bytes it would be a black dot, and nobody would know."""
    spec = making.image_spec()
    values = np.full((spec.height, spec.width, 3), 0.5, np.float32)
    values[0, 0, 0] = lost

    with pytest.raises(verify.Refused, match="NaN or infinite"):
        verify.frame(values, spec)


def test_frame_of_another_size_is_refused() -> None:
    with pytest.raises(verify.Refused, match="A frame is 64x48x3, 48x64x3 was asked for"):
        verify.frame(np.zeros((64, 48, 3), np.uint8), making.image_spec())


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_float_frame_is_rounded_as_diffusers_does(dtype: type[np.floating]) -> None:
    spec = making.image_spec()
    values = making.noise(spec)

    expected = values
    actual = verify.frame((values / 255).astype(dtype), spec)

    assert actual.dtype == np.uint8
    assert (expected == actual).all()


def test_float_frame_outside_its_range_is_a_bug_not_clipped() -> None:
    spec = making.image_spec()

    with pytest.raises(ValueError, match="not within"):
        verify.frame(np.full((spec.height, spec.width, 3), 1.5, np.float32), spec)


def test_decoder_is_not_left_running_by_a_refusal(tmp_path: Path) -> None:
    spec = making.clip_spec(num_frames=33)
    file = _encode(list(making.moving(spec)), spec, tmp_path / "a.mp4")
    before = psutil.Process().children(recursive=True)

    with pytest.raises(verify.Refused):
        verify.clip(file, making.clip_spec(width=64, num_frames=33))

    assert psutil.Process().children(recursive=True) == before
