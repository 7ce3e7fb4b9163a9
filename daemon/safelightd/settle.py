"""What becomes of a job that came back without a verdict: pure rules over its attempts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from safelight.ledger import Attempts
from safelight.plan import Overrun

CRASHES_MAX = 3
"""Times a job may break the engine before it is set aside."""

RETURNS_MAX = 5
"""Times the machine may take a job back uncounted; afterwards every return counts as a crash."""

OVERRUNS_MAX = 8
"""Plans of one job that may run out of memory; afterwards each more counts as a crash. A ladder has fewer rungs: this
ends what a plan that predicts nothing would repeat."""

NO_ROOM_AGAIN_S = (5.0, 60.0, 300.0)
"""Waits of a job for which there was no room, by how often it was tried; the last repeats. Others go before it."""

NO_ROOM_TRIES_MAX = 150
"""Half a day of those; then the job fails with the reason, since what has the memory may never leave: a desktop."""

Cause = Literal["crash", "return", "stop", "no-start", "no-room", "oom", "refused"]
"""crash: it broke the engine and a probe found the device well. return: the machine took it back. stop: a person
stopped the worker. no-start: no engine came up to run it. no-room: it was not begun, since others have the memory. None
of these three can be a job's doing, so that none is counted. oom: its plan ran out of memory, and the next takes a
smaller one. refused: the result was broken, and another precision may do better."""


@dataclass(frozen=True)
class Decision:
    """What to do with the job, and its attempts as they are now."""

    requeue: bool
    attempts: Attempts
    reason: str


def begin(attempts: Attempts, worker: str, lock: str) -> Attempts:
    """Return the attempts as they must be on disk before the GPU starts."""
    started = {"attempts": attempts.attempts + 1, "running": True, "worker": worker, "lock": lock}
    return attempts.model_copy(update=started)


def overran(attempts: Attempts, overrun: Overrun) -> Attempts:
    """Return the attempts with a plan that ran out of memory, which the next must stay below."""
    return attempts.model_copy(update={"overruns": (*attempts.overruns, overrun)})


def refused(attempts: Attempts, precision: str) -> Attempts:
    """Return the attempts with a precision whose result was broken, which the next must not use."""
    return attempts.model_copy(update={"refused": (*attempts.refused, precision)})


def decide(attempts: Attempts, cause: Cause, reason: str) -> Decision:
    """Return whether the job runs again, at its own place in the line, or is quarantined."""
    counts = (
        cause == "crash"
        or (cause == "return" and attempts.returns >= RETURNS_MAX)
        or (cause == "oom" and len(attempts.overruns) > OVERRUNS_MAX)
    )
    after = attempts.model_copy(
        update={
            "running": False,
            "crashes": attempts.crashes + counts,
            "returns": attempts.returns + (cause == "return" and not counts),
        }
    )
    if after.crashes < CRASHES_MAX:
        return Decision(requeue=True, attempts=after, reason=reason)
    return Decision(requeue=False, attempts=after, reason=f"It broke the engine {after.crashes} times, last: {reason}")
