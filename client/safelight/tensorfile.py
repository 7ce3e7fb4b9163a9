"""What a file of weights says it holds: the headers of safetensors and GGUF, read without their weights.

Nothing of a file is ever executed: what is pickled is refused by its first bytes, whatever it is called.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from safelight.errors import SafelightError

SUFFIXES = (".safetensors", ".gguf")

PICKLES = (".bin", ".ckpt", ".pkl", ".pt", ".pth")

HEADER_BYTES_MAX = 100_000_000
"""As in safetensors' own reader: a longer header is an attack or no header."""

ITEM_BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "I64": 64, "I32": 32, "I16": 16, "I8": 8,
    "U8": 8, "BOOL": 8,
}  # fmt: skip
"""The dtypes that are read, by the names of the safetensors format (its README, version 0.8)."""

GGUF_TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    20: ("IQ4_NL", 32, 18),
    23: ("IQ4_XS", 256, 136),
    30: ("BF16", 1, 2),
}
"""By number: name, weights a block, bytes a block (GGML_QUANT_SIZES of gguf 0.19). Those that diffusers 0.42 turns
into floats, and the plain ones."""

_GGUF_VALUES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""How struct reads the plain kinds of a GGUF file's key-value pairs."""

_STRING, _ARRAY = 8, 9

_ORIGINAL_SHAPE = "comfy.gguf.orig_shape."
"""Begins the key by which city96's tools keep the shape of what they stored in another."""


class UnreadableWeights(SafelightError):
    """A file is no safetensors or GGUF file, is cut, or is damaged."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: rows of numbers, or of blocks of packed numbers."""

    file: Path
    name: str
    dtype: str
    """The format's name: BF16, F8_E4M3, Q4_0."""
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def parameters(self) -> int:
        return math.prod(self.shape)


def entries(file: Path) -> list[Entry]:
    """Return every tensor of a file, in its order.

    Raises:
        UnreadableWeights: it is neither safetensors nor GGUF, is cut, or holds kinds that are not known.
        OSError: it cannot be read.
    """
    if file.suffix.lower() == ".gguf":
        return list(_gguf(file))
    return list(_safetensors(file))


def pickled(file: Path) -> bool:
    """Whether a file begins as torch.save writes one: a zip archive, or a pickle itself."""
    with file.open("rb") as stream:
        begin = stream.read(4)
    return begin == b"PK\x03\x04" or (len(begin) > 1 and begin[0] == 0x80 and begin[1] in range(2, 6))


def _refuse(file: Path, problem: str) -> UnreadableWeights:
    return UnreadableWeights(f"{file}: {problem}. Fetch it anew.")


def _refuse_pickle(file: Path) -> UnreadableWeights:
    return UnreadableWeights(
        f"{file}: is a pickle, whatever its name says, and a pickle can run any program. Convert it to safetensors "
        "where that may happen, or fetch a file that is."
    )


def _safetensors(file: Path) -> Iterator[Entry]:
    with file.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        length = int.from_bytes(stream.read(8), "little")
        if not 0 < length <= min(HEADER_BYTES_MAX, size - 8):
            raise _refuse_pickle(file) if pickled(file) else _refuse(file, "no safetensors file, or a cut one")
        try:
            header = json.loads(stream.read(length))
            named = {name: row for name, row in header.items() if name != "__metadata__"}
        except (ValueError, AttributeError, RecursionError) as error:
            raise _refuse(file, f"its header is damaged ({error})") from error
    for name, row in named.items():
        yield _safetensors_entry(file, name, row, start=8 + length, size=size)


