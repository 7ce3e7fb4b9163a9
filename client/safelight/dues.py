"""When a job that waits may start: what the window of [policy] and its own not_before say. Knows no hold."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from datetime import time as wall_time

from safelight.jobspec import PRIORITIES
from safelight.place import Place

NIGHT = PRIORITIES.index("night")


LATEST = datetime(9998, 1, 1, tzinfo=UTC).timestamp()
"""Later than any night; what somebody else has written into the queue may lie beyond what a date can say."""


@dataclass(frozen=True)
class Due:
    """When a job starts at the earliest, which is not now."""

    at: datetime
    """With its zone, the machine's."""
    why: str


def in_window(window: str, now: wall_time) -> bool:
    """Whether `now` lies in "23:00-07:00"; a window may cross midnight; its end is outside."""
    start, end = (wall_time.fromisoformat(part) for part in window.split("-"))
    if start <= end:
        return start <= now < end
    return now >= start or now < end


def later(line: Iterable[Place], window: str, now: datetime) -> dict[str, Due]:
    """Return which jobs of the line may not start now, in its order.

    Args:
        window: of [policy], by the clock on the wall; "" where `night` may start at any hour.
        now: with its zone.
    """
    found = {}
    seconds = now.timestamp()
    for priority, not_before, job in line:
        at = min(max(not_before, seconds), LATEST)
        wall = datetime.fromtimestamp(at)  # noqa: DTZ006 - a window is local wall clock
        if priority == NIGHT and window and not in_window(window, wall.time()):
            found[job] = Due(_opening(window, wall).astimezone(), f'priority night, [policy] window = "{window}"')
        elif at > seconds:
            found[job] = Due(wall.astimezone(), "not_before")
    return found


def _opening(window: str, after: datetime) -> datetime:
    """Return when a window opens next, by the clock on the wall."""
    opening = datetime.combine(after.date(), wall_time.fromisoformat(window.partition("-")[0]))
    return opening if opening > after else opening + timedelta(days=1)
