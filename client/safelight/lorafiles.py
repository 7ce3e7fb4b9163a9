"""LoRA files: found by name in the folder `loras` of the models folder or among those that come with safelight, or
copied from beside a job; known by sha256.

Only safetensors: other formats are pickles, and a pickle can run any program. What is in a file is not looked at here,
but that it is whole.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from safelight import digests, durable
from safelight.config import shipped
from safelight.errors import Fault, InvalidJob
from safelight.lora import SUFFIX, Lora

SIZE_BYTES_MAX = 8 << 30
"""The largest published ones, of rank 256 for Wan A14B, have 2.5 GB."""

HEADER_BYTES_MAX = 100_000_000
"""As in the format's own reader."""

PICKLES = (".bin", ".ckpt", ".pkl", ".pt", ".pth")

PIECE_BYTES = 1 << 20

_digests: dict[tuple[Path, int, int, int], str] = {}
"""By path, inode, size and time of change: a night of jobs names the same few files, and a digest takes a second a
gigabyte."""


def folder(models_folder: Path) -> Path:
    """Return where LoRAs are looked for by name."""
    return models_folder / "loras"


def may_look(models_folder: Path) -> bool:
    """Whether this user can see what LoRAs there are; where there is no folder, there are none."""
    return not models_folder.exists() or os.access(models_folder, os.R_OK | os.X_OK)


def names(models_folder: Path) -> dict[str, Path]:
    """Return every LoRA by its name, which says the folders that it lies in below `loras`; links are followed."""
    top = folder(models_folder)
    found = {}
    for place, below, files in os.walk(top, followlinks=True):
        below[:] = sorted(name for name in below if not name.startswith("."))
        if len(Path(place).relative_to(top).parts) >= 8:
            below.clear()  # a link that leads back above itself
        for file in sorted(files):
            if file.lower().endswith(SUFFIX) and not file.startswith("."):
                path = Path(place) / file
                found[str(path.relative_to(top))[: -len(SUFFIX)]] = path
    return found


def shipped_names() -> dict[str, Path]:
    """Return the LoRAs that come with safelight, by name; a file of yours that has such a name goes before it."""
    return {file.stem: file for file in sorted(shipped("loras").glob(f"*{SUFFIX}"))}


def check_shipped(file: Path, label: str) -> None:
    """Compare a LoRA that comes with safelight with the digest beside it.

    Raises:
        InvalidJob: it is not what was shipped.
    """
    if digests.listed(file.parent).get(file.name) != _digest(file):
        raise _refused(label, f"{file} is not as shipped", "Install safelight again.")


def find(lora: Lora, models_folder: Path) -> Lora:
    """Return a LoRA that is named, with the digest and size of its file.

    A name without folders means the one file of that name in any of them.

    Raises:
        InvalidJob: there is none, there are several, or the file is damaged.
    """
    path, name = _named(lora, models_folder)
    if path.parent == shipped("loras"):
        check_shipped(path, lora.label)
    return lora.model_copy(update={"name": name, **_known(path, lora.label)})


def file_of(lora: Lora, models_folder: Path, inputs: Path) -> Path:
    """Return the file of a LoRA whose digest is known, which is still what it was.

    Raises:
        InvalidJob: it is gone, or has changed.
    """
    path = inputs / lora.sha256 if lora.path else _named(lora, models_folder)[0]
    try:
        is_same = _digest(path) == lora.sha256
    except OSError as error:
        remedy = "Submit the job again with the file." if lora.path else "Put it back, or submit the job again."
        raise _refused(lora.label, f"{path}: {error.strerror}", remedy) from error
    if not is_same:
        remedy = "Put it back, or submit the job again."
        raise _refused(lora.label, f"{path} has changed since it was submitted", remedy)
    return path


