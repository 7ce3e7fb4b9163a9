"""What is wrong with what a person wrote: collected, so that all of it is told at once."""

from __future__ import annotations

import difflib
from typing import Any

from safelight.errors import Fault


class Faults:
    """Collects what is wrong with one job or one file, so that a person sees all of it at once."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.found: list[Fault] = []

    def at(self, where: str) -> Faults:
        """Return what collects for another place into the same list."""
        other = Faults(where)
        other.found = self.found
        return other

    def add(self, problem: str, remedy: str = "") -> None:
        self.found.append(Fault(self.where, problem, remedy))


def near(word: str, known: tuple[str, ...] | list[str] | dict[str, Any]) -> str:
    """Return "Did you mean x?" for the known word most like `word`, else the whole list."""
    match = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"Did you mean {match[0]}?" if match else f"Known: {', '.join(known)}."


def shown(value: object) -> str:
    """Return a wrong value as a message can hold it: a whole file may stand in its place."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
