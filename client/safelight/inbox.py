"""The inbox's protocol, over folders: reading, claiming, accepting, rejecting.

    inbox/cat.md                                    dropped by a person: a batch of its own, named `cat`
    inbox/summer/cat.md                             of batch `summer`
    inbox/night/summer/cat.md                       the same, with priority `night`
    inbox/.safelight/claimed/<submission>~<path>    taken: its id is born in the name, and the rename makes it ours
    inbox/accepted/<date>/<submission>~<name>       its jobs are queued; .ticket.json beside it names them
    inbox/rejected/<submission>~<name>              it was refused; .error.txt beside it says why

Every step can be done again after a crash: what lies in claimed/ says by its name what it is. Links, FIFOs, sockets
and devices are never opened. Knows no queue. safelight.drops says which files there are and when they may be taken.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import signal
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, NamedTuple

from safelight import durable, ids
from safelight.drops import Entry, Kind, mark_of, place_of, stem_of, suffix_of
from safelight.errors import BadConfig, Fault, SafelightError
from safelight.jobspec import JobSpec, is_folder_name
from safelight.lora import SUFFIX as LORA_SUFFIX
from safelight.paths import Paths
from safelight.promptfile import SUFFIXES, TABLE_BYTES_MAX

NAME_BYTES_MAX = 255
"""NAME_MAX, limits.h; no file system of Linux that holds an inbox allows more."""

NOTE_BYTES = 40
"""Kept free in the name of a filed file: for `.ticket.json`, and for what durable.write adds while it writes that."""


# -- the folders -------------------------------------------------------------------------------------------------


def prepare(paths: Paths) -> None:
    """Make the folders and prove by real renames that files can be claimed and filed.

    Raises:
        BadConfig: a folder cannot be made, or a rename between them fails (they lie on different mounts).
        SafelightError: the disk is full or broken just now; a restart may help.
    """
    proof = paths.inbox / ".proof"  # always the same, so that one left by a crash is gone after the next start
    try:
        for folder in (paths.inbox, paths.claimed, paths.accepted, paths.rejected):
            folder.mkdir(parents=True, exist_ok=True)
        proof.touch()
        for folder in (paths.claimed, paths.accepted, paths.rejected):
            proof = proof.rename(folder / proof.name)
        proof.unlink()
        for folder in (paths.rejected, *sorted(paths.accepted.iterdir())[-2:]):
            for unfinished in folder.glob(".*.part"):  # notes that a crash cut short; they are written anew
                unfinished.unlink()
    except OSError as error:
        if error.errno in durable.PASSING:
            raise SafelightError(f"{paths.inbox}: {error}. Free some space, or mend the disk.") from error
        raise BadConfig(
            f"{error.filename}: files cannot be taken from the inbox ({error.strerror}). {paths.inbox} and accepted/, "
            "rejected/ and .safelight/ in it must lie on one file system and be writable for safelight: change their "
            "owner or mode, or set [paths] inbox."
        ) from error


# -- reading -----------------------------------------------------------------------------------------------------


Identity = tuple[int, int, int]
"""Inode, size, mtime: equal ones mean the same content. Without the ctime, which chmod and rename change."""


class Reading(NamedTuple):
    """A file's content, and what must still be true of the file once it is claimed."""

    content: bytes
    identity: Identity

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()


def read(top: Path, entry: Entry, is_still: Callable[[Identity], bool], *, leases: bool = True) -> Reading | None:
    """Return the content of a regular file, cut behind the longest that a prompt file may be.

    None while somebody writes it, or when it is no longer what the scan saw.

    Args:
        is_still: whether it has not changed for long enough; asked where the kernel does not say who writes it.
        leases: False where others write without our kernel's knowing: its word is no proof there.

    Raises:
        OSError: it cannot be read.
    """
    with _whole(top, entry, is_still, leases=leases) as whole:
        if whole is None:
            return None
        file, identity = whole
        with open(file, "rb", closefd=False) as stream:
            return Reading(stream.read(TABLE_BYTES_MAX + 1), identity)


def is_whole(top: Path, entry: Entry, is_still: Callable[[Identity], bool], *, leases: bool = True) -> bool:
    """Whether `read` would return the content.

    Raises:
        OSError: it cannot be read.
    """
    with _whole(top, entry, is_still, leases=leases) as whole:
        return whole is not None


