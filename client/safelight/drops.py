"""What lies in the inbox: which files there are, what their folders say, and from when each may be taken.

A file may be whole when it has not changed for settle_s; safelight.inbox asks who has it open. Nothing is opened here.
Knows no clock: time is an argument, in seconds of time.monotonic().
"""

from __future__ import annotations

import errno
import math
import os
import re
import stat
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple

from safelight.jobspec import PRIORITIES
from safelight.promptfile import SUFFIXES

PICTURE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp"})

EMPTY_S = 60.0
"""A file of 0 bytes is a placeholder: browsers make one when a download starts. Only after this long is it refused."""

DEPTH_MAX = 8
"""Folders below the inbox that are looked into."""

OWN = frozenset({"accepted", "rejected"})
"""Our own folders in the inbox; .safelight is hidden anyway."""

_IGNORED = re.compile(
    r"\..*|#.*#|.*~|.*\.(?:sw[a-p]|tmp|part|crdownload|filepart)|.*\.sync-conflict-.*"
    r"|4913|Thumbs\.db|desktop\.ini|@eaDir|__MACOSX|lost\+found",
    re.DOTALL,
)
"""What editors, desktops, browsers and synchronisers leave lying about (4913 is vim's trial file)."""

_PARTIAL = re.compile(
    r"(?:(?P<download>.+)\.(?:part|crdownload|filepart)|\.syncthing\.(?P<syncthing>.+)\.tmp|\.(?P<rsync>.+)\.[A-Za-z0-9]{6})",
    re.DOTALL,
)
"""Names that stand for a file still on its way: browsers and wget, Syncthing, rsync (.cat.png.Ab12Cd).

A backup may be called like that, too. Of mkstemp's six characters one name in two hundred has small letters alone, so
the name does not tell: LEFTOVER_S does.
"""

UNSEEN_S = 30.0
"""Default of [inbox] unseen_s. As long as Linux keeps back what a program has written (vm.dirty_expire_centisecs), so
that a writer on another machine is noticed; and many times what a copy pauses."""

OPEN_S = 600.0
"""For a file that was seen opened and not closed. Not for ever: a close may have been overlooked."""

LEFTOVER_S = 600.0
"""For a partial file that does not grow: longer than a copy pauses. Then it was left behind, and nothing waits for it.
From when it was first seen so: times of files are carried over by what copies them, and clocks are set."""

Kind = Literal["text", "picture", "other", "odd"]
"""odd: a link, FIFO, socket or device; other: a regular file that is neither a prompt file nor a picture."""

Seen = Literal["closed", "open", "unseen"]
"""What is known of those who wrote a file: closed after its last change; open still; or nothing."""


# -- what a path says --------------------------------------------------------------------------------------------


class Place(NamedTuple):
    """What the folders of a file say about it."""

    priority: str | None
    batch: str
    area: str
    """The folder that its pictures are looked for in: the batch's, else the priority's, else "" for the inbox."""
    is_batch: bool


def place_of(path: str) -> Place:
    """Return what the path of a file, relative to the inbox, says about its jobs."""
    *folders, name = path.split("/")
    priority = folders[0] if folders and folders[0] in PRIORITIES else None
    inner = folders[1:] if priority else folders
    if inner:
        return Place(priority, inner[0], f"{priority}/{inner[0]}" if priority else inner[0], is_batch=True)
    return Place(priority, stem_of(name), priority or "", is_batch=False)


def area_of(path: str) -> str:
    """Return the folder that the pictures of a file's text are looked for in; see Place.area."""
    return place_of(path).area


def order(path: str) -> tuple[int, str, str]:
    """Return the key by which files are taken: priority, then the path as people count, 2 before 10."""
    priority, inner = place_of(path).priority, path
    if priority:
        inner = path.removeprefix(f"{priority}/")
    counted = re.sub(r"[0-9]+", lambda digits: digits[0].lstrip("0").zfill(20), inner.casefold())
    return PRIORITIES.index(priority or "normal"), counted.replace("/", "\0"), path


def kind_of(name: str) -> Kind:
    """Return what a regular file is, by its suffix."""
    suffix = suffix_of(name).lower()
    return "text" if suffix in SUFFIXES else "picture" if suffix in PICTURE_SUFFIXES else "other"


def is_ignored(name: str) -> bool:
    """Whether a file or folder of this name is none that a person means to drop."""
    return _IGNORED.fullmatch(name) is not None


def stem_of(path: str) -> str:
    """Return the path without its suffix: what a text and the picture of its name have in common."""
    return path.removesuffix(suffix_of(path))


def suffix_of(path: str) -> str:
    """Return the suffix with its dot; "" where there is none."""
    name = path.rpartition("/")[2]
    start, dot, end = name.rpartition(".")
    return dot + end if start and end else ""


# -- looking -----------------------------------------------------------------------------------------------------


class Entry(NamedTuple):
    """One file as a scan found it."""

    path: str
    kind: Kind
    size: int
    mark: int
    """Stands for its inode, size, mtime and ctime: equal marks mean that nothing was written."""
    since: float
    """When it was first seen with this mark."""


