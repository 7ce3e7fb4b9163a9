"""Kept results: what LoRAs and a precision have made of a transformer. Where they are, what made them, what may go.

`<models>/fused/<KEY>/<PRECISION>/<DIGEST>/<COMPONENT>/` is of the format of a prepared folder (`safelight.prepared`);
DIGEST stands for the LoRAs, the dtype and the card. A set is what lies below one DIGEST, the experts of one model, and
is there, empty, as soon as one job has used those LoRAs; its time is that of its last use. Knows no tensor.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import get_args

from pydantic import ValidationError

from safelight import durable, prepared, tensorfile
from safelight.config import Config
from safelight.lora import Lora
from safelight.machine import GIB, Machine
from safelight.models import Models
from safelight.plan import Dtype, Precision
from safelight.prepared import MANIFEST, UNFINISHED, DamagedFolder

FOLDER = "fused"

VERSION = 1
"""Of the arithmetic by which safelight itself adds LoRAs. Another one makes every result stale."""

RESTS_S = 3600.0
"""A set that was used within this time is not removed for another: jobs that take turns with more LoRAs than there is
room for would else write a set each, all night."""

FREE_TIMES = 3
"""So many times [policy] min_free_disk_gib is left free: below one no job starts, and outputs come after this."""

SEEN_S = 30 * 86_400.0
"""After so long it is forgotten that LoRAs were used."""

Loras = tuple[tuple[str, float, str], ...]
"""sha256, scale and expert of each, in order: a sum of floats depends on it. A file that nobody has looked at yet has
its name there, and no result."""


class Manifest(prepared.Manifest):
    """What a kept result holds, and all that its bits depend on."""

    digest: str
    loras: Loras
    made_on: str
    """The card's name, or cpu: others add in another order."""
    arithmetic: int = VERSION

    @property
    def name(self) -> str:
        return f"{set_name(self.key, self.precision, self.digest)}/{self.component}"


def loras_of(loras: Sequence[Lora]) -> Loras:
    """Return what tells the weights of one job from those of another of the same model."""
    return tuple((lora.sha256 or lora.label, lora.scale, lora.expert) for lora in loras)


def digest(loras: Loras, dtype: str, made_on: str) -> str:
    """Return what a set is called; 64 bits of a digest: a manifest has all of it."""
    return hashlib.sha256(json.dumps([loras, dtype, made_on]).encode()).hexdigest()[:16]


def set_name(key: str, precision: Precision, of: str) -> str:
    return f"{key}/{precision}/{of}"


def of_loras(loras: Sequence[Lora], key: str, machine: Machine) -> tuple[str, ...]:
    """Return which of a machine's kept results have these LoRAs in them."""
    made_on = machine.gpu or machine.device
    of = [digest(loras_of(loras), dtype, made_on) for dtype in get_args(Dtype)]
    return tuple(name for name in machine.fused if name.split("/")[0] == key and name.split("/")[2] in of)


def set_folder(models_folder: Path, name: str) -> Path:
    """Return where a set is, or would be."""
    return models_folder / FOLDER / name


def sets(models_folder: Path, key: str = "*") -> list[Path]:
    """Return every set, finished or not, the least recently used first."""
    return sorted((at for at in _below(models_folder, f"{key}/*/*") if at.is_dir()), key=_used_at)


def seen(models_folder: Path, key: str) -> frozenset[str]:
    """Return the names of a model's sets: those of LoRAs that a job has used before."""
    return frozenset(map(_name, sets(models_folder, key)))


def folders(models_folder: Path) -> Iterator[Path]:
    """Yield every finished folder, in order."""
    for found in sorted(_below(models_folder, f"*/*/*/*/{MANIFEST}")):
        if not found.parent.name.endswith(UNFINISHED):
            yield found.parent


def leftovers(models_folder: Path) -> list[Path]:
    """Return what is not finished: it is being written or removed, or a process that did so was ended."""
    found = _below(models_folder, "*/*/*/*")
    return [at for at in found if at.is_dir() and (at.name.endswith(UNFINISHED) or not (at / MANIFEST).is_file())]


