"""Frames to MP4 and back through the real ffmpeg."""

from __future__ import annotations

import json
import os
import select
import signal
import struct
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from numpy.typing import NDArray

from safelight.embedded import MP4_COMMENT, mp4_box
from safelightd import video
from safelightd.progress import Cancelled
from tests.integration import making


def write(path: Path, frames: Any, fps: int = 24, comment: str | None = None) -> int:
    spec = making.clip_spec()
    return video.write_mp4(path, frames, fps=fps, width=spec.width, height=spec.height, comment=comment)


def _children() -> set[psutil.Process]:
    return set(psutil.Process().children(recursive=True))


@pytest.mark.parametrize(("frames", "fps"), [(1, 24), (5, 16), (9, 24), (33, 30), (12, 1), (13, 119), (13, 120)])
def test_clip_has_exactly_the_frames_and_rate_it_was_given(tmp_path: Path, frames: int, fps: int) -> None:
    file = tmp_path / "clip.mp4"
    spec = making.clip_spec()

    assert write(file, making.moving(spec, frames), fps=fps) == frames

    assert video.timing(file) == video.Timing(spec.width, spec.height, frames, fps)
    assert [frame.shape for frame in video.read_frames(file)] == [(spec.height, spec.width, 3)] * frames


@pytest.mark.parametrize("rgb", [(220, 30, 30), (30, 200, 60), (20, 40, 230), (128, 128, 128), (255, 255, 255)])
def test_colours_come_back_as_they_went_in(tmp_path: Path, rgb: tuple[int, int, int]) -> None:
    """Converted by one matrix and read by another, red comes back 20 steps off."""
    file = tmp_path / "clip.mp4"
    frame = making.colour(making.clip_spec(), rgb)

    write(file, [frame] * 3)

    for decoded in video.read_frames(file):
        assert np.abs(decoded.astype(int) - frame).max() <= 3


