"""Pulled models and ControlNets: folders that `safelight models pull` fetched, and how much of one has arrived.

`manifest.json` in each names every file with its digest. Until all of them are there and right they lie
in a hidden folder beside the final one, which is renamed as a whole. Knows no network.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from safelight import prepared, published
from safelight.errors import SafelightError
from safelight.models import Models
from safelight.prepared import StoredFile
from safelight.published import Published

MANIFEST = "manifest.json"

WANTED = "wanted.json"
"""Lies in the hidden folder: what is being fetched."""

PART = ".part"
"""Ends the name of a file that has not arrived whole."""


class DamagedModel(SafelightError):
    """A pulled model is not what its manifest says."""


class WantedFile(BaseModel):
    """A file as the hub names it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    size_bytes: int
    digest: str
    """`sha256:` of its bytes where the hub keeps it apart from git, else git's own `blob:`."""


class Wanted(BaseModel):
    """What a pull fetches: the files of one commit that a model needs."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    v: Literal[1] = 1
    repository: str
    commit: str
    files: tuple[WantedFile, ...]

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)


class Manifest(BaseModel):
    """What a pulled model holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    v: Literal[1] = 1
    key: str
    repository: str
    commit: str
    licence: str
    files: tuple[StoredFile, ...]

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)


@dataclass(frozen=True)
class Arrived:
    """How much of a model lies in its hidden folder."""

    size_bytes: int
    of_bytes: int
    """0 where nothing says how much it will be."""


def hidden(folder: Path) -> Path:
    """Return where a model is while it is being pulled to `folder`."""
    return folder.with_name(f".{folder.name}.unfinished")


def arrived(folder: Path) -> Arrived | None:
    """Return how much of a model has been fetched that is not at `folder` yet; None where no pull has begun."""
    place = hidden(folder)
    if not place.is_dir():
        return None
    wanted = read_wanted(place)
    if wanted is None:
        return Arrived(0, 0)
    return Arrived(sum(size_here(place, file) for file in wanted.files), wanted.size_bytes)


def size_here(place: Path, file: WantedFile) -> int:
    """Return how many bytes of a file are in the hidden folder, whole or in part."""
    for name in (file.name, file.name + PART):
        try:
            return min((place / name).stat().st_size, file.size_bytes)
        except OSError:
            continue
    return 0


def read_wanted(place: Path) -> Wanted | None:
    """Return what is being fetched into a hidden folder; None where it does not say."""
    try:
        return Wanted.model_validate_json((place / WANTED).read_bytes())
    except (OSError, ValidationError):
        return None


def all_of(models_folder: Path, table: Models) -> Iterator[Published]:
    """Yield every model and ControlNet whose folder has a manifest, in the table's order."""
    seen = set()  # a registered model may take from another's folder what it has not itself
    for facts in table.values():
        nets = [published.of_controlnet(facts, key, models_folder) for key in facts.controlnets]
        for what in (published.of_model(facts, models_folder), *nets):
            if not facts.tiny and what.folder not in seen and (what.folder / MANIFEST).is_file():
                seen.add(what.folder)
                yield what


def read(folder: Path) -> Manifest | None:
    """Return the manifest of a folder; None where there is none: somebody put it there by hand.

    Raises:
        DamagedModel: it cannot be read.
    """
    try:
        content = (folder / MANIFEST).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise DamagedModel(f"{folder / MANIFEST}: cannot be read ({error.strerror}).") from error
    try:
        return Manifest.model_validate_json(content)
    except ValidationError as error:
        raise DamagedModel(f"{folder / MANIFEST}: damaged, or of a later version.") from error


def mismatch(folder: Path) -> str | None:
    """Return what is wrong with a pulled model as far as names and sizes tell; no weight is read.

    None also where no manifest says what should be there.
    """
    try:
        manifest = read(folder)
    except DamagedModel:
        return f"its {MANIFEST} cannot be read"
    return prepared.size_mismatch(folder, manifest.files) if manifest else None


def damage(what: Published) -> list[str]:
    """Return what is wrong with what was pulled, a line a file with the remedy; every byte of it is read."""
    folder = what.folder
    try:
        manifest = read(folder)
    except DamagedModel as error:
        return [f"{error} {remedy(what)}"]
    files = manifest.files if manifest else ()
    wrong = ((file, prepared.file_damage(folder / file.name, file, "fetched")) for file in files)
    return [f"{folder / file.name}: {problem}. {remedy(what)}" for file, problem in wrong if problem]


def remedy(what: Published) -> str:
    """Return the command that fetches what is damaged."""
    return f"Fetch what is damaged again: {what.command} --force"
