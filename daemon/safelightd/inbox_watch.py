"""Hints that something happened in the inbox, and who has opened and closed its files: watchdog's events.

They may be late, doubled or lost; scans are the truth.
"""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from watchdog.events import (
    DirCreatedEvent,
    DirDeletedEvent,
    DirMovedEvent,
    FileClosedEvent,
    FileClosedNoWriteEvent,
    FileCreatedEvent,
    FileDeletedEvent,
    FileModifiedEvent,
    FileMovedEvent,
    FileOpenedEvent,
    FileSystemEvent,
    FileSystemEventHandler,
)
from watchdog.observers.api import ObservedWatch
from watchdog.observers.inotify import InotifyObserver

from safelightd.closes import Closes
from safelightd.logs import Log

WATCHES_MAX = 64
"""Folders of the inbox that are watched: each costs a thread. Those beyond are found by scanning."""

REMOTE = {
    0x6969: "NFS", 0x517B: "SMB", 0xFE534D42: "SMB2", 0xFF534D42: "CIFS", 0x65735546: "FUSE", 0x01021997: "9P",
    0x00C36400: "Ceph", 0x5346414F: "AFS", 0x786F4256: "VirtualBox",
}  # fmt: skip
"""statfs(2) f_type of file systems that others write without our kernel's knowing: no events come from there."""

_TELLING: list[type[FileSystemEvent]] = [
    FileClosedEvent, FileCreatedEvent, FileMovedEvent, DirCreatedEvent, DirMovedEvent, DirDeletedEvent,
]  # fmt: skip
"""A file moved in is only ever moved, never closed."""

_QUIET: list[type[FileSystemEvent]] = [
    FileOpenedEvent, FileModifiedEvent, FileClosedNoWriteEvent, FileDeletedEvent,
]  # fmt: skip
"""Evidence, and no hints: our own reading makes them too."""

_libc = ctypes.CDLL(None, use_errno=True)
log = Log("safelight.inbox")

# It calls the end of a watch an error; an overflow, its only warning, loses hints and no files.
logging.getLogger("watchdog").setLevel(logging.CRITICAL)


def remote_name(folder: Path) -> str | None:
    """Return what kind of remote file system holds the folder, None for a local one.

    Raises:
        OSError: there is no such folder.
    """
    answer = ctypes.create_string_buffer(512)  # struct statfs has 120 bytes and starts with f_type, a long
    if _libc.statfs(os.fsencode(folder), answer):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(folder))
    return REMOTE.get(ctypes.c_long.from_buffer(answer).value & 0xFFFFFFFF)


class Watch:
    """Watches the folders it is told to and calls `hint` when something happens in one, from a thread of its own.

    The inbox itself is not watched recursively: accepted/ grows for ever, and our own renames would wake us. The
    threads end with the process; to stop them takes up to 0.5 s, for which watchdog holds moves back.
    """

    def __init__(self, inbox: Path, hint: Callable[[], None], closes: Closes) -> None:
        self._inbox = inbox
        self._hint = hint
        self._closes = closes
        self._watched: dict[Path, tuple[ObservedWatch, tuple[int, int]]] = {}
        self._observer = InotifyObserver(generate_full_events=True)  # else a file moved in looks like one begun
        self._observer.start()
        self._refused = False
        self._complete = False

    def follow(self, folders: Iterable[str]) -> bool:
        """Watch the inbox, its parent and these folders of it, in place of those before.

        A folder that was made again under its old name is another one and is watched anew.

        Returns:
            True when a folder is watched that was not before: what came into it until now gave no hint.
        """
        wanted = [self._inbox.parent, self._inbox, *(self._inbox / name for name in sorted(folders))]
        now = {folder: identity for folder in wanted[:WATCHES_MAX] if (identity := _identity(folder))}
        for folder, (watch, identity) in list(self._watched.items()):
            if now.get(folder) != identity:
                self._observer.unschedule(watch)
                del self._watched[folder]
                if folder != self._inbox.parent:
                    self._closes.gone_below("" if folder == self._inbox else folder.name)
        added = [folder for folder in now if folder not in self._watched and self._watch(folder, now[folder])]
        self._complete = len(self._watched) == len(wanted)
        return bool(added)

    @property
    def complete(self) -> bool:
        """Whether everything that should be watched is."""
        return self._complete

    def _watch(self, folder: Path, identity: tuple[int, int]) -> bool:
        recursive = self._inbox in folder.parents
        try:
            # resolved: watchdog would watch a link itself, and an inbox may be one, to a larger disk
            real = folder.resolve()
            if folder == self._inbox.parent:
                handler: FileSystemEventHandler = _Handler(self._hint, self._inbox.name)
                telling = _TELLING
            else:
                handler = _Files(self._hint, self._closes, real, folder.name if recursive else "")
                telling = [*_TELLING, *_QUIET]
            watch = self._observer.schedule(handler, str(real), recursive=recursive, event_filter=telling)
        except OSError as error:  # fs.inotify.max_user_watches or max_user_instances is reached, or it went away
            if not self._refused:
                log.warning("inbox.unwatched", folder=folder, error=error, instead="a scan every few seconds")
            self._refused = True
            return False
        self._watched[folder] = watch, identity
        return True


class _Handler(FileSystemEventHandler):
    """Passes events about one name on as hints."""

    def __init__(self, hint: Callable[[], None], only: str) -> None:
        self._hint = hint
        self._only = only

    def on_any_event(self, event: FileSystemEvent) -> None:
        if self._only in (_name(event.src_path), _name(event.dest_path)):
            self._hint()


class _Files(FileSystemEventHandler):
    """Notes what happens to the files of a folder of the inbox, and passes on as hints what may be news.

    Args:
        real: the folder, without links.
        within: its path in the inbox; "" for the inbox itself.
    """

    def __init__(self, hint: Callable[[], None], closes: Closes, real: Path, within: str) -> None:
        self._hint = hint
        self._closes = closes
        self._real = real
        self._prefix = f"{within}/" if within else ""

    def on_any_event(self, event: FileSystemEvent) -> None:
        if not event.is_directory:
            self._note(event)
        left = isinstance(event, FileMovedEvent) and not event.dest_path  # our own claims do
        if not left and not isinstance(event, tuple(_QUIET)):
            self._hint()

    def _note(self, event: FileSystemEvent) -> None:
        source, target = Path(os.fsdecode(event.src_path)), Path(os.fsdecode(event.dest_path))
        if isinstance(event, FileMovedEvent) and event.dest_path:
            before = self._path(source) if event.src_path else None
            self._closes.moved(before, self._path(target), target, itself=not event.is_synthetic)
        elif isinstance(event, FileOpenedEvent):
            self._closes.opened(self._path(source))
        elif isinstance(event, FileModifiedEvent):
            self._closes.written(self._path(source))
        elif isinstance(event, FileClosedEvent | FileClosedNoWriteEvent):
            self._closes.closed(self._path(source), source, written=isinstance(event, FileClosedEvent))
        else:
            self._closes.gone(self._path(source))  # created, deleted, moved away

    def _path(self, file: Path) -> str:
        """Return the path in the inbox."""
        return f"{self._prefix}{file.relative_to(self._real)}"


def _name(path: bytes | str) -> str:
    return os.fsdecode(path).rpartition("/")[2]


def _identity(folder: Path) -> tuple[int, int] | None:
    try:
        status = folder.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino
