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
