"""One worker a GPU: a lock file in a folder that user and system workers share. The kernel drops it with its holder."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from safelight.config import Config
from safelight.errors import BadConfig
from safelight.machine import Machine
from safelightd import linux

SHARED = Path("/dev/shm")  # noqa: S108 - the one world-writable folder that is there on every Linux with glibc and
# that PrivateTmp does not replace; the file carries no content, only the lock


DYING_S = 3.0
"""A worker that was killed leaves its lock when its last child has died, and is_taken() holds it for a moment: neither
must end a new worker for good."""


def lock_path(machine: Machine, config: Config) -> Path:
    """Return the lock of the worker's device. Two installations on the CPU do not meet; two on one GPU do."""
    if machine.device == "cpu":
        return config.paths.state / "worker-cpu.lock"
    return SHARED / f"safelight-{machine.uuid}.lock"


def take(path: Path, patience_s: float = DYING_S) -> int:
    """Lock the device for as long as the returned descriptor is open.

    Raises:
        BadConfig: another worker has it, and still has it after `patience_s`.
    """
    descriptor = _open(path)
    if not linux.lock(descriptor, patience_s):
        os.close(descriptor)
        raise BadConfig(f"Another worker uses this device ({path}). One worker a GPU: stop the other first.")
    return descriptor


def is_taken(path: Path) -> bool:
    """Whether a worker holds this lock now."""
    if not path.exists():
        return False
    descriptor = _open(path)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _open(path: Path) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        # Another user's file in a sticky folder may be opened for reading, not with O_CREAT (fs.protected_regular).
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        before = os.umask(0)  # everybody's worker must be able to open it, whatever the unit or the shell of the first
        try:
            return os.open(path, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o444)
        finally:
            os.umask(before)
