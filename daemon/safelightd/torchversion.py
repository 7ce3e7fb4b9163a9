"""Which torch is installed, and what its version says of pinned memory. Imports none of it."""

from __future__ import annotations

import re
from importlib import metadata

PINNED_EXACT_SINCE = (2, 13)
"""The torch whose pinned memory need not take the next power of two: the first to know the allocator's key for it."""


def installed() -> str:
    """Return the installed torch's version, "" where there is none."""
    try:
        return metadata.version("torch")
    except metadata.PackageNotFoundError:
        return ""


def pins_exactly(version: str) -> bool:
    """Whether pinned blocks of a torch take the size asked for, once it is told so; those of an unknown one may not."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2]) >= PINNED_EXACT_SINCE
