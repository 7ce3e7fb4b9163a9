"""What becomes of a job that came back without a verdict: pure rules over its attempts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from safelight.ledger import Attempts

CRASHES_MAX = 3
"""Times a job may break the engine before it is set aside."""

RETURNS_MAX = 5
"""Times the machine may take a job back uncounted; afterwards every return counts as a crash."""

Cause = Literal["crash", "return", "stop"]
"""crash: it broke the engine and a probe found the device well. return: the machine took it back. stop: a person
stopped the worker, which no job can bring about and so none is counted."""


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


def decide(attempts: Attempts, cause: Cause, reason: str) -> Decision:
    """Return whether the job runs again, at its own place in the line, or is quarantined."""
    counts = cause == "crash" or (cause == "return" and attempts.returns >= RETURNS_MAX)
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
