"""Prepared folders of models too large for the disk in bf16: random weights, quantised on their way to the files.

What `safelight models prepare` would make of a folder of random weights, which is never written. Of two experts the
second one's files are links to the first's: they are read twice and stored once.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from bench import fullsize, shapes
from bench.fullsize import SHARD_BYTES, WRITERS, random_weight, timed
from safelight import prepared
from safelight.models import ModelFacts
from safelight.plan import Precision
from safelight.prepared import Manifest, Source, StoredFile
from safelightd import outline, precision, skeleton
from safelightd.assembly import dtypes_kept
from safelightd.device import give_back
from safelightd.outline import Piece
from safelightd.shards import Shard, split
from safelightd.weights import Stored

CLASS, LIBRARY = "WanTransformer3DModel", "diffusers"
STEM = "diffusion_pytorch_model"

NOT_HASHED = "0" * 64
"""In the place of digests that no bench asks for: hashing takes longer than writing."""


def build(
    facts: ModelFacts, folder: Path, held: Precision, models_folder: Path, device: str,
    changed: Mapping[str, Any] = fullsize.FULL,
) -> None:  # fmt: skip
    """Write the model's folder with configurations in the place of its experts, and those prepared below
    `models_folder`, unless they are there; for bf16 the first expert as it would be published, and a link to it."""
    experts = [name for name in facts.blocks if name.startswith("transformer")]
    fullsize.build(facts, folder, device, changed=changed, config_only=experts)
    if held == "bf16":
        _build_plain(facts, folder, experts, device)
        return
    first, *others = (prepared.folder(models_folder, facts.key, held, name) for name in experts)
    if not (first / prepared.MANIFEST).is_file():
        shutil.rmtree(first, ignore_errors=True)
        first.mkdir(parents=True)
        with timed(f"build {facts.key}/{held}"):
            names = _write(facts, folder / experts[0], held, first, device)
            _write_manifest(facts, folder / experts[0], held, first, names)
            give_back()
            os.sync()
    for other in others:
        if not (other / prepared.MANIFEST).is_file():
            shutil.rmtree(other, ignore_errors=True)
            other.mkdir(parents=True)
            names = [file.name for file in first.iterdir() if file.name != prepared.MANIFEST]
            for name in names:
                (other / name).hardlink_to(first / name)
            _write_manifest(facts, folder / other.name, held, other, names)


def _build_plain(facts: ModelFacts, folder: Path, experts: Sequence[str], device: str) -> None:
    first, *others = (folder / name for name in experts)
    if not any(first.glob("*.safetensors")):
        shutil.rmtree(first)
        with timed(f"build {facts.key} {first.name}"):
            module = fullsize.on_meta(f"{LIBRARY}.{CLASS}", shapes.config(facts, first.name, fullsize.FULL))
            fullsize.write(module, first, device)
    for other in others:
        for file in first.iterdir():
            if not (other / file.name).exists():
                (other / file.name).symlink_to(file.absolute())


def resident(folder: Path, device: torch.device) -> torch.nn.Module:
    """Return the expert whose configuration is in `folder` with random weights in bf16, all of it on `device`."""
    module = _outline(folder)
    kept = dtypes_kept(module, outline.DTYPE)
    for name, parameter in list(module.named_parameters()):
        path, _, child = name.rpartition(".")
        weight = random_weight(name, tuple(parameter.shape), str(device))
        weight = weight.float() if name in kept else weight
        setattr(module.get_submodule(path), child, torch.nn.Parameter(weight, requires_grad=False))
    return module.to(device).eval()


def _outline(folder: Path) -> torch.nn.Module:
    return skeleton.build(getattr(importlib.import_module(LIBRARY), CLASS), folder, LIBRARY)


def _write(facts: ModelFacts, published: Path, held: Precision, folder: Path, device: str) -> list[str]:
    """Write what `safelightd.prepare` would, several files at a time; return their names."""
    module = _outline(published)
    stored = {
        name: Stored(published / "none", 0, 2 * tensor.numel(), torch.bfloat16, tuple(tensor.shape))
        for name, tensor in module.state_dict(keep_vars=True).items()
    }
    paths = tuple(dict.fromkeys(blocks.path for blocks in facts.blocks["transformer"]))
    pieces = list(outline.pieces(module, stored, paths, precision.format_of(held), published))
    shards = split((piece.entries for piece in pieces), SHARD_BYTES)
    names = [f"{STEM}-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    file_of = {entry.name: name for name, own in zip(names, shards, strict=True) for entry in own}

    def write_shard(name: str) -> None:
        own = [piece for piece in pieces if file_of[piece.entries[0].name] == name]
        with Shard(folder / name, [entry for piece in own for entry in piece.entries]) as shard:
            for piece in own:
                _write_piece(shard, piece, held, _name_of(piece, stored), device)

    with ThreadPoolExecutor(WRITERS) as threads:
        list(threads.map(write_shard, names))
    index = {"metadata": {"total_size": sum(e.nbytes for own in shards for e in own)}, "weight_map": file_of}
    (folder / f"{STEM}.safetensors.index.json").write_text(json.dumps(index))
    shutil.copy(published / "config.json", folder)
    return [*names, f"{STEM}.safetensors.index.json", "config.json"]


def _name_of(piece: Piece, stored: dict[str, Stored]) -> str:
    return next(name for name, tensor in stored.items() if tensor is piece.stored)


@torch.no_grad()
def _write_piece(shard: Shard, piece: Piece, held: Precision, name: str, device: str) -> None:
    weight = random_weight(name, piece.stored.shape, device).to(piece.dtype)
    if not piece.quantised:
        shard.write(piece.entries[0].name, weight)
        return
    quantiser = precision.format_of(held)
    assert quantiser is not None
    for entry, part in zip(piece.entries, quantiser.quantise(weight).values(), strict=True):
        shard.write(entry.name, part.reshape(entry.shape))


def _write_manifest(facts: ModelFacts, published: Path, held: Precision, folder: Path, names: Sequence[str]) -> None:
    files = tuple(StoredFile(name=name, size_bytes=(folder / name).stat().st_size, sha256=NOT_HASHED) for name in names)
    manifest = Manifest(
        key=facts.key, precision=held, component=folder.name, dtype=str(outline.DTYPE).removeprefix("torch."),
        source=Source(folder=str(published), files=()), files=files,
    )  # fmt: skip
    (folder / prepared.MANIFEST).write_text(manifest.model_dump_json(indent=1))
