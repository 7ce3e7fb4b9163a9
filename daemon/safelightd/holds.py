"""Why no job starts: a set of named reasons. Reads the machine's state; decides nothing about a job that runs."""

from __future__ import annotations

import json
import os
import time
from datetime import datetime
from datetime import time as wall_time
from pathlib import Path

from safelight import durable
from safelight.config import Config
from safelight.jobspec import PRIORITIES
from safelight.machine import GIB

PROBE_AGAIN_S = (5.0, 15.0, 60.0)
"""Waits between probes of a GPU that failed one; the last repeats."""


class GpuTrouble:
    """Remembers that the GPU failed a probe, and when to ask again."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self._failures = 0
        self._again_at = 0.0

    def failed(self, reason: str) -> None:
        self.reason = reason
        wait_s = PROBE_AGAIN_S[min(self._failures, len(PROBE_AGAIN_S) - 1)]
        self._failures += 1
        self._again_at = time.monotonic() + wait_s

    def lifted(self) -> None:
        self.reason = None
        self._failures = 0

    def due(self) -> bool:
        return self.reason is not None and time.monotonic() >= self._again_at


def read(config: Config, *, user_hold: str | None, gpu: str | None) -> dict[str, str]:
    """Return the holds in force, name -> reason for a person.

    Args:
        user_hold: what the queue says of the user's hold; the file of this installation counts as well.
        gpu: what is wrong with the GPU, None when nothing is.
    """
    found = {
        "user": _user(config.paths.user_hold, user_hold),
        "disk": _disk(config),
        "models": _models(config),
    }
    if config.settings.worker.device != "cpu":
        found["gpu"] = gpu
        if config.settings.policy.on_battery == "pause" and on_battery():
            found["battery"] = "on battery power; jobs go on when it charges"
    return {name: reason for name, reason in found.items() if reason}


def _user(file: Path, queue_says: str | None) -> str | None:
    try:
        reason = str(json.loads(file.read_text()).get("reason", ""))
    except FileNotFoundError:
        return queue_says
    except ValueError:
        reason = ""  # an unreadable file still says: paused
    return reason or "paused by safelight pause"


def _disk(config: Config) -> str | None:
    """Publishing and the ledger need room: no job starts that could not be kept."""
    least = config.settings.policy.min_free_disk_gib * GIB
    for folder in (config.paths.outbox, config.paths.state):
        there = next(parent for parent in (folder, *folder.parents) if parent.exists())
        stat = os.statvfs(there)
        free = stat.f_bavail * stat.f_frsize
        if free < least:
            return f"{free / GIB:.1f} GiB free at {folder}, less than min_free_disk_gib = {least / GIB:g}"
    return None


def _models(config: Config) -> str | None:
    """An unmounted disk must not fail a night of jobs one by one: its mount point is there, and empty."""
    folder, seen = config.paths.models, config.paths.state / "models.seen"
    remembered = seen.read_text() if seen.exists() else ""
    if any(folder.glob("*/model_index.json")):
        if remembered != str(folder):
            durable.write(seen, str(folder).encode())
        return None
    if remembered != str(folder):
        return None
    return f"the models in {folder} are gone; is its disk mounted? If you removed them, remove {seen} too"


def on_battery(power: Path = Path("/sys/class/power_supply")) -> bool:
    """Whether a battery discharges and no mains supply is online."""
    discharging = False
    for supply in sorted(power.glob("*")):
        kind = _word(supply / "type")
        if kind in ("Mains", "USB") and _word(supply / "online") == "1":
            return False
        discharging |= kind == "Battery" and _word(supply / "status") == "Discharging"
    return discharging


def _word(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""


def open_classes(window: str, now: datetime) -> list[int]:
    """Return the priority classes whose jobs may start now, in order.

    `night` waits for the window; with none it comes after everything else at any hour.
    """
    classes = list(range(len(PRIORITIES)))
    if window and not in_window(window, now.time()):
        classes.remove(PRIORITIES.index("night"))
    return classes


def in_window(window: str, now: wall_time) -> bool:
    """Whether `now` lies in "23:00-07:00"; a window may cross midnight; its end is outside."""
    start, end = (wall_time.fromisoformat(part) for part in window.split("-"))
    if start <= end:
        return start <= now < end
    return now >= start or now < end
