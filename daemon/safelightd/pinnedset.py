"""Pinned blocks that outlive a job: the next one of the same plan need not read and pin them again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from safelight.rung import Pinned
from safelightd.pinned import PinnedMemory


@dataclass(frozen=True)
class PinnedKey:
    """What tells one set of pinned blocks from another: their files, and how and which of them are held."""

    held: Pinned
    folder: Path
    files: tuple[tuple[str, int, int], ...]
    """Name, size and time of change."""

    @property
    def layout(self) -> PinnedKey:
        """What sets share that need the same memory."""
        return replace(self, held=replace(self.held, loras=()))


class PinnedSet:
    """At most one set of pinned blocks, kept from one job to the next of the same plan."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._key: PinnedKey | None = None
        self._memory: PinnedMemory | None = None

    @property
    def held(self) -> Pinned | None:
        """What the planner should know of what is kept."""
        return self._key.held if self._key else None

    def drop_unless(self, keys: Sequence[PinnedKey]) -> None:
        """Give the set back unless one of these wants it, or one like it with other LoRAs in its weights."""
        if self._memory is not None and (self._key is None or self._key.layout not in [key.layout for key in keys]):
            self._memory.close()
            self._key, self._memory = None, None

    def take(self, key: PinnedKey) -> PinnedMemory | None:
        """Return the set of this key, which is the taker's until `keep`."""
        return self._taken() if self._key == key else None

    def take_to_refill(self, nbytes: int) -> PinnedMemory | None:
        """Return memory that is pinned and of just this size, whatever is in it; other memory is given back.

        Weights with other LoRAs in them need the same, and so does the second of two experts.
        """
        if self.nbytes != nbytes:
            self.drop_unless([])
        return self._taken()

    def _taken(self) -> PinnedMemory | None:
        memory, self._memory, self._key = self._memory, None, None
        return memory

    def keep(self, key: PinnedKey, memory: PinnedMemory) -> None:
        """Keep a filled set for the next job, where it is within the limit."""
        self.drop_unless([])
        if memory.bytes.numel() <= self._limit_bytes:
            self._key, self._memory = key, memory
        else:
            memory.close()

    @property
    def nbytes(self) -> int:
        return self._memory.bytes.numel() if self._memory else 0
