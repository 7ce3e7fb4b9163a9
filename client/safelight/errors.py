"""Every error a person can meet, each with the exit code a script can rely on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class Fault:
    """One thing wrong with something a person wrote: where it is, what it is, and what to do about it."""

    where: str
    problem: str
    remedy: str

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
    """Return distinct faults as a reader meets them: file after file as first named, line after line."""
    names: dict[str, int] = {}

    def place(fault: Fault) -> tuple[int, int]:
        name, _, line = fault.where.rpartition(":")
        if not line.isdigit():
            name, line = fault.where, "0"
        return names.setdefault(name, len(names)), int(line)

    return sorted(dict.fromkeys(faults), key=place)


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
