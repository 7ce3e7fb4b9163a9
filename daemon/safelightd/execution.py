"""One execution of one job, as RQ's work horse does it: hand it to the engine, pass on what comes back, conclude.

Speaks to the engine, the ledger and the queue; knows no RQ and no torch. Whatever happens to this process, the ledger
says what the job's state is: the attempt is on disk before the engine gets the job, the receipt before the queue
hears of it.
"""

from __future__ import annotations

import threading
import time
from typing import Any

from safelight.errors import LedgerDamaged, QueueUnreachable
from safelight.jobspec import JobSpec
from safelight.ledger import Attempts, leave_no_file
from safelight.plan import Overrun, Plan
from safelight.queueserver import AWAY
from safelight.receipt import EndState, Phase, Receipt
from safelight.rung import Circumstances
from safelightd import calibration, holds, room, settle, shortage
from safelightd.conclusion import (
    Site,
    conclude,
    ended,
    keep,
    left_to_other,
    rejected,
    settle_job,
    spec_of,
)
from safelightd.horse import Request, Requests, Shared
from safelightd.link import EngineGone, Link
from safelightd.logs import Log
from safelightd.patience import patiently
from safelightd.settle import Cause

PROGRESS_EVERY_S = 0.25
"""Steps reach the queue no faster; a phase's beginning always does."""

PROGRESS_AWAY_S = 10.0
"""After a try on an absent server, none for so long: each takes a second, and the engine's verdict may wait behind."""

NEXT_IN_LINE = 50
"""How far into the line is looked for jobs of one shape: far enough to tell a night of them from one."""

SHOWN = ("phase", "i", "n", "seconds_left")
"""What of a message `watch` and `status` show."""

TIMES_EXPECTED = 3.0
"""What the plan expects may take so many times as long before it counts as no progress: on a CPU one step of a large
clip takes hours, and a plan of a kind that this machine has not run yet is off by up to 2."""

CANCEL_READ_S = 5.0
"""One blocking read for a cancellation; it is repeated."""

CANCEL_GRACE_S = 30.0
"""An engine that has not stopped this long after it was asked is killed: a step of a full-size clip takes 10 to 60 s
on a laptop, but the engine looks between the blocks of a step."""

log = Log("safelight.execution")


class Unsettled(Exception):
    """The job came back without a verdict of its own."""

    def __init__(self, cause: Cause, attempts: Attempts, reason: str) -> None:
        super().__init__(reason)
        self.cause: Cause = cause
        self.attempts = attempts


