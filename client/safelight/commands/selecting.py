"""Which jobs a person means: by id, by the beginning or any part of an id, by batch, or all that have not ended."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from safelight.commands.client import Client
    from safelight.errors import InvalidJob, QueueUnreachable
    from safelight.jobqueue import JobQueue
    from safelight.ledger import Ledger

ABBREVIATION_MIN = 4
"""Fewer characters of an id say nothing: every id of this century begins with 20."""

AMBIGUOUS_SHOWN = 10


def jobs_argument() -> Callable[[Any], Any]:
    return click.argument("ids", metavar="[ID]...", nargs=-1)


def batch_option(help_text: str) -> Callable[[Any], Any]:
    return click.option("--batch", metavar="NAME", help=help_text)


def one_of(ids: tuple[str, ...], batch: str | None, *, everything: bool, remedy: str) -> None:
    """Refuse no selection, and two at once.

    Raises:
        click.UsageError: none or several of IDs, --batch and --all were given.
    """
    given = sum((bool(ids), batch is not None, everything))
    if given != 1:
        raise click.UsageError("Name jobs by ID, or by --batch, or --all: one of them." if given else remedy)


def resolve(written: Iterable[str], queue: JobQueue | None, ledger: Ledger) -> list[str]:
    """Return the ids that are meant, each once, in the order written.

    Args:
        queue: None while it does not answer; what only the queue knows is unknown then.

    Raises:
        InvalidJob: an id is unknown, or what was written fits several; each is named.
    """
    from safelight.errors import Fault, InvalidJob

    found: dict[str, None] = {}
    faults = []
    accepted = _Accepted(ledger)
    for text in written:
        matches = _matching(text, queue, ledger, accepted)
        if len(matches) == 1:
            found[matches[0]] = None
        elif matches:
            shown = ", ".join(matches[:AMBIGUOUS_SHOWN]) + (" ..." if len(matches) > AMBIGUOUS_SHOWN else "")
            faults.append(Fault(text, f"fits {len(matches)} jobs", f"Write more of it: {shown}"))
        else:
            faults.append(Fault(text, "no job has this id", "safelight list shows them."))
    if faults:
        raise InvalidJob(faults)
    return list(found)


def resolve_anyhow(client: Client, written: Iterable[str]) -> tuple[list[str], QueueUnreachable | None]:
    """Return the ids that are meant, from the ledger alone while the queue does not answer; then that error as well.

    Raises:
        InvalidJob: as `resolve` says.
        QueueUnreachable: the queue does not answer, and the ledger does not know one of them.
    """
    from safelight.errors import InvalidJob, QueueUnreachable

    try:
        with client.queue() as queue:
            return resolve(written, queue, client.ledger), None
    except QueueUnreachable as away:
        try:
            return resolve(written, None, client.ledger), away
        except InvalidJob:
            raise away from None  # the queue may well know it


class _Accepted:
    """Looks ids up in the ledger's submissions; each file is read once, however many ids are asked for."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._ids: dict[str, set[str]] = {}

    def __contains__(self, job: str) -> bool:
        from safelight.ids import submission_of

        if not self._ledger.knows(job):
            return False
        submission = submission_of(job)
        if submission not in self._ids:
            self._ids[submission] = {spec.id for spec in self._ledger.submission(submission)}
        return job in self._ids[submission] or self._ledger.spec(job) is not None


def _matching(text: str, queue: JobQueue | None, ledger: Ledger, accepted: _Accepted) -> list[str]:
    """An exact id is looked up where that is cheapest; only what may be part of one is searched for."""
    from safelight.ids import is_id

    if queue and queue.state(text):
        return [text]
    if is_id(text) and (has_ended(text, ledger) or text in accepted):
        return [text]
    if len(text) < ABBREVIATION_MIN:
        return []
    known = queue.containing(text) if queue else []
    return sorted({*known, *(job for job in ledger.ended() if text in job)})


def has_ended(job: str, ledger: Ledger) -> bool:
    return (ledger.paths.receipts / f"{job}.json").is_file()


def of_batch(queue: JobQueue, batch: str) -> list[str]:
    """Return the jobs of a batch that the queue lists: running, waiting in order, ended newest first.

    Raises:
        InvalidJob: there is no such batch.
    """
    members = set(queue.batch_ids(batch))
    found = [job for job in in_order(queue) if job in members]
    if not found:
        raise no_such_batch(batch)
    return found


def no_such_batch(batch: str) -> InvalidJob:
    from safelight.errors import Fault, InvalidJob

    return InvalidJob([Fault(f"--batch {batch}", "no job is of this batch", "safelight list shows the batches.")])


def in_order(queue: JobQueue) -> list[str]:
    """Return all that the queue lists: running first, then waiting in order, then ended newest first."""
    return [*queue.running(), *queue.waiting_ids(), *reversed(queue.ended_ids())]
