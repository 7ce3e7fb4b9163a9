"""Turns of the inbox: look, claim, write down, queue, file away.

Files are claimed in groups: one sync for the claims of a group, one for its specs, one for its notes. Whatever stops
a turn in the middle leaves files in claimed/, and the next turn, or the next process, finishes them first.
"""

from __future__ import annotations

import errno
import heapq
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import NamedTuple, TypeVar

from safelight import drops, expand, inbox, lorafiles, pairing, promptfile, wan_cli
from safelight.config import Config
from safelight.draft import Draft
from safelight.drops import Entry, Patience, Scan
from safelight.errors import Fault, InvalidJob, LedgerDamaged, SafelightError, in_order
from safelight.inbox import Claim, Filing, Reading
from safelight.jobqueue import JobQueue
from safelight.jobspec import JobSpec
from safelight.ledger import Ledger
from safelight.lora import Lora
from safelight.models import Models
from safelight.promptfile import InvalidPromptFile
from safelight.sizes import KeptPicture
from safelightd.inbox_pictures import Pictures, Wait
from safelightd.logs import Log
from safelightd.writers import Writers

GROUP_FILES = 200
"""Files claimed together: a group's syncs took 24 ms of its 0.3 s (ext4 on a virtual disk, 2 cores, 2026-11-22)."""

GROUP_BYTES = 4 << 20
"""Text held at once, but for a single file that is larger."""

LOT_JOBS = 2_000
"""Jobs written down and queued together, unless a single file has more: one of 10,000 took 28 MiB (2026-11-22)."""

TURN_FILES = 2_000
"""Files taken between two looks, so that what is dropped into high/ meanwhile need not wait for all the others."""

TURN_S = 5.0
"""Likewise, where the files are large."""

WRITER_S = 1.0
"""A file that somebody has open for writing is looked at again this often."""

RETRY_S = 60.0
"""A file that cannot be read or moved is tried again this often."""

REPEAT_S = 3600.0
"""And spoken of this often."""

MACHINE_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EMFILE, errno.ENFILE})
"""Not this file's fault: everything waits."""

Answer = TypeVar("Answer")
log = Log("safelight.inbox")


class Taken(NamedTuple):
    """A claimed file and what is to become of it."""

    claim: Claim
    text: Text | None = None
    faults: Sequence[Fault] = ()
    """Why it is refused, whatever was in it."""
    known: Sequence[JobSpec] = ()
    """Its jobs, where the ledger has them already."""


class Text(NamedTuple):
    """What was in a prompt file."""

    reading: Reading
    drafts: Sequence[Draft]
    faults: Sequence[Fault]


class Made(NamedTuple):
    """What a file came to."""

    specs: list[JobSpec]
    pictures: set[str]
    """Paths in the inbox of the pictures its jobs use."""


class Later(NamedTuple):
    """A file that is not to be tried again before its wait is over, unless it changes."""

    mark: int
    wait: Wait
    stuck: bool = False
    """It cannot be read or moved; nothing waits for it."""


@dataclass
class Lot:
    """What is written down, queued and filed together."""

    new: dict[str, list[JobSpec]] = field(default_factory=dict)
    known: list[JobSpec] = field(default_factory=list)
    filings: list[Filing] = field(default_factory=list)
    claims: list[Claim] = field(default_factory=list)
    used: dict[str, set[str]] = field(default_factory=dict)
    """The pictures that the new jobs of each submission were made with."""

    @property
    def jobs(self) -> Iterator[JobSpec]:
        yield from self.known
        for specs in self.new.values():
            yield from specs


