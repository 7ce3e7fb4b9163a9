"""Folders that one process writes to at a time."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safelight.errors import SafelightError


class AlreadyClaimed(SafelightError):
    """Another process has the folder."""


@contextmanager
def claimed(folder: Path, doing: str) -> Iterator[None]:
    """Have a folder, made where it is missing, that no other process has claimed; the kernel ends a dead one's claim.

    Raises:
        AlreadyClaimed: another process has it; `doing` says what it does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if not _is_locked(descriptor, folder):
            raise AlreadyClaimed(f"{folder}: another process is {doing} this. Wait for it.")
        yield
    finally:
        os.close(descriptor)


def _is_locked(descriptor: int, folder: Path) -> bool:
    """Whether the folder is this process's now: locked, and still under its name, which the last owner may change."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.fstat(descriptor).st_ino == folder.stat().st_ino
    except (BlockingIOError, FileNotFoundError):
        return False
