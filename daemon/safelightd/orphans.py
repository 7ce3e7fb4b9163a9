"""Taking up the jobs that dead workers left, and leaving those of live ones alone. Knows no RQ.

A worker's lock tells whether it lives, on the machine where the lock is; of a worker that may be on another machine,
its silence alone does. docs/architecture.md has the whole rule.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

from safelight.errors import LedgerDamaged
from safelight.ledger import Attempts
from safelightd import gpulock
from safelightd.conclusion import Site, conclude, give_back, left_to_other, rejected, settle_job, spec_of

SILENT_S = 90.0
"""For so long a worker of another host must not have been heard of, after the server forgot it: a server that comes
back from an outage has forgotten all of them, and each says within seconds that it lives."""


@dataclass(frozen=True)
class Holder:
    """A worker that has, or had, a job."""

    worker: str
    lock: Path | None
    """What it holds while it lives; None where nobody can tell."""


@dataclass(frozen=True)
class Silence:
    """How long workers have not been heard of, as this process saw it."""

    clock: Callable[[], float] = time.monotonic
    _since: dict[str, float] = field(default_factory=dict)

    def of(self, worker: str, *, heard: bool) -> float:
        """Return for how many seconds the worker has been silent, told whether the server has heard of it lately."""
        if heard:
            self._since.pop(worker, None)
            return 0.0
        now = self.clock()
        return now - self._since.setdefault(worker, now)


def take_up(site: Site, silence: Silence, started: Iterable[str]) -> list[str]:
    """Settle the jobs that dead workers had started, or had taken and not started; return those of others.

    Called between two jobs alone: what this worker itself seems to run was left by an earlier life of it.

    Args:
        started: jobs that the ledger may say are under way; what the queue says is under way is looked at anyway.
    """
    running = site.queue.running()
    return [job for job in sorted({*started, *running}) if not _taken_up(site, silence, job, running.get(job))]


def _taken_up(site: Site, silence: Silence, job: str, taken_by: str | None) -> bool:
    """Settle a job if nobody who lives has it, and return whether it is settled.

    Nobody whose lock is held here meanwhile can start, or settle it as well: who has it is read again under it.
    """
    holders = _holders(site, job, taken_by)
    if not all(_is_dead(site, silence, holder) for holder in holders):
        if taken_by == site.worker and (note := _note(site, job)):
            left_to_other(site, note)
        return False
    with ExitStack() as locks:
        others = {holder.lock for holder in holders if holder.lock and not _is_own(site, holder)}
        if not all(locks.enter_context(gpulock.deserted(lock)) for lock in sorted(others)):
            return False
        taken_by = site.queue.running().get(job)
        if _holders(site, job, taken_by) != holders:
            return False
        if holders:
            settle_orphan(replace(site, worker=taken_by or holders[-1].worker), job, "the worker was killed")
    return True


def _holders(site: Site, job: str, taken_by: str | None) -> list[Holder]:
    """Return who has the job: by the queue, and by the ledger, which may know of an earlier one."""
    found = [Holder(taken_by, gpulock.lock_of(taken_by, site.config))] if taken_by else []
    if (note := _note(site, job)) and note.running:
        found.append(Holder(note.worker, Path(note.lock) if note.lock else None))
    return found


def _note(site: Site, job: str) -> Attempts | None:
    """Return what the ledger says of a job that has not ended; a damaged file says nothing."""
    try:
        return None if site.ledger.receipt(job) else site.ledger.attempts(job)
    except LedgerDamaged:
        return None


def _is_dead(site: Site, silence: Silence, holder: Holder) -> bool:
    if _is_own(site, holder):
        return True
    if holder.lock and gpulock.is_taken(holder.lock):
        return False
    heard = site.queue.heard_of(holder.worker)
    if holder.lock and gpulock.is_of_this_host(holder.worker) and (holder.lock.exists() or not heard):
        return True  # a lock's file that is gone says nothing: logind may remove what a person had in /dev/shm
    return silence.of(holder.worker, heard=heard) >= SILENT_S


def _is_own(site: Site, holder: Holder) -> bool:
    """It may have had another name: a machine's name changes. Whoever held our lock is dead, for we hold it."""
    return holder.worker == site.worker or holder.lock == Path(site.lock)


def settle_own(site: Site, job: str, reason: str) -> None:
    """Settle a job whose process in this worker died, unless that had found it to be another worker's."""
    note = _note(site, job)
    if note is None or not left_to_other(site, note):
        settle_orphan(site, job, reason)


def settle_orphan(site: Site, job: str, reason: str) -> None:
    """Bring a job whose process died to where the ledger says it is: ended, or back in the line."""
    try:
        _settle_orphan(site, job, reason)
    except LedgerDamaged as damaged:
        rejected(site, job, str(damaged))


def _settle_orphan(site: Site, job: str, reason: str) -> None:
    if receipt := site.ledger.receipt(job):
        conclude(site, receipt)
        return
    spec = spec_of(site, job)
    if spec is None:
        rejected(site, job, "neither the queue nor the ledger knows what was asked for")
        return
    attempts = site.ledger.attempts(job)
    if attempts.running:
        settle_job(site, spec, attempts, "return", reason)
    else:
        give_back(site, spec, attempts)
