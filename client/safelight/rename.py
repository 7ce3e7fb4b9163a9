"""Rename without replacing: who comes second is told so, and nothing is overwritten."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

AT_FDCWD = -100
"""linux/fcntl.h: paths are relative to the working folder."""

RENAME_NOREPLACE = 1
"""linux/fs.h."""

_libc = ctypes.CDLL(None, use_errno=True)


def rename_new(source: Path, target: Path) -> None:
    """Give the file `source` the name `target` of the same file system, in one step.

    Where the file system cannot rename like that (NFS), a second name is made and the first removed: a crash between
    the two leaves one file under both names.

    Raises:
        FileExistsError: `target` exists; both files are as they were.
        OSError: anything else; `target` was not made.
    """
    done = _libc.renameat2(AT_FDCWD, os.fsencode(source), AT_FDCWD, os.fsencode(target), RENAME_NOREPLACE)
    if done == 0:
        return
    code = ctypes.get_errno()
    if code not in (errno.EINVAL, errno.ENOSYS):
        raise OSError(code, os.strerror(code), str(source), None, str(target))
    os.link(source, target, follow_symlinks=False)
    source.unlink()