def _below(models_folder: Path, pattern: str) -> list[Path]:
    """Return what matches; nothing where another process removes a folder just now, or where the disk has gone."""
    try:
        return list((models_folder / FOLDER).glob(pattern))
    except OSError:  # a cache: to look again for the next job costs nothing, and this one must not fail
        return []


def _name(at: Path) -> str:
    return "/".join(at.parts[-3:])


def read(found: Path) -> Manifest:
    """Return the manifest of a folder.

    Raises:
        DamagedFolder: it cannot be read, or is another folder's.
    """
    try:
        manifest = Manifest.model_validate_json((found / MANIFEST).read_bytes())
    except (OSError, ValidationError) as error:
        raise DamagedFolder(f"its {MANIFEST} cannot be read") from error
    named = "/".join(found.parts[-4:])
    if manifest.name != named or digest(manifest.loras, manifest.dtype, manifest.made_on) != manifest.digest:
        raise DamagedFolder(f"its {MANIFEST} is another folder's")
    return manifest


def trouble(found: Path, table: Models, versions: Mapping[str, str]) -> str | None:
    """Return why a finished folder is of no use, None where jobs may load it; of its weights the headers are read.

    Raises:
        OSError: the published weights are being replaced just now, or their disk has gone.
    """
    try:
        manifest = read(found)
        if manifest.key not in table:
            return "its model is not known any more"
        if (manifest.arithmetic, manifest.versions) != (VERSION, versions):
            return "other versions of the libraries are installed"
        published = prepared.component_folder(table[manifest.key], _models_folder(found), manifest.component)
        if not prepared.is_current(manifest, published, touched=False):
            return "the published weights are others now"
    except DamagedFolder as error:
        return str(error)
    return shallow_damage(found, manifest)


def _models_folder(found: Path) -> Path:
    return found.parents[4]


def shallow_damage(found: Path, manifest: Manifest) -> str | None:
    """Return what is wrong with a folder as far as names, sizes and headers tell."""
    if wrong := prepared.size_mismatch(found, manifest.files):
        return wrong
    try:
        for file in manifest.files:
            if file.name.endswith(".safetensors"):
                tensorfile.entries(found / file.name)
    except (tensorfile.UnreadableWeights, OSError) as error:
        return str(error)
    return None


def usable(models_folder: Path, table: Models, versions: Mapping[str, str]) -> list[str]:
    """Return KEY/PRECISION/DIGEST/COMPONENT of every result that jobs may load."""
    found = []
    for at in folders(models_folder):
        with suppress(OSError):
            if trouble(at, table, versions) is None:
                found.append("/".join(at.parts[-4:]))
    return found


def damage(found: Path) -> list[str]:
    """Return what is wrong with a folder, a line a file; every byte of it is read."""
    remedy = f"Remove it, and a later job makes it anew: safelight models rm {found.parts[-4]} --fused"
    try:
        manifest = read(found)
    except DamagedFolder as error:
        return [f"{found}: {error}. {remedy}"]
    wrong = ((file, prepared.file_damage(found / file.name, file)) for file in manifest.files)
    return [f"{found / file.name}: {problem}. {remedy}" for file, problem in wrong if problem]


def held_bytes(at: Path) -> int:
    """Return what lies below a folder."""
    total = 0
    for folder, _, files in os.walk(at):  # which passes over what vanishes
        for file in files:
            with suppress(OSError):  # another process removes it just now
                total += (Path(folder) / file).stat().st_size
    return total


def limits(config: Config) -> tuple[int, int]:
    """Return how many bytes may be kept, and how many of the disk stay free of them."""
    reserve = int(FREE_TIMES * config.settings.policy.min_free_disk_gib * GIB)
    return int(config.settings.worker.fused_gib * GIB), reserve


