"""One worker a GPU: a lock file in a folder that user and system workers share. The kernel drops it with its holder.

A worker is named after its host and device, so that its name tells which lock it holds.
"""

from __future__ import annotations

import fcntl
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safelight.config import Config
from safelight.errors import BadConfig
from safelight.machine import Machine
from safelightd import linux

SHARED = Path("/dev/shm")  # noqa: S108 - the one world-writable folder that is there on every Linux with glibc and
# that PrivateTmp does not replace; the file carries no content, only the lock


DYING_S = 10.0
"""A worker that was killed leaves its lock when its last child has died, is_taken() holds it for a moment, and who
takes up its jobs until they are written down: none of them must end a new worker for good."""


_NAME = re.compile(r"(?P<host>.+)-(?P<device>cpu|(?:GPU|MIG)-.+)")


def worker_name(machine: Machine) -> str:
    return f"{socket.gethostname()}-{machine.uuid or 'cpu'}"


def is_of_this_host(worker: str) -> bool:
    """Whether a worker's name is one that this host gives."""
    found = _NAME.fullmatch(worker)
    return found is not None and found["host"] == socket.gethostname()


def lock_path(machine: Machine, config: Config) -> Path:
    """Return the lock of the worker's device. Two installations on the CPU do not meet; two on one GPU do."""
    return _lock("cpu" if machine.device == "cpu" else machine.uuid, config)


def lock_of(worker: str, config: Config) -> Path | None:
    """Return the lock that a worker of this name holds while it lives, if it is one of this machine, also under a name
    that the machine had before. None for a name that no worker gives itself."""
    found = _NAME.fullmatch(worker)
    return _lock(found["device"], config) if found else None


def _lock(device: str | None, config: Config) -> Path:
    return config.paths.state / "worker-cpu.lock" if device == "cpu" else SHARED / f"safelight-{device}.lock"


def take(path: Path, patience_s: float = DYING_S) -> int:
    """Lock the device for as long as the returned descriptor is open.

    Raises:
        BadConfig: another worker has it, and still has it after `patience_s`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = _open(path)
    if not linux.lock(descriptor, patience_s):
        os.close(descriptor)
        raise BadConfig(f"Another worker uses this device ({path}). One worker a GPU: stop the other first.")
    return descriptor


def is_taken(path: Path) -> bool:
    """Whether a worker holds this lock now."""
    if not os.path.exists(path):  # noqa: PTH110 - Path.exists raises below a folder that is closed to us
        return False
    descriptor = _open(path)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


@contextmanager
def deserted(path: Path) -> Iterator[bool]:
    """Keep this lock's worker from starting meanwhile, so that what it left can be taken up; False where it lives, or
    somebody else takes that up.

    Nobody is kept from a lock that cannot be made here, since its folder is gone or somebody else's.
    """
    try:
        descriptor = _open(path)
    except (FileNotFoundError, PermissionError):
        yield True
        return
    try:
        yield linux.lock(descriptor, patience_s=0)
    finally:
        os.close(descriptor)


def _open(path: Path) -> int:
    try:
        # Another user's file in a sticky folder may be opened for reading, not with O_CREAT (fs.protected_regular).
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        before = os.umask(0)  # everybody's worker must be able to open it, whatever the unit or the shell of the first
        try:
            return os.open(path, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o444)
        finally:
            os.umask(before)
