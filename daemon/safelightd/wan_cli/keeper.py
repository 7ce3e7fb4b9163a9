"""Runs a command of which nothing outlives who asked for it: python -I -S keeper.py COMMAND...

When stdin ends, because who asked closed it or died, the command and all it started is killed; so it is when the
command ends and leaves something behind. Exits as the command did, with 128 + N after signal N.
Imports the standard library alone: it runs without site-packages.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
NOT_STARTED = 127


def keep(command: list[str]) -> int:
    """Run a command to its end, or to the end of stdin; return the exit status to pass on."""
    own = os.getpid()
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    child = os.fork()
    if child == 0:
        _become(command, own)
    with suppress(OSError):  # it has done so itself
        os.setpgid(child, child)
    select.select([sys.stdin.fileno(), os.pidfd_open(child)], [], [])
    with suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    _end_the_rest(own)
    return 128 - status if status < 0 else status


def _end_the_rest(own: int) -> None:
    """Kill what went into a session of its own: whose parent ends becomes a child of this process, as subreaper."""
    children = Path(f"/proc/self/task/{own}/children")
    while left := children.read_text().split():
        for child in left:
            os.kill(int(child), signal.SIGKILL)  # not waited for yet: nobody else can have its number
        os.wait()


def _become(command: list[str], keeper: int) -> NoReturn:
    """Turn this fork into the command, at the head of a process group of its own."""
    try:
        os.setpgid(0, 0)
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() == keeper:
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.execv(command[0], command)
    except OSError as error:
        os.write(2, f"{command[0]}: {error.strerror}\n".encode())
    os._exit(NOT_STARTED)


if __name__ == "__main__":
    sys.exit(keep(sys.argv[1:]))
