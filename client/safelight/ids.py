"""Ids of submissions and of their jobs: they sort by time, and become parts of file names and of Redis keys."""

from __future__ import annotations

import re
import secrets
from datetime import UTC, datetime

PATTERN = r"[A-Za-z0-9-]+"
"""Of a job's: what does not match must never become part of a path."""

SUBMISSION = r"\d{8}-\d{6}-\d{3}[0-9a-f]{4}"
"""Of a submission's: day, time, milliseconds (UTC), and four random digits."""

_last_submission_ms = 0


def submission_id(now: datetime) -> str:
    """Return a new submission's id: it sorts by time, also within one millisecond of this process.

    The random part keeps two processes apart that submit in the same millisecond.
    """
    global _last_submission_ms  # one process never hands out an id that sorts before an earlier one
    _last_submission_ms = max(int(now.timestamp() * 1000), _last_submission_ms + 1)
    moment = datetime.fromtimestamp(_last_submission_ms / 1000, UTC)
    return f"{moment:%Y%m%d-%H%M%S}-{_last_submission_ms % 1000:03d}{secrets.token_hex(2)}"


def job_id(submission: str, index: int) -> str:
    """Return the id of one job of a submission; ids sort in the order of submission."""
    return f"{submission}-{index:05d}"


def submission_of(job: str) -> str:
    return job.rsplit("-", 1)[0]


def is_id(text: str) -> bool:
    """Whether `text` can be a job's id at all."""
    return bool(re.fullmatch(PATTERN, text))


def made_at(submission: str) -> datetime:
    """Return the moment in a submission's id, UTC, with its milliseconds.

    Raises:
        ValueError: it is not the id of a submission.
    """
    moment, _, tail = submission.rpartition("-")
    return datetime.strptime(f"{moment}{tail[:3]}", "%Y%m%d-%H%M%S%f").replace(tzinfo=UTC)


def before(moment: datetime) -> str:
    """Return what every id sorts below that was made before the second of `moment`, and in it."""
    return f"{moment.astimezone(UTC):%Y%m%d-%H%M%S}~"