@contextmanager
def _whole(
    top: Path, entry: Entry, is_still: Callable[[Identity], bool], *, leases: bool
) -> Iterator[tuple[int, Identity] | None]:
    """Open a file, and say what it was when it was whole; None when it is not what the scan saw, or not whole."""
    folder, _, name = entry.path.rpartition("/")
    inside = _open_folder(top, folder)
    try:
        # O_NONBLOCK: what was swapped for a FIFO since must not hold us
        file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=inside)
    except (FileNotFoundError, BlockingIOError):
        yield None
        return
    finally:
        os.close(inside)
    try:
        status = os.fstat(file)
        same = stat.S_ISREG(status.st_mode) and mark_of(status) == entry.mark
        writers = _writers(file) if same and leases else "unknown"
        identity = identity_of(status)
        whole = same and (writers == "none" or (writers == "unknown" and is_still(identity)))
        yield (file, identity) if whole else None
    finally:
        os.close(file)


def _open_folder(top: Path, folder: str) -> int:
    """Return a descriptor of a folder below `top`; no step of the way may be a link."""
    inside = os.open(top, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    for name in folder.split("/") if folder else ():
        try:
            step = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=inside)
        finally:
            os.close(inside)
        inside = step
    return inside


def identity_of(status: os.stat_result) -> Identity:
    """Return what must stay the same of a file for its content to be the same."""
    return status.st_ino, status.st_size, status.st_mtime_ns


def _writers(file: int) -> Literal["none", "some", "unknown"]:
    """Return whether anybody has the file open for writing: the kernel grants no read lease then (fcntl(2)).

    It grants leases on one's own files alone, for which no capability is needed (CAP_LEASE would give them on those of
    others, but outside user namespaces only), and none on network file systems: unknown there.
    """
    # A writer who comes while we hold the lease is announced by SIGIO, which would end the process; SIGURG does not.
    fcntl.fcntl(file, fcntl.F_SETSIG, signal.SIGURG)
    try:
        fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except OSError as error:
        return "some" if error.errno == errno.EAGAIN else "unknown"
    fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    return "none"


# -- claiming ----------------------------------------------------------------------------------------------------

_CLAIMED = re.compile(
    rf"(?P<submission>{ids.SUBMISSION})(?P<pictures>(?:\+\w+)*)~(?P<path>[^/]+)", re.DOTALL | re.ASCII
)


@dataclass(frozen=True)
class Claim:
    """A file that is ours: what its name in claimed/ says."""

    submission: str
    path: str
    """Where it lay in the inbox."""
    pictures: tuple[str, ...] = ()
    """The suffixes of the pictures of its name that lay beside it then: the pair outlives a crash."""

    @property
    def name(self) -> str:
        """Its name in claimed/: `/` is written %2F, and what is too long for a name is shortened in the middle."""
        pictures = "".join(suffix.replace(".", "+") for suffix in self.pictures)
        path = self.path.replace("%", "%25").replace("/", "%2F")
        return _shortened(f"{self.submission}{pictures}~{path}", NAME_BYTES_MAX)

    @property
    def claimed_at(self) -> datetime:
        """The moment in its submission's id, in local time with its zone."""
        return ids.made_at(self.submission).astimezone()

    @classmethod
    def of(cls, name: str) -> Claim | None:
        """Return the claim that a file in claimed/ is, None for a file that came there otherwise."""
        match = _CLAIMED.fullmatch(name)
        if not match:
            return None
        path = match["path"].replace("%2F", "/").replace("%25", "%")
        return cls(match["submission"], path, tuple(f".{suffix}" for suffix in match["pictures"].split("+")[1:]))


def _shortened(name: str, bytes_max: int) -> str:
    """Return the name with what is too much of it taken out before its last 40 bytes."""
    whole = os.fsencode(name)
    if len(whole) <= bytes_max:
        return name
    head, tail = whole[: bytes_max - 43], whole[-40:]
    return f"{head.decode(errors='ignore')}…{tail.decode(errors='ignore')}"


def new_submission() -> str:
    """Return the id under which the next file is claimed."""
    return ids.submission_id(datetime.now(UTC))


def claim(paths: Paths, entry: Entry, submission: str, pictures: tuple[str, ...] = ()) -> Claim:
    """Take a file by renaming it to its claimed name; `sync_claims` makes that last.

    Raises:
        OSError: it cannot be moved, or somebody was quicker.
    """
    taken = Claim(submission, entry.path, pictures)
    _move(paths.inbox, entry.path, paths.claimed / taken.name)
    return taken


def _move(top: Path, path: str, target: Path) -> None:
    """Rename what lies at `path` below `top`, itself where it is a link, to a name that nobody else has."""
    folder, _, name = path.rpartition("/")
    inside = _open_folder(top, folder)
    try:
        os.rename(name, target, src_dir_fd=inside)
    finally:
        os.close(inside)


def sync_claims(paths: Paths, claims: Iterable[Claim]) -> None:
    """Make claims last, which they must before their jobs are written down.

    A claim that a power cut takes back is made again, under another id: its jobs would be there twice.
    """
    durable.sync_folder(paths.claimed)
    for folder in {taken.path.rpartition("/")[0] for taken in claims}:
        try:
            durable.sync_folder(paths.inbox / folder)
        except OSError:
            durable.sync_filesystem(paths.claimed)  # a person has removed, renamed or closed the folder meanwhile