class Partial(NamedTuple):
    """A part of a file that is on its way, or was once."""

    path: str
    stands_for: str
    mark: int
    since: float
    """When it was first seen with this mark."""


@dataclass(frozen=True)
class Scan:
    """What lay below a folder."""

    started_at: float
    identity: tuple[int, int]
    """st_dev and st_ino of the folder: another folder of the same name has others."""
    entries: dict[str, Entry]
    arriving: Mapping[str, float]
    """Paths that a partial file stands for, and when that last changed: less than LEFTOVER_S ago."""
    folders: tuple[str, ...]
    """The folders right below."""
    troubles: tuple[tuple[str, str], ...] = ()
    """Folders that were not looked into, and why; and partial files for which nothing waits any more."""
    partials: Mapping[str, Partial] = field(default_factory=dict)
    """Every partial file, by its own path."""

    @cached_property
    def pictures(self) -> dict[str, list[Entry]]:
        """The pictures by stem."""
        found: dict[str, list[Entry]] = {}
        for entry in self.entries.values():
            if entry.kind == "picture":
                found.setdefault(stem_of(entry.path), []).append(entry)
        return found

    def suffixes_beside(self, text: str) -> tuple[str, ...]:
        """Return the suffixes of the pictures that have the name of the text at path `text`."""
        return tuple(suffix_of(picture.path) for picture in self.pictures.get(stem_of(text), ()))


def scan(top: Path, before: Scan | None, clock: Callable[[], float]) -> Scan:
    """Return every file below `top` that is not to be ignored, each with the time since which it has not changed.

    Raises:
        OSError: `top` itself cannot be read.
    """
    walk = _Walk(top, clock())
    last = before if before and before.identity == walk.identity else None
    known = last.entries if last else {}
    entries = {}
    for path, kind, size, mark in walk.files():
        old = known.get(path)
        entries[path] = old if old and old.mark == mark else Entry(path, kind, size, mark, clock())
    partials = {part.path: part for part in (_seen(part, last) for part in walk.partials)}
    arriving: dict[str, float] = {}
    for part in partials.values():
        if walk.started_at - part.since < LEFTOVER_S:
            arriving[part.stands_for] = max(part.since, arriving.get(part.stands_for, part.since))
        elif last and last.started_at - part.since < LEFTOVER_S:
            problem = f"it is a part of {part.stands_for} and has not changed for {LEFTOVER_S / 60:.0f} minutes"
            walk.troubles.append((part.path, f"{problem}: nothing waits for it any more. Remove it"))
    return Scan(walk.started_at, walk.identity, entries, arriving, tuple(walk.folders), tuple(walk.troubles), partials)


def _seen(part: Partial, last: Scan | None) -> Partial:
    """Return the part as it was when it was first seen with its mark."""
    old = last.partials.get(part.path) if last else None
    return old if old and old.mark == part.mark else part


