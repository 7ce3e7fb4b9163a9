"""What this process holds, on the device and in host RAM, and giving it back. Imports torch: engine and probe only.

`python -m safelightd.device` proves that torch can compute on the GPU here; it exits 0, or 5 with the reason.
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from pathlib import Path

import torch

from safelight import footprint
from safelight.errors import NoUsableGpu
from safelightd.probe import Own

_libc = ctypes.CDLL(None)


class ProcessMeter:
    """Peaks of this process: what it held of the GPU, the context included, and of RAM.

    The resident peak is the kernel's VmHWM; writing 5 to clear_refs resets it (proc_pid_clear_refs(5)).
    """

    def reset(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def settle(self) -> None:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()

    def peaks(self) -> tuple[int, int]:
        """Return peak bytes on the device and in RAM since `reset`."""
        device = torch.cuda.max_memory_reserved() + context_bytes() if torch.cuda.is_available() else 0
        return device, _status("VmHWM")


def context_bytes() -> int:
    """Return what this process holds of the GPU outside of what torch allocates: context, libraries, kernels.

    By the driver's word on this process; where it cannot tell processes apart (in a container), the card's whole use,
    so that another program's memory counts as ours.
    """
    free, total = torch.cuda.mem_get_info()
    own = _used_by_this_process()
    return max((total - free if own is None else own) - torch.cuda.memory_reserved(), 0)


def _used_by_this_process() -> int | None:
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None  # a job under way ends well without it; the next plan says what is wrong
    try:
        uuid = f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"
        card = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        found = [
            process.usedGpuMemory
            for process in pynvml.nvmlDeviceGetComputeRunningProcesses(card)
            if process.pid == os.getpid()
        ]
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()
    return int(found[0]) if found and found[0] else None


def own() -> Own:
    """Return what this process holds between two jobs: the bare context, and RAM with what stays pinned."""
    if not torch.cuda.is_initialized():
        return Own(host_bytes=_status("RssAnon"))
    held = _used_by_this_process()
    # Where the driver cannot tell processes apart, what the predictions count for a context.
    return Own(footprint.CONTEXT_BYTES if held is None else held, _status("RssAnon"))


def _status(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def give_back() -> None:
    """Return all memory that nothing refers to any more: to the device, and pinned blocks to the system."""
    gc.collect()
    if not torch.cuda.is_initialized():
        return
    torch.cuda.empty_cache()
    if hasattr(torch.accelerator, "empty_host_cache"):  # not in every torch from 2.11 on
        torch.accelerator.empty_host_cache()


def release() -> None:
    """Give everything between two jobs back: the device's cache, pinned host memory, and the heap's free pages.

    cuBLAS keeps its workspace allocated for the life of the process unless told: 42 MiB (H100, torch 2.11, 2026-11-22).
    """
    if torch.cuda.is_available():
        torch._C._cuda_clearCublasWorkspaces()  # noqa: SLF001 - torch's own cuda graphs call it so; there is no other name
    give_back()
    # What is alive between two jobs stays. A compiled job leaves 150,000 objects, and the collection after each
    # component would walk through them: demo-flux encoded in 0.20 s instead of 0.06 from then on, and in 0.06 with this
    # (2 cores, torch 2.13.0, 2026-11-26).
    gc.freeze()
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
