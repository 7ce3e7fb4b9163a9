"""Files that are whole or absent, also after a power cut."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

SYNC_ONE_BY_ONE_MAX = 8
"""Above this many files one syncfs(2) is cheaper than an fsync(2) each: 2,000 files of 1.2 KB took 1.07 s one by one
and 0.23 s together (ext4 on a virtual disk, 2 cores, 2026-11-22)."""

PASSING = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ENOTCONN, errno.ESTALE})
"""What a full or broken disk says: no reason never to try again."""

_libc = ctypes.CDLL(None, use_errno=True)


def write(path: Path, content: bytes) -> None:
    """Put `content` under `path` so that a crash at any moment leaves the old file or the new one, whole."""
    write_all([(path, content)])


def write_all(files: Iterable[tuple[Path, bytes]]) -> None:
    """Put many files of one file system in place, synced together: all are durable when this returns.

    Each is whole or absent at any moment; a crash midway leaves some old and some new.
    """
    staged: list[tuple[Path, Path]] = []
    try:
        for path, content in files:
            staged.append((_stage(path, content), path))
        if not staged:
            return
        _sync([unfinished for unfinished, _ in staged])
        for unfinished, path in staged:
            unfinished.replace(path)
    except OSError:
        for unfinished, _ in staged:
            unfinished.unlink(missing_ok=True)
        raise
    for folder in {path.parent for _, path in staged}:
        sync_folder(folder)


def create_all(files: Iterable[tuple[Path, bytes]]) -> None:
    """Put many new files in place as `write_all` does; where that fails, none of them is there that was not before."""
    made: list[Path] = []

    def noted() -> Iterator[tuple[Path, bytes]]:
        for path, content in files:
            if not path.exists():
                made.append(path)
            yield path, content

    try:
        write_all(noted())
    except OSError:
        _take_back(made)
        raise


def _take_back(made: Sequence[Path]) -> None:
    """Remove files as well as a disk that failed just now lets us; what it said first is what matters."""
    for path in made:
        with suppress(OSError):
            path.unlink(missing_ok=True)
    for folder in {path.parent for path in made}:
        with suppress(OSError):
            sync_folder(folder)


@contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """Have a file to write piece by piece, under another name; whole, durable and `path` when the block ends well.

    Where it does not, what was there before stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = _unfinished(path)
    try:
        with unfinished.open("wb") as stream:
            yield stream
        sync_file(unfinished)
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def _unfinished(path: Path) -> Path:
    """Return the name that a file has until it is whole; it starts with a dot, so that no scan takes it for the file
    itself."""
    return path.with_name(f".{path.name}.{os.getpid()}.part")


def _stage(path: Path, content: bytes) -> Path:
    """Write beside the final name."""
    unfinished = _unfinished(path)
    try:
        try:
            unfinished.write_bytes(content)
        except FileNotFoundError:
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished.write_bytes(content)
    except OSError:
        unfinished.unlink(missing_ok=True)
        raise
    return unfinished


def sweep(folder: Path) -> list[Path]:
    """Remove what processes that were killed in the middle of a write left in a folder, and return it."""
    left = [file for file in folder.glob(".*.part") if _is_orphan(file.name)]
    for file in left:
        file.unlink(missing_ok=True)
    return left


def _is_orphan(name: str) -> bool:
    """Whether the process whose number is in the name of an unfinished file has ended."""
    number = name.removesuffix(".part").rpartition(".")[2]
    if not number.isdecimal():
        return False
    try:
        os.kill(int(number), 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:
        return False  # it lives, and is somebody else's
    return False


def _sync(files: list[Path]) -> None:
    if len(files) > SYNC_ONE_BY_ONE_MAX:
        sync_filesystem(files[0].parent)
        return
    for file in files:
        sync_file(file)


def sync_file(file: Path) -> None:
    """Force a file's bytes to the disk."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Force a folder's names to the disk: without it a rename can be forgotten by a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_filesystem(folder: Path) -> None:
    """Force everything written to the file system of `folder` to the disk: one commit for a whole group."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if _libc.syncfs(descriptor):
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error), str(folder))
    finally:
        os.close(descriptor)
