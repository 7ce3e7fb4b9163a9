"""Registered models: weights that stay where they lie, and what is known of them.

`<models>/registered/<KEY>.json` says what a key is like and where its files are; `safelight models add` writes it and
`rm` removes it. `<KEY>.digests.json` beside it has the sha256 of each file once they were read. Knows no weight.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from safelight import durable
from safelight.tensorfile import SUFFIXES

FOLDER = "registered"
"""Below the models folder; not a key, since keys are folders with a model_index.json."""

_DIGESTS = ".digests.json"

_READ = (*SUFFIXES, ".json", ".txt", ".model")
"""What jobs read of a model's folder."""

_BLOB = re.compile(r"[0-9a-f]{64}")
"""The hub's cache names large files by their sha256."""

CHUNK_BYTES = 8 * 2**20

Tell = Callable[[Path, int, int], None]
"""Is told of a file, the bytes that were read of all, and how many those are."""


class Registration(BaseModel):
    """Where a registered model's files are."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    v: Literal[1] = 1
    key: str
    like: str
    """The key whose facts it has; its own, where it is a model of the shipped table that lies elsewhere."""
    folder: str = ""
    """In the layout of diffusers, absolute; "" where it is to lie below the models folder, under its key."""
    components: dict[str, str] = Field(default_factory=dict)
    """Folders or single files, absolute, in the place of components of that folder."""

    @property
    def row(self) -> dict[str, object]:
        """What it says in the table of models."""
        row: dict[str, object] = {"path": self.folder, "component_paths": self.components, "tiny": False}
        return row if self.like == self.key else {"like": self.like, **row}

    @property
    def own(self) -> list[Path]:
        """What was registered: weights in the place of components, else the whole folder."""
        return [Path(place) for place in self.components.values()] or [Path(self.folder)]

    @property
    def places(self) -> list[Path]:
        """What must be there."""
        return [Path(place) for place in (self.folder, *self.components.values()) if place]


class FileDigest(BaseModel):
    """A file as it was when all of it was read."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Digested:
    """How much of a registered model has digests."""

    lacking: tuple[Path, ...]
    """Its files that have none."""
    done_bytes: int
    """Of the files that have one."""
    total_bytes: int


class Digests(BaseModel):
    """What was read of a registered model, by the paths of its files."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    v: Literal[1] = 1
    files: dict[str, FileDigest] = Field(default_factory=dict)


def file_of(models_folder: Path, key: str) -> Path:
    """Return where a registration is, or would be."""
    return models_folder / FOLDER / f"{key}.json"


def stamp(models_folder: Path) -> int:
    """Return what changes when a model is registered or forgotten; 0 where none ever was."""
    try:
        return (models_folder / FOLDER).stat().st_mtime_ns
    except OSError:
        return 0


def read_all(models_folder: Path) -> tuple[list[Registration], list[str]]:
    """Return every registration in the order of keys, and what is wrong with those that cannot be read."""
    found, faults = [], []
    try:
        files = sorted((models_folder / FOLDER).glob("*.json"))
    except OSError as error:
        return [], [f"{models_folder / FOLDER}: {error.strerror}. Make it readable."]
    for file in files:
        if file.name.startswith(".") or file.name.endswith(_DIGESTS):
            continue
        try:
            registration = Registration.model_validate_json(file.read_bytes())
            if registration.key != file.stem:
                faults.append(f"{file}: is that of {registration.key}. Remove it.")
            else:
                found.append(registration)
        except (OSError, ValidationError):
            faults.append(f"{file}: damaged, or of a later version. Remove it, and register the model again.")
    return found, faults


def read(models_folder: Path, key: str) -> Registration | None:
    """Return the registration of a key; None where there is none that can be read."""
    return next((found for found in read_all(models_folder)[0] if found.key == key), None)


def write(models_folder: Path, registration: Registration) -> None:
    """Register a model: whole and on the disk when this returns."""
    durable.write(file_of(models_folder, registration.key), registration.model_dump_json(indent=1).encode())


def forget(models_folder: Path, key: str) -> None:
    """Remove a registration; the files that it names are left alone."""
    with _alone(models_folder):
        for file in (file_of(models_folder, key), _digests_file(models_folder, key)):
            file.unlink(missing_ok=True)
        durable.sync_folder(models_folder / FOLDER)


def unmounted(registration: Registration) -> Path | None:
    """Return a place that is gone as an unmounted disk's are: the folder that held it is gone, too, or empty."""
    for place in registration.places:
        if not place.exists() and not holds_something(place.parent):
            return place
    return None


def holds_something(folder: Path) -> bool:
    """Whether there is anything in a folder; False where it is none, or cannot be read."""
    try:
        return any(folder.iterdir())
    except OSError:
        return False


