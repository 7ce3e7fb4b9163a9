"""What is there of each model: where, as what it is stored, how much of it, what it lacks, and what jobs it serves.

Reads names, sizes and headers; reads no weight.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from safelight import layout, models, prepared, published, pulled, registered, tensorfile
from safelight.jobspec import JobSpec
from safelight.models import ModelFacts, Models
from safelight.published import Published
from safelight.tensorfile import SUFFIXES, Entry

LARGE = "transformer"

WHOLE = ("present", "built on first use")
"""What Standing.state says of a model that jobs can load."""


@dataclass(frozen=True)
class Standing:
    """How much of a model is there."""

    state: str
    """present, incomplete, damaged, gone, missing, or in words how much of it has arrived."""
    missing: tuple[str, ...] = ()
    """What it lacks, or what is wrong with it."""
    precision: str = ""
    """What most weights of its transformer are stored as."""
    size_bytes: int = 0
    """Of all its weights on disk."""
    registered: bool = False


def standing(facts: ModelFacts, models_folder: Path) -> Standing:
    """Return how much of a model is there."""
    if facts.tiny:
        return _of_tiny(models.folder(facts, models_folder) / "model_index.json")
    own = registered.file_of(models_folder, facts.key).is_file()
    folder = models.folder(facts, models_folder)
    places = [Path(place).expanduser() for place in (facts.path, *facts.component_paths.values()) if place]
    if gone := [str(place) for place in places if not place.exists()]:
        return Standing("gone", tuple(gone), registered=own)
    there = models.is_there(facts, models_folder)
    if not there and not facts.component_paths:
        return Standing(_arriving(folder) or "missing", registered=own)
    headers, faults = _headers(facts, models_folder)
    size = sum({entry.file: entry.file.stat().st_size for entries in headers.values() for entry in entries}.values())
    precision = _precision(headers.get(LARGE, []))
    if not there:
        lacks = f"all but its {' and '.join(facts.component_paths)} (safelight models pull {facts.key} fetches it)"
        return Standing(_arriving(folder) or "incomplete", (lacks,), precision, size, own)
    if lacking := models.missing_files(facts, folder):
        return Standing("incomplete", tuple(lacking), precision, size, own)
    if faults:
        return Standing("damaged", tuple(faults), precision, size, own)
    if wrong := pulled.mismatch(folder):
        return Standing("incomplete", (wrong,), precision, size, own)
    return Standing("present", (), precision, size, own)


def _of_tiny(index: Path) -> Standing:
    return Standing("present" if index.is_file() else "built on first use")


def controlnets(facts: ModelFacts, models_folder: Path) -> dict[str, Standing]:
    """Return how much of each of a model's ControlNets is there, by key."""
    return {key: _of_controlnet(published.of_controlnet(facts, key, models_folder)) for key in facts.controlnets}


def _of_controlnet(what: Published) -> Standing:
    if what.facts.tiny:
        return _of_tiny(what.folder / what.index)
    if not (what.folder / what.index).is_file():
        return Standing(_arriving(what.folder) or "missing")
    wrong = pulled.mismatch(what.folder)
    if lacking := what.lacking() or ([wrong] if wrong else []):
        return Standing("incomplete", tuple(lacking))
    return Standing("present")


def lacking(specs: Iterable[JobSpec], table: Models, models_folder: Path, env: Mapping[str, str]) -> list[str]:
    """Return what these jobs need and is not whole here, a line each, with what to do about it."""
    own = [spec for spec in specs if spec.backend == "diffusers" and spec.model in table]
    models_of = dict.fromkeys(spec.model for spec in own)
    nets_of = dict.fromkeys((spec.model, spec.controlnet.model) for spec in own if spec.controlnet)
    wanted = [published.of_model(table[key], models_folder) for key in models_of]
    wanted += [
        published.of_controlnet(table[key], net, models_folder) for key, net in nets_of if net in table[key].controlnets
    ]
    return [line for what in wanted if (line := _lacking(what, models_folder, env))]


def _lacking(what: Published, models_folder: Path, env: Mapping[str, str]) -> str:
    try:
        at = _of_controlnet(what) if what.controlnet else standing(what.facts, models_folder)
        if at.state in WHOLE:
            return ""
        return f"{what.name}: {at.state}. Its jobs fail as long as it is not whole. {_whole(what, at, env)}"
    except OSError as error:  # a disk that is gone, or another person's folder: no reason to refuse a job
        place = error.filename or what.folder
        return f"{what.name}: {place}: {error.strerror}. Its jobs may fail. Let the worker's user read it."


def _whole(what: Published, at: Standing, env: Mapping[str, str]) -> str:
    """Return what makes a model whole that is not."""
    if at.state in ("gone", "damaged"):
        forget = f", or forget it: safelight models rm {what.facts.key}" if at.registered else "."
        return f"Put it back, whole{forget}"
    if at.state == "incomplete" and what.repository and not (what.folder / pulled.MANIFEST).is_file():
        return f"Copy it again, whole; or move {what.folder} away, and fetch it: {what.command}"
    if at.state == "missing" and not what.controlnet and (cached := in_hub_cache(what.facts, env)):
        return f"It is in the hub's cache: safelight models add {cached}"
    if what.repository:
        return f"Fetch it: {what.command}"
    return f"Put its files into {what.folder}."


def serves(facts: ModelFacts) -> tuple[str, ...]:
    """Return what a job may ask of a model: what it makes, and of what."""
    if facts.kind == "image":
        return ("text-to-image",)
    return {
        "never": ("text-to-video",),
        "optional": ("text-to-video", "image-to-video"),
        "required": ("image-to-video",),
    }[facts.image]


def in_hub_cache(facts: ModelFacts, env: Mapping[str, str]) -> Path | None:
    """Return where the hub's own cache has a model; None where it has not.

    The places are those of huggingface_hub's constants.py (2.4).
    """
    base = env.get("HF_HOME") or os.path.join(env.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")  # noqa: PTH118 - text
    cache = Path(env.get("HF_HUB_CACHE") or f"{base}/hub").expanduser()
    found = cache / f"models--{facts.repository.replace('/', '--')}"
    return found if facts.repository and (found / "snapshots").is_dir() else None


def _arriving(folder: Path) -> str:
    arrived = pulled.arrived(folder)
    if arrived is None:
        return ""
    return f"{_gib(arrived.size_bytes)} of {_gib(arrived.of_bytes)} pulled"


def _gib(size_bytes: float) -> str:
    from safelight import display

    return display.gib(size_bytes)


def _headers(facts: ModelFacts, models_folder: Path) -> tuple[dict[str, list[Entry]], list[str]]:
    """Return the tensors of each component that has weights, and what is wrong with the files."""
    headers: dict[str, list[Entry]] = {}
    faults = []
    for component in facts.components:
        place = prepared.component_folder(facts, models_folder, component)
        try:
            files = [place] if place.is_file() else sorted(file for file in place.glob("*") if file.suffix in SUFFIXES)
            headers[component] = [entry for file in files if file.exists() for entry in tensorfile.entries(file)]
        except tensorfile.UnreadableWeights as error:
            faults.append(str(error))
        except OSError as error:
            faults.append(f"{place}: {error.strerror}")
    return headers, faults


def _precision(entries: list[Entry]) -> str:
    try:
        return layout.recognise(entries, entries[0].file).precision if entries else ""
    except layout.OtherModel:
        return layout.precision(entries)