class Intake:
    """Takes files from one inbox into the ledger and the queue; remembers what was seen, and nothing that matters."""

    def __init__(self, config: Config, models: Models, record: Ledger, patience: Patience, writers: Writers) -> None:
        self._config = config
        self._paths = config.paths
        self._models = models
        self._ledger = record
        self._patience = patience
        self._claimed: Scan | None = None
        self._scan: Scan | None = None
        self._later: dict[str, Later] = {}
        self._spoken: dict[str, float] = {}
        self._writers = writers
        self._pictures = Pictures(config.paths, models, patience, writers)
        self.queued_jobs = 0
        self.waiting_files = 0

    @property
    def folders(self) -> tuple[str, ...]:
        """The folders in the inbox, as of the last look."""
        return self._scan.folders if self._scan else ()

    def turn(self, queue: JobQueue, is_stopping: Callable[[], bool]) -> float | None:
        """Finish what was claimed, then take what is due.

        Args:
            is_stopping: asked after each group, the first moment at which stopping leaves nothing half done.

        Returns:
            In how many seconds the next turn is worthwhile; None when nothing is on its way.

        Raises:
            OSError: a folder is gone or the disk is full; claimed files stay claimed.
            queueserver.AWAY: the server is away; likewise.
        """
        unfinished, unfinished_at = self._finish(queue)
        self._scan = scan = drops.scan(self._paths.inbox, self._scan, time.monotonic)
        self._forget(scan)
        ready, next_at = self._due(scan, unfinished)
        more = len(ready) > TURN_FILES
        taken = 0
        for group in _groups(heapq.nsmallest(TURN_FILES, ready, key=lambda entry: drops.order(entry.path))):
            claimed = self._claim(group, scan)
            self._commit(queue, claimed)
            taken += len(claimed)
            if is_stopping() or time.monotonic() - scan.started_at > TURN_S:
                return 0.0
        if taken or more:
            return 0.0  # pictures may go now that their texts have gone
        waits = (later.wait.until for later in self._later.values() if not later.stuck)
        next_at = min(next_at, unfinished_at, *waits, math.inf)
        return max(0.0, next_at - time.monotonic()) if next_at < math.inf else None

    # -- what is due ----------------------------------------------------------------------------------------------

    def _forget(self, scan: Scan) -> None:
        """Drop what was remembered of files that are gone or have changed, or whose time has come."""
        for path, later in list(self._later.items()):
            entry = scan.entries.get(path)
            if entry is None or entry.mark != later.mark or later.wait.is_over(scan):
                del self._later[path]
        self._pictures.forget(scan)
        self._spoken = {path: at for path, at in self._spoken.items() if scan.started_at - at < REPEAT_S}
        for folder, problem in scan.troubles:
            self._speak(folder, problem)

    def _due(self, scan: Scan, unfinished: Sequence[str]) -> tuple[list[Entry], float]:
        """Return the files that may be taken now, and when the next may; `unfinished` is what stays in claimed/."""
        stuck = {path for path, later in self._later.items() if later.stuck}
        ready, next_at = [], math.inf
        for at, entry in drops.due(scan, self._patience, self._pictures.used_marks, stuck, unfinished):
            if entry.path in self._later:
                continue
            if at <= scan.started_at:
                ready.append(entry)
            else:
                next_at = min(next_at, at)
        self.waiting_files = len(scan.entries) - len(ready)
        return ready, next_at

    # -- claiming -------------------------------------------------------------------------------------------------

    def _claim(self, group: Sequence[Entry], scan: Scan) -> list[Taken]:
        """Claim what can be claimed of a group, and return what may be gone on with."""
        claimed = []
        for entry in group:
            try:
                if taken := self._take(entry, scan):
                    claimed.append(taken)
            except OSError as error:
                if error.errno in MACHINE_ERRORS:
                    raise
                self._later[entry.path] = Later(entry.mark, Wait(time.monotonic() + RETRY_S), stuck=True)
                self._speak(entry.path, f"cannot be taken: {error.strerror or error}")
        # what a late writer has changed stays claimed until it has settled there
        return [one for one in claimed if not one.text or inbox.is_unchanged(self._paths, one.claim, one.text.reading)]

    def _take(self, entry: Entry, scan: Scan) -> Taken | None:
        """Claim one file; None when it is to be taken later, or was a picture that went with its text."""
        fault = inbox.fault_of(entry.path, entry.kind, entry.size)
        if entry.kind == "picture" and self._pictures.file_used(entry):
            return None
        if fault:
            return Taken(inbox.claim(self._paths, entry, inbox.new_submission()), faults=(fault,))
        text = _parsed(self._writers.read(entry, scan.started_at), entry.path)
        if not text:
            self._later[entry.path] = Later(entry.mark, Wait(scan.started_at + WRITER_S))
            if entry.since + RETRY_S < scan.started_at:
                self._speak(entry.path, "a program has it open for writing; it is taken when that closes it")
            return None
        if wait := self._pictures.wait_for(entry, text.drafts, scan):
            self._later[entry.path] = Later(entry.mark, wait)
            return None
        return Taken(inbox.claim(self._paths, entry, inbox.new_submission(), scan.suffixes_beside(entry.path)), text)

    # -- finishing ------------------------------------------------------------------------------------------------

    def _finish(self, queue: JobQueue) -> tuple[list[str], float]:
        """Finish what lies in claimed/; return the paths of what stays there, and when that may have settled.

        What the ledger knows is queued again (each job at most once). What it does not know was claimed and not yet
        read, or changed by a late writer: it is read when it has settled.
        """
        self._claimed = scan = drops.scan(self._paths.claimed, self._claimed, time.monotonic)
        next_at = math.inf
        left: list[str] = []
        group: list[Taken] = []
        for name in sorted(scan.entries):
            entry = scan.entries[name]
            claim = Claim.of(name)
            if claim is None:
                self._speak(f".safelight/claimed/{name}", "is no claim of safelight: move it away")
                continue
            try:
                taken = self._take_again(claim, entry, scan.started_at)
            except (OSError, LedgerDamaged) as error:
                if isinstance(error, OSError) and error.errno in MACHINE_ERRORS:
                    raise
                self._speak(f".safelight/claimed/{name}", f"cannot be finished: {error}")
                continue  # it may stay for ever, and holds no pictures
            if taken is None:
                left.append(claim.path)
                next_at = min(next_at, max(entry.since + self._patience.settle_s, scan.started_at + WRITER_S))
                continue
            group.append(taken)
            if len(group) == GROUP_FILES:
                self._commit(queue, group)
                group = []
        self._commit(queue, group)
        return left, next_at

    def _take_again(self, claim: Claim, entry: Entry, now: float) -> Taken | None:
        """Return a claim with what was in it; None while it may still change."""
        known = self._ledger.submission(claim.submission)
        if not known and entry.since + self._patience.settle_s > now:
            return None
        if not known and (fault := inbox.fault_of(claim.path, entry.kind, entry.size)):
            return Taken(claim, faults=(fault,))
        text = _parsed(self._writers.read_claimed(entry, now), claim.path)
        return Taken(claim, text, known=known) if text or known else None

    # -- queueing -------------------------------------------------------------------------------------------------

    def _commit(self, queue: JobQueue, group: Sequence[Taken]) -> None:
        """Write down, queue and file a group of claimed files."""
        lot, jobs = Lot(), 0
        ended = self._ledger.ended() if any(taken.known for taken in group) else set()
        for taken in group:
            lot.claims.append(taken.claim)
            if taken.known:
                lot.known += [spec for spec in taken.known if spec.id not in ended]
                lot.filings.append(self._acceptance(taken, taken.known))
            else:
                self._add(lot, taken)
            jobs += len(lot.new.get(taken.claim.submission, taken.known))
            if jobs >= LOT_JOBS:
                self._queue(queue, lot)
                lot, jobs = Lot(), 0
        self._queue(queue, lot)

    def _add(self, lot: Lot, taken: Taken) -> None:
        """Add a file's jobs to the lot, or its refusal with every fault: how it is written, and what it asks for."""
        faults = list(taken.faults or (taken.text.faults if taken.text else ()))
        made: Made | None = None
        if not taken.faults:
            try:
                made = _or_refuse(taken.claim.path, lambda: self._expand(taken))
            except InvalidJob as error:
                faults += error.faults
        if faults or made is None:
            filing = inbox.rejection(self._paths, taken.claim, in_order(faults))
            lot.filings.append(filing)
            log.warning("inbox.rejected", file=inbox.shown(taken.claim.path), faults=len(faults), why=filing.note)
            return
        lot.used[taken.claim.submission] = made.pictures
        lot.new[taken.claim.submission] = made.specs
        lot.filings.append(self._acceptance(taken, made.specs))

    def _acceptance(self, taken: Taken, specs: Sequence[JobSpec]) -> Filing:
        sha256 = taken.text.reading.sha256 if taken.text else None
        return inbox.acceptance(self._paths, taken.claim, specs, sha256, datetime.now().astimezone())

    def _expand(self, taken: Taken) -> Made:
        """Return a file's jobs and the pictures they use, which are among the inputs then.

        Raises:
            InvalidJob: every fault of the file.
        """
        claim = taken.claim
        stored: set[str] = set()

        def store(name: str) -> KeptPicture:
            path, kept = self._pictures.store(claim.path, name)
            stored.add(path)
            return kept

        place = drops.place_of(claim.path)
        self._models = self._models.current()
        specs = expand.expand(
            pairing.paired(claim.path, claim.pictures, taken.text.drafts if taken.text else ()),
            self._models,
            self._config,
            submission=claim.submission,
            now=claim.claimed_at,
            batch=place.batch,
            priority=place.priority,
            store_image=store,
            keep_lora=self._keep_lora,
            wildcards=self._paths.wildcards,
            max_jobs=self._config.settings.inbox.max_jobs_per_file,
        )
        wan_cli.refuse_unconfigured(specs, self._models, self._config)
        return Made(specs, stored)

    def _keep_lora(self, lora: Lora) -> Lora:
        """Find a LoRA by name: of files that are neither texts nor pictures, the inbox takes none."""
        if lora.path:
            problem, remedy = (
                "a LoRA's file is not taken from the inbox",
                f"Move it to {lorafiles.folder(self._paths.models)}",
            )
            raise InvalidJob([Fault(f"LoRA {lora.path}", problem, f"{remedy} and write its name.")])
        return lorafiles.find(lora, self._paths.models)

    def _queue(self, queue: JobQueue, lot: Lot) -> None:
        """Claims, ledger, queue, files, in that order: a crash between any two is finished by the next turn."""
        if not lot.filings:
            return
        inbox.sync_claims(self._paths, lot.claims)
        self._ledger.accept(lot.new)
        for submission, pictures in lot.used.items():
            self._pictures.note_used(pictures, submission)
        new = queue.submit(lot.jobs)
        inbox.file_away(lot.filings)
        self.queued_jobs += len(new)
        if new:
            log.info("inbox.queued", submissions=len(lot.new), jobs=len(new))

    def _speak(self, path: str, problem: str) -> None:
        """Log a file's trouble, once an hour."""
        if path not in self._spoken:
            self._spoken[path] = time.monotonic()
            log.warning("inbox.left", file=inbox.shown(path), problem=problem)


