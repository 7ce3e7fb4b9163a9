"""Values with tensors in them as one file, and back with the bits and the memory layout they had.

    the sha256 of all that follows, in hex, a newline, and a safetensors file: what is no tensor is in its metadata, as
    JSON

Written piece by piece, so that what lies on a GPU is copied neither there nor whole into RAM. Knows no job.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from safelightd.shards import NAMES, PIECE_BYTES
from safelightd.weights import DTYPES

DIGEST_BYTES = 65
"""64 hexadecimal digits and a newline."""


class Damaged(Exception):
    """A file is not what was written."""


def pack(value: Any, name: str, tensors: dict[str, torch.Tensor]) -> object:
    """Return a value as JSON can hold it; its tensors go into `tensors`, as they are, by names that begin with `name`.

    Raises:
        TypeError: it is of a kind that nobody knows how to give back.
    """
    if isinstance(value, torch.Tensor) and value.dtype in NAMES:
        tensors[name], order = _dense(value.detach())
        return {"tensor": name, "on": value.device.type, **({"order": order} if order else {})}
    if type(value) in (list, tuple, torch.Size):
        parts = [pack(part, f"{name}.{i}", tensors) for i, part in enumerate(value)]
        return parts if type(value) is list else {"tuple": parts}
    if type(value) is dict:
        pairs = [
            (pack(key, name, tensors), pack(part, f"{name}.{i}", tensors))
            for i, (key, part) in enumerate(value.items())
        ]
        return {"dict": pairs}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": value.type}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    kind = value.dtype if isinstance(value, torch.Tensor) else type(value).__name__
    raise TypeError(f"{name} is a {kind}: no checkpoint can hold it")


def unpack(value: Any, tensors: Mapping[str, torch.Tensor], device: torch.device) -> Any:
    """Return what was packed, its tensors copied: to `device`, or to the CPU where they were there.

    On the CPU, too: in a file's bytes they lie anywhere, and BLAS rounds by where they lie.
    """
    match value:
        case {"tensor": name, "on": place}:
            tensor, order = tensors[name], value.get("order")
            if order:
                tensor = tensor.permute([order.index(i) for i in range(len(order))])
            return tensor.to("cpu" if place == "cpu" else device, copy=True)
        case {"tuple": parts}:
            return tuple(unpack(part, tensors, device) for part in parts)
        case {"dict": pairs}:
            return {unpack(key, tensors, device): unpack(part, tensors, device) for key, part in pairs}
        case {"dtype": name}:
            return getattr(torch, name)
        case {"device": place}:
            return torch.device("cpu") if place == "cpu" else device
        case [*parts]:
            return [unpack(part, tensors, device) for part in parts]
    return value


def _dense(tensor: torch.Tensor) -> tuple[torch.Tensor, list[int] | None]:
    """Return a view whose numbers lie in the order of its dimensions, and which of the tensor's each of them is.

    What a transformer calls (1, tokens, width) may lie width first, and sums round by how they lie.
    """
    if tensor.is_contiguous():
        return tensor, None
    strides = tensor.stride()
    order = sorted(range(tensor.dim()), key=strides.__getitem__, reverse=True)
    turned = tensor.permute(order)
    return (turned, order) if turned.is_contiguous() else (tensor.contiguous(), None)


def size_bytes(tensors: Mapping[str, torch.Tensor]) -> int:
    """Return about what a file of these takes."""
    return sum(tensor.nbytes for tensor in tensors.values())


def write(stream: BinaryIO, tensors: Mapping[str, torch.Tensor], told: Mapping[str, str]) -> None:
    """Write a file, of tensors that lie anywhere."""
    digest = hashlib.sha256()
    stream.write(b" " * DIGEST_BYTES)
    for piece in _pieces(tensors, told):
        digest.update(piece)
        stream.write(piece)
    stream.seek(0)
    stream.write(digest.hexdigest().encode() + b"\n")


def _pieces(tensors: Mapping[str, torch.Tensor], told: Mapping[str, str]) -> Iterator[Any]:
    """Yield a safetensors file; wider numbers first, so that each is aligned (the format's README, version 0.8)."""
    header: dict[str, object] = {"__metadata__": dict(told)}
    ordered = sorted(tensors.items(), key=lambda named: -named[1].element_size())
    end = 0
    for name, tensor in ordered:
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": [*tensor.shape], "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for _, tensor in ordered:
        flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        for piece in flat.split(PIECE_BYTES):
            # Always a copy: memory that numpy has seen cannot be given back by emptying its tensor.
            yield piece.to("cpu", copy=True).numpy().data


def read(file: Path) -> tuple[dict[str, str], Mapping[str, torch.Tensor]]:
    """Return what a file tells, and its tensors, each read when it is asked for: together they may be gigabytes.

    Raises:
        Damaged: it is cut, or another than was written.
        OSError: it cannot be read.
    """
    opened = _Opened(file)
    digest = opened.read(0, DIGEST_BYTES)
    found = hashlib.sha256()
    for begin in range(DIGEST_BYTES, opened.size, PIECE_BYTES):
        found.update(opened.read(begin, min(PIECE_BYTES, opened.size - begin)))
    if digest != found.hexdigest().encode() + b"\n":
        raise Damaged(f"{file}: its digest is another")
    told, rows, start = _header(opened, file)
    return told, _Tensors(opened, start, rows)


def peek(file: Path) -> dict[str, str]:
    """Return what a file tells, at once and unchecked: `read` says whether it is what was written.

    Raises:
        Damaged: its beginning is no such file's.
        OSError: it cannot be read.
    """
    return _header(_Opened(file), file)[0]


def _header(opened: _Opened, file: Path) -> tuple[dict[str, str], dict[str, Any], int]:
    """Return what a file tells, where its tensors lie, and where the first of them begins."""
    try:
        start = DIGEST_BYTES + 8
        length = int.from_bytes(opened.read(DIGEST_BYTES, 8), "little")
        header = json.loads(opened.read(start, length))
        told = header.pop("__metadata__")
        return told, header, start + length
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"{file}: {error}") from error


class _Opened:
    """A file that stays open for as long as somebody holds this, whatever takes its place meanwhile."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._descriptor)
        self.size = os.fstat(self._descriptor).st_size

    def read(self, begin: int, count: int) -> bytearray:
        """Return so many bytes, fewer where the file ends."""
        content = bytearray(max(min(count, self.size - begin), 0))
        view, done = memoryview(content), 0
        while done < len(content):
            more = os.preadv(self._descriptor, [view[done:]], begin + done)
            if not more:
                raise OSError(errno.EIO, "it ends before its end", str(self._file))
            done += more
        return content


class _Tensors(Mapping[str, torch.Tensor]):
    """The tensors of a file."""

    def __init__(self, opened: _Opened, start: int, rows: Mapping[str, Any]) -> None:
        self._opened = opened
        self._start = start
        self._rows = rows

    def __getitem__(self, name: str) -> torch.Tensor:
        row = self._rows[name]
        shape, dtype = row["shape"], DTYPES[row["dtype"]]
        if not math.prod(shape):
            return torch.empty(shape, dtype=dtype)
        begin, end = row["data_offsets"]
        return torch.frombuffer(self._opened.read(self._start + begin, end - begin), dtype=dtype).reshape(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)
