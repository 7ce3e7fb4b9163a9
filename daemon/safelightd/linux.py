"""The few calls of Linux that Python has no name for."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Callable

PR_SET_PDEATHSIG = 1

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
