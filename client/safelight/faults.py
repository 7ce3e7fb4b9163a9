"""What is wrong with what a person wrote: collected, so that all of it is told at once."""

from __future__ import annotations

import difflib
from collections.abc import Container, Mapping
from copy import copy
from dataclasses import dataclass, field
from typing import Any

from safelight.errors import Fault


@dataclass(frozen=True)
class Places:
    """Where the values of one job are written, by name, each as a Fault's `where`."""

    own: Mapping[str, str] = field(default_factory=dict)
    inherited: Mapping[str, str] = field(default_factory=dict)
    """Of what the file says for all of its jobs."""

    def without(self, names: Container[str]) -> Places:
        """Return the places of other values: those of `names` were replaced by what is not in the file."""
        own, inherited = (
            {name: where for name, where in places.items() if name not in names}
            for places in (self.own, self.inherited)
        )
        return Places(own, inherited)


NOWHERE = Places()


ALIKE = 0.62
"""From this ratio of difflib on a word may be meant by another: union-pro-2 by union is 0.625, lora by colour 0.6."""


class Faults:
    """Collects what is wrong with one job or one file, so that a person sees all of it at once."""

    def __init__(self, where: str) -> None:
        self.file = self.where = where
        self.found: list[Fault] = []
        self.places = NOWHERE
        self.heir = ""

    def at(self, where: str, places: Places = NOWHERE) -> Faults:
        """Return what collects for another place into the same list."""
        other = Faults(where)
        other.found, other.places = self.found, places
        return other

    def at_line(self, number: int) -> Faults:
        """Return what collects for a line of the same file."""
        other = copy(self)
        other.where = f"{self.file}:{number}"
        return other

    def knowing(self, places: Places) -> Faults:
        """Return what collects for the same job, whose values are written at `places`."""
        other = copy(self)
        other.places = places
        return other

    def of(self, *names: str) -> Faults:
        """Return what collects for the values of `names`, where the first of them that is the job's own is written.

        Where none is its own: where the first inherited one is, and the faults say which job inherits it.
        """
        other = copy(self)
        if own := [self.places.own[name] for name in names if name in self.places.own]:
            other.where = own[0]
        elif inherited := [self.places.inherited[name] for name in names if name in self.places.inherited]:
            other.where, other.heir = inherited[0], self.where
        return other

    def add(self, problem: str, remedy: str = "") -> None:
        self.found.append(Fault(self.where, problem, remedy, self.heir))


def near(word: str, known: tuple[str, ...] | list[str] | dict[str, Any]) -> str:
    """Return "Did you mean x?" for the known word most like `word`, else the whole list."""
    match = difflib.get_close_matches(word, known, n=1, cutoff=ALIKE)
    return f"Did you mean {match[0]}?" if match else f"Known: {', '.join(known)}."


def shown(value: object) -> str:
    """Return a wrong value as a message can hold it: a whole file may stand in its place."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
