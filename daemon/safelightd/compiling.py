"""Regional compilation: the repeated blocks of a transformer, each kind compiled once and then used by all of them.

The code is kept on disk (TORCHINDUCTOR_CACHE_DIR, which the worker sets), so that a new process takes seconds for it
and not half a minute.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from safelightd.assembly import running_order

RECOMPILES_MAX = 64
"""Kinds of block times shapes times precisions that one process may meet; torch's own 8 would end a mixed night."""

_here: set[str] = set()


def compile_blocks(module: nn.Module, paths: Sequence[str]) -> None:
    """Make every repeated block run compiled, for pictures of all sizes at once. Hooks on the blocks stay outside: they
    may do what no graph can."""
    torch._dynamo.config.recompile_limit = RECOMPILES_MAX  # noqa: SLF001 - torch's documented name for it
    # Else sizes that happen to be equal are taken for the same: as many tokens as channels, and no other number goes.
    torch.fx.experimental._config.use_duck_shape = False  # noqa: SLF001 - as above
    for _, block in running_order(module, paths):
        block.forward = _on_plain_tensors(torch.compile(block.forward, fullgraph=True, dynamic=True))


def _on_plain_tensors(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return `forward`, made to see no difference between blocks: all but the first of a kind get views of what the
    block before has joined, and each combination of those would be compiled again."""

    def plainly(*given: Any, **named: Any) -> Any:
        return forward(*map(_plain, given), **{name: _plain(value) for name, value in named.items()})

    return plainly


def _plain(value: Any) -> Any:
    """Return a tensor with the strides that its shape would have had by itself, and no view of another; the same
    memory. Anything that is not contiguous stays as it is."""
    if not isinstance(value, torch.Tensor) or not value.is_contiguous():
        return value
    strides = [math.prod(value.shape[i + 1 :]) for i in range(value.ndim)]
    return value.as_strided(value.shape, strides).data


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
