"""Frames to MP4 and GIF and back, through ffmpeg: a few frames in memory at a time. Knows no jobs."""

from __future__ import annotations

import errno
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Full, Queue
from threading import Event, Thread
from typing import IO, Any

import imageio_ffmpeg
import numpy as np
from numpy.typing import NDArray

from safelight.embedded import GIF_COMMENT, mp4_box
from safelight.errors import BadConfig, SafelightError

CRF = 10
"""x264's constant rate factor. What Wan's own code gets by imageio's `quality=8` (Wan-Video/Wan2.2 @ 42bf4cf)."""

ENCODE = [
    # Untagged, small clips are shown by BT.601 and large ones by BT.709: reds turn orange.
    "-vf", "scale=out_color_matrix=bt709:out_range=tv,format=yuv420p,"
           "setparams=range=tv:colorspace=bt709:color_primaries=bt709:color_trc=bt709",
    "-c:v", "libx264", "-crf", str(CRF), "-fps_mode", "passthrough", "-movflags", "+faststart", "-f", "mp4",
]  # fmt: skip

ENCODE_GIF = [
    # A palette for each frame: one for all would need all frames in memory.
    "-vf", "split[one][two];[one]palettegen=stats_mode=single[palette];[two][palette]paletteuse=new=1",
    "-fps_mode", "passthrough", "-loop", "0", "-f", "gif",
]  # fmt: skip

ENCODE_WHOLE = ["-c:v", "ffv1", "-pix_fmt", "gbrp", "-fps_mode", "passthrough", "-f", "nut"]
"""Without loss, for a file that is read once more. NUT, since Matroska rounds the times of frames to milliseconds."""

INTERPOLATION = "minterpolate"
"""The filter of ffmpeg that makes frames between frames; receipts name it."""

INTERPOLATE = (
    # The filter computes in YUV, and never gives the last frame, which it only looks at: so a copy of it comes last.
    "scale=out_color_matrix=bt709:out_range=tv,format=yuv444p,tpad=stop=1:stop_mode=clone,"
    + INTERPOLATION + "=fps={fps}:mi_mode=mci:mc_mode=aobmc:vsbmc=1,"
    "scale=in_color_matrix=bt709:in_range=tv,format=rgb24"
)  # fmt: skip

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.ENOENT)
"""What the disk may answer ffmpeg; it passes on as the OSError that it is."""

FRAMES_AHEAD = 4
"""That wait for ffmpeg beside the one that it is given: what the VAE makes of a latent frame."""

_TABLE = (b"moov", b"trak", b"mdia", b"minf", b"stbl")
"""Where an MP4 says what its first track holds."""

_START = (
    "import ctypes, os, signal, sys\n"
    "ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)\n"
    "os.getppid() == int(sys.argv[1]) or os._exit(1)\n"
    "os.execv(sys.argv[2], sys.argv[2:])\n"
)
"""Becomes ffmpeg, after asking (PR_SET_PDEATHSIG) to die with the parent.

Not done by preexec_fn: the engine has threads, where Python warns that it may deadlock; and the fork it needs copies
the page tables, 1.4 ms a GiB. This costs 14 ms (2 cores, 2026-11-22)."""


class FfmpegFailed(SafelightError):
    """ffmpeg could not write or read a clip."""


class FfmpegKilled(SafelightError):
    """A signal ended ffmpeg: that says nothing of the clip."""

    def __init__(self, path: Path, number: int, words: str) -> None:
        self.signal = number
        super().__init__(f"{path}: ffmpeg was ended by signal {number}: {words or 'it said nothing'}")


@dataclass(frozen=True)
class Timing:
    """What an MP4 says about itself: size in pixels, frames, frames a second."""

    width: int
    height: int
    num_frames: int
    fps: float


