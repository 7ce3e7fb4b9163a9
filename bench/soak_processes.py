"""Where a soak happens: the daemon's processes, started as units start them, and small disks that can be filled."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from bench import soak_engine
from bench.scratch import Scratch
from safelightd import linux

NAMES = ("redis", "inbox", "worker")
"""What a service manager starts, in its order."""

ROLES = ("redis", "valkey", "inbox", "worker", "horse", "engine")

RESTART_S = 0.1
"""A unit's RestartSec is what systemd waits; no promise may hang on it."""

STOP_S = 60.0
HOPELESS = (2, 3)
"""Exit codes after which a unit is not started again (RestartPreventExitStatus)."""

DISK_BYTES = 96 << 20
CLONE_NEWNS = 0x00020000


class Processes:
    """The daemon's processes; whichever ends is started again, unless a fault wants it away."""

    def __init__(self, place: Scratch, engine: str, env: Mapping[str, str], logs: Path) -> None:
        self._env = {**place.env, **env}
        self._commands = {
            "redis": [sys.executable, "-m", "safelightd.cli", "redis"],
            "inbox": [sys.executable, "-m", "safelightd.cli", "inbox"],
            "worker": soak_engine.command(f"work({engine!r})"),
        }
        self._logs = logs
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self.away_until: dict[str, float] = dict.fromkeys(NAMES, 0.0)
        self.exits: Counter[str] = Counter()
        """How often which process ended how, as "worker -9"."""

    def tend(self) -> None:
        """Start what is not running and may."""
        now = time.monotonic()
        for name in NAMES:
            process = self._running.get(name)
            if process and process.poll() is not None:
                self.exits[f"{name} {process.returncode}"] += 1
                del self._running[name]
                self.away_until[name] = max(self.away_until[name], now + RESTART_S)
            if name not in self._running and now >= self.away_until[name]:
                self._start(name)

    def _start(self, name: str) -> None:
        with (self._logs / f"{name}.log").open("ab") as log:
            self._running[name] = subprocess.Popen(
                self._commands[name], env=self._env, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True, preexec_fn=linux.die_with_parent(os.getpid()),
            )  # fmt: skip

    def find(self, role: str) -> psutil.Process | None:
        """Return the process of a role, None while there is none."""
        name = {"valkey": "redis", "horse": "worker", "engine": "worker"}.get(role, role)
        started = self._running.get(name)
        if started is None or started.poll() is not None:
            return None
        with suppress(psutil.Error):
            process = psutil.Process(started.pid)
            if role == name:
                return process
            own = process.cmdline()
            for child in process.children():
                words = child.cmdline()
                if words and (words == own) == (role == "horse"):  # a horse is a fork of its worker
                    return child
        return None

    def state(self) -> list[str]:
        """Return in words which processes there are."""
        found = {role: self.find(role) for role in ROLES}
        return [f"{role} {process.pid} {process.status()}" for role, process in found.items() if process]

    @property
    def gave_up(self) -> int:
        """How often a process ended in a way after which a unit leaves it alone."""
        return sum(times for ended, times in self.exits.items() if int(ended.split()[1]) in HOPELESS)

    def stop(self) -> dict[str, int]:
        """Stop politely, the server last; return the exit status of each."""
        statuses: dict[str, int] = {}
        for name in reversed(NAMES):
            process = self._running.pop(name, None)
            if process is None:
                continue
            process.terminate()
            try:
                statuses[name] = process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                statuses[name] = process.wait()
        return statuses


def mount_disks(places: Sequence[Path]) -> tuple[str, str]:
    """Put a small disk of its own under each of `places`, seen by this process and its children alone.

    Returns:
        What the disks are, "" where this machine cannot; and why it cannot.
    """
    if os.geteuid() != 0:
        return "", "a disk that can be filled needs root to mount it"
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNS):
        return "", f"no mount namespace of its own: {os.strerror(ctypes.get_errno())}"
    if reason := _run("mount", "--make-rprivate", "/"):
        return "", reason
    if not any(_mount_image(place) for place in places):
        return "ext4 in a file", ""
    unmount(places)
    reasons = [_run("mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "soak", str(place)) for place in places]
    return ("", "; ".join(filter(None, reasons))) if any(reasons) else ("tmpfs, which syncs in no time", "")


def _mount_image(place: Path) -> str:
    """Mount a new ext4 on `place`: its syncs take time, as a real disk's do; return why not, "" when done."""
    image = place.with_name(f"{place.name}.ext4")
    with image.open("wb") as file:
        file.truncate(DISK_BYTES)
    if reason := _run("mkfs.ext4", "-q", "-m", "0", str(image)) or _run("mount", "-o", "loop", str(image), str(place)):
        return reason
    (place / "lost+found").rmdir()
    return ""


def _run(*command: str) -> str:
    """Run a program of the system; return what went wrong, "" when nothing did."""
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        return f"there is no {command[0]}"
    except subprocess.CalledProcessError as error:
        return f"{' '.join(command)}: {error.stderr.strip()}"
    return ""


def unmount(places: Sequence[Path]) -> None:
    """Take the disks away again where there are any, so that their folders can be removed."""
    for place in places:
        if place.is_mount():
            _run("umount", "--lazy", str(place))
