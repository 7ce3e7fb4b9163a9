"""`safelightd inbox`: takes what people drop into the inbox, for as long as it runs.

A turn (safelightd.intake) does the work; this is what comes between two turns: waiting for a hint, for time to pass
or for a signal, and holding while the queue is away, the disk is full or the folder is gone.
"""

from __future__ import annotations

import os
import select
import signal
import time
from types import FrameType

from safelight import inbox, models, queueserver
from safelight.config import Config
from safelight.drops import Patience
from safelight.errors import BadConfig, QueueUnreachable, SafelightError
from safelight.jobqueue import JobQueue
from safelight.ledger import Ledger
from safelight.queueserver import AWAY
from safelightd import linux, systemd
from safelightd.closes import Closes
from safelightd.inbox_watch import Watch, remote_name
from safelightd.intake import Intake
from safelightd.logs import Log
from safelightd.pruning import Pruning
from safelightd.writers import Writers

DEBOUNCE_S = 0.1
"""From a hint to the look, so that the files of one copy are seen together."""

BUSY_S = 1.0
"""Between looks while files are on their way: their events may have been lost."""

IDLE_S = 60.0
"""Between looks while nothing is; reached by doubling from BUSY_S after the last thing that happened."""

UNWATCHED_S = 5.0
"""Between looks, at most, where no events come from: network file systems, or too many folders."""

REMOTE_SETTLE_S = 5.0
"""settle_s, at least, on a network file system: it shows changes late. What is read waits unseen_s there."""

DYING_S = 3.0
"""A killed process keeps its lock until the disk has answered it: that must not end its successor for good."""

HOLDS_S = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
"""Between tries while something is away or full; the last repeats."""

QUEUE_TIMEOUT_S = 3.0
"""For one answer of the server, so that SIGTERM need not wait long for a hung one."""

log = Log("safelight.inbox")


def serve(config: Config) -> int:
    """Take files from the inbox until SIGTERM or SIGINT; returns the exit status to give.

    Raises:
        BadConfig: the folders cannot be used, another process serves this inbox, or the server is not a safe one.
    """
    wake = _Wake()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, wake.stop)
    lock = _lock(config)
    try:
        inbox.prepare(config.paths)
        status = _Service(config, wake).run()
    finally:
        os.close(lock)
    # Python takes handlers away before it ends: a second signal would end us by itself, and not with 0.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    return status


def _lock(config: Config) -> int:
    """Return the lock of this inbox's one process; it is free again however we end.

    Raises:
        BadConfig: another process holds it, or the state folder cannot be written.
    """
    file = config.paths.state / "inbox.lock"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise BadConfig(f"{file}: {error.strerror}. Make the folder writable, or set [paths] state.") from error
    if not linux.lock(lock, DYING_S):
        os.close(lock)
        raise BadConfig(f"{config.paths.inbox} is served by another process already. Stop that one first.")
    return lock