def files_of(registration: Registration) -> list[Path]:
    """Return every file that jobs may read of a registered model; links of the hub's cache are followed.

    Raises:
        OSError: a place is gone, or cannot be read.
    """
    found: list[Path] = []
    for place in registration.places:
        if place.is_dir():
            inner = [
                place,
                *sorted(each for each in place.iterdir() if each.is_dir() and not each.name.startswith(".")),
            ]
            found += [file for folder in inner for file in sorted(folder.iterdir()) if file.suffix in _READ]
        else:
            place.stat()
            found.append(place)
    return list(dict.fromkeys(found))


def verify(models_folder: Path, registration: Registration, tell: Tell) -> tuple[int, list[str]]:
    """Read every file of a registered model; return how many were read for the first time, and what is wrong.

    A file of the hub's cache is compared with its name there; any other with what it was when it was first read, which
    is written down after each: what interrupts this loses one file's reading.
    """
    try:
        files = files_of(registration)
        of = sum(file.stat().st_size for file in files)
    except OSError as error:
        return 0, [f"{error.filename}: {error.strerror}. {remedy(registration.key)}"]
    known = _read_digests(_digests_file(models_folder, registration.key))
    done, new, wrong = 0, 0, []
    for file in files:
        try:
            found = digest(file, partial(_told, tell, file, done, of))
        except OSError as error:
            wrong.append(f"{file}: cannot be read ({error.strerror}). {remedy(registration.key)}")
            continue
        done += found.size_bytes
        meant = _named(file, found) or known.get(str(file))
        if meant is None:
            new += remember(models_folder, registration, file, found)
        elif meant != found:
            wrong.append(f"{file}: its bytes are not those that it had. {remedy(registration.key)}")
    return new, wrong


def remedy(key: str) -> str:
    """Return what to do about files that are not what they were."""
    return f"Put back what was there, or register it anew: safelight models rm {key}, then safelight models add."


def digested(models_folder: Path, registration: Registration) -> Digested:
    """Return which files of a model have not been read once; those that the hub's cache names by a digest need not be.

    Raises:
        OSError: a place is gone, or cannot be read.
    """
    known = _read_digests(_digests_file(models_folder, registration.key))
    sizes = {file: file.stat().st_size for file in files_of(registration)}
    lacking = {file: size for file, size in sizes.items() if not (str(file) in known or _blob_name(file))}
    total = sum(sizes.values())
    return Digested(tuple(lacking), total - sum(lacking.values()), total)


def remember(models_folder: Path, registration: Registration, file: Path, found: FileDigest) -> bool:
    """Write down what a file is, unless that is known; False where the model was forgotten, or registered anew."""
    with _alone(models_folder):
        if read(models_folder, registration.key) != registration:
            return False
        place = _digests_file(models_folder, registration.key)
        known = {str(file): found, **_read_digests(place)}
        durable.write(place, Digests(files=known).model_dump_json(indent=1).encode())
    return True


@contextmanager
def _alone(models_folder: Path) -> Iterator[None]:
    """Change what is known of a model while no other process does: the daemon and a person may read it at once."""
    descriptor = os.open(models_folder / FOLDER, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _digests_file(models_folder: Path, key: str) -> Path:
    return models_folder / FOLDER / f"{key}{_DIGESTS}"


def _read_digests(file: Path) -> dict[str, FileDigest]:
    try:
        return dict(Digests.model_validate_json(file.read_bytes()).files)
    except (OSError, ValidationError):
        return {}  # they are read again


def _told(tell: Tell, file: Path, before: int, of: int, nbytes: int) -> None:
    tell(file, before + nbytes, of)


def digest(file: Path, tell: Callable[[int], None]) -> FileDigest:
    """Read a file, telling how many bytes that are so far.

    Raises:
        OSError: it cannot be read, or it was changed or replaced while it was.
    """
    sha256, size = hashlib.sha256(), 0
    with file.open("rb") as stream:
        before = os.fstat(stream.fileno())
        while chunk := stream.read(CHUNK_BYTES):
            sha256.update(chunk)
            size += len(chunk)
            tell(size)
    after = file.stat()
    if any(getattr(before, name) != getattr(after, name) for name in ("st_ino", "st_size", "st_mtime_ns")):
        raise OSError(errno.ESTALE, "it was changed while it was read", str(file))
    return FileDigest(size_bytes=size, sha256=sha256.hexdigest())


def _named(file: Path, found: FileDigest) -> FileDigest | None:
    """Return what a file of the hub's cache should be, by the name of its blob."""
    name = _blob_name(file)
    return FileDigest(size_bytes=found.size_bytes, sha256=name) if name else None


def _blob_name(file: Path) -> str:
    name = file.readlink().name if file.is_symlink() else ""
    return name if _BLOB.fullmatch(name) else ""
