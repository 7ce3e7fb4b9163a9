"""The tensors of a component's safetensors files: where each lies, and the way from there to RAM or to the GPU.

Reads with its own calls rather than through a mapping: the kernel copies from the page cache straight into pinned
memory, several threads at a time, and the GPU takes it from there while the next piece is read. Knows no module.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch

from safelight import tensorfile
from safelight.errors import SafelightError
from safelightd.pinned import PinnedMemory

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The names of the safetensors format (its README, version 0.8)."""

THREADS = 4
PIECE_BYTES = 16 * 2**20
PIECES = 2 * THREADS
"""What is under way between file and GPU: 128 MiB of pinned memory."""
ENCODED_PIECE_BYTES = 2**20
"""Of packed weights, which take many times as much while they are decoded: a small piece at a time."""


class BadModelFolder(SafelightError):
    """A model's folder is missing, incomplete, damaged, or holds what is never loaded."""


class Encoding(Protocol):
    """How numbers are packed in a file: in blocks of so many bytes, each of so many numbers."""

    @property
    def block_bytes(self) -> int: ...

    @property
    def block_items(self) -> int: ...

    def decode(self, raw: torch.Tensor, first: int) -> torch.Tensor:
        """Return the numbers of whole blocks, flat, in float32 and on the device of `raw`.

        Args:
            raw: their bytes, a flat uint8 tensor.
            first: which block of the encoded tensor the first of them is.
        """
        ...


@dataclass(frozen=True)
class Stored:
    """One tensor in a file. Where its rows do not lie together, the others follow in `then`."""

    file: Path
    offset: int
    nbytes: int
    dtype: torch.dtype
    """Of an encoded one: what it is decoded to."""
    shape: tuple[int, ...]
    """Of the whole tensor."""
    encoding: Encoding | None = None
    first_block: int = 0
    """Of the encoded tensor in the file, where this one begins."""
    then: tuple[Stored, ...] = ()


def stored_tensors(folder: Path, weights: str) -> dict[str, Stored]:
    """Return every tensor of a component, by name.

    Args:
        weights: the file's name; sharded ones are listed in the same name plus .index.json.

    Raises:
        BadModelFolder: a file is cut or no safetensors file.
    """
    index = folder / f"{weights}.index.json"
    files = [weights]
    if index.is_file():
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    try:
        entries = [entry for file in files for entry in tensorfile.entries(folder / file)]
    except tensorfile.UnreadableWeights as error:
        raise BadModelFolder(str(error)) from error
    return {entry.name: plain(entry) for entry in entries}


def plain(entry: tensorfile.Entry) -> Stored:
    """Return a tensor that is stored number by number."""
    return Stored(entry.file, entry.offset, entry.nbytes, DTYPES[entry.dtype], entry.shape)


@dataclass(frozen=True)
class _Piece:
    """A run of bytes of one file and where it goes: a flat tensor, whose dtype may be another than the file's."""

    file: Path
    offset: int
    nbytes: int
    dtype: torch.dtype
    target: torch.Tensor
    encoding: Encoding | None = None
    first_block: int = 0

    @property
    def is_converted(self) -> bool:
        return self.encoding is not None or self.dtype != self.target.dtype

    def numbers(self, raw: torch.Tensor) -> torch.Tensor:
        """Return what these bytes, a flat uint8 tensor, stand for."""
        return raw.view(self.dtype) if self.encoding is None else self.encoding.decode(raw, self.first_block)


