"""What this process holds, on the device and in host RAM, and giving it back. Imports torch: engine and probe only.

`python -m safelightd.device` proves that torch can compute on the GPU here; it exits 0, or 5 with the reason.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import torch

from safelight.errors import NoUsableGpu
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
    """Give everything between two jobs back: the device's cache, pinned host memory, and the heap's free pages.

    cuBLAS keeps its workspace allocated for the life of the process unless told: 42 MiB (H100, torch 2.11, 2026-11-22).
    """
    if torch.cuda.is_available():
        torch._C._cuda_clearCublasWorkspaces()  # noqa: SLF001 - torch's own cuda graphs call it so; there is no other name
    loading.give_back()
    _libc.malloc_trim(0)


def held_bytes() -> int:
    """Return what torch still holds on the device for this process; the bare CUDA context is not in it."""
    return torch.cuda.memory_reserved() if torch.cuda.is_available() else 0


def prove() -> None:
    """Multiply two matrices on the GPU and check the result.

    Raises:
        NoUsableGpu: with what torch said.
    """
    try:
        ones = torch.ones(256, 256, device="cuda")
        corner = float((ones @ ones)[0, 0])
    except (RuntimeError, ValueError, AssertionError) as error:  # what torch raises where CUDA cannot start
        raise NoUsableGpu(f"torch {torch.__version__} cannot use the GPU: {error}") from error
    if corner != 256.0:
        raise NoUsableGpu(f"the GPU says that 256 ones are {corner}")


def main() -> int:
    """Prove the visible GPU; the exit code and one line on stderr are the answer."""
    try:
        prove()
    except NoUsableGpu as error:
        print(error, file=sys.stderr)  # noqa: T201 - the answer to the process that asked
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
