"""What `safelight doctor` says of one fact: how it looks, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from safelight.errors import BadConfig, NoUsableGpu, QueueUnreachable

EXIT_ORDER = (BadConfig.exit_code, NoUsableGpu.exit_code, QueueUnreachable.exit_code)
"""Of several faults the first of these is told: without an installation nothing else matters."""


@dataclass(frozen=True)
class Finding:
    """One fact, how it looks, and what to do about it."""

    name: str
    look: Literal["ok", "warn", "fail"]
    says: str
    remedy: str = ""
    exit_code: int = 0
    """Of a `fail`."""


def ok(name: str, says: str) -> Finding:
    return Finding(name, "ok", says)


def warn(name: str, says: str, remedy: str) -> Finding:
    return Finding(name, "warn", says, remedy)


def fail(name: str, says: str, remedy: str, exit_code: int = BadConfig.exit_code) -> Finding:
    return Finding(name, "fail", says, remedy, exit_code)


def exit_code(findings: Iterable[Finding]) -> int:
    """Return 0, or the code of the gravest failure."""
    codes = {found.exit_code for found in findings if found.look == "fail"}
    return next((code for code in EXIT_ORDER if code in codes), 0)
