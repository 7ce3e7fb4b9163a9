"""One execution of one job, as RQ's work horse does it: hand it to the engine, pass on what comes back, conclude.

Speaks to the engine, the ledger and the queue; knows no RQ and no torch. Whatever happens to this process, the ledger
says what the job's state is: the attempt is on disk before the engine gets the job, the receipt before the queue
hears of it.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from safelight.config import Config
from safelight.jobqueue import AWAY, JobQueue
from safelight.jobspec import JobSpec
from safelight.ledger import Attempts, Ledger
from safelight.models import Models
from safelight.paths import Paths
from safelight.receipt import EndState, Receipt
from safelightd import calibration, settle
from safelightd.horse import Request, Requests, Shared
from safelightd.link import EngineGone, Link
from safelightd.logs import Log
from safelightd.patience import patiently
from safelightd.settle import Cause

PROGRESS_EVERY_S = 0.25
"""Steps reach the queue no faster; a phase's beginning always does."""

SHOWN = ("phase", "i", "n", "seconds_left")
"""What of a message `watch` and `status` show."""

CANCEL_READ_S = 5.0
"""One blocking read for a cancellation; it is repeated."""

CANCEL_GRACE_S = 30.0
"""An engine that has not stopped this long after it was asked is killed: a step of a full-size clip takes 10 to 60 s
on a laptop, but the engine looks between the blocks of a step."""

log = Log("safelight.execution")


@dataclass(frozen=True)
class Place:
    """Where an execution happens: what the worker gives every job."""

    config: Config
    models: Models
    ledger: Ledger
    queue: JobQueue
    worker: str
    lock: str
    kill_engine: Callable[[], None]
    """Ends the engine for good; afterwards it holds nothing on the GPU."""
    device_is_well: Callable[[], str | None]
    """Asks a fresh process; None, or what is wrong with the device."""


class Unsettled(Exception):
    """The job came back without a verdict of its own."""

    def __init__(self, cause: Cause, reason: str) -> None:
        super().__init__(reason)
        self.cause: Cause = cause


class Execution:
    """Runs one job; `run` returns what RQ keeps as the result."""

    def __init__(self, place: Place, link: Link, requests: Requests, shared: Shared, job: str, execution: str) -> None:
        self._place = place
        self._link = link
        self._job = job
        self._execution = execution
        self._requests = requests
        self._shared = shared
        self._asked: Request | None = None
        self._asked_at = 0.0
        self._progress_at = 0.0

    # -- the whole path ---------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Bring the job to its end, or give it back to the line."""
        place, job = self._place, self._job
        if receipt := place.ledger.receipt(job):
            return self._concluded(receipt)
        spec = patiently(lambda: place.queue.spec(job))
        if spec is None:
            return {"state": "unknown"}  # the server was wiped; the ledger fills it again
        self._write_down(spec)
        attempts = settle.begin(place.ledger.attempts(job), place.worker, place.lock)
        place.ledger.note(attempts)
        log.info("job.started", id=job, model=spec.model, attempt=attempts.attempts)
        try:
            receipt = self._verdict(spec, attempts)
        except Unsettled as unsettled:
            return settle_job(place, spec, attempts, unsettled.cause, str(unsettled))
        except EngineGone as gone:
            place.kill_engine()
            return self._after_engine(spec, attempts, str(gone))
        return self._concluded(receipt)

    def _write_down(self, spec: JobSpec) -> None:
        """A client on another host could not write the ledger: its job gets its entry when it is first seen here."""
        ledger = self._place.ledger
        if not ledger.knows(spec.id):
            ledger.accept({spec.id: [spec]})

    def _concluded(self, receipt: Receipt) -> dict[str, Any]:
        conclude(self._place, receipt)
        return {"state": receipt.state}

    def _after_engine(self, spec: JobSpec, attempts: Attempts, reason: str) -> dict[str, Any]:
        """The engine is gone. Asked for: nobody's fault. Else the job's, if a fresh process finds the device well."""
        if self._asked == "cancel":
            return self._concluded(self._end(spec, attempts, "cancelled", "cancelled", None))
        if self._asked == "stop":
            return settle_job(self._place, spec, attempts, "stop", "the worker was stopped")
        trouble = self._place.device_is_well()
        return settle_job(self._place, spec, attempts, "return" if trouble else "crash", trouble or reason)

    # -- talking to the engine --------------------------------------------------------------------------------

    def _verdict(self, spec: JobSpec, attempts: Attempts) -> Receipt:
        threading.Thread(target=self._await_cancel, daemon=True).start()
        self._link.send("run", self._execution, spec=spec.model_dump(mode="json"), attempt=attempts.attempts)
        phase = "load"
        while True:
            message = self._next(phase)
            match message["type"]:
                case "phase":
                    phase = message["phase"]
                    self._show(message, always=True)
                case "step":
                    self._show(message, always=False)
                case "done":
                    return Receipt.model_validate(message["receipt"], strict=False)
                case "failed":
                    return self._failed(spec, attempts, message)

    def _next(self, phase: str) -> dict[str, Any]:
        """Wait for the next message of this execution that shows progress; kill an engine that shows none."""
        deadline_s = getattr(self._place.config.settings.worker.deadline_s, _deadline_of(phase))
        last = time.monotonic()
        self._shared.set(busy=True, deadline=last + deadline_s)
        while True:
            until = (
                last + deadline_s if self._asked is None else min(last + deadline_s, self._asked_at + CANCEL_GRACE_S)
            )
            left_s = until - time.monotonic()
            if left_s <= 0:
                raise EngineGone(self._overdue(phase, deadline_s))
            message = self._link.receive(left_s, wakeup=self._requests.descriptor)
            if message is None:
                self._pass_on_request()
            elif message["execution"] == self._execution and message["type"] != "alive":
                return message

    def _overdue(self, phase: str, deadline_s: float) -> str:
        if self._asked is not None:
            return f"the engine did not stop within {CANCEL_GRACE_S:g} s of being asked, in {phase}"
        return f"no progress for {deadline_s:g} s in {phase}"

    def _failed(self, spec: JobSpec, attempts: Attempts, message: dict[str, Any]) -> Receipt:
        kind, text = message["kind"], message["message"]
        if kind == "cancelled" and self._asked == "stop":
            raise Unsettled("stop", "the worker was stopped")
        if kind == "machine":
            raise Unsettled("return", text)
        if kind == "engine":
            raise EngineGone(text)
        state: EndState = "cancelled" if kind == "cancelled" else "failed"
        log.warning("job.failed" if state == "failed" else "job.cancelled", id=spec.id, error=text)
        return self._end(spec, attempts, state, text, message.get("phase"))

    def _end(self, spec: JobSpec, attempts: Attempts, state: EndState, error: str, phase: str | None) -> Receipt:
        receipt = ended(spec, attempts, state, error, phase)
        leave_no_file(self._place.config.paths, spec.id)
        self._place.ledger.record(receipt)
        return receipt

    # -- being asked to stop ----------------------------------------------------------------------------------

    def _await_cancel(self) -> None:
        """Wait for the person's word in a thread of its own: the queue may be away meanwhile."""
        while not patiently(lambda: self._place.queue.wait_for_cancel(self._job, CANCEL_READ_S)):
            pass
        self._requests.ask("cancel")

    def _pass_on_request(self) -> None:
        """Tell the engine what was asked; the first request stands."""
        asked = self._requests.take()
        if asked and self._asked is None:
            self._asked = asked
            self._asked_at = time.monotonic()
            self._link.send("cancel", self._execution, reason=asked)

    def _show(self, message: dict[str, Any], *, always: bool) -> None:
        """Let `watch` and `status` see it; what the queue misses while it is away, nobody needs later."""
        now = time.monotonic()
        if not always and now - self._progress_at < PROGRESS_EVERY_S:
            return
        self._progress_at = now
        shown = {key: value for key, value in message.items() if key in SHOWN}
        try:
            self._place.queue.progress(self._job, shown)
        except AWAY as error:
            log.debug("progress.unseen", error=error)


