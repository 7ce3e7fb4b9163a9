"""What this process holds, on the device and in host RAM, and giving it back. Engine only: imports torch."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

from safelightd import loading

_libc = ctypes.CDLL(None)


class ProcessMeter:
    """Peaks of this process: what torch allocated on the GPU, and resident memory.

    The resident peak is the kernel's VmHWM; writing 5 to clear_refs resets it (proc_pid_clear_refs(5)).
    """

    def reset(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def peaks(self) -> tuple[int, int]:
        """Return peak bytes on the device and in RAM since `reset`."""
        device = torch.cuda.max_memory_reserved() if torch.cuda.is_available() else 0
        return device, _resident_peak_bytes()


def _resident_peak_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def release() -> None:
    """Give everything between two jobs back: the device's cache, pinned host memory, and the heap's free pages."""
    loading.give_back()
    _libc.malloc_trim(0)


def held_bytes() -> int:
    """Return what torch still holds on the device for this process; the bare CUDA context is not in it."""
    return torch.cuda.memory_reserved() if torch.cuda.is_available() else 0
