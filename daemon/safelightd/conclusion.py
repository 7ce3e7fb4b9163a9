"""What becomes of a job that was taken: told to the ledger first, then to the queue. Knows no engine.

The worker that ran it concludes it so, and whoever takes up what a dead worker left.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from safelight.calibration import Calibration
from safelight.config import Config
from safelight.errors import InvalidJob
from safelight.jobqueue import JobQueue
from safelight.jobspec import JobSpec
from safelight.ledger import Attempts, Ledger, leave_no_file, leave_nothing
from safelight.models import Models
from safelight.place import Place
from safelight.receipt import EndState, Receipt
from safelightd import calibration, gpulock, settle
from safelightd.logs import Log
from safelightd.patience import patiently
from safelightd.settle import Cause

log = Log("safelight.execution")


@dataclass(frozen=True)
class Site:
    """Where an execution happens: what the worker gives every job."""

    config: Config
    models: Models
    ledger: Ledger
    queue: JobQueue
    worker: str
    lock: str
    kill_engine: Callable[[], bool]
    """Ends the engine for good; afterwards it holds nothing on the GPU. Returns whether somebody else's SIGKILL had."""
    device_is_well: Callable[[], str | None]
    """Asks a fresh process; None, or what is wrong with the device."""
    wait: Callable[[float], bool]
    """Waits so many seconds for an absent server; True when nobody may wait any longer."""


def ended(spec: JobSpec, attempts: Attempts, state: EndState, error: str, phase: str | None = None) -> Receipt:
    """Return the receipt of a job that ended without an output."""
    return Receipt.model_validate(
        {
            "id": spec.id,
            "state": state,
            "spec": spec,
            "error": error,
            "phase": phase,
            "attempts": attempts.attempts,
            "overruns": attempts.overruns,
            "finished_at": datetime.now().astimezone().isoformat(timespec="milliseconds"),
        }
    )


def spec_of(site: Site, job: str) -> JobSpec | None:
    """Return what was asked for: the queue's copy, or the ledger's where the queue holds none that is a job."""
    try:
        spec = site.queue.spec(job)
    except InvalidJob as error:
        log.error("job.malformed", error=error)
        spec = None
    return spec or site.ledger.spec(job)


def rejected(site: Site, job: str, error: str) -> dict[str, Any]:
    """End a job that nothing can be done with; the others go on."""
    log.error("job.rejected", id=job, error=error)
    patiently(lambda: site.queue.reject(job, site.worker, error), site.wait)
    return {"state": "failed"}


def conclude(site: Site, receipt: Receipt) -> None:
    """Tell the queue how a job ended; the ledger has its receipt already."""
    if not patiently(lambda: site.queue.conclude(receipt, site.worker), site.wait):
        patiently(lambda: site.queue.restore(receipt), site.wait)  # the server has lost what it knew of the job
    site.ledger.forget_attempts(receipt.id)
    leave_nothing(site.config.paths, receipt.id)
    if receipt.state == "done":
        _learn(site, receipt)
        seconds = sum(phase.seconds for phase in receipt.phases.values())
        log.info("job.done", id=receipt.id, seconds=seconds, outputs=len(receipt.outputs))


def _learn(site: Site, receipt: Receipt) -> None:
    """Keep what a job showed, for plans and for `status`."""
    before = calibration.load(site.config.paths.state)
    keep(site, before, calibration.learned(before, receipt))


def keep(site: Site, before: Calibration, after: Calibration) -> None:
    """Write down what has been learned, where it is news."""
    if after != before:
        calibration.save(site.config.paths.state, after)
        patiently(lambda: site.queue.set_calibration(after), site.wait)


def settle_job(site: Site, spec: JobSpec, attempts: Attempts, cause: Cause, reason: str) -> dict[str, Any]:
    """Give a job that came back without a verdict to the line again, or set it aside; never one that is finished but
    for its publishing."""
    finished = site.ledger.intended(spec.id) is not None
    decision = settle.decide(attempts, "stop" if finished else cause, reason)
    if not decision.requeue:
        receipt = ended(spec, decision.attempts, "quarantined", decision.reason)
        leave_no_file(site.config.paths, spec.id)
        site.ledger.record(receipt)
        conclude(site, receipt)
        log.error("job.quarantined", id=spec.id, reason=decision.reason)
        return {"state": "quarantined"}
    site.ledger.note(decision.attempts)
    give_back(site, spec, decision.attempts, not_before=_again_at(cause, decision.attempts))
    log.warning("job.requeued", id=spec.id, cause=cause, reason=reason, crashes=decision.attempts.crashes)
    return {"state": "queued", "reason": reason}


def left_to_other(site: Site, attempts: Attempts) -> bool:
    """Whether another worker that lives has begun this job, for all that the queue gave it to us: it goes on with it,
    and the queue hears whose it is. Both would write the same unfinished files."""
    if not attempts.running or attempts.worker == site.worker or attempts.lock in ("", site.lock):
        return False
    if not gpulock.is_taken(Path(attempts.lock)):
        return False
    log.warning("job.elsewhere", id=attempts.id, worker=attempts.worker)
    patiently(lambda: site.queue.hand_over(attempts.id, site.worker, attempts.worker), site.wait)
    return True


def _again_at(cause: Cause, attempts: Attempts) -> float:
    """Return when the job may be tried again; one without room lets those go before it that may fit."""
    if cause != "no-room":
        return 0.0
    return time.time() + settle.NO_ROOM_AGAIN_S[min(attempts.attempts, len(settle.NO_ROOM_AGAIN_S)) - 1]


def give_back(site: Site, spec: JobSpec, attempts: Attempts, *, not_before: float = 0.0) -> None:
    """Put a job that ran back to its own place in the line, also into one that has forgotten it.

    Args:
        not_before: until then (epoch seconds) it lets others go first; 0 for one that does not.
    """
    later = Place.of(spec, not_before) if not_before else None
    if not patiently(lambda: site.queue.give_back(spec.id, site.worker, attempts.attempts, later), site.wait):
        patiently(lambda: site.queue.submit([spec]), site.wait)
