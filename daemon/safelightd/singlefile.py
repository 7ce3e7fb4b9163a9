"""A transformer in a single file, as the tensors of diffusers' module: what lies where in the file, and how.

The authors' names and shapes are turned into those of diffusers by its own converters. They are given row numbers in
the place of weights, so that what comes out says which rows of which tensor each of the module's is made of: no weight
is read, and the Reader takes each from where it lies.
"""

from __future__ import annotations

import importlib
import struct
from collections.abc import Iterator, Mapping
from itertools import accumulate
from math import prod
from pathlib import Path

import torch
from torch import nn

from safelight import layout, tensorfile
from safelight.layout import Layout
from safelight.tensorfile import Entry
from safelightd import encodings
from safelightd.assembly import dtypes_kept
from safelightd.encodings import Ggml, Scaled
from safelightd.weights import DTYPES, BadModelFolder, Encoding, Reader, Stored, plain, stored_tensors

CONVERTERS = {
    "flux": "convert_flux_transformer_checkpoint_to_diffusers",
    "wan": "convert_wan_transformer_to_diffusers",
}
"""In diffusers.loaders.single_file_utils (0.42)."""

CONVERTER_WIDTH = {"flux": 3072, "wan": None}
"""The width that a converter is written for: FLUX's splits a fused weight at multiples of 3072, whatever comes."""

SCALE_FORMATS = {"F32": "f", "F16": "e", "F64": "d"}


def weights_in(place: Path, weights: str) -> dict[str, Stored]:
    """Return every tensor of a component by diffusers' name, from its folder or from a single file.

    Args:
        weights: the name of a folder's file, as `stored_tensors` wants it.

    Raises:
        BadModelFolder: the file is cut, damaged, pickled, or holds another model.
    """
    return stored_in(place) if place.is_file() else stored_tensors(place, weights)


def weights_of(module: nn.Module, place: Path, weights: str) -> dict[str, Stored]:
    """Return every tensor of a component by name; a single file must have those of `module` and no other.

    Raises:
        BadModelFolder: as `weights_in` says; or the file has tensors that the module has not, or lacks some.
    """
    stored = weights_in(place, weights)
    if not place.is_file():
        return stored
    own = module.state_dict()
    for names, problem in (
        (set(own) - set(stored), "lacks"),
        (set(stored) - set(own), "holds more than the model has:"),
    ):
        if names:
            raise BadModelFolder(
                f"{place}: {problem} {len(names)} tensors, {min(names)} the first. Its config.json is another model's, "
                "or the file is: name another with safelight models add."
            )
    return stored


def filled(module: nn.Module, file: Path, dtype: torch.dtype) -> nn.Module:
    """Return `module`, built on the meta device, with each tensor read from a single file into RAM of its own.

    Args:
        dtype: of all but what the class keeps in float32.

    Raises:
        BadModelFolder: the file is not this module's.
    """
    stored = weights_of(module, file, "")
    kept = dtypes_kept(module, dtype)
    state = {
        name: torch.empty(tensor.shape, dtype=torch.float32 if name in kept else dtype)
        for name, tensor in module.state_dict().items()
    }
    for name, tensor in state.items():
        if stored[name].shape != tuple(tensor.shape):
            raise BadModelFolder(f"{file}: {name} is not of the shape that config.json says. Name another file.")
    with Reader(torch.device("cpu")) as reader:
        reader.read((stored[name], tensor) for name, tensor in state.items())
    module.load_state_dict(state, assign=True)
    return module.requires_grad_(requires_grad=False).eval()


def precision_in(place: Path, weights: str) -> str:
    """Return what most of a component's weights are stored as, in words."""
    if place.is_file():
        return _recognised(place).precision
    files = sorted({stored.file for stored in stored_tensors(place, weights).values()})
    return layout.precision(entry for file in files for entry in tensorfile.entries(file))


def stored_in(file: Path) -> dict[str, Stored]:
    """Return the tensors of a single file by diffusers' names.

    Raises:
        BadModelFolder: as `weights_in` says.
    """
    found = _recognised(file)
    encoded = {name: _encoding(entry, found.scales.get(name)) for name, entry in found.tensors.items()}
    if found.names == "diffusers":
        return {name: _rows(entry, encoded[name], 0, None) for name, entry in found.tensors.items()}
    return {name: _joined(runs, found, encoded) for name, runs in _converted(found, file).items()}


def _recognised(file: Path) -> Layout:
    try:
        return layout.recognise(tensorfile.entries(file), file)
    except (tensorfile.UnreadableWeights, layout.OtherModel) as error:
        raise BadModelFolder(str(error)) from error


