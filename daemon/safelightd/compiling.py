"""Regional compilation: the repeated blocks of a transformer, each kind compiled once and then used by all of them.

The code is kept on disk (TORCHINDUCTOR_CACHE_DIR, which the worker sets), so that a new process takes seconds for it
and not half a minute.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from safelightd.assembly import running_order

RECOMPILES_MAX = 64
"""Kinds of block times shapes times precisions that one process may meet; torch's own 8 would end a mixed night."""

_here: set[str] = set()


def compile_blocks(module: nn.Module, paths: Sequence[str]) -> None:
    """Make every repeated block run compiled. Hooks on the blocks stay outside: they may do what no graph can."""
    torch._dynamo.config.recompile_limit = RECOMPILES_MAX  # noqa: SLF001 - torch's documented name for it
    for _, block in running_order(module, paths):
        block.forward = torch.compile(block.forward, fullgraph=True)


def remember(kind: str) -> None:
    """Note that blocks of this kind ("family/precision") have been compiled and run, here and on disk."""
    if kind in _here:
        return
    _here.add(kind)
    if folder := _folder():
        mark = folder / "kinds" / kind
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()


def compiled_here() -> frozenset[str]:
    """Return the kinds that this process has compiled."""
    return frozenset(_here)


def compiled_before() -> frozenset[str]:
    """Return the kinds whose code is on disk."""
    folder = _folder()
    kinds = folder / "kinds" if folder else None
    if kinds is None or not kinds.is_dir():
        return frozenset()
    return frozenset(str(file.relative_to(kinds)) for file in kinds.glob("*/*"))


def _folder() -> Path | None:
    name = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    return Path(name) if name else None
