"""Having in the line what the ledger says should be there. Knows no RQ."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Sequence

from safelight import durable
from safelight.errors import LedgerDamaged
from safelight.jobspec import JobSpec
from safelight.ledger import Ledger, leave_nothing
from safelight.paths import Paths
from safelightd.conclusion import Site
from safelightd.logs import Log

LATE_S = 5.0
"""A client hands its jobs over at once after writing them down; the idle worker looks after this long whether it did.
Sending them twice does no harm: each is queued at most once."""

log = Log("safelight.recovery")


def fill(site: Site, elsewhere: Collection[str]) -> None:
    """Have every accepted job without a receipt in the line, in its order: also after the server lost everything.

    Args:
        elsewhere: jobs that other workers run.
    """
    over = queue_submissions(site, site.ledger.open_submissions(), elsewhere)
    _restore_ended(site, over)
    _requeue_retried(site, elsewhere)
    site.queue.mark_filled()
    site.ledger.close_ended()


def _requeue_retried(site: Site, elsewhere: Collection[str]) -> None:
    """`retry` puts the receipt aside before it tells the queue, which may not have heard of it, or have forgotten with
    the last second of its file. What it says besides that is news: cancelled by a client without a ledger, say."""
    unwritten = set(site.queue.unwritten())
    for job, state in site.ledger.reopened().items():
        is_news = (state and site.queue.state(job) != state) or job in unwritten
        if job not in elsewhere and not is_news and site.queue.requeue(job):
            log.info("retry.requeued", id=job)


def queue_submissions(site: Site, submissions: Sequence[str], elsewhere: Collection[str]) -> list[str]:
    """Have the jobs of these submissions in the line unless they have ended or run elsewhere; each at most once.

    Returns those that have ended.
    """
    ledger, queue = site.ledger, site.queue
    ended = ledger.ended()
    over: list[str] = []

    def waiting() -> Iterator[JobSpec]:
        for spec in _accepted(ledger, submissions):
            if spec.id in ended:
                over.append(spec.id)
            elif spec.id not in elsewhere:
                yield spec

    new = queue.submit(waiting())
    if new:
        log.info("queue.filled", jobs=len(new))
    return over


def _accepted(ledger: Ledger, submissions: Sequence[str]) -> Iterator[JobSpec]:
    """Yield what was accepted; one damaged file does not stop a night."""
    for submission in submissions:
        try:
            yield from ledger.submission(submission)
        except LedgerDamaged as damaged:
            log.error("submission.damaged", error=damaged)


def _restore_ended(site: Site, ids: list[str]) -> None:
    """A job with a receipt has ended, whatever the queue remembered: it may have died between the two."""
    remembered = {row.id: row.state for row in site.queue.rows(ids)}
    for job in ids:
        try:
            receipt = site.ledger.receipt(job)
        except LedgerDamaged as damaged:
            log.error("receipt.damaged", error=damaged)
            continue
        if receipt and remembered.get(job) != receipt.state:
            site.queue.restore(receipt)
        if receipt:
            # whoever wrote the receipt may have died before
            site.ledger.forget_attempts(job)
            leave_nothing(site.config.paths, job)


def sweep(paths: Paths) -> None:
    """Remove what killed processes left half written in the ledger: hidden files that nobody reads."""
    for folder in (paths.jobs, paths.attempts, paths.publishing, paths.receipts, paths.checkpoints):
        try:
            left = durable.sweep(folder)
        except OSError as error:
            log.warning("ledger.unswept", folder=folder, error=error)
            continue
        if left:
            log.info("ledger.swept", folder=folder, files=len(left))


class Late:
    """Finds the submissions that a client wrote down and did not live to hand over.

    By their names, each looked at twice: clocks are set, and where a disk is slow a file is older than its name.
    """

    def __init__(self, known: Iterable[str] = ()) -> None:
        self._known = set(known)
        self._since: dict[str, float] = {}
        self._next_look = -math.inf

    def look(self, ledger: Ledger, now: float) -> list[str]:
        """Return those that have lain there for LATE_S at `now` (monotonic), each once; looks no oftener than that."""
        if now < self._next_look:
            return []
        self._next_look = now + LATE_S
        there = ledger.open_submissions()
        late = [name for name in there if name in self._since and now - self._since[name] >= LATE_S]
        self._known = self._known.intersection(there).union(late)
        self._since = {name: self._since.get(name, now) for name in there if name not in self._known}
        return late
