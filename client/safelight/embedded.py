"""What a picture or clip says about the job that made it: enough to run it again.

    PNG          the iTXt chunk `safelight`
    JPEG, WebP   the Exif MakerNote, after the bytes "safelight" and NUL
    MP4          the tag `comment` (moov/udta/meta/ilst/©cmt)
    GIF          the comment that comes last
    .json        the receipt that lies beside an output

The daemon writes it (safelightd.metadata). Files come from anywhere: sizes found inside are never trusted. Knows
nothing of the ledger, and does not judge whether this machine can run the job.
"""

from __future__ import annotations

import struct
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Literal

from PIL import ExifTags, Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from safelight.errors import Fault, InvalidJob
from safelight.jobspec import JobSpec
from safelight.plan import Plan

PNG_KEY = "safelight"
MAKER = b"safelight\x00"
MP4_COMMENT = (b"moov", b"udta", b"meta", b"ilst", b"\xa9cmt", b"data")

GIF_COMMENT = b"!\xfe"
"""Begins a comment extension (GIF89a, 24)."""

FIRST_FRAME = "0001.png"
"""Of a folder of frames."""

RECORD_BYTES_MAX = 2**20
"""Four texts of 20,000 characters, each six bytes once JSON has escaped it, are 480,000 bytes."""

PICTURE_BYTES_MAX = 2**26
"""The largest picture has 2048 x 2048 pixels: 12.6 MB before compression."""

BOXES_MAX = 10_000
"""Boxes looked at in one MP4, where ffmpeg's files have about 40, or chunks in a WebP, which has one a frame."""

_PICTURE_HEADS = {b"\x89PNG\r\n\x1a\n": "PNG", b"\xff\xd8\xff": "JPEG", b"RIFF": "WEBP"}

_DAMAGED = (
    OSError, ValueError, SyntaxError, EOFError, LookupError, TypeError, struct.error, zlib.error, Warning,
    Image.DecompressionBombError,
)  # fmt: skip
"""What Pillow raises on damaged and hostile files; its warnings are made errors here."""


