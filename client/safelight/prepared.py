"""Prepared folders: components stored in the precision they run in. Where they are, and what made them.

`<models>/prepared/<KEY>/<PRECISION>/<COMPONENT>/` holds config.json, the weights as safetensors, and manifest.json,
which is written last: a folder that has one is whole. Knows no tensor.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from safelight import models
from safelight.errors import SafelightError
from safelight.models import ModelFacts, Models
from safelight.plan import Precision
from safelight.tensorfile import SUFFIXES

MANIFEST = "manifest.json"

UNFINISHED = ".unfinished"
"""Ends the name of a folder that is being written."""

EDGE_BYTES = 2**20

LIBRARIES = ("torch", "diffusers", "transformers", "torchao", "bitsandbytes", "optimum-quanto")
"""What has a say in the bits of a weight that is quantised."""

PRECISIONS: tuple[Precision, ...] = tuple(name for name in get_args(Precision) if name not in ("fp32", "fp16"))
"""What a component can be prepared in."""


class DamagedFolder(SafelightError):
    """A prepared folder is not what its manifest says."""


class SourceFile(BaseModel):
    """A file that a prepared component was made from, as it was then."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    size_bytes: int
    mtime_ns: int
    edges_sha256: str
    """Of its first and its last MiB: names, shapes and offsets are in it, and some of the weights."""


class Source(BaseModel):
    """What a prepared component was made from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    folder: str
    files: tuple[SourceFile, ...]


class StoredFile(BaseModel):
    """A file of a prepared folder."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    size_bytes: int
    sha256: str


class Manifest(BaseModel):
    """What a prepared folder holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    v: Literal[1] = 1
    key: str
    precision: Precision
    component: str
    dtype: str
    """Of the computation it was made for, and of what is not quantised; scales are in it, too."""
    source: Source
    files: tuple[StoredFile, ...]
    quantised: int = 0
    """Linear weights held in `precision`."""
    versions: dict[str, str] = Field(default_factory=dict)
    """Of the libraries that made it."""

    @property
    def name(self) -> str:
        return f"{self.key}/{self.precision}/{self.component}"

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)


def folder(models_folder: Path, key: str, precision: Precision, component: str) -> Path:
    """Return where a component is, or would be, in a precision."""
    return models_folder / "prepared" / key / precision / component


def _name(found: Path) -> str:
    return "/".join(found.parts[-3:])


def folders(models_folder: Path) -> Iterator[Path]:
    """Yield every finished folder, in order."""
    for manifest in sorted((models_folder / "prepared").glob(f"*/*/*/{MANIFEST}")):
        found = manifest.parent
        if not found.name.endswith(UNFINISHED) and found.parent.name in PRECISIONS:
            yield found


def usable(models_folder: Path, table: Models) -> list[Manifest]:
    """Return what jobs may be loaded from: whole, and made from the weights that its model has now."""
    return [manifest for manifest, current in manifests(models_folder, table) if current]


def manifests(models_folder: Path, table: Models) -> list[tuple[Manifest, bool]]:
    """Return every finished folder of a known model, and whether it was made from the weights that are there now.

    A folder whose manifest cannot be read, or is another folder's, is left out: `damage` says what is wrong with it.
    """
    found = []
    for at in folders(models_folder):
        try:
            manifest = read(at)
        except DamagedFolder:
            continue
        if manifest and manifest.key in table and manifest.name == _name(at):
            published = component_folder(table[manifest.key], models_folder, manifest.component)
            try:
                current = is_current(manifest, published)
            except OSError:
                current = False  # they are being replaced just now, or the disk has gone
            found.append((manifest, current))
    return found


def read(found: Path) -> Manifest | None:
    """Return the manifest of a folder; None where there is none.

    Raises:
        DamagedFolder: it cannot be read.
    """
    try:
        content = (found / MANIFEST).read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise DamagedFolder(f"{found / MANIFEST}: cannot be read ({error}). {remedy(found)}") from error
    try:
        return Manifest.model_validate_json(content)
    except ValidationError as error:
        raise DamagedFolder(f"{found / MANIFEST}: damaged, or of a later version. {remedy(found)}") from error


def versions() -> dict[str, str]:
    """Return the versions of the installed libraries that make weights; none of them is imported."""
    found = {name: next(iter(metadata.distributions(name=name)), None) for name in LIBRARIES}
    return {name: distribution.version for name, distribution in found.items() if distribution}


def component_folder(facts: ModelFacts, models_folder: Path, component: str) -> Path:
    """Return where a component's published weights are: a folder, or a single file."""
    own = facts.component_paths.get(component)
    return Path(own).expanduser() if own else models.folder(facts, models_folder) / component


