"""Writes safetensors files tensor by tensor: what a file will hold is known before the first of them is there.

The layout is that of the format's own writer (its README, version 0.8): wider dtypes first, so that each tensor is
aligned; no holes. Knows no model.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch

from safelightd.weights import DTYPES

PIECE_BYTES = 16 * 2**20
"""Of a tensor, in RAM at a time on its way from a GPU to the file."""

NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """One tensor to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def split(groups: Iterable[Sequence[Entry]], limit_bytes: int) -> list[list[Entry]]:
    """Return the entries of each file; a group stays together, and no file is larger than a group must be."""
    shards: list[list[Entry]] = []
    room = 0
    for group in groups:
        size = sum(entry.nbytes for entry in group)
        if size > room:
            shards.append([])
            room = limit_bytes
        shards[-1] += group
        room -= size
    return shards


class Shard:
    """One safetensors file being written; use it in a `with`."""

    def __init__(self, file: Path, entries: Sequence[Entry]) -> None:
        self.file = file
        self._entries = {entry.name: entry for entry in entries}
        self._waiting = set(self._entries)
        self._offsets: dict[str, int] = {}
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # without it transformers refuses a file
        end = 0
        for entry in sorted(entries, key=lambda entry: -entry.dtype.itemsize):
            begin, end = end, end + entry.nbytes
            self._offsets[entry.name] = begin
            header[entry.name] = {
                "dtype": NAMES[entry.dtype],
                "shape": list(entry.shape),
                "data_offsets": [begin, end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._start = 8 + len(text)
        self.nbytes = self._start + end
        self._descriptor = os.open(file, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o666)
        self._write(len(text).to_bytes(8, "little") + text, 0)

    def __enter__(self) -> Shard:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file, whatever is in it."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write a tensor, of the shape and dtype of its entry, from whatever device it is on."""
        entry = self._entries[name]
        assert (tuple(tensor.shape), tensor.dtype) == (entry.shape, entry.dtype), name
        self._waiting.remove(name)
        flat = tensor.detach().reshape(-1).contiguous().view(torch.uint8)
        for begin in range(0, entry.nbytes, PIECE_BYTES):
            # Always a copy: memory that numpy has seen cannot be given back by emptying its tensor.
            piece = flat[begin : begin + PIECE_BYTES].to("cpu", copy=True)
            self._write(piece.numpy(), self._start + self._offsets[name] + begin)

    @property
    def is_whole(self) -> bool:
        """Whether every tensor has been written."""
        return not self._waiting

    def finish(self) -> str:
        """Force the file to the disk; return its sha256, read back."""
        assert not self._waiting, f"{len(self._waiting)} tensors were never written"
        os.fsync(self._descriptor)
        with open(os.dup(self._descriptor), "rb") as stream:  # noqa: PTH123 - of a descriptor, which Path cannot open
            stream.seek(0)
            return hashlib.file_digest(stream, "sha256").hexdigest()

    def _write(self, content: bytes | memoryview | object, offset: int) -> None:
        left = memoryview(content).cast("B")  # type: ignore[arg-type]  # numpy arrays are buffers, and say so from 3.12
        while left:
            count = os.pwrite(self._descriptor, left, offset)
            left, offset = left[count:], offset + count