def write_mp4(
    path: Path, frames: Iterable[NDArray[np.uint8]], *, fps: int, width: int, height: int, comment: str | None = None
) -> int:
    """Write an H.264 MP4 (yuv420p, BT.709, index first) and return the number of frames in it.

    Whatever ends it early, Cancelled included, no ffmpeg is left running; the unfinished file stays for the caller to
    remove.

    Args:
        frames: (height, width, 3) each; taken as ffmpeg wants them, FRAMES_AHEAD before. None is changed once given.
        width: a multiple of 2, as height: yuv420p has one colour for four pixels.
        comment: the tag `comment`; any length, one line.

    Raises:
        OSError: the disk is full or refuses.
        FfmpegFailed: anything else, in ffmpeg's words.
    """
    if width % 2 or height % 2:
        raise ValueError(f"{width}x{height}: H.264 in yuv420p has even sizes only")
    return _encode(path, frames, ENCODE, fps=fps, width=width, height=height, comment=comment)


def write_gif(
    path: Path, frames: Iterable[NDArray[np.uint8]], *, fps: int, width: int, height: int, comment: str | None = None
) -> int:
    """Write a GIF that repeats for ever and return the number of frames in it; otherwise as `write_mp4`.

    Args:
        fps: a divisor of 100: a frame lasts whole hundredths of a second.
    """
    if 100 % fps:
        raise ValueError(f"{fps} frames a second: those of a GIF last whole hundredths of one")
    count = _encode(path, frames, ENCODE_GIF, fps=fps, width=width, height=height)
    if comment is not None:
        text = comment.encode()
        blocks = [text[at : at + 255] for at in range(0, len(text), 255)]
        with path.open("r+b") as file:
            file.seek(-1, os.SEEK_END)  # in place of the trailer (GIF89a, 24 and 27)
            file.write(GIF_COMMENT + b"".join(bytes([len(block)]) + block for block in blocks) + b"\x00;")
    return count


def write_whole(path: Path, frames: Iterable[NDArray[np.uint8]], *, fps: int, width: int, height: int) -> int:
    """Write frames to a file that gives them back as they were, and return their number; otherwise as `write_mp4`."""
    return _encode(path, frames, ENCODE_WHOLE, fps=fps, width=width, height=height)


def interpolated(path: Path, *, times: int, fps: int) -> Iterator[NDArray[np.uint8]]:
    """Yield the n frames of a clip and `times - 1` new ones between any two: (n - 1) * times + 1 of them.

    The new ones follow what moves. Where the picture changes at once, as at a cut, they repeat the frame before.

    Args:
        fps: the clip's, before.

    Raises:
        OSError, FfmpegFailed: it cannot be read to its end, or a side is shorter than 32 pixels.
    """
    return read_frames(path, INTERPOLATE.format(fps=fps * times))


def _encode(
    path: Path, frames: Iterable[NDArray[np.uint8]], how: list[str], *,
    fps: int, width: int, height: int, comment: str | None = None,
) -> int:  # fmt: skip
    count = 0
    with ExitStack() as stack:
        tags = stack.enter_context(_memory_file(_ffmetadata(comment)))
        arguments = [
            "-y", "-f", "rawvideo", "-pixel_format", "rgb24", "-video_size", f"{width}x{height}",
            "-framerate", str(fps), "-i", "pipe:0", "-f", "ffmetadata", "-i", f"/proc/self/fd/{tags.fileno()}",
            # else the encoder takes a rate that it likes better than 119 a second, which is 120
            "-map", "0:v:0", "-map_metadata", "1", "-enc_time_base", f"1/{fps}", *how, f"file:{path}",
        ]  # fmt: skip
        run = stack.enter_context(_ffmpeg(arguments, path, stdin=subprocess.PIPE, pass_fds=(tags.fileno(),)))
        assert run.process.stdin is not None
        with suppress(BrokenPipeError), _feeding(run.process.stdin) as feed:  # it died: its words say of what
            for frame in frames:
                if frame.shape != (height, width, 3) or frame.dtype != np.uint8:
                    raise ValueError(f"a frame is {frame.dtype} {frame.shape}, not uint8 ({height}, {width}, 3)")
                feed(np.ascontiguousarray(frame))
                count += 1
        run.check()
    return count


