"""RQ's worker, less what it does because others may share its queue, and an absent server ends it no more."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from rq import Worker

from safelight.queueserver import AWAY

SERVER_TIMEOUT_S = 10.0
"""For one answer; longer than the longest blocking read, or an idle wait would look like an outage. With its second try
a call on a server that hangs takes 20 s, well within the watchdog's time."""


class LoneWorker(Worker):
    """A worker whose queue and name are its own: a lock held by its process says so."""

    def heartbeat(self, timeout: int | None = None, pipeline: Any = None) -> None:
        """RQ's heartbeat; outside a pipeline an absent server is no reason to end."""
        with suppress(*(() if pipeline is not None else AWAY)):
            super().heartbeat(timeout, pipeline)

    def register_birth(self) -> None:
        """Register, replacing what a killed earlier life left: the lock says that it is dead."""
        self.connection.delete(self.key)
        super().register_birth()

    def register_death(self) -> None:
        with suppress(*AWAY):
            super().register_death()

    def check_for_suspension(self, burst: bool) -> None:  # noqa: FBT001 - RQ's signature
        """Nothing: `rq suspend` is one key for all workers; our holds are named and each worker's own."""

    @property
    def connection_timeout(self) -> float:
        """RQ's own least timeout, for its blocking reads, of which we use none."""
        return SERVER_TIMEOUT_S

    @property
    def should_run_maintenance_tasks(self) -> bool:
        """No: RQ's maintenance repairs queues that several workers share, and can end a worker over one bad hash."""
        return False

    def subscribe(self) -> None:
        """Listen to no commands: no thread at the fork, and nobody but us stops a job."""

    def unsubscribe(self) -> None:
        """There is nothing to leave."""

    def procline(self, message: str) -> None:
        """Leave the process's name alone: systemd and people look for it."""
