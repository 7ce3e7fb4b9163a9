"""Why no job starts: a set of named reasons. Reads the machine's state; decides nothing about a job that runs."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from safelight import durable, fused, registered
from safelight.config import Config
from safelight.dues import in_window
from safelight.jobspec import PRIORITIES
from safelight.machine import GIB
from safelightd import places
from safelightd.power import on_battery

PROBE_AGAIN_S = (5.0, 15.0, 60.0)
"""Waits between probes of a GPU that failed one; the last repeats."""

START_AGAIN_S = (1.0, 5.0, 15.0, 60.0, 300.0)
"""Waits before the next job after one that the machine took back, by how often that happened in a row: a disk that
fails every job takes a dozen attempts an hour and not a thousand."""


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


class Setback:
    """Remembers that the machine took a job back, and keeps the next from starting for a while, longer each time."""

    def __init__(self) -> None:
        self._reason = ""
        self._failures = 0
        self._until = 0.0

    def failed(self, reason: str, *, of_all: bool = True) -> None:
        """Note why a job came back.

        Args:
            of_all: the next job may well meet the same. One that had no room says nothing of those after it.
        """
        wait_s = START_AGAIN_S[min(self._failures if of_all else 0, len(START_AGAIN_S) - 1)]
        self._reason = f"{reason}; the next job starts {wait_s:g} s after that"
        self._failures += of_all
        self._until = time.monotonic() + wait_s

    def lifted(self) -> None:
        self._failures = 0
        self._until = 0.0

    @property
    def reason(self) -> str | None:
        return self._reason if time.monotonic() < self._until else None


def read(
    config: Config, *, user_hold: str | None, gpu: str | None, machine: str | None = None, sleep: str | None = None
) -> dict[str, str]:
    """Return the holds in force, name -> reason for a person.

    Args:
        user_hold: what the queue says of the user's hold; the file of this installation counts as well.
        gpu: what is wrong with the GPU, None when nothing is.
        machine: why the machine took the last job back, None when it did not or that is long enough ago.
        sleep: that the machine goes to sleep, None when it does not.
    """
    found = {
        "user": _user(config.paths.user_hold, user_hold),
        "disk": _look(_disk, config),
        "models": _look(_models, config),
        "machine": machine,
        "sleep": sleep,
    }
    if config.settings.worker.device != "cpu":
        found["gpu"] = gpu
        if config.settings.policy.on_battery == "pause" and on_battery():
            found["battery"] = "on battery power; jobs go on when it charges"
    return {name: reason for name, reason in found.items() if reason}


def of_disks(config: Config) -> str | None:
    """Return what is wrong with the disks that a job reads and writes, None where nothing is: while something is, an
    error is not the job's."""
    return _look(_disk, config) or _look(_models, config)


def _look(at: Callable[[Config], str | None], config: Config) -> str | None:
    """A disk that has gone away, or that nothing can be written to, is a reason to wait and not to end."""
    try:
        return at(config)
    except OSError as error:
        return f"{error}"


def _user(file: Path, queue_says: str | None) -> str | None:
    try:
        written = json.loads(file.read_bytes())
    except FileNotFoundError:
        return queue_says
    except (OSError, ValueError):
        written = None  # an unreadable file still says: paused
    reason = written.get("reason") if isinstance(written, dict) else None
    return str(reason or "paused by safelight pause")


def _disk(config: Config) -> str | None:
    """Publishing and the ledger need room: no job starts that could not be kept. What is kept of LoRAs makes way."""
    outbox, memory = config.paths.outbox, config.paths.outbox_seen
    if places.missed(memory, [outbox]):
        return f"all that was in {outbox} is gone; is its disk mounted? If you removed it, remove {memory} too"
    least = config.settings.policy.min_free_disk_gib * GIB
    for folder in (config.paths.outbox, config.paths.state):
        there = next(parent for parent in (folder, *folder.parents) if parent.exists())
        if shutil.disk_usage(there).free < least:
            fused.give_way(config, there)
        if (free := shutil.disk_usage(there).free) < least:
            return f"{free / GIB:.1f} GiB free at {folder}, less than min_free_disk_gib = {least / GIB:g}"
        if not os.access(there, os.W_OK | os.X_OK, effective_ids=True):
            return f"nothing can be written to {there}: mounted read-only, or not this user's"
    return None


def _models(config: Config) -> str | None:
    """An unmounted disk must not fail a night of jobs one by one: its mount point is there, and empty."""
    for registration in registered.read_all(config.paths.models)[0]:
        if place := registered.unmounted(registration):
            return (
                f"{place} of {registration.key} is gone, with what lay beside it; is its disk mounted? If you removed "
                f"it: safelight models rm {registration.key}"
            )
    named, memory = places.of_weights(config), config.paths.state / "places.seen"
    if missing := places.missed(memory, named):
        return (
            f"{missing} is gone, which {named[missing]} names; is its disk mounted? If you moved or removed it, change "
            f"that, or remove {memory}"
        )
    folder, seen = config.paths.models, config.paths.state / "models.seen"
    own, remembered = os.fsencode(folder), seen.read_bytes() if seen.exists() else b""
    if any(folder.glob("*/model_index.json")):
        if remembered != own:
            durable.write(seen, own)
        return None
    if remembered != own:
        return None
    return f"the models in {folder} are gone; is its disk mounted? If you removed them, remove {seen} too"


def wall_clock() -> datetime:
    """Return the local time, by the zone that the machine is in now: a long process would keep that of its start."""
    time.tzset()
    return datetime.now()  # noqa: DTZ005 - a window is local wall clock


def open_classes(window: str, now: datetime) -> list[int]:
    """Return the priority classes whose jobs may start now, in order.

    `night` waits for the window; with none it comes after everything else at any hour. The window is what the clock on
    the wall says: in the nights when it is changed, the window is an hour shorter or longer.
    """
    classes = list(range(len(PRIORITIES)))
    if window and not in_window(window, now.time()):
        classes.remove(PRIORITIES.index("night"))
    return classes