@contextmanager
def _feeding(stdin: IO[bytes]) -> Iterator[Callable[[NDArray[np.uint8]], None]]:
    """Have what writes frames to ffmpeg while the next ones are made; at the end all are written and `stdin` is closed.

    A frame of 1280x704 takes 4 ms to pass through a pipe, for which a GPU would wait. Where the block is left by an
    exception nothing more is written.

    Raises:
        BrokenPipeError: ffmpeg reads no more.
    """
    waiting: Queue[NDArray[np.uint8] | None] = Queue(FRAMES_AHEAD)
    broken: list[OSError] = []
    given_up = Event()

    def write() -> None:
        while (frame := waiting.get()) is not None and not given_up.is_set():
            try:
                if not broken:
                    stdin.write(frame.data)
            except OSError as error:
                broken.append(error)

    def feed(frame: NDArray[np.uint8]) -> None:
        if broken:
            raise broken[0]
        waiting.put(frame)

    writer = Thread(target=write, name="ffmpeg-feed", daemon=True)
    writer.start()
    try:
        yield feed
    except BaseException:
        given_up.set()
        with suppress(Full):  # then it is writing, and looks as soon as ffmpeg is killed
            waiting.put_nowait(None)
        raise
    waiting.put(None)
    writer.join()
    if broken:
        raise broken[0]
    stdin.close()


