"""Where systemd units of safelight are installed, and so what starts the daemon on this machine."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

TARGET = "safelight.target"

OF_THE_SYSTEM = Path("/etc/systemd/system")


def of_a_person(env: Mapping[str, str]) -> Path:
    """Return the folder of a person's own units."""
    return Path(env.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "systemd/user"


def installed(env: Mapping[str, str], system: Path = OF_THE_SYSTEM) -> list[Path]:
    """Return the folders that have our units, the person's first."""
    return [folder for folder in (of_a_person(env), system) if _is_there(folder / TARGET)]


def _is_there(unit: Path) -> bool:
    try:
        return unit.is_file()
    except OSError:  # a folder that is closed to this user has no units of theirs
        return False


def remedy(env: Mapping[str, str] | None = None, system: Path = OF_THE_SYSTEM) -> str:
    """Return the sentence that says how the daemon is started here."""
    env = os.environ if env is None else env
    folders = installed(env, system)
    if not folders:
        return "Start it: safelight up, or safelight service install for units that do."
    return f"Start it: {'sudo systemctl' if folders[0] == system else 'systemctl --user'} start {TARGET}"
