"""The few calls of Linux that Python has no name for."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import platform
import select
import signal
import time
from collections.abc import Callable
from pathlib import Path

PR_SET_PDEATHSIG = 1

IOPRIO_SET = {"x86_64": 251, "aarch64": 30}
"""The number of ioprio_set(2), which glibc has no function for."""

_IOPRIO_WHO_PROCESS = 1
_IOPRIO_IDLE = 3 << 13

_libc = ctypes.CDLL(None, use_errno=True)


def die_with_parent(parent: int) -> Callable[[], None]:
    """Return what a child calls between fork and exec so that it is killed when `parent` dies, however it dies.

    The parent's death is that of the thread that forked: start such children from the main thread. The check for
    the parent afterwards closes the gap in which it died before the call.
    """

    def arrange() -> None:
        _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)

    return arrange


def be_idle() -> None:
    """Let every other process have CPU and disk first, where that is not so already.

    The unit's filter forbids both calls, and its settings did the same before; on other machines than those two there
    is the CPU's part alone.
    """
    if os.getpriority(os.PRIO_PROCESS, 0) < 19:
        os.nice(19)
    if number := IOPRIO_SET.get(platform.machine()):
        _libc.syscall(number, _IOPRIO_WHO_PROCESS, 0, _IOPRIO_IDLE)


def kill_and_await(pid: int) -> None:
    """SIGKILL the process group that `pid` leads and return when the process is gone, whoever its parent is.

    A pidfd becomes readable when its process has ended (pidfd_open(2)): the GPU memory is free by then.
    """
    try:
        watched = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        select.select([watched], [], [])
    finally:
        os.close(watched)


def lock(descriptor: int, patience_s: float) -> bool:
    """Take the exclusive lock of an open file or folder; False when somebody else has it for all of `patience_s`.

    It is held for as long as the descriptor is open (flock(2), which has no timeout of its own).
    """
    until = time.monotonic() + patience_s
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= until:
                return False
            time.sleep(0.05)
            continue
        return True


def lock_holder(descriptor: int) -> int | None:
    """Return the process that took the lock of an open file or folder, None where the kernel does not tell.

    proc_locks(5) names a file by its device and inode; some file systems (btrfs) have another device in stat(2), a
    holder in another pid namespace has no number here, and the system's units hide the file (ProcSubset=pid).
    """
    locks = Path("/proc/locks")
    found = os.fstat(descriptor)
    name = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}:{found.st_ino}"
    for line in locks.read_text().splitlines() if locks.is_file() else ():
        words = line.split()
        if words[1] == "FLOCK" and words[5] == name and int(words[4]) > 0:
            return int(words[4])
    return None