def _safetensors_entry(file: Path, name: str, row: Any, *, start: int, size: int) -> Entry:
    try:
        dtype, shape = str(row["dtype"]), tuple(map(int, row["shape"]))
        begin, end = map(int, row["data_offsets"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise _refuse(file, f"its header is damaged: {name} ({error})") from error
    if dtype not in ITEM_BITS:
        problem = f"{name} is stored as {dtype}, which is not read"
        raise UnreadableWeights(f"{file}: {problem}. Use another file of the model; known: {', '.join(ITEM_BITS)}.")
    bits = ITEM_BITS[dtype]
    if (
        min(shape, default=0) < 0
        or not 0 <= begin <= end <= size - start
        or (end - begin) * 8 != math.prod(shape) * bits
    ):
        raise _refuse(file, f"{name} lies outside of the file: it is cut")
    return Entry(file, name, dtype, shape, start + begin, end - begin)


def _gguf(file: Path) -> Iterator[Entry]:
    with file.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        try:
            yield from _gguf_entries(file, stream, size)
        except (struct.error, UnicodeDecodeError, OverflowError, MemoryError) as error:
            raise _refuse(file, f"its header is cut or damaged ({error})") from error


def _gguf_entries(file: Path, stream: BinaryIO, size: int) -> list[Entry]:
    """Read a header: magic, version, counts, key-value pairs, tensors (ggml's docs/gguf.md)."""
    magic, version = _unpack(stream, "4sI")
    if magic != b"GGUF":
        raise _refuse_pickle(file) if pickled(file) else _refuse(file, "no GGUF file")
    if version not in (2, 3):
        raise UnreadableWeights(f"{file}: a GGUF file of version {version}, and 2 and 3 are read. Fetch a newer file.")
    tensors, pairs = _unpack(stream, "QQ")
    alignment, original = 32, {}
    for _ in range(pairs):
        key, value = _string(stream, size), _value(stream, size)
        if key == "general.alignment" and isinstance(value, int) and value > 0:
            alignment = value
        if key.startswith(_ORIGINAL_SHAPE) and isinstance(value, list):
            original[key.removeprefix(_ORIGINAL_SHAPE)] = tuple(map(int, value))
    rows = []
    for _ in range(tensors):
        name = _string(stream, size)
        (dimensions,) = _unpack(stream, "I")
        if dimensions > 8:
            raise _refuse(file, f"{name} has {dimensions} dimensions: its header is damaged")
        shape = tuple(reversed(_unpack(stream, f"{dimensions}Q")))
        kind, offset = _unpack(stream, "IQ")
        rows.append((name, shape, kind, offset))
    start = -(-stream.tell() // alignment) * alignment
    return [_gguf_entry(file, *row, start=start, size=size, original=original) for row in rows]


def _gguf_entry(
    file: Path, name: str, shape: tuple[int, ...], kind: int, offset: int, *, start: int, size: int,
    original: dict[str, tuple[int, ...]],
) -> Entry:  # fmt: skip
    if kind not in GGUF_TYPES:
        known = ", ".join(name for name, _, _ in GGUF_TYPES.values())
        raise UnreadableWeights(f"{file}: {name} is packed as GGUF type {kind}, which is not read. Known: {known}.")
    dtype, block, block_bytes = GGUF_TYPES[kind]
    count = math.prod(shape)
    nbytes = count // block * block_bytes
    if (shape and shape[-1] % block) or start + offset + nbytes > size:
        raise _refuse(file, f"{name} lies outside of the file: it is cut")
    if math.prod(original.get(name, shape)) != count:
        raise _refuse(file, f"{name} has another size than its own header says")
    return Entry(file, name, dtype, original.get(name, shape), start + offset, nbytes)


def _unpack(stream: BinaryIO, form: str) -> tuple[Any, ...]:
    return struct.unpack(f"<{form}", stream.read(struct.calcsize(f"<{form}")))


def _string(stream: BinaryIO, size: int) -> str:
    (length,) = _unpack(stream, "Q")
    if length > size:
        raise struct.error("a text longer than the file")
    return stream.read(length).decode()


def _value(stream: BinaryIO, size: int) -> Any:
    (kind,) = _unpack(stream, "I")
    if kind != _ARRAY:
        return _item(stream, kind, size)
    kind, count = _unpack(stream, "IQ")
    if count > size:
        raise struct.error("a list longer than the file")
    return [_item(stream, kind, size) for _ in range(count)]


def _item(stream: BinaryIO, kind: int, size: int) -> Any:
    if kind == _STRING:
        return _string(stream, size)
    if kind not in _GGUF_VALUES:
        raise struct.error(f"a value of unknown kind {kind}")
    return _unpack(stream, _GGUF_VALUES[kind])[0]
