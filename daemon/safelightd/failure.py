"""What an error in the engine means: the job's own fault, the machine's, memory that ran out, a broken result, or one
after which this process is not trusted, or has nothing left to work with. Imports torch: the engine only."""

from __future__ import annotations

import errno
import re
import signal
import traceback
from typing import Any

import pynvml
import torch

from safelight.errors import NoUsableGpu, SafelightError
from safelight.plan import Plan
from safelight.planner import DoesNotFit
from safelightd import pipelines, shortage, verify
from safelightd.outputs import OutboxUnwritable
from safelightd.progress import Cancelled, Watch
from safelightd.room import NoRoom
from safelightd.shortage import DEVICE_IS_FULL, HOST_IS_FULL, Memory
from safelightd.video import FfmpegKilled
from safelightd.wan_cli.program import ProgramBroke

MACHINE_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ENOTCONN, errno.ESTALE)
"""What a full, read-only, broken or unmounted disk says: the machine's fault, not the job's."""

SPENT_ERRNOS = (errno.EMFILE, errno.ENFILE, errno.EAGAIN)
"""What the system says where it has no more open files, processes or threads for us."""

BROKE_ITSELF = (signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGSEGV)
"""Signals that a program gets for what it does; any other was sent by somebody else."""

_OF_THE_GPU = re.compile(r"CUDA|cuDNN|CUDNN|cuBLAS|CUBLAS|CUSOLVER|CUSPARSE|CUFFT|NVRTC")
"""In what the libraries of the GPU say when something is wrong with it, or with what it was given."""

_NO_THREAD = "can't start new thread"

_TRIED = re.compile(r"[Tt]ried to allocate ([\d.]+) (bytes|KiB|MiB|GiB)")
_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def failure(error: BaseException, watch: Watch) -> dict[str, Any]:
    """Return the verdict on a job that ended with `error`, as the link carries it."""
    if isinstance(error, Cancelled):
        return _verdict("cancelled", "cancelled", watch)
    if isinstance(error, OutboxUnwritable) or _is_of_a_disk(error):
        return _verdict("machine", f"{error}", watch)
    if isinstance(error, FfmpegKilled):
        return _verdict("engine" if error.signal in BROKE_ITSELF else "machine", str(error), watch)
    if _is_spent(error):
        return _verdict("spent", f"{type(error).__name__}: {error}", watch)
    if isinstance(error, (verify.Refused, pipelines.BrokenResult)) and watch.plan:
        return _verdict("refused", str(error), watch, precision=watch.plan.precision)
    if isinstance(error, (NoUsableGpu, pynvml.NVMLError)):
        return _verdict("engine", str(error), watch)  # a fresh process is asked what is wrong with the GPU
    if isinstance(error, (NoRoom, DoesNotFit)):
        return _verdict("no-room" if isinstance(error, NoRoom) else "too-large", str(error), watch)
    if isinstance(error, SafelightError):
        return _verdict("job", str(error), watch)
    message = f"{type(error).__name__}: {error}"
    memory = exhausted(error, watch.plan)
    if memory and (overrun := shortage.overrun(watch.plan, watch.current, memory, _reached(error, memory, watch))):
        fields = {"memory": memory, "overrun": overrun.model_dump(mode="json")}
        return _verdict("oom", message, watch, **fields)
    broken = memory is not None or isinstance(error, (torch.AcceleratorError, ProgramBroke))
    return _verdict("engine" if broken or _OF_THE_GPU.search(str(error)) else "job", message, watch)


def _is_spent(error: BaseException) -> bool:
    """Whether the system, or what this process has leaked, leaves it nothing to go on with: another may have."""
    if isinstance(error, OSError):
        return error.errno in SPENT_ERRNOS
    return isinstance(error, RuntimeError) and _NO_THREAD in str(error)


def _is_of_a_disk(error: BaseException | None) -> bool:
    """Whether a disk has said it, or what this error was made of."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in MACHINE_ERRNOS:
            return True
        error = error.__cause__
    return False


def _verdict(kind: str, message: str, watch: Watch, **fields: Any) -> dict[str, Any]:
    return {"kind": kind, "message": message, "phase": watch.current, **fields}


def exhausted(error: BaseException, plan: Plan | None) -> Memory | None:
    """Return which memory an error says was exhausted, None when it says something else.

    Where nothing runs on a GPU, all memory is the host's. CUDA has one word for the GPU's memory and for RAM that it
    could not pin; the line that asked tells them apart.
    """
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return "host"
    if isinstance(error, torch.OutOfMemoryError) or DEVICE_IS_FULL.search(str(error)):
        return "host" if (plan and plan.device == "cpu") or _was_pinning(error) else "device"
    return "host" if HOST_IS_FULL.search(str(error)) else None


def _was_pinning(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError):  # of the GPU's allocator alone
        return False
    return any("pin_memory" in (frame.line or "") for frame in traceback.extract_tb(error.__traceback__))


def _reached(error: BaseException, memory: Memory, watch: Watch) -> int:
    """Return what the phase held at its peak, and the allocation that was refused where the error names it."""
    try:
        device, host = watch.peaks()
    except RuntimeError:  # a device too full for a context cannot be asked what is on it
        return 0
    held = device if memory == "device" else host
    tried = _TRIED.search(str(error))
    return held + (int(float(tried[1]) * _UNITS[tried[2]]) if tried else 0)
