"""Host memory that the GPU reads by itself, of exactly the size that was asked for.

torch's own pinned blocks take the next power of two (37 GB for FLUX's 24) and stay in its cache; these are mapped,
registered and gone again. Counted by the kernel as anonymous memory of this process (RssAnon).
"""

from __future__ import annotations

import ctypes
import mmap
from concurrent.futures import ThreadPoolExecutor

import torch

THREADS = 4
PIECE_BYTES = 64 * 2**20


class PinnedMemory:
    """`nbytes` of RAM, registered with CUDA where `device` is a GPU; `bytes` is the flat uint8 tensor of it.

    Raises:
        MemoryError: there is not that much RAM, or the driver will not pin it.
    """

    def __init__(self, nbytes: int, device: torch.device) -> None:
        try:
            # Private: shared anonymous memory is shmem, which gets no huge pages.
            area = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise MemoryError(f"{nbytes / 2**30:.1f} GiB of RAM to be pinned: {error}") from error
        area.madvise(mmap.MADV_HUGEPAGE)  # 512 times fewer pages to fault and to pin
        self.bytes = torch.frombuffer(area, dtype=torch.uint8)
        self._area = area
        self._registered = False
        if device.type == "cuda":
            _touch(self.bytes)
            status = torch.cuda.cudart().cudaHostRegister(self.bytes.data_ptr(), nbytes, 0)
            if int(status):
                raise MemoryError(f"{nbytes / 2**30:.1f} GiB of RAM cannot be pinned: CUDA error {int(status)}")
            self._registered = True

    def close(self) -> None:
        """Give the memory back at once, also where a name still points at a part of it; nothing may read it any more,
        the GPU included."""
        if self._registered:
            torch.cuda.cudart().cudaHostUnregister(self.bytes.data_ptr())
            self._registered = False
        if self.bytes.numel():
            self._area.madvise(mmap.MADV_DONTNEED)  # unmapped it is only with the last view, which a cycle may hold
        self.bytes = torch.empty(0, dtype=torch.uint8)


def _touch(area: torch.Tensor) -> None:
    """Have every page there, by several threads: the driver would fault them one after another."""
    begin, end = area.data_ptr(), area.data_ptr() + area.numel()
    with ThreadPoolExecutor(THREADS, "pin") as threads:  # ctypes lets other threads run meanwhile
        list(threads.map(lambda at: ctypes.memset(at, 0, min(PIECE_BYTES, end - at)), range(begin, end, PIECE_BYTES)))
