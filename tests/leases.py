"""A process without CAP_LEASE, as the inbox of a system service is: the kernel lends it its own files alone."""

from __future__ import annotations

import ctypes
import os

CAP_LEASE = 28
"""linux/capability.h"""

_VERSION = 0x20080522
"""_LINUX_CAPABILITY_VERSION_3: two sets of three words, effective, permitted and inheritable."""

_libc = ctypes.CDLL(None, use_errno=True)


def give_up_leases() -> None:
    """Take CAP_LEASE from this process for good; only root has it."""
    header, sets = (ctypes.c_uint32 * 2)(_VERSION, 0), (ctypes.c_uint32 * 6)()
    _check(_libc.capget(header, sets))
    for word in range(3):
        sets[word] &= ~(1 << CAP_LEASE)
    _check(_libc.capset(header, sets))


def _check(status: int) -> None:
    if status:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
