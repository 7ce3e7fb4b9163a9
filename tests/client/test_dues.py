"""When a job that waits may start."""

from __future__ import annotations

from datetime import datetime, timedelta

import pytest

from safelight import dues
from safelight.place import Place

EVENING = datetime(2026, 11, 22, 20, 37).astimezone()
NIGHT, NORMAL = 3, 1


@pytest.mark.parametrize(
    ("window", "priority", "not_before", "due"),
    [
        ("", NIGHT, None, None),
        ("03:00-04:00", NORMAL, None, None),
        ("20:00-04:00", NIGHT, None, None),
        ("03:00-04:00", NIGHT, None, datetime(2026, 11, 23, 3)),
        ("23:00-07:00", NIGHT, None, datetime(2026, 11, 22, 23)),
        ("23:00-07:00", NIGHT, datetime(2026, 11, 24, 6), datetime(2026, 11, 24, 6)),
        ("23:00-07:00", NIGHT, datetime(2026, 11, 24, 8), datetime(2026, 11, 24, 23)),
        ("23:00-07:00", NORMAL, datetime(2026, 11, 24, 8), datetime(2026, 11, 24, 8)),
        ("23:00-07:00", NORMAL, datetime(2026, 11, 21, 8), None),
    ],
)
def test_a_job_is_due_in_the_window_and_not_before_its_time(
    window: str, priority: int, not_before: datetime | None, due: datetime | None
) -> None:
    place = Place(priority, int(not_before.timestamp()) if not_before else 0, "job")

    found = dues.later([place], window, EVENING)

    assert [one.at for one in found.values()] == ([due.astimezone()] if due else [])


def test_a_place_beyond_what_a_date_can_say_is_later_all_the_same() -> None:
    found = dues.later([Place(NORMAL, 999_999_999_999, "job")], "", EVENING)

    assert found["job"].at > EVENING + timedelta(days=365 * 1000)
