"""Input pictures: found below a batch's folder without following a link, checked, and kept by their sha256.

A job names the digest, so that what a person moves or edits tonight does not matter. Knows no jobs.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
import stat
import struct
import zlib
from pathlib import Path, PurePosixPath

from PIL import Image, UnidentifiedImageError

from safelight import durable, pictures
from safelight.errors import Fault, InvalidJob
from safelight.sizes import KeptPicture, Size

SIZE_BYTES_MAX = 64 << 20

PIXELS_MAX = 64_000_000
"""8000 x 8000: 192 MB decoded, far above what a model sees, below what a file can use to fill the memory."""

FORMATS = ("PNG", "JPEG", "WEBP")

_DAMAGED = (
    OSError, SyntaxError, ValueError, EOFError, OverflowError, LookupError, TypeError, struct.error, zlib.error,
)  # fmt: skip
"""What Pillow raises for files that are cut, changed or made to hurt; a test feeds it thousands."""


def resolve(name: str, base: Path, what: str = "picture") -> Path:
    """Return the path of the file that a job file calls `name`: a plain one below `base`, reached by no link.

    Args:
        what: it is, for messages.

    Raises:
        InvalidJob: the name leads elsewhere, or there is no such file.
    """
    _check_name(name, what)
    parts = PurePosixPath(name).parts
    with contextlib.ExitStack() as opened:
        try:
            folder = os.open(base, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            opened.callback(os.close, folder)
            for place, part in enumerate(parts, start=1):
                # With O_PATH and O_NOFOLLOW a link opens as itself, and nothing behind the name is touched.
                folder = os.open(part, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
                opened.callback(os.close, folder)
                _check_kind(name, os.fstat(folder).st_mode, what, last=place == len(parts))
        except OSError as error:
            raise _refused(name, _reason(error), f"Put the {what} beside the job file.") from error
    return base.joinpath(*parts)


def _check_name(name: str, what: str) -> None:
    """Refuse names that mean a place outside the folder, in whatever spelling."""
    lowered = name.lower()
    if not PurePosixPath(name).parts or "\x00" in name or any("\ud800" <= letter <= "\udfff" for letter in name):
        problem = "that is no name of a file"
    elif name.startswith(("/", "~")) or ".." in PurePosixPath(name).parts:
        problem = "it leads out of the folder of the job file"
    elif "://" in name or lowered.startswith(("file:", "data:")):
        problem = "it is an address, and nothing is fetched"
    elif any(code in lowered for code in ("%2e", "%2f", "%5c", "%00")):
        problem = "it has % codes, and none is decoded"
    else:
        return
    raise _refused(repr(name), problem, f"Put the {what} beside the job file and write its name.")


def _check_kind(name: str, mode: int, what: str = "picture", *, last: bool) -> None:
    if stat.S_ISLNK(mode):
        raise _refused(name, "a link leads there, and none is followed", f"Put the {what} itself there.")
    if last and not stat.S_ISREG(mode):
        raise _refused(name, "it is no plain file", f"Name a {what}.")


def store(source: Path, inputs: Path) -> KeptPicture:
    """Keep a copy of the picture at `source` as `inputs/<sha256>`, and return its digest and size.

    It is decoded whole first, also where it is there already: an earlier version may have taken what this one does not.
    It is durable when this returns; of a picture that is there only the time is renewed, so that no pruning takes it
    from the job to come.
    `source` itself must not be a link: resolve one that you trust.

    Raises:
        InvalidJob: it is not one picture in PNG, JPEG or WebP, it is damaged, too large, or has transparency.
        OSError: `inputs` cannot be written.
    """
    content = _read(source)
    size = _check_picture(content, source.name)
    digest = hashlib.sha256(content).hexdigest()
    kept = inputs / digest
    try:
        os.utime(kept)
    except (FileNotFoundError, PermissionError):  # not there, or another member's
        durable.write(kept, content)
    return KeptPicture(digest, size)


def _read(source: Path) -> bytes:
    try:
        descriptor = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            _check_kind(source.name, os.fstat(descriptor).st_mode, last=True)
            content = file.read(SIZE_BYTES_MAX + 1)
    except OSError as error:
        raise _refused(source.name, _reason(error), "Name a picture that can be read.") from error
    if len(content) > SIZE_BYTES_MAX:
        raise _refused(source.name, f"it is larger than {SIZE_BYTES_MAX >> 20} MiB", "Make it smaller.")
    return content


def _check_picture(content: bytes, name: str) -> Size:
    """Decode every pixel of the one picture in `content`, and return its size."""
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as picture:
            width, height = picture.size
            if width * height > PIXELS_MAX:
                raise _too_many_pixels(name, f"{width}x{height}")
            if picture.format in ("PNG", "WEBP") and getattr(picture, "is_animated", False):
                raise _refused(name, "it is an animation", "Save the one frame that is meant.")
            picture.load()
            if refused := pictures.refusal(picture):
                raise _refused(name, *refused)
            return pictures.size(picture)
    except UnidentifiedImageError as error:
        raise _refused(name, "it is no PNG, JPEG or WebP picture", "Save it as one of them.") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_many_pixels(name, "what it claims") from error
    except _DAMAGED as error:
        raise _refused(name, f"it is damaged ({error})", "Save it again.") from error


def _too_many_pixels(name: str, size: str) -> InvalidJob:
    return _refused(name, f"{size} is more than {PIXELS_MAX:,} pixels", "Make it smaller.")


def _refused(name: str, problem: str, remedy: str) -> InvalidJob:
    return InvalidJob([Fault(name, problem, remedy)])


def _reason(error: OSError) -> str:
    if error.errno == errno.ELOOP:
        return "a link leads there, and none is followed"
    return (error.strerror or str(error)).lower()
