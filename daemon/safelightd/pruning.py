"""Calls `safelight prune` once a day, in a process of its own: a slow or broken disk then holds up nobody else."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import suppress

from safelight.cli import main
from safelight.config import Config
from safelight.retention import Rules
from safelightd import linux
from safelightd.logs import Log

FIRST_S = 600.0
"""From the start to the first: a service that is restarted again and again has other troubles."""

EVERY_S = 86_400.0

log = Log("safelight.inbox")


class Pruning:
    """What [retention] asks for, day after day; nothing where it asks for nothing."""

    def __init__(self, config: Config, first_s: float | None = None) -> None:
        self._source = config.source
        self._asked_for = bool(Rules.of(config.settings))
        self._due_at = _now() + (FIRST_S if first_s is None else first_s)
        self.process: subprocess.Popen[bytes] | None = None

    def look(self) -> None:
        """Start what is due, or log how it ended; never raises and never waits."""
        try:
            if self.process is not None:
                self._settle(self.process)
            elif self._asked_for and _now() >= self._due_at:
                self._due_at = _now() + EVERY_S
                self.process = self._start()
        except Exception:
            log.exception("retention.defect")

    def stop(self) -> None:
        """End it, wherever it is: the next run finishes what it began."""
        if self.process is not None:
            self.process.kill()

    def _start(self) -> subprocess.Popen[bytes]:
        # The file is named, so that the child prunes this installation and no other.
        words = ["--config", str(self._source), "prune"]
        return subprocess.Popen(
            [sys.executable, "-m", "safelightd.pruning", str(os.getpid()), *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )

    def _settle(self, process: subprocess.Popen[bytes]) -> None:
        if process.poll() is None:
            return
        self.process = None
        words = " ".join(process.communicate()[1].decode(errors="replace").split())
        if process.returncode:
            log.warning("retention.failed", status=process.returncode, says=words)
        else:
            log.info("retention.pruned", says=words)


def _now() -> float:
    """Seconds that go on while the machine sleeps, and whatever the wall clock does."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _run(parent: int, words: list[str]) -> None:
    """Be `safelight`, politely, and for no longer than `parent` lives."""
    linux.die_with_parent(parent)()
    with suppress(OSError):  # the sandbox of a unit may forbid it
        os.nice(19)
    main(words, prog_name="safelight")


if __name__ == "__main__":
    _run(int(sys.argv[1]), sys.argv[2:])
