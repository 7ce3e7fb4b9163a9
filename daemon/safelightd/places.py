"""Whether what was there before is gone as it is while its disk is not mounted: the mount point is there, and empty.

A place counts once it has held something, so that a name with a typo in it holds nothing. What is remembered of that
is a file in the state folder.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safelight import durable, lorafiles, registered
from safelight.config import Config


def of_weights(config: Config) -> dict[Path, str]:
    """Return where settings, and links in the models folder, say that weights and Wan's program are; each with what
    says so. Registrations are looked at by `registered.unmounted`."""
    found: dict[Path, str] = {}
    for key, row in config.settings.models.items():
        for field, written in _fields_of(row):
            named = Path(os.path.expanduser(written))  # noqa: PTH111 - Path's raises where there is no such user
            place = config.beside_settings(str(named)) if field == "native" else named
            found[_real(place)] = f"[models.{key}] {field}"
    program = config.settings.wan_cli
    if program.checkout:
        found[_real(config.wan_checkout)] = "[wan_cli] checkout"
    if program.python:
        found[_real(config.wan_python)] = "[wan_cli] python"
    models = config.paths.models
    for link in _links(models, models / "controlnets", lorafiles.folder(models)):
        found[_real(link)] = f"the link {link}"
    return found


def _fields_of(row: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the fields of a model's row in the settings that name a place, and the place."""
    fields = {name: row.get(name) for name in ("path", "native")}
    for table in ("components", "component_paths"):
        fields |= {f"{table}.{name}": place for name, place in row.get(table, {}).items()}
    for name, controlnet in row.get("controlnets", {}).items():
        fields[f"controlnets.{name}.path"] = controlnet.get("path")
    named = ((name, place) for name, place in fields.items() if place and isinstance(place, str))
    yield from ((name, place) for name, place in named if "\0" not in place)


def _real(place: Path) -> Path:
    return Path(os.path.realpath(place))


def _links(*folders: Path) -> Iterator[Path]:
    for folder in folders:
        try:
            yield from (entry for entry in sorted(folder.iterdir()) if entry.is_symlink())
        except OSError:
            continue  # there is none, or its own disk is gone, which is another hold


def missed(memory: Path, places: Iterable[Path]) -> Path | None:
    """Return a place that is gone and was there when it was last looked at; remember in the file `memory` which are.

    Raises:
        OSError: the memory cannot be written.
    """
    named = {str(place): place for place in places}
    before = remembered(memory)
    after = {name for name, place in named.items() if name in before or _holds(place)}
    if after != before:
        durable.write(memory, json.dumps(sorted(after), indent=1).encode())
    return next((place for name, place in named.items() if name in before and is_gone(place)), None)


def is_missed(memory: Path, place: Path) -> bool:
    """Whether one place is gone and was there when it was last looked at; nothing is remembered."""
    return str(place) in remembered(memory) and is_gone(place)


def remembered(memory: Path) -> set[str]:
    """Return which places were there before."""
    try:
        return set(map(str, json.loads(memory.read_bytes())))
    except (FileNotFoundError, ValueError, TypeError):
        return set()  # those that are there are seen again at once


def is_gone(place: Path) -> bool:
    """Whether a place is an empty folder, or gone with all that lay beside it; a person who removes it leaves that."""
    real = _real(place)  # what lies beside a link says nothing of the disk that it leads to
    try:
        real.stat()
    except OSError:
        return not registered.holds_something(real.parent)
    return not _holds(real)


def _holds(place: Path) -> bool:
    try:
        return place.is_file() or registered.holds_something(place)
    except OSError:
        return False