class Reader:
    """Reads stored tensors into tensors of any device; use it in a `with`.

    On a GPU everything is queued on `stream`, behind what the caller's stream was told before; `read` returns when the
    last piece has been queued. Whoever needs the tensors calls `finish` first, or makes its own stream wait.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._open = ExitStack()
        self._files: dict[Path, int] = {}
        self._threads = self._open.enter_context(ThreadPoolExecutor(THREADS, "reader"))
        self._slots: list[PinnedMemory] = []
        self._free: list[torch.cuda.Event] = []

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Return when nothing is under way, everything given back."""
        self._open.close()
        if self.stream is not None:
            self.stream.synchronize()
        for slot in self._slots:
            slot.close()

    def read(self, wanted: Iterable[tuple[Stored, torch.Tensor]]) -> None:
        """Fill each tensor with what is stored, converted on the tensor's own device where its dtype is another.

        Raises:
            OSError: the disk failed. BadModelFolder: a file ended before its tensor.
        """
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream())  # what used the targets' memory before
        pieces = [piece for stored, tensor in wanted for piece in self._pieces(stored, tensor)]
        if self.stream is not None and any(piece.target.is_cuda for piece in pieces):
            self._read_to_device(pieces)
        else:
            list(self._threads.map(self._fill, pieces))

    def finish(self) -> None:
        """Make the caller's stream wait for everything that was read."""
        if self.stream is not None:
            torch.cuda.current_stream().wait_stream(self.stream)

    def _queue(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    def _pieces(self, stored: Stored, tensor: torch.Tensor) -> Iterator[_Piece]:
        flat = tensor.view(-1)
        if stored.file not in self._files:
            self._files[stored.file] = os.open(stored.file, os.O_RDONLY | os.O_CLOEXEC)
            self._open.callback(os.close, self._files[stored.file])
        packed = stored.encoding
        block, items = (packed.block_bytes, packed.block_items) if packed else (stored.dtype.itemsize, 1)
        step = max((ENCODED_PIECE_BYTES if packed else PIECE_BYTES) // block, 1) * block
        for begin in range(0, stored.nbytes, step):
            nbytes = min(step, stored.nbytes - begin)
            part = flat[begin // block * items : (begin + nbytes) // block * items]
            first = stored.first_block + begin // block
            yield _Piece(stored.file, stored.offset + begin, nbytes, stored.dtype, part, packed, first)
        done = stored.nbytes // block * items
        for more in stored.then:
            yield from self._pieces(more, flat[done : done + math.prod(more.shape)])
            done += math.prod(more.shape)

    def _fill(self, piece: _Piece) -> None:
        """Read one piece, whole, into RAM, where its target lies."""
        if not piece.is_converted:
            self._read_into(piece, piece.target)
            return
        raw = torch.empty(piece.nbytes, dtype=torch.uint8)
        self._read_into(piece, raw)
        piece.target.copy_(piece.numbers(raw))

    def _read_into(self, piece: _Piece, into: torch.Tensor) -> None:
        # Not through numpy: a tensor that numpy has seen cannot be emptied any more.
        place = memoryview((ctypes.c_ubyte * piece.nbytes).from_address(into.data_ptr())).cast("B")
        done = 0
        while done < len(place):
            count = os.preadv(self._files[piece.file], [place[done:]], piece.offset + done)
            if count == 0:
                raise BadModelFolder(f"{piece.file}: ended early while it was read. Fetch the model anew.")
            done += count

    def _read_to_device(self, pieces: Sequence[_Piece]) -> None:
        assert self.stream is not None
        if not self._slots:
            self._slots = [PinnedMemory(PIECE_BYTES, self.device) for _ in range(PIECES)]
            self._free = [torch.cuda.Event() for _ in range(PIECES)]
        under_way: deque[tuple[Future[None], int, _Piece]] = deque()
        for i, piece in enumerate(pieces):
            if len(under_way) == PIECES:
                self._send(*under_way.popleft())
            slot = i % PIECES
            under_way.append((self._threads.submit(self._fill_slot, slot, piece), slot, piece))
        while under_way:
            self._send(*under_way.popleft())

    def _fill_slot(self, slot: int, piece: _Piece) -> None:
        self._free[slot].synchronize()  # the GPU has taken what lay there before
        self._read_into(piece, self._slots[slot].bytes)

    def _send(self, filled: Future[None], slot: int, piece: _Piece) -> None:
        filled.result()
        raw = self._slots[slot].bytes[: piece.nbytes]
        with self._queue():
            if piece.is_converted:  # piece by piece: a whole tensor in both dtypes is memory that no plan counts
                raw = raw.to(self.device, non_blocking=True)
            piece.target.copy_(piece.numbers(raw), non_blocking=True)
            self._free[slot].record(self.stream)
