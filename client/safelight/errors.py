"""Every error a person can meet, each with the exit code a script can rely on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

FAULTS_MAX = 1_000
"""Of one file, or of all that were given at once: more are not read."""

LINES_SHOWN = 5
"""Of those that one fault is about."""

LINE_DIGITS_MAX = 9
"""Of a line's number. What has more is a file's name."""

REMEDY_CHARACTERS_AGAIN = 100
"""Up to here a remedy is repeated; a list of words that are known is not."""


@dataclass(frozen=True, order=True)
class Fault:
    """One thing wrong with something a person wrote: where it is, what it is, and what to do about it."""

    where: str
    problem: str
    remedy: str
    heir: str = ""
    """The place of the job, where the value is not its own: `where` is then in what the file says for all its jobs."""

    def __str__(self) -> str:
        return f"{self.where}: {self.problem}. {self.remedy}".rstrip()


class SafelightError(Exception):
    """A job failed, or something happened that no other class names."""

    exit_code = 1


class InvalidJob(SafelightError):
    """What was asked for cannot be run as written; every fault is listed, none was corrected silently."""

    exit_code = 2

    def __init__(self, faults: Sequence[Fault]) -> None:
        self.faults = tuple(faults)
        super().__init__("\n".join(str(fault) for fault in self.faults))


class BadArgument(SafelightError):
    """A command was given something that it cannot use as it is, such as a folder with something else in it."""

    exit_code = 2


def in_order(faults: Sequence[Fault]) -> list[Fault]:
    """Return faults as a reader meets them, file after file as first named, line after line, and each told once.

    One that is there on several lines says so on the first of them, and one of a value that jobs inherit says whose it
    is. A long remedy is there once. After FAULTS_MAX the last says how many more there are.
    """
    names: dict[str, int] = {}
    alike: dict[tuple[str, str, str], list[Fault]] = {}
    for fault in sorted(faults, key=lambda fault: _place(fault, names)):
        alike.setdefault((_split(fault.where)[0], fault.problem, fault.remedy), []).append(fault)
    told: list[Fault] = []
    remedies: dict[str, str] = {}
    for group in list(alike.values())[:FAULTS_MAX]:
        fault = _told_once(group)
        before = remedies.setdefault(fault.remedy, fault.where)
        repeats = before != fault.where and len(fault.remedy) > REMEDY_CHARACTERS_AGAIN
        told.append(replace(fault, remedy=f"See {before} above.") if repeats else fault)
    if more := len(alike) - len(told):
        word = "fault is" if more == 1 else "faults are"
        told.append(Fault(list(alike)[FAULTS_MAX][0], f"{more:,} more {word} not listed", "Correct these first."))
    return told


def _place(fault: Fault, names: dict[str, int]) -> tuple[int, int]:
    name, line = _split(fault.where)
    return names.setdefault(name, len(names)), line


def _split(where: str) -> tuple[str, int]:
    """Return the file and the line of a place; 0 where it is no line."""
    name, _, line = where.rpartition(":")
    return (name, int(line)) if line.isdecimal() and len(line) <= LINE_DIGITS_MAX else (where, 0)


def _told_once(group: Sequence[Fault]) -> Fault:
    """Return the first of faults that differ in their places alone, with the lines that they are about."""
    first = group[0]
    own = dict.fromkeys(_split(fault.where)[1] for fault in group)
    heirs = dict.fromkeys(_split(fault.heir)[1] for fault in group if fault.heir)
    lines = sorted({*own, *heirs} - {0, _split(first.where)[1]})
    if not lines:
        return replace(first, heir="")
    shown, more = ", ".join(map(str, lines[:LINES_SHOWN])), len(lines) - LINES_SHOWN
    listed = f"{'line' if len(lines) == 1 else 'lines'} {shown}" + (f" and {more:,} more" if more > 0 else "")
    return replace(first, problem=f"{first.problem} ({'also' if len(own) > 1 else 'for'} {listed})", heir="")


class BadConfig(SafelightError):
    """The settings or the installation are wrong; restarting will not help."""

    exit_code = 3


class QueueUnreachable(SafelightError):
    """No queue server answered; `problem` and `remedy` are the two halves of the message."""

    exit_code = 4

    def __init__(self, problem: str, remedy: str = "") -> None:
        self.problem = problem
        self.remedy = remedy
        super().__init__(f"{problem} {remedy}".strip())


class NoUsableGpu(SafelightError):
    """The configured GPU cannot be used. Safelight never falls back to the CPU by itself."""

    exit_code = 5


class LedgerDamaged(SafelightError):
    """A file of the ledger cannot be read back."""


class Forgotten(LedgerDamaged):
    """The job has ended and its record was removed since; who meets it again must not run it."""