def is_unchanged(paths: Paths, taken: Claim, reading: Reading) -> bool:
    """Whether what was claimed is what was read: a writer who had opened it before the rename may have gone on."""
    try:
        return identity_of(os.lstat(paths.claimed / taken.name)) == reading.identity
    except FileNotFoundError:
        return False


# -- filing ------------------------------------------------------------------------------------------------------


def fault_of(path: str, kind: Kind, size: int) -> Fault | None:
    """Return why a file can make no jobs, whatever it says; None for a prompt file."""
    where, name = shown(path), path.rpartition("/")[2]
    if kind == "odd":
        return Fault(where, "this is a link, FIFO, socket or device, not a file", "Copy the file itself.")
    if where != path:
        return Fault(where, "its name is not UTF-8, or holds characters that cannot be printed", "Rename it.")
    if kind == "other" and suffix_of(name).lower() == LORA_SUFFIX:
        remedy = f"Move it into the folder loras beside the models, and write its name: loras: {stem_of(name)}"
        return Fault(where, "a LoRA's file is not taken from the inbox", remedy)
    if kind == "other":
        return Fault(where, f"{suffix_of(name) or 'a name without a suffix'} is no prompt file", f"Known: {_KNOWN}.")
    if kind == "picture":
        remedy = f"Put {stem_of(name)}.txt with a prompt beside it."
        return Fault(where, "no text came that was accepted and uses this picture", remedy)
    if not is_folder_name(place_of(path).batch):
        remedy = "Rename it: at most 120 bytes, no . or - in front, no space at its ends."
        return Fault(where, f"its jobs' folder cannot be called {place_of(path).batch!r}", remedy)
    if size == 0:
        return Fault(where, "it is empty", "Write a prompt into it.")
    return None


_KNOWN = ", ".join(SUFFIXES)


def shown(path: str) -> str:
    """Return a path as messages may show it: what cannot be printed is escaped."""
    return path if path.isprintable() else repr(path)[1:-1]


class Filing(NamedTuple):
    """Where a claimed file goes, and the note that lies beside it there."""

    source: Path
    target: Path
    note: Path
    text: bytes


def acceptance(paths: Paths, taken: Claim, jobs: Sequence[JobSpec], sha256: str | None, now: datetime) -> Filing:
    """Return the filing of a file whose jobs are queued; its ticket names them."""
    ticket = {
        "v": 1,
        "submission": taken.submission,
        "file": taken.path,
        "sha256": sha256,
        "batch": jobs[0].batch,
        "jobs": [job.id for job in jobs],
        "enqueued_at": now.isoformat(timespec="seconds"),
    }
    target = _accepted(paths, taken)
    note = target.with_name(f"{target.name}.ticket.json")
    return Filing(paths.claimed / taken.name, target, note, json.dumps(ticket, indent=1).encode() + b"\n")


def rejection(paths: Paths, taken: Claim, faults: Sequence[Fault]) -> Filing:
    """Return the filing of a file that was refused, with every fault."""
    lines = [
        f"{shown(taken.path)} was not queued.",
        "",
        *map(str, faults),
        "",
        "Correct it and put it into the inbox again.",
        "",
    ]
    target = paths.rejected / _filed_name(taken)
    note = target.with_name(f"{target.name}.error.txt")
    return Filing(paths.claimed / taken.name, target, note, "\n".join(lines).encode(errors="backslashreplace"))


def _accepted(paths: Paths, taken: Claim) -> Path:
    return paths.accepted / f"{taken.claimed_at:%Y-%m-%d}" / _filed_name(taken)


def _filed_name(taken: Claim) -> str:
    return _shortened(f"{taken.submission}~{taken.path.rpartition('/')[2]}", NAME_BYTES_MAX - NOTE_BYTES)


def file_away(filings: Sequence[Filing]) -> None:
    """Write all notes, synced together, then give the files their last names.

    Raises:
        OSError: a note cannot be written (the disk is full) or a file not be moved; the rest can be done again.
    """
    durable.write_all((filing.note, filing.text) for filing in filings)
    for filing in filings:
        filing.source.replace(filing.target)


def file_picture(paths: Paths, entry: Entry, submission: str) -> None:
    """Move a picture that jobs have used to accepted/, beside the text that used it.

    Raises:
        OSError: it cannot be moved.
    """
    target = _accepted(paths, Claim(submission, entry.path))
    if target.exists():  # a text may use pictures of one name from several folders
        target = _accepted(paths, Claim(new_submission(), entry.path))
    target.parent.mkdir(parents=True, exist_ok=True)
    _move(paths.inbox, entry.path, target)