def read_frames(path: Path, filters: str = "null") -> Iterator[NDArray[np.uint8]]:
    """Yield every frame of a clip as (height, width, 3), decoded strictly: any complaint of the decoder is an error.

    Args:
        filters: what ffmpeg does to them before.

    Raises:
        OSError, FfmpegFailed: it cannot be read to its end.
    """
    arguments = [
        "-i", f"file:{path}", "-map", "0:v:0", "-vf", filters, "-fps_mode", "passthrough",
        "-c:v", "ppm", "-f", "image2pipe", "pipe:1",
    ]  # fmt: skip
    with _ffmpeg(arguments, path, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as run:
        assert run.process.stdout is not None
        while (frame := _read_ppm(run.process.stdout)) is not None:
            yield frame
        run.check()


def join(clips: Sequence[Path], path: Path) -> None:
    """Write one MP4 that shows the clips one after the other; what is encoded is copied as it is, and no tag.

    Args:
        clips: of one size, rate and `encoding`: else what comes out is not what went in.

    Raises:
        OSError: a clip cannot be read, or the disk is full or refuses.
        FfmpegFailed: anything else, in ffmpeg's words.
    """
    with _memory_file(_list_of(clips).encode(errors="surrogateescape")) as listed:
        arguments = [
            "-y", "-f", "concat", "-safe", "0", "-i", f"/proc/self/fd/{listed.fileno()}", "-map", "0:v:0",
            "-map_metadata", "-1", "-c", "copy", "-movflags", "+faststart", "-f", "mp4", f"file:{path}",
        ]  # fmt: skip
        with _ffmpeg(arguments, path, stdin=subprocess.DEVNULL, pass_fds=(listed.fileno(),)) as run:
            run.check()


def _list_of(clips: Sequence[Path]) -> str:
    """Return the clips as ffmpeg's concat wants them, each with its length.

    An MP4's own is in whole milliseconds, so that the next clip would begin up to one too early or too late. Ends are
    rounded and not lengths: a hundred clips are no further off than one.
    """
    lines, seconds, begins_us = [], 0.0, 0
    for clip in clips:
        found = timing(clip)
        seconds += found.num_frames / found.fps
        ends_us = round(seconds * 1e6)
        name = str(clip.absolute()).replace("'", r"'\''")
        lines.append(f"file 'file:{name}'\nduration {ends_us - begins_us}us\n")
        begins_us = ends_us
    return "".join(lines)


def encoding(path: Path) -> bytes:
    """Return what a decoder must know before the first frame of an MP4: equal in clips that can follow each other.

    Raises:
        ValueError: it holds no H.264.
    """
    with path.open("rb") as file:
        kinds = mp4_box(file, *_TABLE, b"stsd") or b""
    at = kinds.find(b"avcC")
    if at < 4:
        raise ValueError("it holds no H.264")
    (size,) = struct.unpack_from(">I", kinds, at - 4)
    return kinds[at : at - 4 + size]


def timing(path: Path) -> Timing:
    """Return what the file's index says; decoding tells whether it is true.

    Raises:
        ValueError: it is not an MP4 with one constant frame rate.
    """
    with path.open("rb") as file:
        header, times, kinds = (
            mp4_box(file, *box) or b""
            for box in ((b"moov", b"trak", b"mdia", b"mdhd"), (*_TABLE, b"stts"), (*_TABLE, b"stsd"))
        )
    try:
        # Offsets of ISO 14496-12: 8.4.2 (mdhd, version 0), 8.6.1.2 (stts), 12.1.3 (width and height in stsd).
        (timescale,) = struct.unpack_from(">I", header, 12)
        entries, num_frames, delta = struct.unpack_from(">III", times, 4)
        width, height = struct.unpack_from(">HH", kinds, 40)
    except struct.error:
        raise ValueError("it has no index of a video") from None
    if entries != 1 or not delta:
        raise ValueError("its frames are not evenly spaced")
    return Timing(width, height, num_frames, timescale / delta)


def _read_ppm(stream: IO[bytes]) -> NDArray[np.uint8] | None:
    """Return the next picture of a stream of binary PPMs, which carry their own size, or None at the end."""
    if stream.readline() != b"P6\n":
        return None
    width, height = (int(number) for number in stream.readline().split())
    stream.readline()
    pixels = stream.read(width * height * 3)
    if len(pixels) < width * height * 3:
        return None
    return np.frombuffer(pixels, np.uint8).reshape(height, width, 3)


def _ffmetadata(comment: str | None) -> bytes:
    """Return the tags as ffmpeg's own file of them: an argument of a command could hold 128 KiB only."""
    escaped = "".join(f"\\{sign}" if sign in "=;#\\\n" else sign for sign in comment or "")
    return f";FFMETADATA1\ncomment={escaped}\n".encode() if comment else b";FFMETADATA1\n"


@contextmanager
def _memory_file(content: bytes = b"") -> Iterator[IO[bytes]]:
    """Open a file that no full disk can refuse."""
    with os.fdopen(os.memfd_create("ffmpeg"), "w+b") as file:
        file.write(content)
        file.flush()
        yield file


@dataclass(frozen=True)
class _Run:
    """One ffmpeg at work on `path`."""

    process: subprocess.Popen[bytes]
    said: IO[bytes]
    path: Path

    def check(self) -> None:
        """Wait for its end.

        Raises:
            OSError: the disk refused.
            FfmpegKilled: a signal ended it.
            FfmpegFailed: it failed, or said anything at level `error`.
        """
        status = self.process.wait()
        self.said.seek(0)
        words = self.said.read().decode(errors="replace").strip()
        if not status and not words:
            return
        for code in DISK_ERRORS:
            if os.strerror(code) in words:
                raise OSError(code, os.strerror(code), str(self.path))
        if status < 0:
            raise FfmpegKilled(self.path, -status, words)
        raise FfmpegFailed(f"{self.path}: ffmpeg ended with exit status {status}: {words or 'it said nothing'}")


@contextmanager
def _ffmpeg(arguments: list[str], path: Path, **channels: Any) -> Iterator[_Run]:
    """Run ffmpeg for the length of the block; it is gone afterwards, and dies with this thread (prctl(2))."""
    try:
        binary = imageio_ffmpeg.get_ffmpeg_exe()
    except RuntimeError as error:
        raise BadConfig(f"There is no ffmpeg ({error}) Install safelight[daemon].") from error
    start = [sys.executable, "-I", "-S", "-c", _START, str(os.getpid())]
    with _memory_file() as said:
        process = subprocess.Popen([*start, binary, "-v", "error", *arguments], stderr=said, **channels)
        try:
            yield _Run(process, said, path)
        finally:
            process.kill()  # after a check() it has ended, and this does nothing
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe:
                    with suppress(BrokenPipeError):  # what was buffered for it is of no use now
                        pipe.close()
