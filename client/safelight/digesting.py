"""What `safelightd digests` says of itself: where it reads, and what it could not. It writes that, clients read it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from safelight.registered import Digested


class Reading(BaseModel):
    """How far the daemon is with the digests of registered models."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    v: Literal[1] = 1
    key: str = ""
    file: str = ""
    """What is being read; "" while nothing is."""
    done_bytes: int = 0
    """Of the model, this file's part included."""
    total_bytes: int = 0
    faults: dict[str, str] = Field(default_factory=dict)
    """Files that could not be read, and why."""

    def done_of(self, key: str, at: Digested) -> int:
        """Return how many bytes of a model were read: what has digests, and the part of the file that is being read."""
        reads = self.key == key and Path(self.file) in at.lacking
        return max(at.done_bytes, self.done_bytes) if reads else at.done_bytes

    def faults_of(self, at: Digested) -> list[str]:
        """Return what could not be read of the files that lack digests."""
        return [self.faults[str(file)] for file in at.lacking if str(file) in self.faults]


def read(file: Path) -> Reading:
    """Return what was last written; an empty one where nothing is, or what is there is of another version."""
    try:
        return Reading.model_validate_json(file.read_bytes())
    except (OSError, ValidationError):
        return Reading()  # only progress: what has digests is known without it
