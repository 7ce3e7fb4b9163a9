"""What the pictures in the inbox are to the texts of one process: waited for, copied, used, done with.

What matters is on disk; what is remembered here only spares work and time.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from safelight import drops, inbox, pairing
from safelight.draft import Draft
from safelight.drops import Entry, Patience, Scan
from safelight.models import Models
from safelight.paths import Paths
from safelight.sizes import KeptPicture
from safelightd.writers import Writers


class Wait(NamedTuple):
    """What a text waits for."""

    until: float
    missing: tuple[Sequence[str], ...] = ()
    """It may go sooner once each of these pictures is there, at one of its paths."""

    def is_over(self, scan: Scan) -> bool:
        came = self.missing and all(any(path in scan.entries for path in paths) for paths in self.missing)
        return bool(came) or self.until <= scan.started_at


class Used(NamedTuple):
    """A picture that jobs were made with."""

    mark: int
    submission: str
    """Of the text that used it last."""


class Stored(NamedTuple):
    """A picture that was copied this turn: ten thousand texts may name it."""

    mark: int
    kept: KeptPicture


class Pictures:
    """The pictures of one inbox."""

    def __init__(self, paths: Paths, models: Models, patience: Patience, writers: Writers) -> None:
        self._paths = paths
        self._models = models
        self._patience = patience
        self._writers = writers
        self._whole: dict[str, bool] = {}
        self._used: dict[str, Used] = {}
        self._stored: dict[str, Stored] = {}

    @property
    def used_marks(self) -> dict[str, int]:
        """The marks of pictures when jobs were made with them, by path."""
        return {path: used.mark for path, used in self._used.items()}

    def forget(self, scan: Scan) -> None:
        """Drop what is not in the inbox any more."""
        self._used = {path: used for path, used in self._used.items() if path in scan.entries}
        self._stored.clear()
        self._whole.clear()

    def wait_for(self, text: Entry, drafts: Sequence[Draft], scan: Scan) -> Wait | None:
        """Return how long a text must wait for pictures it needs: they are arriving, or may yet come."""
        soon = scan.started_at + max(self._patience.settle_s, 1.0)
        missing = []
        for name in pairing.pictures_named(drafts):
            paths = pairing.picture_paths(text.path, name)
            found = next((scan.entries[path] for path in paths if path in scan.entries), None)
            if found and found.since + self._patience.settle_s > scan.started_at:
                return Wait(found.since + self._patience.settle_s)
            if found and not self._is_whole(found, scan):
                return Wait(soon)
            if not found and any(path in scan.arriving for path in paths):
                return Wait(soon)
            if not found and paths and not any(os.path.lexists(self._paths.inbox / path) for path in paths):
                missing.append(paths)
        stem = drops.stem_of(text.path)
        if not all(self._is_whole(picture, scan) for picture in scan.pictures.get(stem, ())):
            return Wait(soon)
        if stem not in scan.pictures and any(self._needs_picture(draft) for draft in drafts):
            missing.append([stem + suffix for suffix in drops.PICTURE_SUFFIXES])
        until = text.since + self._patience.partner_s
        return Wait(until, tuple(missing)) if missing and until > scan.started_at else None

    def _is_whole(self, picture: Entry, scan: Scan) -> bool:
        """Whether nobody writes a picture any more; asked once a turn. What cannot be opened is refused by its text."""
        if picture.path not in self._whole:
            try:
                self._whole[picture.path] = picture.kind == "odd" or self._writers.is_whole(picture, scan.started_at)
            except OSError:
                self._whole[picture.path] = True
        return self._whole[picture.path]

    def _needs_picture(self, draft: Draft) -> bool:
        model = draft.fields.get("model")
        self._models = self._models.current()
        return not pairing.names_image(draft) and model in self._models and self._models[str(model)].image == "required"

    def store(self, text: str, name: str) -> tuple[str, KeptPicture]:
        """Copy a picture that the text at path `text` names to the inputs; return its path in the inbox, and the copy.

        Raises:
            InvalidJob: it is not there, or cannot be used.
            OSError: the copy cannot be written.
        """
        path = pairing.find_picture(self._paths, text, name)
        mark = drops.mark_of(os.lstat(self._paths.inbox / path))
        if path not in self._stored or self._stored[path].mark != mark:
            self._stored[path] = Stored(mark, pairing.store_picture(self._paths, path))
        return path, self._stored[path].kept

    def note_used(self, stored: Iterable[str], submission: str) -> None:
        """Remember that jobs were made with pictures that were just stored."""
        for path in stored:
            self._used[path] = Used(self._stored[path].mark, submission)

    def file_used(self, picture: Entry) -> bool:
        """Move a picture that jobs were made with to accepted/; False when none were.

        Raises:
            OSError: it cannot be read or moved.
        """
        used = self._used.get(picture.path)
        if used and used.mark == picture.mark:
            inbox.file_picture(self._paths, picture, used.submission)
            return True
        if pairing.was_used(self._paths, picture.path):  # by a process before this one
            inbox.file_picture(self._paths, picture, inbox.new_submission())
            return True
        return False
