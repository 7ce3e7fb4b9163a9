"""Taking up what a dead process left: from the ledger, into the line. Knows no RQ."""

from __future__ import annotations

from pathlib import Path

from safelightd import gpulock
from safelightd.execution import Place, conclude, settle_job
from safelightd.logs import Log

log = Log("safelight.recovery")


def own_orphans(place: Place) -> None:
    """Settle the jobs that an earlier life of this worker had started, or had taken and not started."""
    started = {found.id for found in place.ledger.interrupted() if found.worker == place.worker}
    taken = {job for job, worker in place.queue.running().items() if worker == place.worker}
    for job in sorted(started | taken):
        settle_orphan(place, job, "the worker was killed")


def settle_orphan(place: Place, job: str, reason: str) -> None:
    """Bring a job whose process died to where the ledger says it is: ended, or back in the line."""
    if receipt := place.ledger.receipt(job):
        conclude(place, receipt)
        return
    spec = place.queue.spec(job) or place.ledger.spec(job)
    if spec is None:
        log.error("job.unknown", id=job)
        return
    attempts = place.ledger.attempts(job)
    if attempts.running:
        settle_job(place, spec, attempts, "return", reason)
    else:
        place.queue.give_back(job, place.worker, attempts.attempts)


def fill(place: Place) -> None:
    """Have every accepted job without a receipt in the line, in its order: also after the server lost everything."""
    ledger, queue = place.ledger, place.queue
    ended = ledger.ended()
    elsewhere = {found.id for found in ledger.interrupted() if found.worker != place.worker and _lives(found.lock)}
    new = queue.submit(spec for spec in ledger.accepted() if spec.id not in ended and spec.id not in elsewhere)
    _restore_ended(place, [spec.id for spec in ledger.accepted() if spec.id in ended])
    queue.mark_filled()
    ledger.close_ended()
    if new:
        log.info("queue.filled", jobs=len(new))


def _lives(lock: str) -> bool:
    return bool(lock) and gpulock.is_taken(Path(lock))


def _restore_ended(place: Place, ids: list[str]) -> None:
    """A job with a receipt has ended, whatever the queue remembered: it may have died between the two."""
    remembered = {row.id: row.state for row in place.queue.rows(ids)}
    for job in ids:
        receipt = place.ledger.receipt(job)
        if receipt and remembered.get(job) != receipt.state:
            place.queue.restore(receipt)
