"""A job's place in the line: what orders it, as one word. Pure."""

from __future__ import annotations

import math
import re
from datetime import datetime
from typing import NamedTuple

from safelight import ids
from safelight.jobspec import PRIORITIES, JobSpec

_WRITTEN = re.compile(rf"([0-3]):(\d{{12}}):({ids.PATTERN})")


class Place(NamedTuple):
    """Sorts as the line does: priority, then not_before, then order of submission.

    So does what it is written as, "<priority>:<not_before>:<id>".
    """

    priority: int
    """Its class, an index of PRIORITIES."""
    not_before: int
    """Seconds since 1970; 0 for at once."""
    id: str

    @classmethod
    def of(cls, spec: JobSpec, earliest: float = 0.0) -> Place:
        """Return where a job stands.

        Args:
            earliest: when it may start at all (epoch seconds), whatever it says itself.
        """
        asked = int(datetime.fromisoformat(spec.not_before).timestamp()) if spec.not_before else 0
        return cls(PRIORITIES.index(spec.priority), max(asked, math.ceil(earliest), 0), spec.id)

    @classmethod
    def parse(cls, written: str) -> Place | None:
        """Return what stands in the line; None where it is none: an id becomes the name of files, and others may write
        to the server."""
        if found := _WRITTEN.fullmatch(written):
            return cls(int(found[1]), int(found[2]), found[3])
        return None

    def __str__(self) -> str:
        return f"{self.priority}:{self.not_before:012d}:{self.id}"
