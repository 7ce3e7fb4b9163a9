"""Writing down what was cancelled, so that it stays cancelled when the queue is lost or forgets it.

A waiting job leaves the line first, and the queue remembers that its receipt is not written yet: whoever can write the
ledger does so, the client that cancelled it, the next one, or a worker. Whatever dies in between, one of them comes.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import datetime
from itertools import islice
from typing import TYPE_CHECKING

from safelight.errors import InvalidJob, LedgerDamaged
from safelight.ledger import Ledger, leave_nothing
from safelight.receipt import Receipt

if TYPE_CHECKING:
    from safelight.jobqueue import JobQueue
    from safelight.jobspec import JobSpec

RECORD_CHUNK = 1_000
"""Receipts synced together."""


def write_down(queue: JobQueue, ledger: Ledger, most: int | None = None) -> None:
    """Give all jobs that were cancelled while they waited, and whose receipts may be missing, their receipts.

    One that is finished goes back into the line, to be published: a client that cannot see the ledger cannot know.

    Args:
        most: so many of them alone.

    Raises:
        OSError: the disk is full, say; the queue remembers the jobs.
    """
    unwritten = islice(queue.unwritten(), most)
    while group := list(islice(unwritten, RECORD_CHUNK)):
        states = {row.id: row.state for row in queue.rows(group)}
        cancelled = [job for job in group if states.get(job) == "cancelled"]  # nobody has retried it meanwhile
        for job in [job for job in cancelled if is_finished(job, ledger)]:
            queue.requeue(job)
            cancelled.remove(job)
        ledger.record_all(_receipts(cancelled, queue, ledger))
        now = {row.id: row.state for row in queue.rows(cancelled)}
        for job in cancelled:
            if now.get(job) != "cancelled":
                ledger.reopen_cancelled(job)  # retried meanwhile; a retry from now on sees the receipt itself
                continue
            ledger.forget_attempts(job)  # it may have run before it was put back
            leave_nothing(ledger.paths, job)
        queue.forget_unwritten(group)


def is_finished(job: str, ledger: Ledger) -> bool:
    """Whether a waiting job was rendered by an attempt that died while it published: the next one only does that."""
    return (ledger.paths.publishing / f"{job}.json").exists()


def is_running(job: str, ledger: Ledger) -> bool:
    """Whether the job runs, as the ledger tells: it was started, and the worker that did it lives."""
    attempts = ledger.attempts(job)
    return attempts.running and _is_held(attempts.lock)


def _is_held(lock: str) -> bool:
    try:
        descriptor = os.open(lock, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _receipts(jobs: Sequence[str], queue: JobQueue, ledger: Ledger) -> Iterator[Receipt]:
    ended = ledger.ended()
    now = datetime.now().astimezone().isoformat(timespec="seconds")
    for job in jobs:
        if job not in ended and (spec := _spec(job, queue, ledger)):
            yield Receipt(id=job, state="cancelled", spec=spec, finished_at=now)


def _spec(job: str, queue: JobQueue, ledger: Ledger) -> JobSpec | None:
    """Return what was asked for; None where neither can tell, and the job could not run either."""
    with suppress(InvalidJob):
        if spec := queue.spec(job):
            return spec
    with suppress(LedgerDamaged):
        return ledger.spec(job)
    return None
