"""Memory that ran out: what it says of the plan, and how to tell that the kernel ended a process for want of it.

Reads counters of the kernel. Knows no torch, no queue and no engine.
"""

from __future__ import annotations

import re
import signal
from pathlib import Path
from typing import Literal, get_args

from safelight.plan import Overrun, PhaseName, Plan
from safelight.receipt import Phase

Memory = Literal["device", "host"]

DEVICE_IS_FULL = re.compile(
    r"CUDA out of memory|CUDA error: out of memory|CUDA_ERROR_OUT_OF_MEMORY|\[CUDA\]: out of memory"
    r"|CUBLAS_STATUS_ALLOC_FAILED|CUDNN_STATUS_ALLOC_FAILED|DEVICE_ALLOCATION_FAILED"
)
"""What torch, the driver, Triton, cuBLAS and cuDNN say of GPU memory in errors that have no class of their own."""

HOST_IS_FULL = re.compile(r"DefaultCPUAllocator: |Cannot allocate memory|HOST_ALLOCATION_FAILED|std::bad_alloc")
"""What torch, the C library, cuDNN and C++ say of host memory."""


def overrun(plan: Plan | None, phase: Phase, memory: Memory, reached_bytes: int = 0) -> Overrun | None:
    """Return what the next plan of this job must stay below; None in a phase that no other plan makes smaller.

    While the job loads, it is the phase about to begin that ran out.
    """
    begun = "encode" if phase == "load" else phase
    if plan is None or begun not in get_args(PhaseName):
        return None
    predicted = plan.predicted.get(begun)
    return Overrun.model_validate(
        {
            "phase": begun,
            "memory": memory,
            "rung": plan.rung,
            "predicted_bytes": getattr(predicted, f"{memory}_bytes") if predicted else 0,
            "reached_bytes": reached_bytes,
        }
    )


def oom_kills(
    root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup"), vmstat: Path = Path("/proc/vmstat")
) -> int:
    """Return how often the kernel has killed a process for memory, as near to this one as it counts.

    That is in our own cgroup, or the nearest above it with a count of its own (cgroup v2), else on the whole machine.
    Kills for the machine's want and for a cgroup's limit are both counted in both (mm/oom_kill.c, __oom_kill_process).
    """
    line = next((line for line in own.read_text().splitlines() if line.startswith("0::")), "0::/")
    folder = root / line[3:].strip("/")
    while folder.is_relative_to(root):  # in a container the root itself counts
        if (count := _count(folder / "memory.events")) is not None:
            return count
        folder = folder.parent
    return _count(vmstat) or 0


def _count(file: Path) -> int | None:
    """Return the number behind `oom_kill`; None when there is no such file or line (before Linux 4.13)."""
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), None)


def was_killed(pid: int, proc: Path = Path("/proc")) -> bool:
    """Whether SIGKILL has ended, or is ending, the process `pid`; anybody's child, so long as nobody has reaped it.

    The kernel shows the wait status of a process of our own user in the last field of its stat file (proc_pid_stat(5)).
    """
    try:
        fields = (proc / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return int(fields[-1]) & 0x7F == signal.SIGKILL
