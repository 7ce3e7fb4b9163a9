"""What the inbox has refused: files that became no jobs, each with a text beside it that says why."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

DAY_S = 86_400
"""Who looks in the morning has not seen what was refused since the last one."""


@dataclass(frozen=True)
class Rejections:
    """How many files were refused, and where they lie with the reasons."""

    folder: str
    files: int
    """All that lie there still."""
    last_day: int
    """Of those, the ones of the last 24 hours."""

    def __str__(self) -> str:
        files = "1 file became no job" if self.files == 1 else f"{self.files} files became no jobs"
        return f"{files}, {self.last_day} in the last 24 hours: {self.folder}/*.error.txt say why"


def look(folder: Path, now: datetime) -> Rejections:
    """Return what lies in `folder`, by the texts that say why.

    Raises:
        OSError: the folder is closed to this user.
    """
    refused_at = []
    with suppress(FileNotFoundError):  # an inbox that nobody has used
        for file in folder.iterdir():
            if file.name.endswith(".error.txt"):
                with suppress(FileNotFoundError):  # somebody tidies up just now
                    refused_at.append(file.stat().st_mtime)
    since = now.timestamp() - DAY_S
    return Rejections(str(folder), len(refused_at), sum(moment >= since for moment in refused_at))
