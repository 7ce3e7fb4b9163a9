"""The machine stays awake while a job runs, and a job never spans a sleep: what was on the GPU may be lost.

Says when the machine is about to sleep and when it was asleep; the worker decides what that means for a job. Without a
bus or without logind nothing is inhibited, and a sleep is noticed afterwards by the clocks. No fault of the bus reaches
the worker.
"""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from safelightd.logind import Denied, Logind
from safelightd.logs import Log

BLOCKED = ("sleep", "idle", "handle-lid-switch")
"""Asked for one by one: polkit may allow some and not others. A closed lid heeds an inhibitor of its own alone."""

JUMP_S = 2.0
"""More than this between two looks, and the machine slept."""

DELAY_SHARE = 0.6
"""Of logind's delay, what a running job gets to stop by itself; the rest is for killing its engine and putting it back
on its place."""

WITHOUT_LOGIND_S = 3.0
"""The same where no logind says how long it waits: 0.6 of its default."""

ASK_AGAIN_S = 0.5
AWAKE_AGAIN_S = 120.0
"""CLOCK_MONOTONIC stands still in sleep: who was to sleep and has been awake for so long is not going to."""

CONNECT_AGAIN_S = 60.0

log = Log("safelight.awake")


def asleep_s() -> float:
    """Return how long this machine has slept since it was booted: CLOCK_BOOTTIME alone counts that."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) - time.clock_gettime(time.CLOCK_MONOTONIC)


class Awake:
    """Inhibitors, and what is known about sleep. For one thread; a fork calls `leave`."""

    def __init__(self, asleep_s: Callable[[], float] = asleep_s) -> None:
        self._asleep_s = asleep_s
        self._slept_s = asleep_s()
        self._logind: Logind | None = None
        self._connect_at = 0.0
        self._delay: int | None = None
        self._blocks: list[int] = []
        self._job_runs = False
        self._warned = False
        self._sleep_at: float | None = None
        self._resumed = False
        self._stop_since: float | None = None
        self._connect()

    # -- while a job runs -------------------------------------------------------------------------------------

    def job_starts(self) -> None:
        """Keep the machine awake, as far as it lets us."""
        self._job_runs = True
        self._stop_since = None
        self._connect()
        self._block()

    def job_ended(self) -> None:
        """Let the machine sleep when it wants."""
        self._job_runs = False
        self._stop_since = None
        self._close(self._blocks)

    def wait_for(self, process: int) -> bool:
        """Wait for a process to end; False when the worker should `look` instead. Waits for nothing without a bus."""
        if self._logind is None and not self.must_stop:
            return True
        with suppress(ProcessLookupError):
            watched = os.pidfd_open(process)
            try:
                readers = [watched, *([self._logind.descriptor] if self._logind else [])]
                ready, _, _ = select.select(readers, [], [], ASK_AGAIN_S if self.must_stop else None)
            finally:
                os.close(watched)
            return watched in ready
        return True

    @property
    def must_stop(self) -> bool:
        """Whether a running job must leave the GPU: the machine is about to sleep, or it slept under the job."""
        return self._sleep_at is not None or self._resumed

    @property
    def overdue(self) -> bool:
        """Whether a job that must stop has had its time to do so by itself."""
        if not self.must_stop:
            return False
        if self._stop_since is None:
            self._stop_since = time.monotonic()
        given_s = self._logind.delay_max_s * DELAY_SHARE if self._logind else WITHOUT_LOGIND_S
        return time.monotonic() - self._stop_since >= given_s

    # -- what happened ----------------------------------------------------------------------------------------

    def look(self) -> None:
        """Hear what logind says and read the clocks; returns at once."""
        self._connect()
        with self._no_harm():
            for begins in self._logind.sleeps() if self._logind else []:
                self._on_sleep() if begins else self._on_resume()
        slept_s = self._asleep_s()
        if slept_s - self._slept_s > JUMP_S:
            log.warning("sleep.over", slept_s=slept_s - self._slept_s)
            self._back()
        elif self._sleep_at is not None and time.monotonic() - self._sleep_at > AWAKE_AGAIN_S:
            log.warning("sleep.never")
            self._back()

    @property
    def hold(self) -> str | None:
        """Why no job starts, None when the machine stays awake."""
        return "the machine goes to sleep; jobs go on when it is back" if self._sleep_at is not None else None

    def take_resumed(self) -> bool:
        """Return whether the machine has slept since the last call: the device is to be probed first."""
        resumed, self._resumed = self._resumed, False
        return resumed

    def let_sleep(self) -> None:
        """Nothing is on the GPU any more: logind need not wait for us."""
        if self._delay is not None:
            os.close(self._delay)
            self._delay = None
            log.info("sleep.ready")

    def leave(self) -> None:
        """Give everything up; in a fork, only its copies: an inhibitor lasts until the last one is closed."""
        self._close(self._blocks)
        if self._delay is not None:
            os.close(self._delay)
            self._delay = None
        if self._logind is not None:
            self._logind.close()
            self._logind = None

    # -- the bus ----------------------------------------------------------------------------------------------

    def _on_sleep(self) -> None:
        log.warning("sleep.comes")
        self._sleep_at = time.monotonic()

    def _on_resume(self) -> None:
        if self._sleep_at is not None:  # else the clocks have told of it already
            log.warning("sleep.over")
            self._back()
        self._hold_off()

    def _back(self) -> None:
        self._slept_s = self._asleep_s()
        self._sleep_at = None
        self._resumed = True
        with self._no_harm():
            self._hold_off()

    def _connect(self) -> None:
        """Have a connection, if there is anything to connect to."""
        if self._logind is not None or time.monotonic() < self._connect_at:
            return
        self._connect_at = time.monotonic() + CONNECT_AGAIN_S
        with self._no_harm():
            self._logind = Logind()
            self._hold_off()
        if self._job_runs:
            self._block()

    def _hold_off(self) -> None:
        """Have logind wait for us before any sleep: the engine is to be gone by then."""
        if self._logind is not None and self._delay is None:
            with suppress(Denied):
                self._delay = self._logind.inhibit("sleep", "delay", "puts its job back and leaves the GPU")

    def _block(self) -> None:
        if self._logind is None or self._blocks:
            return
        denied = []
        with self._no_harm():
            for what in BLOCKED:
                try:
                    self._blocks.append(self._logind.inhibit(what, "block", "a job is running"))
                except Denied:
                    denied.append(what)
        if denied and not self._warned:
            self._warned = True
            log.warning(
                "sleep.not_blocked",
                what=":".join(denied),
                meaning="a sleep is only delayed until the job is back on its place",
                mend="install the polkit rule that `safelight service install` offers",
            )

    @contextmanager
    def _no_harm(self) -> Iterator[None]:
        """A bus that is gone, hangs or speaks nonsense is left; what we hold of logind stays held until we close it."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - whatever it is, no job is hurt by it
            if self._logind is not None:
                self._logind.close()
                self._logind = None
                log.warning("logind.lost", error=error)
            else:
                log.debug("logind.absent", error=error)

    def _close(self, held: list[int]) -> None:
        while held:
            os.close(held.pop())