def _parsed(reading: Reading | None, path: str) -> Text | None:
    """Return what is in a prompt file, `path` being its name for people; None while it is being written."""
    if reading is None:
        return None
    try:
        return Text(reading, _or_refuse(path, lambda: promptfile.parse(reading.content, path)), ())
    except InvalidJob as error:
        drafts = error.drafts if isinstance(error, InvalidPromptFile) else ()
        return Text(reading, drafts, error.faults)


def _or_refuse(path: str, make: Callable[[], Answer]) -> Answer:
    """Return what `make` makes of a file.

    A defect of ours that a file brings to light becomes the refusal of that file: it must not stop all the others,
    tonight and at every restart.

    Raises:
        InvalidJob: `make` refuses the file, or fails on it.
        OSError: the machine's fault.
    """
    try:
        return make()
    except (OSError, SafelightError):
        raise
    except Exception as error:
        log.exception("inbox.defect", file=inbox.shown(path))
        fault = Fault(inbox.shown(path), f"safelight failed on it: {error!r}", "Please report it, with the log.")
        raise InvalidJob([fault]) from error


def _groups(entries: Sequence[Entry]) -> Iterator[list[Entry]]:
    """Yield the files in groups that are claimed together, each small enough to hold its texts at once."""
    group: list[Entry] = []
    size_bytes = 0
    for entry in entries:
        if group and (len(group) == GROUP_FILES or size_bytes + entry.size > GROUP_BYTES):
            yield group
            group, size_bytes = [], 0
        group.append(entry)
        size_bytes += entry.size if entry.kind == "text" else 0
    if group:
        yield group
