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

_TAKEN = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR)
"""What rename(2) answers for a folder whose new name another thing has: it replaces an empty folder, nothing else."""

_libc = ctypes.CDLL(None, use_errno=True)


def rename_new(source: Path, target: Path) -> None:
    """Give the file or folder `source` the name `target` of the same file system, in one step.

    Where the file system cannot rename like that (NFS), a file gets a second name and loses its first: a crash between
    the two leaves one file under both names. An empty folder `target` is no obstacle to a folder.

    Raises:
        FileExistsError: `target` exists; both are as they were.
        OSError: anything else; `target` was not made.
    """
    if source.is_dir() and not source.is_symlink():
        _rename_folder(source, target)
        return
    done = _libc.renameat2(AT_FDCWD, os.fsencode(source), AT_FDCWD, os.fsencode(target), RENAME_NOREPLACE)
    if done == 0:
        return
    code = ctypes.get_errno()
    if code not in (errno.EINVAL, errno.ENOSYS):
        raise OSError(code, os.strerror(code), str(source), None, str(target))
    os.link(source, target, follow_symlinks=False)
    source.unlink()


def _rename_folder(source: Path, target: Path) -> None:
    try:
        source.rename(target)
    except OSError as error:
        if error.errno not in _TAKEN or not os.path.lexists(target):
            raise
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from error
