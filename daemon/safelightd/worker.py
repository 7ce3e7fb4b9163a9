"""The RQ worker: one GPU, one RQ queue of its own, one job at a time.

RQ keeps its bookkeeping (a forked work horse a job, registries, results); what may never go wrong is ours: jobs come
from the shared waiting line, one at a time; the GPU is locked; orphans are recovered from the ledger and not from
RQ's registries; an engine is dead before anything is said about a dead horse; an absent server is waited for.
Never imports torch: a fork after torch has run hangs.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from types import FrameType
from typing import Any

import redis
from rq.exceptions import StopRequested
from rq.serializers import JSONSerializer
from rq.timeouts import HorseMonitorTimeoutException

from safelight import cancelling, models, queueserver
from safelight.config import Config
from safelight.errors import LedgerDamaged, NoUsableGpu, QueueUnreachable
from safelight.jobqueue import JobQueue
from safelight.ledger import Ledger
from safelight.machine import Machine
from safelight.place import Place
from safelight.queueserver import AWAY
from safelightd import (
    calibration,
    gpulock,
    gpustate,
    holds,
    linux,
    missing_gpu,
    orphans,
    probe,
    recovery,
    shortage,
    systemd,
)
from safelightd.awake import Awake
from safelightd.conclusion import Site
from safelightd.execution import Execution
from safelightd.horse import Requests, Shared
from safelightd.link import ENGINE, EngineProcess
from safelightd.logs import Log
from safelightd.loneworker import SERVER_TIMEOUT_S, LoneWorker
from safelightd.notices import Notices
from safelightd.patience import patiently
from safelightd.safejob import JOB_FUNCTION, RESULT_TTL_S, SafeJob, SafeQueue

HEARTBEAT_S = 5
WORKER_TTL_S = 30
"""RQ forgets a silent worker after this and a minute; `status` after FORGOTTEN_S."""

AWAY_POLL_S = 1.0
FORGOTTEN_S = 90
HOLD_POLL_S = 2.0
"""How often holds are looked at while one is in force or nothing waits; a submission wakes the worker at once."""

log = Log("safelight.worker")


class GpuWorker(LoneWorker):
    """One device's worker. Its name is the host's and the device's, so that a restart finds its own orphans."""

    queue_class = SafeQueue
    job_class = SafeJob

    def __init__(
        self,
        config: Config,
        machine: Machine,
        server: redis.Redis,
        engine: Sequence[str] = ENGINE,
        awake: Awake | None = None,
    ) -> None:
        self.config = config
        self.machine = machine
        name = gpulock.worker_name(machine)
        self.line = JobQueue(server, keep_days=config.settings.queue.keep_days)
        super().__init__(
            [name],
            name=name,
            connection=server,
            serializer=JSONSerializer,
            worker_ttl=WORKER_TTL_S,
            job_monitoring_interval=HEARTBEAT_S,
            default_result_ttl=RESULT_TTL_S,
            log_job_description=False,
        )
        self.lock = gpulock.lock_path(machine, config)
        self.engine = EngineProcess(config, machine, engine)
        self.shared = Shared()
        self.requests = Requests()
        self.trouble = holds.GpuTrouble()
        self.setback = holds.Setback()
        self.awake = awake or Awake()
        self.card = gpustate.Watch(config, machine.uuid)
        self.notices = Notices(config.settings.notify)
        self.stopping = threading.Event()
        self._waiting = False
        self._unsure = False
        self._unwritten = ""
        self._late = recovery.Late()
        self._silence = orphans.Silence()
        self._elsewhere: list[str] = []
        self._idle_since = time.monotonic()
        self.site = Site(
            config=config,
            models=models.load(config),
            ledger=Ledger(config.paths),
            queue=self.line,
            worker=name,
            lock=str(self.lock),
            kill_engine=self._kill_engine_from_horse,
            device_is_well=lambda: probe.gpu_is_well(config, machine),
            wait=lambda _seconds: True,  # the worker itself waits in its loop alone, where a signal ends the wait
        )
        SafeJob.allowed = {JOB_FUNCTION: self._run_in_horse}

    # -- a life -----------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Work until asked to stop; returns the exit status: 0 when asked, 1 when something ended it.

        Raises:
            BadConfig: another worker has the device, or jobs are not safe on this server.
            QueueUnreachable: the server went away while the worker started.
        """
        held = gpulock.take(self.lock)
        self._install_signal_handlers()
        try:
            queueserver.check_server(self.connection)
            self._probe()
            recovery.sweep(self.config.paths)
            self.recover()
            systemd.notify("READY=1", "STATUS=Waiting for jobs")
            self.work(logging_level="WARNING")
        except AWAY as error:
            raise QueueUnreachable(f"The queue server went away while the worker started: {error}") from error
        finally:
            self.engine.stop(timeout_s=10)
            self.awake.leave()
            self.notices.close()
            with suppress(*AWAY):
                self.line.forget_worker(self.name)
            os.close(held)
        # Python takes handlers away before it ends: a second SIGTERM would end us by that signal, and not with 0.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        return 0 if self.stopping.is_set() else 1

    def recover(self) -> None:
        """Take up what dead workers left, an earlier life of this one first of all: from the ledger, whatever RQ's
        registries say."""
        self._late = recovery.Late(self.site.ledger.open_submissions())
        self._clear_rq()
        self._take_up([found.id for found in self.site.ledger.interrupted()])
        recovery.fill(self.site, self._elsewhere)
        self.line.set_calibration(calibration.load(self.config.paths.state))

    def _take_up(self, started: list[str]) -> None:
        """Put back what workers left that have died since the last look; those of them that live keep theirs."""
        self._elsewhere = orphans.take_up(self.site, self._silence, started)

    def _clear_rq(self) -> None:
        """Empty this worker's own RQ queue and registries: the lock says that nobody else uses them."""
        queue = self.queues[0]
        started = queue.started_job_registry
        taken = self.connection.lrange(queue.key, 0, -1)
        taken += [entry.partition(b":")[0] for entry in self.connection.zrange(started.key, 0, -1)]
        left = [SafeJob.key_for(entry.decode(errors="replace")) for entry in taken]  # RQ expires only what has ended
        self.connection.delete(*left, queue.key, queue.intermediate_queue_key, started.key)
        self.connection.delete(self.key, self.executions_key)
        queue.finished_job_registry.cleanup()
        queue.failed_job_registry.cleanup()

    # -- taking jobs ------------------------------------------------------------------------------------------

    def dequeue_job_and_maintain_ttl(
        self, _timeout: int | None, _max_idle_time: int | None = None
    ) -> tuple[SafeJob, SafeQueue] | None:
        """Return the next due job once no hold is set; waits for one as long as it takes."""
        self._state = "idle"
        while True:
            if self.stopping.is_set():
                raise StopRequested
            try:
                if taken := self._take():
                    return taken
            except (*AWAY, QueueUnreachable) as error:
                log.warning("queue.away", error=error)
                self._wait_a_while("The queue server is away")
            except OSError as error:
                log.error("ledger.unusable", error=error)
                self._wait_a_while(f"The ledger cannot be used: {error}")

    def _wait_a_while(self, status: str) -> None:
        """Wait before trying again; what was under way may have been done, and is then found out."""
        self._unsure = True
        systemd.notify("WATCHDOG=1", f"STATUS={status}")
        self._wait(lambda: time.sleep(AWAY_POLL_S))  # a signal ends it

    def _take(self) -> tuple[SafeJob, SafeQueue] | None:
        self._mind_sleep()
        in_force = self._look_at_holds()
        self._say(in_force)
        self._write_cancellations()
        if self._unsure or not self.line.filled():
            self.recover()
            self._unsure = False
        else:
            self._take_up(self._elsewhere)
        self.notices.look(self.line.counts(), in_force)
        due_in: float | None = None
        if not in_force:
            classes = holds.open_classes(self.config.settings.policy.window, holds.wall_clock())
            where, due_in = self.line.next_due(classes, time.time())
            if where and (taken := self._dispatch(where)):
                return taken
        self._look_for_late()
        self._retire_idle_engine()
        wait_s = HOLD_POLL_S if due_in is None else min(due_in, HOLD_POLL_S)
        self._wait(lambda: self.line.wait_for_wake(self.name, wait_s))
        return None

    def _write_cancellations(self) -> None:
        """Write receipts of what clients have cancelled, some at a time; a full disk of them stops no other job."""
        try:
            cancelling.write_down(self.line, self.site.ledger, most=cancelling.RECORD_CHUNK)
            self._unwritten = ""
        except OSError as error:
            if self._unwritten != str(error):
                log.warning("cancellation.unwritten", error=error, remedy="it is tried again; the queue remembers it")
            self._unwritten = str(error)

    def _dispatch(self, where: str) -> tuple[SafeJob, SafeQueue] | None:
        """Move one job from the line into our own queue, as an RQ job of this one execution, and take it from there."""
        place = Place.parse(where)
        if place is None:
            log.error("queue.malformed", place=where)
            self.line.drop(where)
            return None
        execution = f"{place.id}_{time.time_ns()}"
        queue = self.queues[0]
        entry = SafeJob.of(place.id, execution, queue)
        if not self.line.dispatch(self.name, place, queue.key, execution, entry.key, entry.to_dict()):
            return None
        taken = SafeQueue.dequeue_any(
            self.queues, None, connection=self.connection, job_class=SafeJob, serializer=JSONSerializer
        )
        if taken is None or taken[0].id != execution:
            raise QueueUnreachable(f"Something else is in {queue.key}; it is emptied and the job taken again.")
        return taken

    def _look_at_holds(self) -> dict[str, str]:
        if self.trouble.due():
            self._probe()
        found = self._holds() | self.card.holds(own=self.engine.pid)
        self.line.set_holds(self.name, found)
        return found

    def _holds(self) -> dict[str, str]:
        user_hold, gpu, machine = self.line.user_hold(), self.trouble.reason, self.setback.reason
        return holds.read(self.config, user_hold=user_hold, gpu=gpu, machine=machine, sleep=self.awake.hold)

    def _mind_sleep(self) -> None:
        """Let the machine sleep with nothing on the GPU; when it is back, nothing starts before a probe."""
        self.awake.look()
        if self.awake.hold:
            self.engine.stop(timeout_s=1)
            self.awake.let_sleep()
        elif self.awake.take_resumed():
            self.engine.stop(timeout_s=10)  # its context may be broken, and a broken one poisons its process
            self._probe()

    def _probe(self) -> None:
        """Ask a fresh process whether the device works, and read the machine again."""
        systemd.notify("WATCHDOG=1", "STATUS=Probing the device")
        trouble = probe.gpu_is_well(self.config, self.machine)
        if trouble:
            self.trouble.failed(trouble)
            log.error("gpu.trouble", reason=trouble)
            return
        self.trouble.lifted()
        try:
            self.machine = probe.read_machine(self.config)
        except NoUsableGpu as error:
            self.trouble.failed(str(error))

    def _say(self, in_force: dict[str, str]) -> None:
        """Tell RQ, `status` and systemd that this worker lives, and why it waits."""
        self.heartbeat()
        self._publish(f"running, pid {self.engine.pid}" if self.engine.running() else "not running")
        systemd.notify("WATCHDOG=1", f"STATUS={_told(in_force) or 'Waiting for jobs'}")

    def _publish(self, engine: str) -> None:
        machine = self.machine.model_dump_json()
        self.line.publish_worker(self.name, FORGOTTEN_S, device=self.machine.device, machine=machine, engine=engine)

    def _say_running(self, job: str) -> None:
        """Tell systemd how far the job is, and what lets nothing start after it."""
        parts = (f"Running {job}", self.shared.progress, _told(self._holds()))
        systemd.notify(f"STATUS={'; '.join(filter(None, parts))}")

    def _look_for_late(self) -> None:
        """Queue what a client wrote down and did not live to hand over."""
        if late := self._late.look(self.site.ledger, time.monotonic()):
            recovery.queue_submissions(self.site, late, self._elsewhere)

    def _retire_idle_engine(self) -> None:
        """A warm engine keeps its imports and compiled code; after idle_exit_s nobody needs them."""
        if self.engine.running() and time.monotonic() - self._idle_since > self.config.settings.worker.idle_exit_s:
            self.engine.stop(timeout_s=10)
            log.info("engine.retired")

    def _wait(self, wait: Callable[[], object]) -> None:
        """Block where a SIGTERM may interrupt: nothing is half done here."""
        self._waiting = True
        try:
            if not self.stopping.is_set():
                wait()
        finally:
            self._waiting = False

    # -- running one ------------------------------------------------------------------------------------------

    def execute_job(self, job: SafeJob, queue: SafeQueue) -> None:
        """Have the horse run the job, then make sure that the job is settled, however the horse ended."""
        self.awake.job_starts()
        self.engine.ensure()
        self.shared.set(busy=False)
        self.shared.progress = ""
        self.requests.forget()
        try:
            execution = self.prepare_execution(job)
            self._say_running(str(job.args[0]))
            self.fork_work_horse(job, queue)
            self.monitor_work_horse(job, queue, execution)
        except AWAY as error:
            self._unsure = True
            log.warning("queue.away", error=error)  # RQ's copy of the result is lost; ours is on disk
        self.executions.clear()
        self._idle_since = time.monotonic()
        self._settle(str(job.args[0]))
        self.awake.job_ended()
        if self.config.settings.worker.release == "process":
            self.engine.stop(timeout_s=10)

    def _settle(self, job: str) -> None:
        """A horse that was killed concluded nothing: the job goes back to the line, now or when the server is back."""
        try:
            if self.line.running().get(job) == self.name:
                orphans.settle_own(self.site, job, "the process that ran it was killed")
            self.notices.ended(self.site.ledger.receipt(job))
        except (*AWAY, QueueUnreachable, OSError, LedgerDamaged) as error:
            self._unsure = True
            log.warning("job.unsettled", id=job, error=error)
        reason, of_all = self.shared.take_setback()
        if reason:
            log.error("machine.setback", reason=reason)
            self.notices.taken_back(reason)
            self.setback.failed(reason, of_all=of_all)
        else:
            self.setback.lifted()
        if self.trouble.reason is None and not self.engine.running() and not self.awake.must_stop:
            self._probe()

    def _run_in_horse(self, job: str, execution: str) -> dict[str, Any]:
        """What RQ calls in the horse."""
        link = self.engine.link
        if link is None:
            raise RuntimeError("a horse without an engine")  # execute_job ensures one before it forks
        self.shared.set(busy=True, deadline=time.monotonic() + HEARTBEAT_S)
        site = replace(self.site, wait=self.requests.wait_unless_stopped)
        result = Execution(site, link, self.requests, self.shared, job, execution).run()
        self.shared.set(busy=False)
        return result

    def _kill_engine_from_horse(self) -> bool:
        """The horse is not the engine's parent: it kills, and the worker reaps at its next `ensure`."""
        if self.engine.pid is None:
            return False
        killed = shortage.was_killed(self.engine.pid)
        linux.kill_and_await(self.engine.pid)
        return killed

    # -- RQ's hooks -------------------------------------------------------------------------------------------

    def wait_for_horse(self) -> tuple[int | None, int | None, Any]:
        """Wait for the horse; when it left the engine busy, the engine is dead before RQ says anything about it."""
        if not self.awake.wait_for(self.horse_pid):
            raise HorseMonitorTimeoutException  # RQ then calls `maintain_heartbeats`, as it does every HEARTBEAT_S
        ended = super().wait_for_horse()
        if self.shared.busy:
            self.engine.kill()
        return ended

    def setup_work_horse_signals(self) -> None:
        """In the horse: SIGTERM asks the engine to stop; it does not end the horse."""
        self.requests.on_sigterm()

    def kill_horse(self, sig: signal.Signals = signal.SIGKILL) -> None:
        """Kill the engine, then the horse: the other way round the engine would finish a job nobody waits for."""
        self.engine.kill()
        super().kill_horse(sig)

    def main_work_horse(self, job: SafeJob, queue: SafeQueue) -> None:
        """Run in the fork: it dies with the worker."""
        linux.die_with_parent(self.pid)()
        self.awake.leave()
        super().main_work_horse(job, queue)

    def maintain_heartbeats(self, job: SafeJob, execution: Any) -> None:
        """Say that we live while the horse works; the watchdog only hears of true progress."""
        self.awake.look()
        if self.stopping.is_set() or self.awake.must_stop:
            self._ask_horse_to_stop()  # the signal may have come while the horse was being made
        if self.awake.overdue:
            self.engine.kill()  # the horse, which was asked to stop, puts the job back
        if not self.shared.busy or time.monotonic() < self.shared.deadline:
            systemd.notify("WATCHDOG=1")
        if self.awake.must_stop:
            return  # a server that hangs would take the time that the engine has to leave
        try:
            super().maintain_heartbeats(job, execution)
            self._publish(f"running, pid {self.engine.pid}")
            self._say_running(str(job.args[0]))
        except AWAY as error:
            self._unsure = True  # a client may have had to leave its jobs to the ledger
            log.debug("queue.away", error=error)  # the job goes on without a server

    def _finalize_success(self, job: SafeJob, queue: SafeQueue, execution: Any, return_value: Any) -> None:
        wait = self.requests.wait_unless_stopped
        patiently(lambda: super(GpuWorker, self)._finalize_success(job, queue, execution, return_value), wait)

    def request_stop(self, _signum: int, _frame: FrameType | None) -> None:
        """On SIGTERM or SIGINT: take no more jobs; the running one stops at its next step and keeps its place."""
        self.stopping.set()
        self._stop_requested = True
        if self.horse_pid:
            self._ask_horse_to_stop()
        elif self._waiting:
            raise StopRequested

    def _ask_horse_to_stop(self) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.horse_pid, signal.SIGTERM)

    request_force_stop = request_stop


def serve(config: Config, engine: Sequence[str] = ENGINE, awake: Awake | None = None) -> int:
    """Run the worker of the configured device until a signal; returns the exit status.

    Raises:
        BadConfig: see GpuWorker.run; also a server that refuses the password.
    """
    signal.signal(signal.SIGTERM, _leave)  # until the worker takes signals itself, nothing is under way
    machine = missing_gpu.await_device(config, FORGOTTEN_S)
    server = _await_server(config)
    return GpuWorker(config, machine, server, engine, awake).run()


def _told(in_force: dict[str, str]) -> str:
    reasons = "; ".join(f"{name}: {reason}" for name, reason in in_force.items())
    return f"Held: {reasons}" if reasons else ""


def _leave(_signum: int, _frame: FrameType | None) -> None:
    sys.exit(0)


def _await_server(config: Config) -> redis.Redis:
    """Wait for the server: it may be loading, or start after us."""
    systemd.notify("STATUS=Waiting for the queue server")
    while True:
        try:
            return queueserver.connect(config.url, timeout_s=SERVER_TIMEOUT_S, retries=1)
        except QueueUnreachable:
            time.sleep(0.2)  # a signal ends it
