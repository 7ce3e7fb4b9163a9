"""Values with tensors in them as one file, and back with the bits and the memory layout they had.

    the sha256 of all that follows, in hex, a newline, and a safetensors file: what is no tensor is in its metadata, as
    JSON

Written piece by piece, so that what lies on a GPU is copied neither there nor whole into RAM. Knows no job.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
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


def read(file: Path) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """Return what a file tells, and its tensors, which share the memory that it was read into.

    Raises:
        Damaged: it is cut, or another than was written.
        OSError: it cannot be read.
    """
    with file.open("rb") as stream:
        digest = stream.readline(DIGEST_BYTES)
        content = bytearray(max(os.fstat(stream.fileno()).st_size - len(digest), 0))
        stream.readinto(content)
    if digest != hashlib.sha256(content).hexdigest().encode() + b"\n":
        raise Damaged(f"{file}: its digest is another")
    try:
        start = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:start])
        told = header.pop("__metadata__")
        return told, {name: _tensor(content, start, row) for name, row in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"{file}: {error}") from error


def _tensor(content: bytearray, start: int, row: Mapping[str, Any]) -> torch.Tensor:
    shape, dtype = row["shape"], DTYPES[row["dtype"]]
    if not (count := math.prod(shape)):
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(content, dtype=dtype, count=count, offset=start + row["data_offsets"][0]).reshape(shape)
