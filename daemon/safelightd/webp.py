"""Frames to an animated WebP: one frame in memory at a time. Knows no jobs.

Pillow's own writer holds all frames, and libwebp's joins equal ones, which makes the count wrong. So each frame is
encoded as a picture and put into the container here ("WebP Container Specification", developers.google.com/speed/webp).
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

QUALITY = 95
"""As that of pictures."""

_ANIMATED, _EXIF = 0x02, 0x08
_REPLACES = 0x02
"""A frame's pixels take the place of what was there."""

_PIXELS = (b"VP8 ", b"VP8L")


def moment_ms(number: int, fps: int) -> int:
    """Return when frame `number`, from 0, begins: in whole milliseconds, each within half of one of its true moment."""
    return (2000 * number + fps) // (2 * fps)


def write(
    path: Path, frames: Iterable[NDArray[np.uint8]], *, fps: int, width: int, height: int, exif: bytes = b""
) -> int:
    """Write an animated WebP that repeats for ever and return the number of frames in it.

    Whatever ends it early, the unfinished file stays for the caller to remove.

    Raises:
        OSError: the disk is full or refuses.
    """
    count = 0
    with path.open("xb") as file:
        file.write(b"RIFF\0\0\0\0WEBP")
        size = _size(width) + _size(height)
        _chunk(file, b"VP8X", bytes([_ANIMATED | (_EXIF if exif else 0), 0, 0, 0]) + size)
        _chunk(file, b"ANIM", struct.pack("<IH", 0, 0))  # black behind, for ever
        for frame in frames:
            lasts_ms = moment_ms(count + 1, fps) - moment_ms(count, fps)
            head = bytes(6) + size + struct.pack("<I", lasts_ms)[:3] + bytes([_REPLACES])
            _chunk(file, b"ANMF", head + _pixels(frame))
            count += 1
        if exif:
            _chunk(file, b"EXIF", exif.removeprefix(b"Exif\0\0"))  # which begins it in a JPEG only
        length = file.tell()
        file.seek(4)
        file.write(struct.pack("<I", length - 8))
    return count


def _size(side: int) -> bytes:
    return struct.pack("<I", side - 1)[:3]


def _chunk(file: BinaryIO, name: bytes, content: bytes) -> None:
    file.write(name + struct.pack("<I", len(content)) + content + bytes(len(content) % 2))


def _pixels(frame: NDArray[np.uint8]) -> bytes:
    """Return the chunk of a WebP picture that holds its pixels."""
    stream = io.BytesIO()
    Image.fromarray(frame).save(stream, "WEBP", quality=QUALITY)
    content, at = stream.getvalue(), 12
    while content[at : at + 4] not in _PIXELS:
        (length,) = struct.unpack_from("<I", content, at + 4)
        at += 8 + length + length % 2
    return content[at:]
