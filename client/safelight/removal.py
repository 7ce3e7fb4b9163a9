"""What `safelight models rm` removes: safelight's own files of a model, of a person's only those that were named."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from safelight import durable, fused, models, prepared, pulled, registered
from safelight.config import Config
from safelight.errors import Fault, InvalidJob
from safelight.models import Models


@dataclass(frozen=True)
class Removal:
    """What goes when a model is removed."""

    key: str
    registered: bool
    """Its registration goes."""
    doomed: tuple[Path, ...]
    """Files and folders that go."""


def plan(key: str, config: Config, table: Models, named: Sequence[Path]) -> Removal:
    """Return what is to go.

    Args:
        named: files and folders of a registered model that are to go, too.

    Raises:
        InvalidJob: nothing of it is safelight's to remove, or something was named that is not of this model.
    """
    folder = config.paths.models
    registration = registered.read(folder, key)
    is_registered = registered.file_of(folder, key).is_file()
    places = registration.own if registration else []
    if not models.KEY.fullmatch(key):
        raise InvalidJob([Fault(key, *_nothing(key, config, table))])
    faults = [
        Fault(f"--delete {place}", f"is no file of {key}", f"Its own: {', '.join(map(str, places)) or 'none'}.")
        for place in named
        if place not in places
    ]
    faults += [
        Fault(f"--delete {place}", "is in the hub's cache, which is more than links", "Use: hf cache rm.")
        for place in named
        if place in places and "snapshots" in place.parts
    ]
    at = folder / key
    was_pulled = [at] if (at / pulled.MANIFEST).is_file() else []
    others = [other for other in registered.read_all(folder)[0] if other.key != key]
    shared = {place: other.key for other in others for place in other.places}
    faults += [
        Fault(str(place), f"{shared[place]} reads it, too", f"First: safelight models rm {shared[place]}.")
        for place in (*was_pulled, *named)
        if place in shared
    ]
    stored = folder / "prepared" / key
    written = [pulled.hidden(at), *stored.glob(f"*/*{prepared.UNFINISHED}")]
    faults += [
        Fault(str(place), "is being written", "Wait for it, or stop it.") for place in written if _claimed(place)
    ]
    kept = folder / fused.FOLDER / key
    faults += [
        Fault(str(place), "is in use by a job", "Wait for it.") for place in kept.glob("*/*/*") if _claimed(place)
    ]
    if faults:
        raise InvalidJob(faults)
    own = [stored, kept, pulled.hidden(at), *was_pulled]
    doomed = [place for place in (*own, *named) if place.exists()]
    if not is_registered and not doomed:
        raise InvalidJob([Fault(key, *_nothing(key, config, table))])
    return Removal(key, is_registered, tuple(doomed))


def empty_fused(key: str, config: Config) -> tuple[int, list[Path]]:
    """Remove what is kept of a model's LoRAs; return how many bytes that were, and the sets that a job uses."""
    freed, left = 0, []
    for at in fused.sets(config.paths.models, key):
        size = fused.held_bytes(at)
        if fused.remove_set(at):
            freed += size
        else:
            left.append(at)
    return freed, left


def _claimed(folder: Path) -> bool:
    """Whether a pull, a preparation or a job has it locked."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _nothing(key: str, config: Config, table: Models) -> tuple[str, str]:
    if key not in table:
        return "is not a model", f"Known: {', '.join(table.near(key))} (safelight models list)."
    facts = table[key]
    if not facts.tiny and models.is_there(facts, config.paths.models):
        return f"was put at {models.folder(facts, config.paths.models)} by hand", "Remove it by hand."
    return "is not registered, pulled or prepared", "There is nothing to remove."


def carry_out(removal: Removal, config: Config) -> None:
    """Remove it; the registration first, so that no job finds half a model."""
    if removal.registered:
        registered.forget(config.paths.models, removal.key)
    for place in removal.doomed:
        if place.is_dir() and not place.is_symlink():
            # Without its index it is no model: what is interrupted here leaves none that looks whole.
            (place / "model_index.json").unlink(missing_ok=True)
            shutil.rmtree(place)
        else:
            place.unlink()
        durable.sync_folder(place.parent)


def size_bytes(place: Path) -> int:
    """Return how many bytes lie there."""
    files = [place] if place.is_file() else [file for file in place.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)
