"""What the planner may use: the frozen description of one machine. `safelightd.probe` reads it; nothing here does."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

GIB = 2**30


class Machine(BaseModel):
    """One machine as the planner sees it. Bytes; what is free is what was free when it was read."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    v: Literal[1] = 1
    device: Literal["cuda", "cpu"]
    gpu: str = ""
    """The card's name, "" on the CPU."""
    uuid: str = ""
    capability: tuple[int, int] | None = None
    driver: str = ""
    vram_total_bytes: int = 0
    vram_free_bytes: int = 0
    ram_total_bytes: int
    ram_available_bytes: int
    """The smaller of MemAvailable and what the cgroup still allows."""
    cpus: int
    multiprocessors: int = 0
    clock_mhz: int = 0
    """Of a multiprocessor, at most; with `capability` it gives the card's arithmetic."""
    link_bytes_per_second: int = 0
    """From pinned host memory to the GPU; 0 where it is not known."""
    compiler: bool = False
    """A C compiler and Python's headers are there: torch.compile needs both."""
    pinned_rounds_up: bool = True
    """torch's own pinned blocks take the next power of two (torch before 2.13). Ours never do."""
    prepared: tuple[str, ...] = ()
    """KEY/PRECISION/COMPONENT for each folder that `safelight models prepare` has finished."""
    fused: tuple[str, ...] = ()
    """KEY/PRECISION/DIGEST/COMPONENT for each result of LoRAs and a precision that jobs have kept (safelight.fused)."""
    fused_room_bytes: int = 0
    """How large a further result may be that is kept; 0 where none is."""