def room_bytes(config: Config, table: Models, whole: Sequence[str], now: float | None = None) -> int:
    """Return how large a further set may be: within the limit and the free disk, when what may go has gone.

    Args:
        whole: what is usable.
    """
    limit, reserve = limits(config)
    folder = config.paths.models
    with _place(folder) as place:
        if not limit or not os.access(".", os.W_OK | os.X_OK, dir_fd=place):
            return 0
    staying = going = 0
    for at in sets(folder):
        size = held_bytes(at)
        if is_resting(at, table, whole, now):
            staying += size
        else:
            going += size
    free = free_bytes(folder) + going - reserve
    return max(min(limit - staying, free), 0)


def give_way(config: Config, beside: Path) -> None:
    """Remove sets, the least recently used first, until [policy] min_free_disk_gib is free where `beside` is.

    Raises:
        OSError: one cannot be removed.
    """
    folder, least = config.paths.models, int(config.settings.policy.min_free_disk_gib * GIB)
    for at in sets(folder):
        with _place(folder) as place:
            if shutil.disk_usage(place).free >= least or os.fstat(place).st_dev != beside.stat().st_dev:
                return
        remove_set(at)


def free_bytes(models_folder: Path) -> int:
    """Return what is free on the disk that results are kept on: `fused` may be a link to another."""
    with _place(models_folder) as place:
        return shutil.disk_usage(place).free


@contextmanager
def _place(models_folder: Path) -> Iterator[int]:
    """Open the folder of results, or the nearest above it that is there: its name may be gone at the next look."""
    own = models_folder / FOLDER
    for at in (own, *own.parents):
        with suppress(FileNotFoundError, NotADirectoryError):
            place = os.open(at, os.O_PATH | os.O_DIRECTORY)
            break
    else:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(own))
    try:
        yield place
    finally:
        os.close(place)


def is_resting(at: Path, table: Models, whole: Sequence[str], now: float | None = None) -> bool:
    """Whether a set is whole and was used so recently that it makes no room for another."""
    key = at.parts[-3]
    experts = [name for name in table[key].blocks if name.startswith("transformer")] if key in table else []
    is_whole = bool(experts) and all(f"{_name(at)}/{name}" in whole for name in experts)
    return is_whole and (time.time() if now is None else now) - _used_at(at) < RESTS_S


def note_use(models_folder: Path, name: str) -> None:
    """Have a set's folder, used now."""
    at = set_folder(models_folder, name)
    at.mkdir(parents=True, exist_ok=True)
    os.utime(at)


def forget_unused(models_folder: Path, now: float | None = None) -> None:
    """Forget that LoRAs were used, where that is long ago and nothing is kept of them."""
    for at in sets(models_folder):
        if (time.time() if now is None else now) - _used_at(at) > SEEN_S:
            with suppress(OSError):  # something is kept in it
                at.rmdir()


def _used_at(at: Path) -> float:
    try:
        return at.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def remove_set(at: Path) -> bool:
    """Remove a set; False where a process reads or writes any of it, or just made it anew."""
    with ExitStack() as locks:
        inner = [folder for folder in at.glob("*") if folder.is_dir()]
        if not all(locks.enter_context(_locked(folder)) for folder in inner):
            return False
        for folder in inner:
            _empty(folder)
    with suppress(OSError):  # another process has begun one in it meanwhile
        at.rmdir()
    durable.sync_folder(at.parent)
    return True


def remove(found: Path) -> bool:
    """Remove one folder of a set; False where a process reads or writes it."""
    with _locked(found) as is_ours:
        if is_ours:
            _empty(found)
    return is_ours


def _empty(folder: Path) -> None:
    # Without its manifest it is not whole: what is interrupted here leaves nothing that looks so.
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder)


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Have a folder for this process alone, where no other has it; the kernel ends a dead one's claim."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield os.fstat(descriptor).st_ino == folder.stat().st_ino
    except BlockingIOError:
        yield False
    finally:
        os.close(descriptor)
