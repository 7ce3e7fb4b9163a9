"""Waiting for an absent queue server: a job that ran for an hour is not lost because Redis was restarted."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from safelight.errors import QueueUnreachable
from safelight.queueserver import AWAY
from safelightd.logs import Log

WAITS_S = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
"""Between tries; the last repeats until the server is back."""

Answer = TypeVar("Answer")
log = Log("safelight.queue")


def patiently(ask: Callable[[], Answer], wait: Callable[[float], bool]) -> Answer:
    """Return what `ask` answers, trying again for as long as the server is away and `wait` allows it.

    Args:
        wait: waits for so many seconds; True means that nobody may wait any longer.

    Raises:
        QueueUnreachable: the server is still away and the wait is over.
    """
    tries = 0
    while True:
        try:
            return ask()
        except AWAY as error:
            if tries == 0:
                log.warning("queue.away", error=error)
            if wait(WAITS_S[min(tries, len(WAITS_S) - 1)]):
                raise QueueUnreachable("The queue server is away, and nobody may wait for it.") from error
            tries += 1
