"""How long outputs and records are kept: what is old enough to go, and its removal.

    state/collected/<id>.json    a person has copied the outputs (safelight.collect)
    state/removing/<id>.json     written before the first of them is removed from the outbox
    state/removed/<id>.json      the same file, once they are gone

What to remove is decided by values alone. Removal can be interrupted anywhere: the next run finishes it. Nothing goes
that somebody changed, renamed or put there, and no record of a job that may still run. Knows no queue.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Literal

from safelight import content, durable, ids
from safelight.config import Config, Settings
from safelight.errors import LedgerDamaged
from safelight.inbox import Claim
from safelight.ledger import Ledger
from safelight.paths import Paths
from safelight.receipt import EndState, Output, Poster, Receipt

BEGAN = datetime(2026, 1, 1, tzinfo=UTC)
"""No job ended before: safelight was not there. A clock without a battery begins at 1970, at 2000 or on the day that
the firmware or systemd was built, and somebody sets it right after the night."""

GROUP_JOBS = 200
"""Jobs whose outputs are removed between two syncs."""


@dataclass(frozen=True)
class Rules:
    """[retention], with 0 for ever."""

    outputs_days: float
    uncollected: Literal["keep", "remove"]
    ledger_days: float

    @classmethod
    def of(cls, settings: Settings) -> Rules:
        """Return the rules of an installation: no record goes while the queue still lists its job."""
        written = settings.retention
        ledger_days = max(written.ledger_days, settings.queue.keep_days) if written.ledger_days else 0
        return cls(written.outputs_days, written.uncollected, ledger_days)

    def __bool__(self) -> bool:
        return bool(self.outputs_days or self.ledger_days)


@dataclass(frozen=True)
class Ended:
    """What counts of a job that has ended."""

    state: EndState
    finished_at: datetime
    """With its zone."""


@dataclass(frozen=True)
class Gone:
    """One thing that was removed, or would be."""

    what: Literal["output", "record", "input"]
    name: str
    """Its path below the outbox; its submission; the digest of an input picture."""
    bytes: int = 0


# -- deciding ----------------------------------------------------------------------------------------------------


def outputs_to_remove(
    jobs: Mapping[str, Ended], rules: Rules, now: datetime, *, collected: Set[str], removed: Set[str]
) -> list[str]:
    """Return the jobs whose outputs have been kept for long enough, in order."""
    return sorted(
        job
        for job, ended in jobs.items()
        if ended.state == "done"
        and job not in removed
        and _is_old(ended, rules.outputs_days, now)
        and (job in collected or rules.uncollected == "remove")
    )


def records_to_remove(
    submissions: Mapping[str, Collection[str]], jobs: Mapping[str, Ended], rules: Rules, now: datetime, *,
    collected: Set[str], removed: Set[str],
) -> list[str]:  # fmt: skip
    """Return the submissions whose records have been kept for long enough, in order.

    A submission goes as a whole or not at all. With the record of a finished job goes the knowledge of which file in
    the outbox is its output, so that those are dealt with first.

    Args:
        submissions: the jobs of each.
        jobs: those that have ended; a job that is not among them keeps its submission.
    """

    def may_go(job: str) -> bool:
        ended = jobs.get(job)
        if ended is None or ended.state == "quarantined" or not _is_old(ended, rules.ledger_days, now):
            return False
        if ended.state != "done" or job in removed:
            return True
        return not rules.outputs_days and (job in collected or rules.uncollected == "remove")

    return sorted(name for name, members in submissions.items() if members and all(map(may_go, members)))


def _is_old(ended: Ended, days: float, now: datetime) -> bool:
    return days > 0 and now - ended.finished_at > timedelta(days=days)


# -- doing -------------------------------------------------------------------------------------------------------


def prune(config: Config, ledger: Ledger, now: datetime, *, dry_run: bool = False) -> Iterator[Gone]:
    """Remove what is too old, and yield each thing that went; with `dry_run` what would, and nothing is changed.

    Raises:
        OSError: a folder cannot be read or written; what was begun is finished by the next run.
    """
    rules = Rules.of(config.settings)
    mounted = _is_mounted(ledger.paths.outbox)
    if not dry_run:
        ledger.finish_forgetting()
        if mounted:
            yield from _remove_outputs(_readable(_jobs_in(ledger.paths.removing), ledger), ledger.paths)
        ledger.close_ended()
    going = _old_outputs(rules, ledger, now) if mounted else []
    receipts = _readable(going, ledger)
    while group := list(islice(receipts, GROUP_JOBS)):
        yield from _would_remove(group, ledger.paths) if dry_run else _begin(group, ledger.paths, now)
    if rules.ledger_days:
        submissions = _old_submissions(rules, ledger, now, removed=ledger.outputs_removed().union(going))
        for name in submissions if dry_run else ledger.forget(submissions):
            yield Gone("record", name)
        yield from _remove_inputs(rules, ledger, now, going=submissions if dry_run else (), dry_run=dry_run)


def _is_mounted(outbox: Path) -> bool:
    """An absent disk leaves its mount point, empty: nothing was removed from it by anybody."""
    return outbox.is_dir() and any(outbox.iterdir())


def _old_outputs(rules: Rules, ledger: Ledger, now: datetime) -> list[str]:
    """Return the jobs whose outputs go."""
    if not rules.outputs_days:
        return []
    collected, removed = ledger.collected(), ledger.outputs_removed()
    candidates = _submitted_before(ledger.ended() - removed, rules.outputs_days, now)
    if rules.uncollected == "keep":
        candidates = [job for job in candidates if job in collected]
    # Only what counts of each receipt is held: there may be 100,000.
    return outputs_to_remove(_ended(_readable(candidates, ledger)), rules, now, collected=collected, removed=removed)


def _old_submissions(rules: Rules, ledger: Ledger, now: datetime, *, removed: Set[str]) -> dict[str, Sequence[str]]:
    """Return the submissions whose records go, with their jobs."""
    submissions: dict[str, Sequence[str]] = {}
    files = _submission_files(ledger.paths)
    for name in _submitted_before(files, rules.ledger_days, now):
        with suppress(LedgerDamaged):  # nobody can tell which jobs it holds
            submissions[name] = [spec.id for spec in ledger.submission(name)]
    old = _submitted_before(ledger.ended(), rules.ledger_days, now)
    submissions |= {job: [job] for job in old if files.isdisjoint({job, ids.submission_of(job)})}
    # What lies in claimed/ is taken up by its submission, and would be read as new.
    claimed = _claimed(ledger.paths)
    submissions = {
        name: jobs for name, jobs in submissions.items() if claimed.isdisjoint({name, ids.submission_of(name)})
    }
    ended = _ended(_readable((job for jobs in submissions.values() for job in jobs), ledger))
    chosen = records_to_remove(submissions, ended, rules, now, collected=ledger.collected(), removed=removed)
    return {name: submissions[name] for name in chosen}


def _remove_inputs(
    rules: Rules, ledger: Ledger, now: datetime, *, going: Collection[str], dry_run: bool
) -> Iterator[Gone]:
    """Remove the input pictures and LoRAs that no record names and nobody has submitted for long enough.

    Where a record cannot be read nobody knows what it names, and all of them stay.
    """
    horizon = now.timestamp() - rules.ledger_days * 86_400
    try:
        old = {file.name: file for file in ledger.paths.inputs.glob("[!.]*") if file.stat().st_mtime < horizon}
        for name in _submission_files(ledger.paths).difference(going) if old else ():
            for spec in ledger.submission(name):
                old.pop(spec.image or "", None)
                old.pop(spec.last_image or "", None)
                old.pop(spec.controlnet.image if spec.controlnet else "", None)
                for lora in spec.loras:
                    old.pop(lora.sha256, None)
    except (FileNotFoundError, LedgerDamaged):
        return
    for digest, file in sorted(old.items()):
        with suppress(FileNotFoundError):  # another run was faster
            is_at = file.stat()
            if is_at.st_mtime < horizon:  # still: somebody may be submitting it
                if not dry_run:
                    file.unlink()
                yield Gone("input", digest, is_at.st_size)


def _submitted_before(names: Iterable[str], days: float, now: datetime) -> list[str]:
    """Return those that begin with a time before the last `days`: their files are worth reading."""
    horizon = ids.before(now.astimezone(UTC) - timedelta(days=days))
    return sorted(name for name in names if name < horizon)


def _submission_files(paths: Paths) -> set[str]:
    return {file.stem for folder in (paths.jobs, paths.jobs / "closed") for file in folder.glob("[!.]*.jsonl")}


def _claimed(paths: Paths) -> set[str]:
    try:
        return {claim.submission for name in os.listdir(paths.claimed) if (claim := Claim.of(name))}
    except FileNotFoundError:
        return set()


def _jobs_in(folder: Path) -> list[str]:
    return sorted(file.stem for file in folder.glob("[!.]*.json"))


def _readable(jobs: Iterable[str], ledger: Ledger) -> Iterator[Receipt]:
    """Yield the receipts that can be read; what a damaged one says is unknown, so that nothing goes by it."""
    for job in jobs:
        with suppress(LedgerDamaged):
            receipt = ledger.receipt(job)
            if receipt and receipt.id == job and not (ledger.paths.publishing / f"{job}.json").exists():
                yield receipt


def _ended(receipts: Iterable[Receipt]) -> dict[str, Ended]:
    found = {}
    for receipt in receipts:
        with suppress(ValueError):  # a time that is none, or cannot be, is never long ago
            finished_at = datetime.fromisoformat(receipt.finished_at).astimezone()
            if finished_at >= BEGAN:
                found[receipt.id] = Ended(receipt.state, finished_at)
    return found


# -- files in the outbox -----------------------------------------------------------------------------------------


def _begin(receipts: Sequence[Receipt], paths: Paths, now: datetime) -> Iterator[Gone]:
    removing_at = now.isoformat(timespec="seconds")
    durable.write_all(
        (paths.removing / f"{receipt.id}.json", json.dumps({"v": 1, "id": receipt.id, "at": removing_at}).encode())
        for receipt in receipts
    )
    yield from _remove_outputs(receipts, paths)


def _remove_outputs(receipts: Iterable[Receipt], paths: Paths) -> Iterator[Gone]:
    """Remove outputs that are noted in removing/, then say so; what is not ours any more stays where it is."""
    done: list[str] = []
    folders: set[Path] = set()
    for receipt in receipts:
        for output in receipt.outputs:
            yield from _remove_output(output, receipt, paths)
            folders.add((paths.outbox / output.path).parent)
        done.append(receipt.id)
    for folder in folders:
        if folder.is_dir():
            durable.sync_folder(folder)
    if done:
        paths.removed.mkdir(parents=True, exist_ok=True)
        for job in done:
            with suppress(FileNotFoundError):  # another run was faster
                (paths.removing / f"{job}.json").replace(paths.removed / f"{job}.json")
        durable.sync_folder(paths.removed)
        durable.sync_folder(paths.removing)
    for folder in folders:
        _remove_empty(folder, paths.outbox)


def _remove_output(output: Output, receipt: Receipt, paths: Paths) -> Iterator[Gone]:
    """Remove an output, then its poster and the receipt beside it."""
    going = paths.unfinished / receipt.id
    content.remove(going)  # a folder of frames whose removal was interrupted
    place = _place(output, paths.outbox)
    if place is None or not (_is_as_published(place, output) or not os.path.lexists(place)):
        return
    if place.is_dir():
        going.parent.mkdir(exist_ok=True)
        place.rename(going)  # half a folder would be one that somebody changed
        content.remove(going)
        yield Gone("output", output.path, output.bytes)
    elif place.exists():
        place.unlink()
        yield Gone("output", output.path, output.bytes)
    if output.poster:
        poster = place.with_name(PurePosixPath(output.poster.path).name)
        if _is_as_published(poster, output.poster):
            poster.unlink()
    sidecar = place.with_suffix(".json")
    if _is_receipt(sidecar, receipt):
        sidecar.unlink()


def _would_remove(receipts: Iterable[Receipt], paths: Paths) -> Iterator[Gone]:
    for receipt in receipts:
        for output in receipt.outputs:
            place = _place(output, paths.outbox)
            if place and _is_as_published(place, output):
                yield Gone("output", output.path, output.bytes)


def _place(output: Output, outbox: Path) -> Path | None:
    """Return where an output was published; None where the way there leads out of the outbox now."""
    inside = PurePosixPath(output.path)
    if inside.is_absolute() or ".." in inside.parts:
        return None
    place = outbox / inside
    return place if place.parent.resolve() == outbox.resolve() / inside.parent else None


def _is_as_published(file: Path, output: Output | Poster) -> bool:
    return content.is_there_as(file, output.sha256, output.bytes)


def _is_receipt(file: Path, receipt: Receipt) -> bool:
    try:
        if not stat.S_ISREG(file.lstat().st_mode):
            return False
        return Receipt.model_validate(json.loads(file.read_bytes()), strict=False) == receipt
    except (FileNotFoundError, ValueError):
        return False


def _remove_empty(batch: Path, outbox: Path) -> None:
    """Remove a batch's folder and its date's where nothing is left in them.

    A job that publishes into one in this very moment makes it again at its next attempt.
    """
    for folder in (batch, *batch.parents):
        if folder == outbox or outbox not in folder.parents or (outbox / "latest").resolve() == folder.resolve():
            return
        with suppress(FileNotFoundError):
            try:
                folder.rmdir()
            except OSError:  # something is in it
                return