class Execution:
    """Runs one job; `run` returns what RQ keeps as the result."""

    def __init__(self, site: Site, link: Link, requests: Requests, shared: Shared, job: str, execution: str) -> None:
        self._site = site
        self._link = link
        self._job = job
        self._execution = execution
        self._requests = requests
        self._shared = shared
        self._asked: Request | None = None
        self._asked_at = 0.0
        self._progress_again_at = 0.0
        self._started = False
        self._phase: Phase = "load"
        self._plan: Plan | None = None
        self._overrun: Overrun | None = None
        self._oom_kills_before = shortage.oom_kills()

    # -- the whole path ---------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Bring the job to its end, or give it back to the line.

        Raises:
            OSError: the ledger cannot be written; the worker takes the job up when it can.
            QueueUnreachable: the server is away and the worker stops; the ledger knows how far the job is.
        """
        try:
            return self._run()
        except LedgerDamaged as damaged:
            return rejected(self._site, self._job, str(damaged))
        except OSError as error:
            self._shared.set_setback(f"{error}")
            raise

    def _run(self) -> dict[str, Any]:
        site, job = self._site, self._job
        if receipt := site.ledger.receipt(job):
            return self._concluded(receipt)
        spec = patiently(lambda: spec_of(site, job), site.wait)
        if spec is None:
            return rejected(site, job, "neither the queue nor the ledger knows what was asked for")
        self._write_down(spec)
        before = site.ledger.attempts(job)
        if left_to_other(site, before):
            return {"state": "running", "worker": before.worker}
        attempts = settle.begin(before, site.worker, site.lock)
        site.ledger.note(attempts)
        log.info("job.started", id=job, model=spec.model, attempt=attempts.attempts)
        try:
            receipt = self._verdict(spec, attempts)
        except Unsettled as unsettled:
            if unsettled.cause == "return":
                self._shared.set_setback(str(unsettled))
            return settle_job(site, spec, unsettled.attempts, unsettled.cause, str(unsettled))
        except EngineGone as gone:
            killed = site.kill_engine()
            return self._after_engine(spec, attempts, self._oom_kill(killed=killed) or str(gone))
        return self._concluded(receipt)

    def _write_down(self, spec: JobSpec) -> None:
        """A client on another host could not write the ledger: its job gets its entry when it is first seen here."""
        ledger = self._site.ledger
        if not ledger.knows(spec.id):
            ledger.accept({spec.id: [spec]})

    def _concluded(self, receipt: Receipt) -> dict[str, Any]:
        conclude(self._site, receipt)
        return {"state": receipt.state}

    def _oom_kill(self, *, killed: bool) -> str:
        """Take the engine's death for an overrun of its plan where the kernel killed it for memory; say so then."""
        if not killed or shortage.oom_kills() == self._oom_kills_before:
            return ""
        self._overrun = shortage.overrun(self._plan, self._phase, "host")
        return f"the kernel killed the engine in {self._phase}: the machine ran out of memory"

    def _after_engine(self, spec: JobSpec, attempts: Attempts, reason: str) -> dict[str, Any]:
        """The engine is gone. After the job was done: no matter. While it published: the next attempt goes on there.
        Asked for: nobody's fault. Before it said a word of this job: the installation's. Else, if the disks are there
        and a fresh process finds the device well, its plan's where memory ran out, and the job's otherwise."""
        if receipt := self._site.ledger.receipt(spec.id):
            return self._concluded(receipt)
        if self._site.ledger.intended(spec.id):
            self._shared.set_setback(f"the engine died while publishing: {reason}")
            return settle_job(self._site, spec, attempts, "return", reason)
        if self._asked == "cancel":
            return self._concluded(self._end(spec, attempts, "cancelled", "cancelled", None))
        if self._asked == "stop":
            return settle_job(self._site, spec, self._with_overrun(attempts), "stop", "the worker was stopped")
        if trouble := holds.of_disks(self._site.config) or self._site.device_is_well():
            return settle_job(self._site, spec, attempts, "return", trouble)
        if not self._started:
            reason = f"the engine did not start: {reason}; its log says why"
            self._shared.set_setback(reason)
            return settle_job(self._site, spec, attempts, "no-start", reason)
        if self._overrun is None:
            return settle_job(self._site, spec, attempts, "crash", reason)
        attempts = self._with_overrun(attempts)
        self._site.ledger.note(attempts)  # first: whatever dies from here on, the next plan is a smaller one
        before = calibration.load(self._site.config.paths.state)
        keep(self._site, before, calibration.overran(before, self._overrun, self._plan))
        return settle_job(self._site, spec, attempts, "oom", reason)

    def _with_overrun(self, attempts: Attempts) -> Attempts:
        return settle.overran(attempts, self._overrun) if self._overrun else attempts

    # -- talking to the engine --------------------------------------------------------------------------------

    def _verdict(self, spec: JobSpec, attempts: Attempts) -> Receipt:
        threading.Thread(target=self._await_cancel, daemon=True).start()
        self._link.send(
            "run",
            self._execution,
            spec=spec.model_dump(mode="json"),
            attempt=attempts.attempts,
            waiting=1 + self._alike_in_line(spec),
            again=self._has_loras_of_another(spec),
            overruns=[overrun.model_dump(mode="json") for overrun in attempts.overruns],
            refused=attempts.refused,
        )
        while True:
            message = self._next()
            match message["type"]:
                case "phase":
                    self._phase = message["phase"]
                    if "plan" in message:
                        self._plan = Plan.model_validate(message["plan"], strict=False)
                    self._show(message, always=True)
                case "step":
                    self._show(message, always=False)
                case "done":
                    return Receipt.model_validate(message["receipt"], strict=False)
                case "failed":
                    return self._failed(spec, attempts, message)

    def _alike_in_line(self, spec: JobSpec) -> int:
        """Return how many of the next jobs are of this one's shape; a rung that is slow to prepare pays for many."""
        try:
            return self._site.queue.alike(spec, NEXT_IN_LINE)
        except AWAY:
            return 0

    def _has_loras_of_another(self, spec: JobSpec) -> bool:
        """Whether one of the next jobs has the same LoRAs; what is made of them is worth keeping then."""
        try:
            return bool(spec.loras) and self._site.queue.share_loras(spec, NEXT_IN_LINE)
        except AWAY:
            return False

    def _next(self) -> dict[str, Any]:
        """Wait for the next message of this execution that shows progress; kill an engine that shows none."""
        phase = self._phase
        deadline_s = self._deadline_s(phase)
        last = time.monotonic()
        self._shared.set(busy=True, deadline=last + deadline_s)
        while True:
            self._pass_on_request()  # also while messages come faster than they are read
            until = (
                last + deadline_s if self._asked is None else min(last + deadline_s, self._asked_at + CANCEL_GRACE_S)
            )
            left_s = until - time.monotonic()
            if left_s <= 0:
                raise EngineGone(self._overdue(phase, deadline_s))
            message = self._link.receive(left_s, wakeup=self._requests.descriptor)
            if message and message["execution"] == self._execution:
                self._started = True
                if message["type"] != "alive":
                    return message

    def _deadline_s(self, phase: Phase) -> float:
        """Return for how long a phase may show no progress: as the settings say, or longer where the plan is."""
        setting: float = getattr(self._site.config.settings.worker.deadline_s, _deadline_of(phase))
        return max(setting, TIMES_EXPECTED * (self._plan.longest_silence_s(phase) if self._plan else 0.0))

    def _overdue(self, phase: str, deadline_s: float) -> str:
        if self._asked is not None:
            return f"the engine did not stop within {CANCEL_GRACE_S:g} s of being asked, in {phase}"
        return f"no progress for {deadline_s:g} s in {phase} ([worker.deadline_s] {_deadline_of(phase)})"

    def _failed(self, spec: JobSpec, attempts: Attempts, message: dict[str, Any]) -> Receipt:
        kind, text = message["kind"], message["message"]
        if kind == "cancelled" and self._asked == "stop":
            raise Unsettled("stop", attempts, "the worker was stopped")
        if kind in ("machine", "spent"):
            raise Unsettled("return", attempts, text)
        is_patient = self._asked != "cancel" and attempts.attempts < settle.NO_ROOM_TRIES_MAX
        if kind == "no-room" and is_patient:
            self._shared.set_setback(text, of_all=False)
            raise Unsettled("no-room", attempts, text)
        if kind == "too-large" and is_patient and self._fits_another(spec, attempts):
            raise Unsettled("no-room", attempts, f"another card may have room for it: {text}")
        if kind == "oom":
            self._overrun = Overrun.model_validate(message["overrun"])
        if kind in ("engine", "oom"):
            raise EngineGone(text)
        if kind == "refused" and not attempts.refused and self._asked != "cancel":
            raise Unsettled("refused", settle.refused(attempts, message["precision"]), text)
        state: EndState = "cancelled" if kind == "cancelled" else "failed"
        if state == "failed" and self._asked != "cancel" and (trouble := holds.of_disks(self._site.config)):
            raise Unsettled("return", attempts, f"{trouble} ({text})")
        log.warning("job.failed" if state == "failed" else "job.cancelled", id=spec.id, error=text)
        return self._end(spec, attempts, state, text, message.get("phase"))

    def _fits_another(self, spec: JobSpec, attempts: Attempts) -> bool:
        """Whether it fits the card of another worker, which takes it when it comes to it."""
        site = self._site
        around = Circumstances(overruns=attempts.overruns, refused=attempts.refused)
        learned = calibration.load(site.config.paths.state)
        workers = patiently(site.queue.workers, site.wait)
        others = [row.machine for row in workers if row.machine and row.name != site.worker]
        models = site.models.current()
        return any(room.fits(spec, room.idle(each, site.config), models, learned, around) for each in others)

    def _end(self, spec: JobSpec, attempts: Attempts, state: EndState, error: str, phase: str | None) -> Receipt:
        receipt = ended(spec, attempts, state, error, phase)
        leave_no_file(self._site.config.paths, spec.id)
        self._site.ledger.record(receipt)
        return receipt

    # -- being asked to stop ----------------------------------------------------------------------------------

    def _await_cancel(self) -> None:
        """Wait for the person's word in a thread of its own: the queue may be away meanwhile."""
        try:
            while not patiently(lambda: self._site.queue.wait_for_cancel(self._job, CANCEL_READ_S), self._site.wait):
                pass
        except QueueUnreachable:
            return  # the worker stops: the job's field tells the next attempt
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
        step = f" {message['i']} of {message['n']}" if "i" in message else ""
        self._shared.progress = message["phase"] + step
        now = time.monotonic()
        if now < self._progress_again_at - (PROGRESS_EVERY_S if always else 0.0):
            return
        self._progress_again_at = now + PROGRESS_EVERY_S
        shown = {key: value for key, value in message.items() if key in SHOWN}
        try:
            self._site.queue.progress(self._job, shown)
        except AWAY as error:
            self._progress_again_at = time.monotonic() + PROGRESS_AWAY_S
            log.debug("progress.unseen", error=error)


def _deadline_of(phase: str) -> str:
    return {"plan": "load", "verify": "publish"}.get(phase, phase)
