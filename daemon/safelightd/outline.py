"""What the prepared folder of a component will hold: every tensor of the published weights and what becomes of it.

Reads headers and builds modules without memory; reads no weight and writes nothing.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from safelight import models, prepared
from safelight.models import ModelFacts
from safelight.plan import Precision
from safelight.prepared import Source
from safelightd import precision, singlefile, skeleton, tiny
from safelightd.assembly import dtypes_kept, running_order
from safelightd.precision import Format
from safelightd.shards import Entry
from safelightd.weights import BadModelFolder, Stored

CLASSES = {
    "FluxTransformer2DModel": "diffusers",
    "WanTransformer3DModel": "diffusers",
    "T5EncoderModel": "transformers",
    "UMT5EncoderModel": "transformers",
}
"""The classes with repeated blocks, and whose they are."""

STEMS = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}
"""How each library names weights."""

DTYPE = torch.bfloat16
"""What is computed in on every GPU that has it, and what is stored where nothing is quantised."""


@dataclass(frozen=True)
class Piece:
    """A stored tensor and what becomes of it."""

    stored: Stored
    dtype: torch.dtype
    """What it is read as."""
    entries: tuple[Entry, ...]
    quantised: bool


@dataclass(frozen=True)
class Work:
    """One component to be prepared."""

    key: str
    precision: Precision
    component: str
    source: Source
    config: Path
    """Its config.json."""
    target: Path
    stem: str
    pieces: tuple[Piece, ...]

    @property
    def name(self) -> str:
        return f"{self.key}/{self.precision}/{self.component}"

    @property
    def size_bytes(self) -> int:
        return sum(entry.nbytes for piece in self.pieces for entry in piece.entries)


def published(facts: ModelFacts, models_folder: Path) -> Mapping[str, tuple[Path, str]]:
    """Return the folder and the class of each component of a model; a tiny model is built where it is missing.

    Raises:
        BadModelFolder: there is no such model here.
    """
    folder = models.folder(facts, models_folder)
    if facts.tiny:
        tiny.build(facts.key, folder)
    index = folder / "model_index.json"
    try:
        entries = json.loads(index.read_text(encoding="utf-8"))
        classes = {name: str(entry[1]) for name, entry in entries.items() if isinstance(entry, list)}
    except FileNotFoundError as error:
        what = facts.repository or facts.key
        raise BadModelFolder(
            f"{index} is missing. Put the diffusers folder of {what} there, or name yours as [models.{facts.key}] "
            "path in the settings."
        ) from error
    except (ValueError, AttributeError, IndexError) as error:
        raise BadModelFolder(f"{index}: damaged ({error}). Fetch the model anew.") from error
    return {name: (prepared.component_folder(facts, models_folder, name), kind) for name, kind in classes.items()}


def outline(facts: ModelFacts, held: Precision, name: str, folder: Path, kind: str, models_folder: Path) -> Work:
    """Return what is to be written for a component.

    Args:
        folder: its published weights: a folder, or a single file.
        kind: its class.

    Raises:
        InvalidJob: its layers cannot be held so.
        BadModelFolder: weights are missing or damaged.
    """
    library = CLASSES.get(kind)
    if library is None:
        raise BadModelFolder(f"{folder}: a {kind} is never loaded block by block. Known: {', '.join(CLASSES)}.")
    config = models.folder(facts, models_folder) / name if folder.is_file() else folder
    module = skeleton.build(getattr(importlib.import_module(library), kind), config, library)
    try:
        stored = singlefile.weights_of(module, folder, f"{STEMS[library]}.safetensors")
    except FileNotFoundError as error:
        raise BadModelFolder(f"{error.filename} is missing. Fetch the model anew.") from error
    paths = tuple(dict.fromkeys(blocks.path for blocks in facts.blocks[name]))
    return Work(
        key=facts.key,
        precision=held,
        component=name,
        source=prepared.source(folder),
        config=config / "config.json",
        target=prepared.folder(models_folder, facts.key, held, name),
        stem=STEMS[library],
        pieces=tuple(pieces(module, stored, paths, precision.format_of(held), folder)),
    )


def pieces(
    module: nn.Module, stored: Mapping[str, Stored], paths: Sequence[str], held: Format | None, folder: Path
) -> Iterator[Piece]:
    """Yield every tensor of a component once, in the module's order, with what it is stored as."""
    kept = dtypes_kept(module, DTYPE)
    prefixes = tuple(f"{name}." for name, _ in running_order(module, paths))
    linears = {f"{name}.weight": linear for name, linear in module.named_modules() if isinstance(linear, nn.Linear)}
    names: dict[int, list[str]] = {}
    tensors = module.state_dict(keep_vars=True)
    for name, tensor in tensors.items():
        names.setdefault(id(tensor), []).append(name)  # T5's embedding has two
    for aliases in names.values():
        name = next((alias for alias in aliases if alias in stored), aliases[0])
        tensor = tensors[name]
        if name not in stored or stored[name].shape != tuple(tensor.shape):
            problem = "is not of the shape that config.json says" if name in stored else "is missing"
            raise BadModelFolder(f"{folder}: {name} {problem}. Fetch the model anew.")
        linear = linears.get(name)
        if held and linear is not None and name.startswith(prefixes) and held.takes(name, linear):
            layout = held.layout(linear.out_features, linear.in_features, DTYPE)
            entries = tuple(Entry(f"{name}.{part}", shape, dtype) for part, (shape, dtype) in layout.items())
            yield Piece(stored[name], DTYPE, entries, quantised=True)
            continue
        dtype = torch.float32 if kept.intersection(aliases) else DTYPE
        dtype = dtype if tensor.is_floating_point() else stored[name].dtype
        yield Piece(stored[name], dtype, (Entry(name, tuple(tensor.shape), dtype),), quantised=False)
