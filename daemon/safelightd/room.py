"""Whether a job that does not fit now would fit later, or on another card: then it waits. Knows no torch.

Submission accepts what fits a machine that nobody else uses. At night a game or a language model's server may have the
memory; the job has done nothing wrong then.
"""

from __future__ import annotations

import os

from safelight.calibration import Calibration
from safelight.config import Config
from safelight.errors import InvalidJob, SafelightError
from safelight.jobspec import JobSpec
from safelight.machine import GIB, Machine
from safelight.models import Models
from safelight.plan import Plan
from safelight.planner import DoesNotFit, make_plan
from safelight.rung import Circumstances
from safelightd import gpustate, probe

USABLE_SHARE = 0.97
"""Of a card's memory, that programs can have: of 12 to 24 GB, drivers keep 240 to 400 MiB for themselves."""


class NoRoom(SafelightError):
    """Other programs have the memory that the job needs; what fits the machine without them is not at fault."""


def plan_here(
    spec: JobSpec, machine: Machine, config: Config, models: Models, calibration: Calibration, around: Circumstances
) -> Plan:
    """Return the plan of a job on this machine as it is now.

    Raises:
        NoRoom: it would fit, if other programs left the memory to it.
        DoesNotFit, InvalidJob: as `make_plan`.
    """
    try:
        return make_plan(spec, machine, models, calibration, around)
    except DoesNotFit as lacking:
        if not fits(spec, idle(machine, config), models, calibration, around):
            raise
        who = _who_has_it(machine) if "GPU memory" in str(lacking) else ""
        raise NoRoom(f"{lacking} {who}".rstrip()) from lacking


def fits(spec: JobSpec, machine: Machine, models: Models, calibration: Calibration, around: Circumstances) -> bool:
    """Whether there is a plan for a job."""
    try:
        make_plan(spec, machine, models, calibration, around)
    except InvalidJob:
        return False
    return True


def idle(machine: Machine, config: Config) -> Machine:
    """Return the machine as it would be if safelight alone used it, within what the settings and its cgroup allow."""
    worker = config.settings.worker
    vram, ram = int(machine.vram_total_bytes * USABLE_SHARE), probe.idle_ram(machine.ram_total_bytes)
    if machine.device == "cuda":
        ram = probe.beside_a_gpu(machine.ram_total_bytes, ram)
    if worker.vram_gib != "auto":
        vram = min(vram, int(float(worker.vram_gib) * GIB))
    if worker.ram_gib != "auto":
        ram = min(ram, int(float(worker.ram_gib) * GIB))
    free = {"vram_free_bytes": max(vram, machine.vram_free_bytes), "ram_available_bytes": ram}
    return machine.model_copy(update=free)


def _who_has_it(machine: Machine) -> str:
    """Say which programs hold memory of the GPU, "" where the driver does not tell."""
    state = gpustate.read(machine.uuid) if machine.uuid else None
    held = gpustate.of_others(state, {os.getpid()}) if state else {}
    if not sum(held.values()):
        return ""
    return f"Other programs hold {sum(held.values()) / GIB:.1f} GiB of the GPU, most of it {gpustate.biggest(held)}."
