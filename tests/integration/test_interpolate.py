"""Frames between the model's frames, by the real ffmpeg: how many, where, and what ends it."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from safelightd import outputs, verify, video
from safelightd.progress import Cancelled
from tests.conftest import Installation
from tests.integration import making

Pixels = NDArray[np.uint8]


def scene(count: int, step: int = 4) -> list[Pixels]:
    """A camera that moves over soft shapes: what lies between two frames is known."""
    noise = np.random.default_rng(0).integers(0, 256, (24, 64, 3))
    wide = Image.fromarray(np.kron(noise, np.ones((8, 8, 1))).astype(np.uint8)).filter(ImageFilter.GaussianBlur(3))
    return [np.asarray(wide)[:160, step * number : step * number + 192] for number in range(count)]


def interpolated(frames: list[Pixels], folder: Path, *, times: int, fps: int = 16) -> list[Pixels]:
    height, width, _ = frames[0].shape
    video.write_whole(folder / "whole.nut", frames, fps=fps, width=width, height=height)
    return list(video.interpolated(folder / "whole.nut", times=times, fps=fps))


def off(a: Pixels, b: Pixels) -> float:
    """Mean difference of two frames, of 255."""
    return float(np.abs(a.astype(int) - b).mean())


@pytest.mark.parametrize("times", [2, 4])
@pytest.mark.parametrize(
    ("frames", "fps"), [(5, 24), (9, 24), (9, 16), (17, 7), (33, 23), (81, 16), (121, 24), (9, 30), (5, 1)]
)
def test_count_is_exact_at_every_rate(frames: int, fps: int, times: int, tmp_path: Path) -> None:
    """Where times of frames are rounded, one is lost: 24 frames a second are 41.67 ms each."""
    spec = making.clip_spec(width=32, height=32)

    found = interpolated(list(making.moving(spec, frames)), tmp_path, times=times, fps=fps)

    assert len(found) == (frames - 1) * times + 1


@pytest.mark.parametrize("times", [2, 4])
def test_models_own_frames_are_kept_from_the_first_to_the_last(times: int, tmp_path: Path) -> None:
    frames = scene(9)

    found = interpolated(frames, tmp_path, times=times)

    assert [off(frame, found[times * number]) < 1 for number, frame in enumerate(frames)] == [True] * 9


def test_what_lies_between_follows_what_moves(tmp_path: Path) -> None:
    frames, between = scene(5, step=4), scene(9, step=2)[1::2]

    found = interpolated(frames, tmp_path, times=2)[1::2]

    for number, (made, true) in enumerate(zip(found, between, strict=False)):
        faded = ((frames[number].astype(int) + frames[number + 1]) // 2).astype(np.uint8)
        assert off(made, true) < off(faded, true) / 2


def test_cut_is_not_smeared(tmp_path: Path) -> None:
    frames = [*scene(4), *(255 - frame for frame in scene(8)[4:])]

    found = interpolated(frames, tmp_path, times=2)

    assert off(found[7], frames[3]) < 1


def test_few_frames_are_in_memory_at_a_time(tmp_path: Path) -> None:
    spec = making.clip_spec(num_frames=33)
    alive: list[weakref.ref[Pixels]] = []
    most = 0

    def frames() -> Iterator[Pixels]:
        nonlocal most
        for frame in making.moving(spec):
            own = frame.copy()
            alive.append(weakref.ref(own))
            most = max(most, sum(ref() is not None for ref in alive))
            yield own

    video.write_whole(tmp_path / "whole.nut", frames(), fps=24, width=spec.width, height=spec.height)
    for frame in video.interpolated(tmp_path / "whole.nut", times=4, fps=24):
        alive.append(weakref.ref(frame))
        most = max(most, sum(ref() is not None for ref in alive))

    assert most <= video.FRAMES_AHEAD + 3


def test_written_whole_comes_back_as_it_was(tmp_path: Path) -> None:
    spec = making.clip_spec()
    frames = [making.noise(spec, seed) for seed in range(5)]
    video.write_whole(tmp_path / "whole.nut", frames, fps=24, width=spec.width, height=spec.height)

    for written, read in zip(frames, video.read_frames(tmp_path / "whole.nut"), strict=True):
        assert (written == read).all()


def test_side_that_is_too_short_is_said_in_ffmpegs_words(tmp_path: Path) -> None:
    frames = [np.zeros((16, 16, 3), np.uint8)] * 5

    with pytest.raises(video.FfmpegFailed, match="Height or width < 32"):
        interpolated(frames, tmp_path, times=2)


def test_cancel_between_two_new_frames_leaves_nothing(installation: Installation) -> None:
    spec = making.clip_spec(num_frames=33, interpolate=4)
    before = psutil.Process().children(recursive=True)
    checks = 0

    def check() -> None:
        nonlocal checks
        checks += 1
        if checks == 20:
            raise Cancelled

    with pytest.raises(Cancelled):
        outputs.write(spec, making.PLAN, making.frames(spec), installation.config, check)

    assert checks == 20
    assert [file for file in installation.paths.outbox.rglob("*") if file.is_file()] == []
    assert psutil.Process().children(recursive=True) == before


def test_models_frames_have_all_come_before_the_first_new_one(installation: Installation) -> None:
    """The GPU does not wait for ffmpeg."""
    spec = making.clip_spec(interpolate=2)
    seen: list[str] = []

    def frames() -> Iterator[Pixels]:
        yield from making.frames(spec)
        seen.append("decoded")

    outputs.write(spec, making.PLAN, frames(), installation.config, lambda: seen.append("new"))

    assert seen == ["decoded", *["new"] * 17]


def test_interpolated_clip_of_another_length_is_refused(installation: Installation) -> None:
    spec = making.clip_spec(interpolate=2)
    file = outputs.write(spec, making.PLAN, making.frames(spec), installation.config)

    verify.output(file, spec)
    with pytest.raises(verify.Refused, match="17 frames at 48 a second; 96x64, 9 at 24 were asked for"):
        verify.output(file, making.clip_spec())
