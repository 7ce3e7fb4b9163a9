"""How warm the GPU is and who else uses it, by NVML's word; the holds `thermal` and `gpu-busy`, both off by default.

A card that NVML cannot ask about gives neither: the probe says what is wrong with it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from pathlib import Path

from safelight.config import Config
from safelight.machine import GIB

COOLED_C = 10
"""So far below the ceiling a hot card has to cool before the next job, or it would be back there within a minute."""

LOOK_AGAIN_S = 10.0
"""A driver without persistence mode wakes an idle card for every look."""


@dataclass(frozen=True)
class GpuState:
    """One look at the card."""

    temperature_c: int | None
    """None where the card does not say."""
    held_bytes: dict[int, int]
    """What each process holds of its memory, by process id; 0 where the driver does not say."""


def read(uuid: str) -> GpuState | None:
    """Ask NVML for the card of this UUID; None when it does not answer."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        card = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        held: dict[int, int] = {}
        for ask in (pynvml.nvmlDeviceGetComputeRunningProcesses, pynvml.nvmlDeviceGetGraphicsRunningProcesses):
            for process in ask(card):
                held[int(process.pid)] = max(held.get(int(process.pid), 0), int(process.usedGpuMemory or 0))
        return GpuState(_temperature_c(card), held)
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()


def _temperature_c(card: object) -> int | None:
    import pynvml

    try:
        return int(pynvml.nvmlDeviceGetTemperature(card, pynvml.NVML_TEMPERATURE_GPU))
    except pynvml.NVMLError:
        return None


class Watch:
    """Looks at one card as often as is good for it, and remembers whether it was too hot."""

    def __init__(self, config: Config, uuid: str, read: Callable[[str], GpuState | None] = read) -> None:
        self._policy = config.settings.policy
        self._uuid = uuid
        self._read = read
        off = (self._policy.thermal_ceiling_c, self._policy.gpu_busy_gib) == ("off", "off")
        self._off = off or config.settings.worker.device == "cpu"
        self._hot = False
        self._state: GpuState | None = None
        self._look_at = 0.0

    def holds(self, own: int | None) -> dict[str, str]:
        """Return the holds in force, name -> reason for a person.

        Args:
            own: the engine's process id; what it holds is ours. None when there is no engine.
        """
        if self._off:
            return {}
        if time.monotonic() >= self._look_at:
            self._look_at = time.monotonic() + LOOK_AGAIN_S
            self._state = self._read(self._uuid)
        if self._state is None:
            return {}
        found = {"thermal": self._too_hot(self._state), "gpu-busy": self._taken(self._state, {own, os.getpid()})}
        return {name: reason for name, reason in found.items() if reason}

    def _too_hot(self, state: GpuState) -> str | None:
        ceiling_c = self._policy.thermal_ceiling_c
        if ceiling_c == "off" or state.temperature_c is None:
            return None
        self._hot = state.temperature_c >= (ceiling_c - COOLED_C if self._hot else ceiling_c)
        if not self._hot:
            return None
        return (
            f"the GPU is at {state.temperature_c} °C, thermal_ceiling_c = {ceiling_c:g}; "
            f"jobs go on below {ceiling_c - COOLED_C:g} °C"
        )

    def _taken(self, state: GpuState, ours: set[int | None]) -> str | None:
        most_gib = self._policy.gpu_busy_gib
        if most_gib == "off":
            return None
        held = of_others(state, ours)
        total = sum(held.values())
        if total <= most_gib * GIB:
            return None
        return (
            f"other programs hold {total / GIB:.1f} GiB of the GPU, gpu_busy_gib = {most_gib:g}; "
            f"most of it {biggest(held)}"
        )


def of_others(state: GpuState, ours: Set[int | None]) -> dict[int, int]:
    """Return what processes hold of the card's memory that are not among `ours`, by process id."""
    return {pid: held for pid, held in state.held_bytes.items() if pid not in ours}


def biggest(held: Mapping[int, int]) -> str:
    """Return the name and id of the process that holds most, of one at least."""
    pid = max(held, key=lambda each: held[each])
    return f"{_name(pid)} (pid {pid})"


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return "a process of somebody else"
