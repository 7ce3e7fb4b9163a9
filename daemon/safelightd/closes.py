"""What was seen of programs that open and close the files of the inbox: evidence where the kernel grants no lease."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from safelight.drops import Seen
from safelight.inbox import Identity, identity_of


class Glimpse(NamedTuple):
    """What was known of one file at one moment."""

    is_open: bool
    whole: Identity | None
    """What the file was when it was closed last, or renamed into place."""

    def seen(self, identity: Identity) -> Seen:
        """Return what is known of the file as it is now: a close counts only where nothing was written after it."""
        if self.is_open:
            return "open"
        return "closed" if self.whole == identity else "unseen"


UNSEEN = Glimpse(is_open=False, whole=None)
"""Of a file of which nothing is known: it was there before the watch, or lies where no events come from."""


MOVED_ON: Identity = (0, 0, 0)
"""Of a file that was closed, and had another name when we looked; no file has the inode 0."""


class Closes:
    """Counts who has which file open, by what one thread tells it; asked from another.

    The count may err: like events in a row are told as one, and an overflow of the kernel's queue loses some. So a
    write that no close has followed counts by itself, and so does a content that is not the one that was closed. A
    close that was lost leaves its file open here, which drops.OPEN_S bounds.
    """

    def __init__(self) -> None:
        self._opens: dict[str, int] = {}
        self._written: set[str] = set()
        self._whole: dict[str, Identity] = {}

    def __len__(self) -> int:
        return len(self._opens.keys() | self._written | self._whole.keys())

    def glimpse(self, path: str) -> Glimpse:
        """Return what is known of a file; ask before you open it, for that is seen too."""
        return Glimpse(path in self._written or self._opens.get(path, 0) > 0, self._whole.get(path))

    def opened(self, path: str) -> None:
        self._opens[path] = self._opens.get(path, 0) + 1

    def written(self, path: str) -> None:
        self._written.add(path)

    def closed(self, path: str, file: Path, *, written: bool) -> None:
        """Note a close of `path`, which lies at `file`; `written` where it had been open for writing."""
        left = self._opens.pop(path, 0) - 1
        if left > 0:
            self._opens[path] = left
        if written:
            self._written.discard(path)
            self._note_whole(path, file)

    def moved(self, source: str | None, path: str, file: Path, *, itself: bool) -> None:
        """Note a rename into place: the convention for files that are whole, unless somebody still has it open.

        Args:
            source: its path before, where that was watched. Then it must have been seen closed there.
            file: where it lies now.
            itself: False where it is a folder around the file that was renamed, which says nothing of the file.
        """
        opens, written, whole = 0, False, None
        if source:
            opens, written, whole = self._opens.get(source, 0), source in self._written, self._whole.get(source)
            self.gone(source)
        self.gone(path)
        if opens:
            self._opens[path] = opens
        if written:
            self._written.add(path)
        if itself and (whole or not source):
            self._note_whole(path, file)
        elif whole:
            self._whole[path] = whole

    def gone(self, path: str) -> None:
        """Forget a file that is gone, or another file's path before it is a new one's."""
        self._opens.pop(path, None)
        self._written.discard(path)
        self._whole.pop(path, None)

    def gone_below(self, folder: str) -> None:
        """Forget every file below a folder that is watched no more; "" is the inbox itself, without its folders."""
        # a copy first, made in one step: the other thread goes on
        for path in {*self._opens, *self._written, *self._whole}:
            if path.startswith(f"{folder}/") if folder else "/" not in path:
                self.gone(path)

    def _note_whole(self, path: str, file: Path) -> None:
        try:
            self._whole[path] = identity_of(os.lstat(file))
        except OSError:
            self._whole[path] = MOVED_ON  # its next name has events of its own