class Embedded(BaseModel):
    """The record inside a file. A receipt reads as one, too: what it has more is left out."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    v: Literal[1] = 1
    spec: JobSpec
    plan: Plan | None = None
    versions: dict[str, str] = Field(default_factory=dict)

    @property
    def id(self) -> str:
        """The job that made the file."""
        return self.spec.id


def read(path: Path) -> Embedded:
    """Return the record in a picture, a clip or a receipt; of what has none, that of the receipt beside it.

    A folder of frames has that of its first.

    Raises:
        InvalidJob: there is no such file, or it holds no record; the message says what it is instead.
    """
    file = path / FIRST_FRAME if path.is_dir() else path
    if not file.is_file():
        raise _refusal(path, "there is no such file")
    try:
        text = _text(file)
    except _DAMAGED as error:
        raise _refusal(path, f"cannot be read ({_first_line(error)})") from error
    if text is not None:
        return _parse(text, path)
    sidecar = path.absolute().with_suffix(".json")  # "." has no name of its own
    if sidecar != path.absolute() and sidecar.is_file():
        return read(sidecar)
    raise _refusal(
        path, "holds no record of safelight: its metadata was switched off or stripped", "Give the .json beside it."
    )


def _text(path: Path) -> bytes | None:
    """Return the record as JSON, or None where a file of a known kind has none."""
    with path.open("rb") as file:
        head = file.read(12)
        file.seek(0)
        for start, kind in _PICTURE_HEADS.items():
            if head.startswith(start):
                return _of_picture(file, kind)
        if head[4:8] == b"ftyp":
            return _of_mp4(file)
        if head.startswith((b"GIF87a", b"GIF89a")):
            return _of_gif(file)
        if head.lstrip().startswith(b"{"):
            return _limited(file.read(RECORD_BYTES_MAX + 1))
    raise ValueError("neither PNG, JPEG, WebP, GIF, MP4 nor a receipt")


def _of_picture(file: BinaryIO, kind: str) -> bytes | None:
    if kind == "WEBP":
        return _of_webp(file)
    if file.seek(0, 2) > PICTURE_BYTES_MAX:
        raise ValueError(f"larger than {PICTURE_BYTES_MAX >> 20} MiB, so not a picture of safelight")
    file.seek(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with Image.open(file, formats=(kind,)) as image:
            if kind == "PNG":
                # `info` has the chunks before the pixels, where we write; other programs move them behind.
                found = image.info.get(PNG_KEY) or getattr(image, "text", {}).get(PNG_KEY)
                return _limited(found.encode()) if isinstance(found, str) else None
            return _in_exif(image.getexif())


def _of_webp(file: BinaryIO) -> bytes | None:
    """Return the record in the Exif; chunks are walked over, since Pillow would read all of a clip for it."""
    if file.read(12)[8:] != b"WEBP":
        raise ValueError("a RIFF file, but no WebP")
    for _ in range(BOXES_MAX):
        head = file.read(8)
        if len(head) < 8:
            return None
        (length,) = struct.unpack_from("<I", head, 4)
        if head.startswith(b"EXIF"):
            exif = Image.Exif()
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                exif.load(_limited(file.read(min(length, RECORD_BYTES_MAX + 1))))
                return _in_exif(exif)
        file.seek(length + length % 2, 1)
    raise ValueError("too many chunks")


def _in_exif(exif: Image.Exif) -> bytes | None:
    note = exif.get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.MakerNote)
    if not isinstance(note, bytes) or not note.startswith(MAKER):
        return None
    return _limited(note.removeprefix(MAKER))


def _of_mp4(file: BinaryIO) -> bytes | None:
    found = mp4_box(file, *MP4_COMMENT)
    if found is None:
        return None
    # Four bytes of type and four of language come before the text.
    text = found[8:]
    return text if text.lstrip().startswith(b"{") else None


def _of_gif(file: BinaryIO) -> bytes | None:
    """Return the last comment that holds a record; blocks are walked over, since no index says where they are."""
    found = None
    header = file.read(13)
    file.seek(_palette_bytes(header[10]), 1)
    while (kind := file.read(1)) != b";":
        if kind == b",":
            image = file.read(9)
            file.seek(_palette_bytes(image[8]) + 1, 1)  # and the byte that the pixels begin with
            _blocks(file, keep=False)
        elif kind == b"!":
            is_comment = kind + file.read(1) == GIF_COMMENT
            text = _blocks(file, keep=is_comment)
            found = text if text.startswith(b"{") else found
        else:
            raise ValueError("its blocks do not follow each other: the file is damaged or incomplete")
    return found


def _palette_bytes(flags: int) -> int:
    return 3 << (flags % 8 + 1) if flags & 0x80 else 0


def _blocks(file: BinaryIO, *, keep: bool) -> bytes:
    """Return the bytes of a chain of blocks, each after its length, up to the empty one; b"" unless they are kept."""
    text = bytearray()
    while length := file.read(1)[0]:
        block = file.read(length)
        if keep:
            text += block
            if len(text) > RECORD_BYTES_MAX:
                raise ValueError(f"its comment is larger than {RECORD_BYTES_MAX >> 20} MiB")
    return bytes(text)


def _limited(text: bytes) -> bytes:
    if len(text) > RECORD_BYTES_MAX:
        raise ValueError(f"its record is larger than {RECORD_BYTES_MAX >> 20} MiB")
    return text


def mp4_box(file: BinaryIO, *path: bytes) -> bytes | None:
    """Return the content of the first box at `path` of an MP4, such as (b"moov", b"mvhd"); None where there is none.

    Raises:
        ValueError: the boxes do not fit into each other, there are too many of them, or this one is too large.
    """
    start, end = 0, file.seek(0, 2)
    left = BOXES_MAX
    for name in path:
        for kind, inner_start, inner_end in _boxes(file, start, end):
            left -= 1
            if not left:
                raise ValueError("too many boxes")
            if kind == name:
                # `meta` has four bytes of version and flags before its boxes (ISO 14496-12, 8.11.1).
                start, end = inner_start + (4 if name == b"meta" else 0), inner_end
                break
        else:
            return None
    if end - start > RECORD_BYTES_MAX:
        raise ValueError(f"its {path[-1].decode('latin-1')} is larger than {RECORD_BYTES_MAX >> 20} MiB")
    file.seek(start)
    return file.read(max(0, end - start))


def _boxes(file: BinaryIO, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Yield the name and the extent of the content of each box between two offsets (ISO 14496-12, 4.2)."""
    while end - start >= 8:
        file.seek(start)
        size, name = struct.unpack(">I4s", file.read(8))
        header = 8
        if size == 1:
            size, header = struct.unpack(">Q", file.read(8))[0], 16
        elif size == 0:
            size = end - start
        if not header <= size <= end - start:
            raise ValueError(f"a box at byte {start} does not fit: the file is damaged or incomplete")
        yield name, start + header, start + size
        start += size


def _parse(text: bytes, path: Path) -> Embedded:
    try:
        return Embedded.model_validate_json(text)
    except ValidationError as error:
        faults = [f"{'.'.join(str(part) for part in fault['loc'])}: {fault['msg']}" for fault in error.errors()]
        if any(fault["loc"] == ("v",) for fault in error.errors()):
            raise _refusal(path, "was written by another version of safelight", "Update safelight.") from error
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise _refusal(path, f"its record is not a job of safelight ({'; '.join(faults[:3])}{more})") from error


def _first_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).splitlines() or [type(error).__name__])[0]


def _refusal(path: Path, problem: str, remedy: str = "") -> InvalidJob:
    return InvalidJob([Fault(str(path), problem, remedy)])
