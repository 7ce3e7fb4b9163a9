"""Blocks that are not on the GPU all the time: each passes through a ring of device memory just before it runs.

A block's parameters are views of its place in the ring for good; only the bytes there change. A copy stream runs as far
ahead as the ring has room, also from the last block of a step to the first of the next. The same numbers as resident
blocks, bit for bit. Knows no file format; on the CPU it does the same without streams.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from safelightd.weights import Reader, Stored

LEFT_OUT = "left_out"
"""The attribute of a block by which a cache says that it does not compute in this forward: the ring stays as it is."""

Wait = Callable[[], None]
"""Makes the caller's stream wait until a block has arrived."""


@dataclass(frozen=True)
class Places:
    """Where in a ring each streamed block lies."""

    nbytes: int
    """Of the ring."""
    offsets: tuple[int, ...]
    follows: tuple[int, ...]
    """For each block the last one before it, in a cycle that never ends, that lies in its way: it may be fetched as
    soon as that one has run. Itself, where nothing else does."""


def places(sizes: Sequence[int], at_once: int = 2) -> Places:
    """Return the places for blocks of these sizes, which run in this order again and again.

    Room for two of the largest: one runs while the next arrives; of smaller ones more are under way.
    """
    room = min(at_once * max(sizes), sum(sizes))
    offsets, end = [], 0
    for size in sizes:
        begin = end if end + size <= room else 0
        offsets.append(begin)
        end = begin + size
    return Places(room, tuple(offsets), tuple(_follows(j, offsets, sizes) for j in range(len(sizes))))


def _follows(j: int, offsets: Sequence[int], sizes: Sequence[int]) -> int:
    begin, end = offsets[j], offsets[j] + sizes[j]
    for back in range(1, len(sizes) + 1):
        k = (j - back) % len(sizes)
        if offsets[k] < end and begin < offsets[k] + sizes[k]:
            return k
    raise AssertionError("a block lies in its own way")


class Source(Protocol):
    """Where streamed blocks come from."""

    def fetch(self, j: int, after: torch.cuda.Event | None) -> Wait:
        """Begin to copy block `j` to its place, once `after` has happened on the device."""
        ...

    def close(self) -> None:
        """Return when nothing is under way any more."""
        ...


class FromPinned:
    """Blocks with a copy in pinned RAM."""

    def __init__(self, copies: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]) -> None:
        self._copies = copies
        self._targets = targets
        self._stream = torch.cuda.Stream(targets[0].device) if targets[0].is_cuda else None

    def fetch(self, j: int, after: torch.cuda.Event | None) -> Wait:
        if self._stream is None:
            self._targets[j].copy_(self._copies[j])
            return _no_wait
        if after is not None:
            self._stream.wait_event(after)
        with torch.cuda.stream(self._stream):
            self._targets[j].copy_(self._copies[j], non_blocking=True)
            return _wait_for(self._stream.record_event())

    def close(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()


class FromFile:
    """Blocks that are read anew each time: what the page cache holds of them costs no RAM of ours."""

    def __init__(
        self,
        wanted: Sequence[Sequence[tuple[Stored, torch.Tensor]]],
        device: torch.device,
        change: Callable[[int], None] = lambda _j: None,
    ) -> None:
        """`change` is called when block `j` has been read, on the stream that read it."""
        self._wanted = wanted
        self._change = change
        self._reader = Reader(device)
        self._thread = ThreadPoolExecutor(1, "block-reader")

    def fetch(self, j: int, after: torch.cuda.Event | None) -> Wait:
        reading = self._thread.submit(self._read, j, after)

        def wait() -> None:
            _wait_for(reading.result())()

        return wait

    def _read(self, j: int, after: torch.cuda.Event | None) -> torch.cuda.Event | None:
        stream = self._reader.stream
        if stream is None:
            self._reader.read(self._wanted[j])
            self._change(j)
            return None
        if after is not None:
            stream.wait_event(after)
        with torch.cuda.stream(stream):  # not behind what the model's own stream has been told meanwhile
            self._reader.read(self._wanted[j])
            self._change(j)
        event: torch.cuda.Event = stream.record_event()
        return event

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)
        self._reader.close()


def stream(blocks: Sequence[nn.Module], follows: Sequence[int], source: Source) -> None:
    """Make each block wait for its bytes before it runs, and have others fetched when it has run: by hooks on them.

    Of a forward that leaves blocks out nothing is fetched: the first of them may have run before that was known.
    """
    waits: dict[int, Wait] = {}
    nexts: list[list[int]] = [[] for _ in blocks]
    running: set[int] = set()

    def arrive(j: int) -> Callable[..., None]:
        def hook(block: nn.Module, *_call: Any) -> None:
            if not getattr(block, LEFT_OUT, False):
                waits.pop(j)()
                running.add(j)

        return hook

    def fetch_next(j: int) -> Callable[..., None]:
        def hook(block: nn.Module, *_call: Any) -> None:
            if j not in running:
                return
            running.remove(j)
            if getattr(block, LEFT_OUT, False):
                waits[j] = _no_wait  # its bytes are where they were
                return
            done = torch.cuda.current_stream().record_event() if torch.cuda.is_initialized() else None
            for k in nexts[j]:
                waits[k] = source.fetch(k, done)

        return hook

    for j, block in enumerate(blocks):
        nexts[follows[j]].append(j)
        if follows[j] >= j:  # its place's last user runs later in the cycle: free in the first round
            waits[j] = source.fetch(j, None)
        block.register_forward_pre_hook(arrive(j))
        block.register_forward_hook(fetch_next(j))


def _no_wait() -> None:
    """On the CPU a block has arrived when fetching returns."""


def _wait_for(event: torch.cuda.Event | None) -> Wait:
    if event is None:
        return _no_wait
    return lambda: torch.cuda.current_stream().wait_event(event)