class _Service:
    """The process: its waits, its holds, and what it tells the service manager."""

    def __init__(self, config: Config, wake: _Wake) -> None:
        self._config = config
        self._wake = wake
        remote = remote_name(config.paths.inbox)
        if remote:
            log.info("inbox.remote", folder=config.paths.inbox, file_system=remote, instead="a scan every few seconds")
        closes = Closes()
        self._watch = None if remote else Watch(config.paths.inbox, self._wake.hint, closes)
        asked = config.settings.inbox
        patience = Patience(max(asked.settle_s, REMOTE_SETTLE_S if remote else 0.0), asked.partner_s, asked.unseen_s)
        writers = Writers(config.paths, patience, closes, leases=not remote)
        self._intake = Intake(config, models.load(config), Ledger(config.paths), patience, writers)
        self._pruning = Pruning(config)
        self._queue: JobQueue | None = None
        self._folder: tuple[int, int] | None = self._identity()
        self._idle_s = BUSY_S
        self._holds = 0
        self._reason = ""

    def run(self) -> int:
        systemd.notify("READY=1", f"STATUS=Watching {self._config.paths.inbox}")
        log.info("inbox.ready", folder=self._config.paths.inbox)
        try:
            while not self._wake.stopping:
                wait_s = self._turn_or_hold()
                self._pruning.look()
                self._wait(wait_s)
        finally:
            self._pruning.stop()
            systemd.notify("STOPPING=1")
        return 0

    def _turn_or_hold(self) -> float:
        """Take a turn and return the seconds until the next; longer and longer ones while something is away."""
        try:
            wait_s = self._turn()
        except (*AWAY, QueueUnreachable, OSError) as error:
            return self._hold(error)
        if self._holds:
            log.info("inbox.resumed", after_tries=self._holds)
        self._holds, self._reason = 0, ""
        systemd.notify(f"STATUS={self._intake.queued_jobs} jobs queued, {self._intake.waiting_files} files wait")
        return wait_s

    def _turn(self) -> float:
        self._check_folder()
        queue = self._connected()
        started = time.monotonic()
        next_s = self._intake.turn(queue, self._is_stopping)
        spent_s = time.monotonic() - started
        added = self._watch is not None and self._watch.follow(self._intake.folders)
        if added:
            return 0.0  # what came before the watch began gave no hint
        if next_s is None:
            self._idle_s = min(self._idle_s * 2, IDLE_S if self._watch and self._watch.complete else UNWATCHED_S)
            return self._idle_s
        self._idle_s = BUSY_S
        # a look at 100,000 waiting files must not become all we do
        return min(next_s, max(BUSY_S, 3 * spent_s))

    def _is_stopping(self) -> bool:
        systemd.notify("WATCHDOG=1")  # a turn may take longer than the manager's patience
        return self._wake.stopping

    def _hold(self, error: Exception) -> float:
        """Say why nothing is taken, and return for how long; what was claimed waits in claimed/."""
        reason = " ".join(str(error).split())
        if reason != self._reason:
            log.warning("inbox.holds", reason=reason)
        self._reason = reason
        systemd.notify(f"STATUS=Waiting: {reason}")
        if isinstance(error, (*AWAY, QueueUnreachable)):
            self._disconnect()
        else:
            self._folder = None  # one of its folders may be gone: prove them again
        wait_s = HOLDS_S[min(self._holds, len(HOLDS_S) - 1)]
        self._holds += 1
        return wait_s

    # -- the folder and the queue ----------------------------------------------------------------------------------

    def _identity(self) -> tuple[int, int]:
        status = self._config.paths.inbox.stat()
        return status.st_dev, status.st_ino

    def _check_folder(self) -> None:
        """See that the inbox is the folder it was; one that was made again gets its inner folders.

        Raises:
            OSError: it is gone, or cannot be used. A person who removed it must make it again: below an absent mount
                we would only hide it.
        """
        now = self._identity()
        if now == self._folder:
            return
        try:
            inbox.prepare(self._config.paths)
        except SafelightError as error:
            raise OSError(str(error)) from error
        self._folder = now

    def _connected(self) -> JobQueue:
        if self._queue is None:
            server = queueserver.connect(self._config.url, timeout_s=QUEUE_TIMEOUT_S, retries=1)
            queueserver.check_server(server)
            self._queue = JobQueue(server, keep_days=self._config.settings.queue.keep_days)
        self._queue.server.ping()  # before anything is claimed
        return self._queue

    def _disconnect(self) -> None:
        if self._queue is not None:
            self._queue.server.close()
        self._queue = None

    # -- waiting ---------------------------------------------------------------------------------------------------

    def _wait(self, seconds: float) -> None:
        """Wait until the time is over, something happened in the inbox, or a signal came."""
        ends_at = time.monotonic() + seconds
        keepalive_s = (systemd.watchdog_s() or 2 * IDLE_S) / 2
        while True:
            systemd.notify("WATCHDOG=1")
            left_s = ends_at - time.monotonic()
            if self._wake.wait(min(max(left_s, 0.0), keepalive_s)):
                self._idle_s = BUSY_S
                return
            if left_s <= keepalive_s:
                return


class _Wake:
    """What ends a wait early. Signals and the threads of the watch only write to a descriptor."""

    def __init__(self) -> None:
        self.stopping = False
        self._hints = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._stops = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def hint(self) -> None:
        os.eventfd_write(self._hints, 1)

    def stop(self, _number: int, _frame: FrameType | None) -> None:
        self.stopping = True
        os.eventfd_write(self._stops, 1)

    def wait(self, seconds: float) -> bool:
        """Return True after a hint (when the debounce is over too) or a signal, False when the time is over."""
        ready, _, _ = select.select([self._hints, self._stops], [], [], seconds)
        if self._hints in ready:
            select.select([self._stops], [], [], DEBOUNCE_S)
            os.eventfd_read(self._hints)
        return bool(ready)