def source(published: Path) -> Source:
    """Return what a folder of published weights, or a single file, holds now; two MiB of each file are read."""
    files = tuple(
        SourceFile(
            name=file.name,
            size_bytes=(at := file.stat()).st_size,
            mtime_ns=at.st_mtime_ns,
            edges_sha256=_edges_sha256(file),
        )
        for file in _source_files(published)
    )
    return Source(folder=str(published), files=files)


def is_current(manifest: Manifest, published: Path, *, touched: bool = True) -> bool:
    """Whether a prepared component was made from what is in this folder now.

    Args:
        touched: files of other times are looked into: they may have been copied. Else they are others.

    Where nothing is left there, nothing speaks against it: published weights may be deleted once they are prepared.
    Files of the same names, sizes and times are taken for the same without being read.
    """
    now = [(file.name, (at := file.stat()).st_size, at.st_mtime_ns) for file in _source_files(published)]
    if not any(name.endswith(SUFFIXES) for name, _, _ in now):
        return True
    then = manifest.source.files
    if now == [(file.name, file.size_bytes, file.mtime_ns) for file in then]:
        return touched or manifest.source.folder == str(published)
    if not touched:
        return False
    if [name_and_size[:2] for name_and_size in now] != [(file.name, file.size_bytes) for file in then]:
        return False
    return all(
        _edges_sha256(file) == past.edges_sha256 for file, past in zip(_source_files(published), then, strict=True)
    )


def damage(found: Path) -> list[str]:
    """Return what is wrong with a prepared folder, a line a file with the remedy; every byte of it is read."""
    try:
        manifest = read(found)
    except DamagedFolder as error:
        return [str(error)]
    if manifest is None:
        return [f"{found / MANIFEST}: is missing. {remedy(found)}"]
    if manifest.name != _name(found):
        return [f"{found / MANIFEST}: is that of {manifest.name}. {remedy(found)}"]
    wrong = ((file, file_damage(found / file.name, file)) for file in manifest.files)
    return [f"{found / file.name}: {problem}. {remedy(found)}" for file, problem in wrong if problem]


def mismatch(found: Path) -> str | None:
    """Return what is wrong with a prepared folder as far as names and sizes tell; no weight is read."""
    try:
        manifest = read(found)
    except DamagedFolder:
        return f"its {MANIFEST} cannot be read"
    if manifest is None or manifest.name != _name(found):
        return f"its {MANIFEST} is missing, or another folder's"
    return size_mismatch(found, manifest.files)


def size_mismatch(folder: Path, files: Iterable[StoredFile]) -> str | None:
    """Return the first of these files that is not there, or not as long as it was."""
    for file in files:
        try:
            size = (folder / file.name).stat().st_size
        except OSError as error:
            return f"{file.name}: {error.strerror}"
        if size != file.size_bytes:
            return f"{file.name} is {size} bytes long and was {file.size_bytes}"
    return None


def file_damage(path: Path, file: StoredFile, were: str = "written") -> str | None:
    """Return what is wrong with a file that was `were` as it says; every byte of it is read."""
    try:
        with path.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            if size != file.size_bytes:
                return f"is {size} bytes long and was {file.size_bytes}"
            same = hashlib.file_digest(stream, "sha256").hexdigest() == file.sha256
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None if same else f"damaged: its bytes are not those that were {were}"


def _source_files(published: Path) -> list[Path]:
    """Return the files that decide what a component computes; weights in a single file are that file."""
    if published.is_file():
        return [published]
    wanted = (*published.glob("*.safetensors"), *published.glob("*.json"))
    return sorted(file for file in wanted if file.is_file())


def _edges_sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        digest.update(stream.read(EDGE_BYTES))
        stream.seek(max(os.fstat(stream.fileno()).st_size - EDGE_BYTES, 0))
        digest.update(stream.read(EDGE_BYTES))
    return digest.hexdigest()


def remedy(found: Path) -> str:
    """Return the command that makes a folder anew."""
    key, precision, component = found.parts[-3:]
    return f"Make it anew: safelight models prepare {key} --precision {precision} --component {component} --force"
