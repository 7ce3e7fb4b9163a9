"""What an output holds, be it a file or the folder of a clip's frames: its digest, its size, and copies of it."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from safelight import durable


def digest(path: Path) -> str:
    """Return the sha256 of a file; of a folder, what `sha256sum * | sha256sum` says inside it.

    Raises:
        OSError: it cannot be read.
    """
    if not path.is_dir():
        return _of_file(path)
    lines = (f"{_of_file(file)}  {file.name}\n".encode() for file in _files(path))
    return _of_parts(lines)


def size_bytes(path: Path) -> int:
    """Return the bytes of a file, or of all files of a folder."""
    return sum(file.stat().st_size for file in (_files(path) if path.is_dir() else [path]))


def is_there_as(path: Path, sha256: str, size: int) -> bool:
    """Whether `path` itself, and no link to it, holds what has this digest and size, and nothing else."""
    try:
        kind = path.lstat().st_mode
        whole = stat.S_ISREG(kind) or (stat.S_ISDIR(kind) and all(map(_is_plain, _all(path))))
        return whole and size_bytes(path) == size and digest(path) == sha256
    except FileNotFoundError:
        return False


def copy(source: Path, target: Path) -> None:
    """Copy a file or a folder of files to `target`, which is not there; its bytes are on the disk when this returns.

    Raises:
        OSError: it cannot be; what was written of it is for the caller to remove.
    """
    if not source.is_dir():
        shutil.copyfile(source, target)
    else:
        target.mkdir()
        for file in filter(Path.is_file, _files(source)):
            shutil.copyfile(file, target / file.name)
    sync(target)


def sync(path: Path) -> None:
    """Force a file, or a folder with all its files, to the disk."""
    if path.is_dir():
        durable.sync_filesystem(path)
    else:
        durable.sync_file(path)


def remove(path: Path) -> None:
    """Remove a file or a folder; nothing happens when neither is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_copied(source: Path, kept: Path) -> None:
    """Remove a file that `kept` is a copy of, or from a folder all that `kept` has, and the folder once it is empty.

    What is one file under two names stays, and what somebody has changed since.
    """
    if source.is_file() and kept.is_file() and not source.samefile(kept):
        if _of_file(source) == _of_file(kept):
            source.unlink()
    elif source.is_dir() and kept.is_dir() and not source.samefile(kept):
        for file in filter(Path.is_file, _files(kept)):
            remove_copied(source / file.name, file)
        if not _all(source):
            source.rmdir()


def _is_plain(file: Path) -> bool:
    return stat.S_ISREG(file.lstat().st_mode) and not file.name.startswith(".")


def _all(folder: Path) -> list[Path]:
    return sorted(folder / name for name in os.listdir(folder))


def _files(folder: Path) -> Iterator[Path]:
    """Yield the files of a folder in the order of their names, as a shell's * does: without what starts with a dot."""
    yield from (file for file in _all(folder) if not file.name.startswith("."))


def _of_file(path: Path) -> str:
    if path.is_dir():
        return "folder"  # in a folder of frames, somebody else's
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _of_parts(parts: Iterator[bytes]) -> str:
    whole = hashlib.sha256()
    for part in parts:
        whole.update(part)
    return whole.hexdigest()