def _named(lora: Lora, models_folder: Path) -> tuple[Path, str]:
    there = names(models_folder)
    if lora.name in there:
        return there[lora.name], lora.name
    alike = [name for name in there if name.rpartition("/")[2] == lora.name]
    if len(alike) > 1:
        raise _refused(lora.label, f"there are several in {folder(models_folder)}", f"Use {' or '.join(alike)}.")
    if alike:
        return there[alike[0]], alike[0]
    own = shipped_names()
    if lora.name in own:
        return own[lora.name], lora.name
    top = folder(models_folder)
    for suffix in PICKLES:
        if (top / f"{lora.name}{suffix}").is_file() or lora.name.lower().endswith(suffix):
            raise _pickled(lora.label)
    short = {name.rpartition("/")[2]: name for name in there}
    near = difflib.get_close_matches(lora.name, [*there, *short], n=3, cutoff=0.4)
    near += difflib.get_close_matches(lora.name, own)
    said = list(dict.fromkeys(short.get(name, name) for name in near)) or [*sorted(there)[:5], *own]
    remedy = f"Did you mean {' or '.join(said)}?" if near else f"There are {', '.join(said)}."
    raise _refused(lora.label, f"no {lora.name}{SUFFIX} in {top}, and none comes with safelight", remedy)


def store(lora: Lora, source: Path, inputs: Path) -> Lora:
    """Keep a copy of the LoRA at `source` as `inputs/<sha256>`; return it with digest and size.

    Durable when this returns. `source` itself must not be a link: resolve one that you trust.

    Raises:
        InvalidJob: it is no safetensors file, or a damaged one.
        OSError: `inputs` cannot be written.
    """
    if source.suffix.lower() in PICKLES:
        raise _pickled(lora.label)
    inputs.mkdir(parents=True, exist_ok=True)
    unfinished = inputs / f".lora.{os.getpid()}.part"
    try:
        with _opened(source, lora.label) as stream, unfinished.open("wb") as copy:
            if os.fstat(stream.fileno()).st_size > SIZE_BYTES_MAX:
                raise _too_large(lora.label)
            sha256 = hashlib.sha256()
            while piece := stream.read(PIECE_BYTES):
                sha256.update(piece)
                copy.write(piece)
            copy.flush()
            os.fsync(copy.fileno())
        size = unfinished.stat().st_size
        if problem := damage(unfinished, size):
            raise _refused(lora.label, problem, "Fetch it anew.")
        unfinished.replace(inputs / sha256.hexdigest())
    finally:
        unfinished.unlink(missing_ok=True)
    durable.sync_folder(inputs)
    return lora.model_copy(update={"sha256": sha256.hexdigest(), "size_bytes": size})


@contextlib.contextmanager
def _opened(source: Path, label: str) -> Iterator[BinaryIO]:
    try:
        descriptor = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise _refused(label, (error.strerror or str(error)).lower(), "Name a file that can be read.") from error
    with os.fdopen(descriptor, "rb") as stream:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise _refused(label, "it is no plain file", f"Name a {SUFFIX} file.")
        yield stream


def _known(path: Path, label: str) -> dict[str, object]:
    """Return the digest and the size of a file, which is whole."""
    try:
        size = path.stat().st_size
        if size > SIZE_BYTES_MAX:
            raise _too_large(label)
        problem = damage(path, size)
        if problem:
            raise _refused(label, problem, "Fetch it anew.")
        return {"sha256": _digest(path), "size_bytes": size}
    except OSError as error:
        raise _refused(label, f"{path}: {error.strerror}", "Name a file that can be read.") from error


def damage(path: Path, size: int) -> str | None:
    """Return why a file is no whole safetensors file; its header is read."""
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 0 < length <= min(HEADER_BYTES_MAX, size - 8):
            return "it is no safetensors file, or a cut one"
        try:
            entries = json.loads(stream.read(length))
            ends = [int(entry["data_offsets"][1]) for name, entry in entries.items() if name != "__metadata__"]
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return "its header is damaged"
    if not ends:
        return "there is no tensor in it"
    return None if max(ends) == size - 8 - length else "it is cut, or has something behind its tensors"


def _digest(path: Path) -> str:
    at = path.stat()
    key = (path, at.st_ino, at.st_size, at.st_mtime_ns)
    if key not in _digests:
        with path.open("rb") as stream:
            _digests[key] = hashlib.file_digest(stream, "sha256").hexdigest()
    return _digests[key]


def _pickled(label: str) -> InvalidJob:
    return _refused(label, "it is pickled, and a pickle can run any program", f"Convert it to {SUFFIX}.")


def _too_large(label: str) -> InvalidJob:
    return _refused(label, f"it is larger than {SIZE_BYTES_MAX >> 30} GiB", "Use one of a lower rank.")


def _refused(label: str, problem: str, remedy: str) -> InvalidJob:
    return InvalidJob([Fault(f"LoRA {label}", problem, remedy)])