def test_clip_says_which_colours_it_is_in(tmp_path: Path) -> None:
    """A player guesses for an untagged clip, by its size: BT.601 for small ones, BT.709 for large ones."""
    file = tmp_path / "clip.mp4"
    bt709 = 1  # ISO/IEC 23091-2, for primaries, transfer and matrix alike

    write(file, making.moving(making.clip_spec()))

    with file.open("rb") as stream:
        kinds = mp4_box(stream, b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stsd") or b""
    assert struct.unpack_from(">HHH", kinds, kinds.index(b"colrnclx") + 8) == (bt709, bt709, bt709)


def test_moving_picture_comes_back_in_order(tmp_path: Path) -> None:
    file = tmp_path / "clip.mp4"
    frames = list(making.moving(making.clip_spec()))

    write(file, frames)

    for written, decoded in zip(frames, video.read_frames(file), strict=True):
        assert np.abs(written.astype(int) - decoded).mean() < 3


def test_index_comes_before_the_pictures_so_that_a_browser_starts_at_once(tmp_path: Path) -> None:
    file = tmp_path / "clip.mp4"

    write(file, making.moving(making.clip_spec()))

    content = file.read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")
    assert b"avc1" in content
    assert b"yuv444" not in content


def test_same_frames_give_the_same_bytes(tmp_path: Path) -> None:
    first, second = tmp_path / "a.mp4", tmp_path / "b.mp4"

    for file in (first, second):
        write(file, making.moving(making.clip_spec()), comment='{"a": 1}')

    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize(
    "text",
    [
        "plain",
        "=;#\\ \\\\ ;comment=x\n#;=",
        "火 🦊 é",
        'quotes " and \' and \\"',
        "[chapter]\n;FFMETADATA1",
        "x" * 300_000,
    ],
    ids=["plain", "escapes", "unicode", "quotes", "sections", "longer than an argument can be"],
)
def test_comment_comes_back_letter_by_letter(tmp_path: Path, text: str) -> None:
    file = tmp_path / "clip.mp4"
    comment = json.dumps({"prompt": text}, ensure_ascii=False)

    write(file, making.moving(making.clip_spec()), comment=comment)

    with file.open("rb") as stream:
        tag = mp4_box(stream, *MP4_COMMENT)
    assert tag is not None
    assert tag[8:].decode() == comment


def test_path_that_looks_like_an_option_or_a_protocol_is_a_path(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("-y.mp4", "http:x.mp4", "a b%d'.mp4"):
        write(Path(name), making.moving(making.clip_spec()))
        assert len(list(video.read_frames(Path(name)))) == 9
    assert sorted(os.listdir(tmp_path)) == ["-y.mp4", "a b%d'.mp4", "http:x.mp4"]


def test_odd_size_is_refused_not_rounded(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="even sizes"):
        video.write_mp4(tmp_path / "a.mp4", [], fps=24, width=63, height=64)


def test_frame_of_another_size_is_refused_not_sheared(tmp_path: Path) -> None:
    frames = [np.zeros((64, 64, 3), np.uint8)]

    with pytest.raises(ValueError, match="a frame is"):
        write(tmp_path / "a.mp4", frames)


def test_few_frames_wait_for_ffmpeg(tmp_path: Path) -> None:
    """A clip of 121 frames of 1280x704 as floats would be 1.3 GB."""
    spec = making.clip_spec(num_frames=40)
    alive: list[weakref.ref[NDArray[np.uint8]]] = []
    most = 0

    def frames() -> Iterator[NDArray[np.uint8]]:
        nonlocal most
        for frame in making.moving(spec):
            own = frame.copy()
            alive.append(weakref.ref(own))
            most = max(most, sum(ref() is not None for ref in alive))
            yield own

    assert write(tmp_path / "clip.mp4", frames()) == 40
    assert most <= video.FRAMES_AHEAD + 3  # and one that is made, one that is given, one that is written


@pytest.mark.parametrize("reason", [Cancelled, RuntimeError, KeyboardInterrupt])
def test_no_ffmpeg_outlives_what_ended_the_frames(tmp_path: Path, reason: type[BaseException]) -> None:
    before, during = _children(), set[psutil.Process]()

    def frames() -> Iterator[NDArray[np.uint8]]:
        yield from making.moving(making.clip_spec(), 5)
        during.update(_children())
        raise reason

    with pytest.raises(reason):
        write(tmp_path / "clip.mp4", frames())

    assert len(during - before) == 1
    assert _children() == before
    for thread in threading.enumerate():
        if thread.name == "ffmpeg-feed":
            thread.join(120)
            assert not thread.is_alive()


def test_frames_are_made_while_others_are_written(tmp_path: Path) -> None:
    """What ffmpeg takes long for is no reason to wait before the next frames are asked for."""
    made: list[int] = []
    reader, writer = os.pipe()
    frame = np.zeros((704, 1280, 3), np.uint8)  # 40 times what a pipe holds
    with os.fdopen(reader, "rb") as end, os.fdopen(writer, "wb", buffering=0) as stdin, video._feeding(stdin) as feed:
        for number in range(video.FRAMES_AHEAD + 1):
            feed(frame)
            made.append(number)
        threading.Thread(target=end.read, daemon=True).start()

    assert len(made) == video.FRAMES_AHEAD + 1


def test_no_ffmpeg_outlives_a_reader_that_stops_early(tmp_path: Path) -> None:
    file = tmp_path / "clip.mp4"
    write(file, making.moving(making.clip_spec(), 60))
    before = _children()

    frames = video.read_frames(file)
    next(frames)
    frames.close()  # type: ignore[attr-defined]  # it is a generator; its type promises an iterator only

    assert _children() == before


ORPHANER = """
import sys, time
from pathlib import Path
import numpy as np
sys.path[:0] = {path!r}
from safelightd import video

def frames():
    for _ in range(40):  # more than a pipe holds: ffmpeg has begun to read
        yield np.zeros((64, 96, 3), np.uint8)
    print("started", flush=True)
    time.sleep(60)

video.write_mp4(Path({file!r}), frames(), fps=24, width=96, height=64)
"""


def test_ffmpeg_dies_with_a_killed_parent_even_when_it_cannot_read_its_input(tmp_path: Path) -> None:
    """A stopped process never sees its input end; only the kernel's signal ends it."""
    program = ORPHANER.format(path=sys.path, file=str(tmp_path / "a.mp4"))
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"started\n"
        (ffmpeg,) = psutil.Process(parent.pid).children()
        ended = os.pidfd_open(ffmpeg.pid)
        ffmpeg.send_signal(signal.SIGSTOP)
        assert "ffmpeg" in ffmpeg.name()

        parent.kill()

    readable, _, _ = select.select([ended], [], [], 10)
    os.close(ended)
    assert readable


def test_full_disk_is_the_systems_own_error(tmp_path: Path) -> None:
    """The worker holds the queue on an OSError; a failed job would burn the whole night."""
    with pytest.raises(OSError, match="No space left on device"):
        write(Path("/dev/full"), making.moving(making.clip_spec()))


def test_missing_folder_is_the_systems_own_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write(tmp_path / "none" / "a.mp4", making.moving(making.clip_spec()))


def test_ffmpeg_that_fails_is_said_with_its_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", "/bin/false")

    with pytest.raises(video.FfmpegFailed, match="exit status 1"):
        write(tmp_path / "a.mp4", making.moving(making.clip_spec()))


def test_an_ffmpeg_that_a_signal_ends_says_so_and_not_that_the_clip_is_broken(tmp_path: Path) -> None:
    before = _children()

    def frames() -> Iterator[NDArray[np.uint8]]:
        for number, frame in enumerate(making.moving(making.clip_spec(), 9)):
            if number == 1:
                for ffmpeg in _children() - before:
                    ffmpeg.kill()
            yield frame

    with pytest.raises(video.FfmpegKilled, match="was ended by signal 9") as raised:
        write(tmp_path / "a.mp4", frames())

    assert raised.value.signal == signal.SIGKILL


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.7, 0.95])
def test_truncated_clip_cannot_be_read_to_its_end(tmp_path: Path, keep: float) -> None:
    file = tmp_path / "clip.mp4"
    spec = making.clip_spec(num_frames=33)
    write(file, [making.noise(spec, seed) for seed in range(33)])
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * keep)])

    with pytest.raises(video.FfmpegFailed):
        list(video.read_frames(file))