Run = tuple[str, int, int]
"""Rows of a tensor of the file: its name, the first, how many."""


def _converted(found: Layout, file: Path) -> dict[str, list[Run]]:
    """Return of which rows of the file's tensors each of diffusers' is made."""
    names = list(found.tensors)
    counts = [found.tensors[name].shape[0] for name in names]
    starts = list(accumulate(counts, initial=0))
    stretch = _stretch(found, file)
    rows = {
        name: torch.arange(start, start + count).repeat_interleave(stretch)
        for name, start, count in zip(names, starts, counts, strict=False)
    }
    convert = getattr(importlib.import_module("diffusers.loaders.single_file_utils"), CONVERTERS[found.family])
    try:
        made: dict[str, torch.Tensor] = convert(rows)
    except (KeyError, IndexError, RuntimeError) as error:
        raise BadModelFolder(f"{file}: is not whole, or of another model ({error}). Fetch it anew.") from error
    if rows:  # the converter takes out what it knows
        raise BadModelFolder(f"{file}: holds {len(rows)} tensors that no such transformer has, {min(rows)} the first.")
    return {name: list(_runs(numbers[::stretch], names, starts)) for name, numbers in made.items()}


def _stretch(found: Layout, file: Path) -> int:
    """Return by how much rows are to be repeated so that a converter finds the width that it is written for."""
    width = CONVERTER_WIDTH[found.family]
    if width is None:
        return 1
    own = found.tensors["img_in.weight"].shape[0] if "img_in.weight" in found.tensors else width
    if width % own:
        raise BadModelFolder(f"{file}: is {own} wide, and FLUX.1 is {width}. Name another file.")
    return width // own


def _runs(numbers: torch.Tensor, names: list[str], starts: list[int]) -> Iterator[Run]:
    """Yield the runs of neighbouring rows in a list of row numbers."""
    breaks = (torch.diff(numbers) != 1).nonzero().flatten() + 1
    for run in torch.tensor_split(numbers, breaks.tolist()):
        first, count = int(run[0]), len(run)
        while count:  # rows that are neighbours may still be of two tensors
            at = int(torch.searchsorted(torch.tensor(starts), first, right=True)) - 1
            part = min(count, starts[at + 1] - first)
            yield names[at], first - starts[at], part
            first, count = first + part, count - part


def _joined(runs: list[Run], found: Layout, encoded: Mapping[str, Encoding | None]) -> Stored:
    parts = [_rows(found.tensors[name], encoded[name], first, count) for name, first, count in runs]
    shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
    whole = parts[0]
    return Stored(
        whole.file, whole.offset, whole.nbytes, whole.dtype, shape, whole.encoding, whole.first_block, tuple(parts[1:])
    )


def _rows(entry: Entry, encoding: Encoding | None, first: int, count: int | None) -> Stored:
    """Return some rows of a tensor, or with no count all of it."""
    if count is None or count == entry.shape[0]:
        return plain(entry) if encoding is None else _encoded(entry, encoding)
    row_bytes = entry.nbytes // entry.shape[0]
    part = Entry(
        entry.file,
        entry.name,
        entry.dtype,
        (count, *entry.shape[1:]),
        entry.offset + first * row_bytes,
        count * row_bytes,
    )
    return plain(part) if encoding is None else _encoded(part, encoding, first * row_bytes // encoding.block_bytes)


def _encoded(entry: Entry, encoding: Encoding, first_block: int = 0) -> Stored:
    return Stored(entry.file, entry.offset, entry.nbytes, torch.float32, entry.shape, encoding, first_block)


def _encoding(entry: Entry, scale: Entry | None) -> Encoding | None:
    """Return how a tensor is packed; None where it is not."""
    if entry.dtype not in DTYPES:
        encodings.check_gguf()
        return Ggml(entry.dtype)
    if DTYPES[entry.dtype].itemsize > 1 or not DTYPES[entry.dtype].is_floating_point:
        return None
    if scale is None:
        return Scaled(DTYPES[entry.dtype], (1.0,), prod(entry.shape[1:]))
    return Scaled(DTYPES[entry.dtype], _floats(scale), prod(entry.shape[1:]))


def _floats(entry: Entry) -> tuple[float, ...]:
    with entry.file.open("rb") as stream:
        stream.seek(entry.offset)
        raw = stream.read(entry.nbytes)
    if entry.dtype == "BF16":  # the upper half of a float32
        raw = b"".join(b"\0\0" + raw[at : at + 2] for at in range(0, len(raw), 2))
    form = SCALE_FORMATS.get(entry.dtype, "f")
    return struct.unpack(f"<{entry.parameters}{form}", raw)