def _deadline_of(phase: str) -> str:
    return {"plan": "load", "verify": "publish"}.get(phase, phase)


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
            "finished_at": datetime.now().astimezone().isoformat(timespec="seconds"),
        }
    )


def leave_no_file(paths: Paths, job: str) -> None:
    """Remove what a job that ended without an output had begun to write; a killed engine could not."""
    if (paths.unfinished / job).exists():
        shutil.rmtree(paths.unfinished / job)


def conclude(place: Place, receipt: Receipt) -> None:
    """Tell the queue how a job ended; the ledger has its receipt already."""
    patiently(lambda: place.queue.conclude(receipt, place.worker))
    place.ledger.forget_attempts(receipt.id)
    if receipt.state == "done":
        _learn(place, receipt)
        seconds = sum(phase.seconds for phase in receipt.phases.values())
        log.info("job.done", id=receipt.id, seconds=seconds, outputs=len(receipt.outputs))


def _learn(place: Place, receipt: Receipt) -> None:
    """Keep the pace for plans and for `status`."""
    before = calibration.load(place.config.paths.state)
    after = calibration.learned(before, receipt, place.models[receipt.spec.model])
    if after != before:
        calibration.save(place.config.paths.state, after)
        patiently(lambda: place.queue.set_calibration(after))


def settle_job(place: Place, spec: JobSpec, attempts: Attempts, cause: Cause, reason: str) -> dict[str, Any]:
    """Give a job that came back without a verdict to the line again, or set it aside."""
    decision = settle.decide(attempts, cause, reason)
    if not decision.requeue:
        receipt = ended(spec, decision.attempts, "quarantined", decision.reason)
        leave_no_file(place.config.paths, spec.id)
        place.ledger.record(receipt)
        conclude(place, receipt)
        log.error("job.quarantined", id=spec.id, reason=decision.reason)
        return {"state": "quarantined"}
    place.ledger.note(decision.attempts)
    patiently(lambda: place.queue.give_back(spec.id, place.worker, decision.attempts.attempts))
    log.warning("job.requeued", id=spec.id, cause=cause, reason=reason, crashes=decision.attempts.crashes)
    return {"state": "queued", "reason": reason}