@dataclass
class _Walk:
    """One walk through a folder."""

    top: Path
    started_at: float
    identity: tuple[int, int] = (0, 0)
    partials: list[Partial] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    troubles: list[tuple[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        status = self.top.stat()
        self.identity = status.st_dev, status.st_ino

    def files(self) -> Iterator[tuple[str, Kind, int, int]]:
        waiting = [""]
        while waiting:
            folder = waiting.pop()
            try:
                with os.scandir(self.top / folder) as found:
                    for entry in found:
                        path = f"{folder}/{entry.name}" if folder else entry.name
                        if entry.is_dir(follow_symlinks=False):
                            if self._enters(path, entry):
                                waiting.append(path)
                        elif file := self._file(path, entry):
                            yield file
            except OSError as error:
                if not folder:
                    raise
                if error.errno != errno.ENOENT:  # it went away while we looked
                    self.troubles.append((folder, str(error.strerror)))

    def _enters(self, path: str, entry: os.DirEntry[str]) -> bool:
        if is_ignored(entry.name) or path in OWN:
            return False
        depth = path.count("/")
        if depth == 0:
            self.folders.append(path)
        if depth >= DEPTH_MAX:
            self.troubles.append((path, f"lies more than {DEPTH_MAX} folders deep. Move it up"))
            return False
        return True

    def _file(self, path: str, entry: os.DirEntry[str]) -> tuple[str, Kind, int, int] | None:
        partial = _PARTIAL.fullmatch(entry.name)
        if is_ignored(entry.name) and not partial:
            return None
        try:
            status = entry.stat(follow_symlinks=False)
        except FileNotFoundError:
            return None
        if partial:
            if stat.S_ISREG(status.st_mode):
                stands_for = path[: -len(entry.name)] + str(partial[partial.lastgroup or 0])
                self.partials.append(Partial(path, stands_for, mark_of(status), self.started_at))
            return None
        kind = kind_of(entry.name) if stat.S_ISREG(status.st_mode) else "odd"
        return path, kind, status.st_size, mark_of(status)


def mark_of(status: os.stat_result) -> int:
    """Return what stands for a file as it is now; see Entry.mark."""
    return hash((status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns))


# -- deciding ----------------------------------------------------------------------------------------------------


class Patience(NamedTuple):
    """How long to wait, in seconds."""

    settle_s: float
    """For a file to stay as it is."""
    partner_s: float
    """For the text of a picture, the picture of a text, and the rest of a batch."""
    unseen_s: float = UNSEEN_S
    """For a file to stay as it is where neither the kernel nor an event says that nobody writes it any more."""

    def still_s(self, seen: Seen) -> float:
        """Return for how long a file that the kernel does not vouch for must not have changed."""
        if seen == "closed":
            return self.settle_s
        return max(self.settle_s, self.unseen_s if seen == "unseen" else OPEN_S)


def due(
    scan: Scan, patience: Patience, used: Mapping[str, int], stuck: Container[str], claimed: Iterable[str] = ()
) -> Iterator[tuple[float, Entry]]:
    """Yield every file with the moment from which it may be taken; infinite where it waits for another file.

    A text waits for the picture of its name. A text of a batch folder waits until everything in that folder has
    settled, so that the batch keeps the order of its names however it was copied, but no longer than partner_s. A
    picture waits while a text that may name it is on its way or claimed; then it may go at once where it was used, and
    after partner_s where it was not.

    Args:
        used: pictures that jobs have been made with, and their marks then.
        stuck: texts that cannot be taken; nothing waits for them.
        claimed: where files lay that were claimed and have not become jobs yet.
    """
    comes = _Coming.of(scan, stuck, claimed)
    for entry in scan.entries.values():
        settled_at = _settled_at(entry, patience)
        if entry.path in scan.arriving:
            yield scan.arriving[entry.path] + LEFTOVER_S, entry
        elif entry.kind == "text":
            partners_at = max(comes.picture_settled_at(entry, patience), comes.batch_settled_at(entry, patience))
            yield max(settled_at, partners_at), entry
        elif entry.kind == "picture":
            alone_at = entry.since if used.get(entry.path) == entry.mark else entry.since + patience.partner_s
            yield max(settled_at, alone_at, comes.texts_until(entry, patience)), entry
        else:
            yield settled_at, entry


def _settled_at(entry: Entry, patience: Patience) -> float:
    return entry.since + (EMPTY_S if entry.size == 0 and entry.kind != "odd" else patience.settle_s)


@dataclass(frozen=True)
class _Coming:
    """What the files of one scan have to wait for."""

    pictures: Mapping[str, list[Entry]]
    parts: Mapping[tuple[str, Kind], float]
    """When the part of a file of this stem and kind changed last."""
    text_parts: Mapping[str, float]
    """Likewise of any text of an area."""
    text_areas: set[str]
    changed_at: dict[str, float]
    """When the last file of each area changed; infinite while one is partly there."""

    @classmethod
    def of(cls, scan: Scan, stuck: Container[str], claimed: Iterable[str]) -> _Coming:
        changed_at: dict[str, float] = {}
        text_areas = {area_of(path) for path in claimed if kind_of(path) == "text"}
        for entry in scan.entries.values():
            area = area_of(entry.path)
            changed_at[area] = max(changed_at.get(area, 0.0), entry.since)
            if entry.kind == "text" and entry.path not in stuck:
                text_areas.add(area)
        changed_at.update((area_of(path), math.inf) for path in scan.arriving)
        parts: dict[tuple[str, Kind], float] = {}
        text_parts: dict[str, float] = {}
        for path, since in scan.arriving.items():
            stem, kind, area = stem_of(path), kind_of(path), area_of(path)
            parts[stem, kind] = max(since, parts.get((stem, kind), since))
            if kind == "text":
                text_parts[area] = max(since, text_parts.get(area, since))
        return cls(scan.pictures, parts, text_parts, text_areas, changed_at)

    def picture_settled_at(self, text: Entry, patience: Patience) -> float:
        stem = stem_of(text.path)
        if (stem, "picture") in self.parts:
            return self.parts[stem, "picture"] + LEFTOVER_S
        return max((_settled_at(picture, patience) for picture in self.pictures.get(stem, ())), default=0.0)

    def batch_settled_at(self, text: Entry, patience: Patience) -> float:
        place = place_of(text.path)
        if not place.is_batch:
            return 0.0
        return min(self.changed_at[place.area] + patience.settle_s, text.since + patience.partner_s)

    def texts_until(self, picture: Entry, patience: Patience) -> float:
        """Return until when the picture waits for texts in its area or in one around it: they may name it.

        For one that is partly there, partner_s from when the part last grew; for that of its own name, longer.
        """
        area = area_of(picture.path)
        areas = ("", area.partition("/")[0], area)
        if any(around in self.text_areas for around in areas):
            return math.inf
        untils = [self.text_parts[around] + patience.partner_s for around in areas if around in self.text_parts]
        own: tuple[str, Kind] = (stem_of(picture.path), "text")
        if own in self.parts:
            untils.append(self.parts[own] + LEFTOVER_S)
        return max(untils, default=0.0)
