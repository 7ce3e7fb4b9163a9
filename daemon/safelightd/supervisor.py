"""`safelight up`: server, inbox and worker in the foreground, for people without systemd.

Whichever dies is started again; one that cannot work (exit 2 or 3) ends all. Ctrl-C or SIGTERM stops the worker
first, so that its job keeps its place, and the server last. Digests are made by a process that ends by itself, started
when models were registered.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import IO

from safelight import queueserver, registered
from safelight.config import Config
from safelight.errors import QueueUnreachable
from safelightd import linux
from safelightd.logs import Log

RESTART_S = (0.1, 0.5, 2.0, 10.0)
"""Before a restart; back to the first after a minute of life."""

HOPELESS = (2, 3)
"""Exit codes that a restart does not change: usage, and bad settings or installation."""

DIGESTS = "digests"
"""Is over when there is nothing left to read, and never started again for how it ended."""

REGISTERED_S = 5.0
"""Between two looks, a stat each, at whether something was registered."""

STOP_S = 40.0
"""For one process to end politely: an engine looks for a stop between the blocks of a step and is killed after 30 s."""

log = Log("safelight.up")


@dataclass
class Child:
    """One of the processes: how to start it, and how often it had to be started again lately."""

    name: str
    process: subprocess.Popen[bytes]
    watched: int
    started_at: float = field(default_factory=time.monotonic)
    restarts: int = 0


class Supervisor:
    """Keeps `safelightd redis`, `inbox` and `worker` running until asked to stop."""

    def __init__(self, config: Config, names: Sequence[str] | None = None, stderr: IO[bytes] | None = None) -> None:
        embedded = ["redis"] if config.embedded else []
        self._config = config
        self._names = list(names or [*embedded, "inbox", DIGESTS, "worker"])
        self._stderr = stderr
        self._children: dict[str, Child] = {}
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_write, False)
        self._stopping = False
        self._status = 0
        self._registered = 0

    def run(self, until: Callable[[], bool] | None = None, poll_s: float | None = None) -> int:
        """Run until a signal, until one process is hopeless, or until `until` says so (asked every `poll_s`).

        Returns:
            0 when asked to stop, else the exit status of the hopeless one.
        """
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):  # SIGHUP: the terminal was closed
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores it
                signal.signal(number, self._on_signal)
        try:
            for name in self._names:
                if self._stopping:
                    break
                if name != DIGESTS:
                    self._start(name)
                if name == "redis":
                    self._await_server()
            while not self._stopping and not (until and until()):
                self._start_digests()
                self._await_change(poll_s or REGISTERED_S)
        finally:
            self._stop_all()
        return self._status

    def _on_signal(self, _number: int, _frame: object) -> None:
        self._stopping = True
        os.write(self._wake_write, b"x")

    def _start(self, name: str, restarts: int = 0) -> None:
        environment = (
            {**os.environ, "SAFELIGHT_CONFIG": str(self._config.source)} if self._config.source.exists() else None
        )
        process = subprocess.Popen(
            [sys.executable, "-m", "safelightd.cli", name],
            env=environment,
            stdin=subprocess.DEVNULL,
            stderr=self._stderr,
            start_new_session=True,  # Ctrl-C reaches us alone; we stop them in order
            preexec_fn=linux.die_with_parent(os.getpid()),
        )
        self._children[name] = Child(name, process, os.pidfd_open(process.pid), restarts=restarts)
        log.info("started", process=name, pid=process.pid)

    def _start_digests(self) -> None:
        """Have digests made where something was registered since they last were; also once after digests were."""
        if DIGESTS not in self._names or DIGESTS in self._children:
            return
        stamp = registered.stamp(self._config.paths.models)
        if stamp != self._registered:
            self._registered = stamp
            self._start(DIGESTS)

    def _await_server(self) -> None:
        """Start the others once the server answers; a hopeless server ends all."""
        while not self._stopping:
            try:
                queueserver.connect(self._config.url, timeout_s=2.0, retries=0).close()
            except QueueUnreachable:
                self._await_change(0.02)
                continue
            return

    def _await_change(self, timeout_s: float | None) -> None:
        """Block until a process ended, a signal came, or the time is over; start again what ended."""
        watched = [child.watched for child in self._children.values()]
        readable, _, _ = select.select([*watched, self._wake_read], [], [], timeout_s)
        for child in list(self._children.values()):
            if child.watched in readable:
                self._ended(child)

    def _ended(self, child: Child) -> None:
        status = child.process.wait()
        os.close(child.watched)
        del self._children[child.name]
        if self._stopping:
            return
        if child.name == DIGESTS:
            log.info("ended", process=child.name, status=status)
            if status:  # what it tried to write changed the folder, and is no reason to try again
                self._registered = registered.stamp(self._config.paths.models)
            return
        if status in HOPELESS:
            log.error("hopeless", process=child.name, status=status)
            self._stopping, self._status = True, status
            return
        lived_s = time.monotonic() - child.started_at
        restarts = 0 if lived_s > 60 else child.restarts
        wait_s = RESTART_S[min(restarts, len(RESTART_S) - 1)]
        log.warning("died", process=child.name, status=status, restart_in_s=wait_s)
        select.select([self._wake_read], [], [], wait_s)  # a signal ends the wait
        if not self._stopping:
            self._start(child.name, restarts + 1)

    def _stop_all(self) -> None:
        """Stop in the order worker, inbox, server, each politely first."""
        for name in reversed(self._names):
            child = self._children.pop(name, None)
            if child is None:
                continue
            child.process.terminate()
            try:
                child.process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                log.warning("killed", process=name, after_s=STOP_S)
                child.process.kill()
                child.process.wait()
            os.close(child.watched)
