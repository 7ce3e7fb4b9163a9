"""Reads the machine: NVML, /proc/meminfo and the cgroup. Never imports torch.

`python -m safelightd.probe` is the fresh process that tells a job's fault from the machine's: it makes a CUDA context
through the driver alone, writes memory and reads it back, and asks NVML what every plan asks it; then becomes
`safelightd.device`, which proves torch with the engine's own environment. It exits 0 or 5. A process whose context
broke cannot tell.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from safelight import fused, models, prepared
from safelight.config import Config
from safelight.errors import NoUsableGpu, SafelightError
from safelight.machine import GIB, Machine
from safelightd import torchversion
from safelightd.link import engine_env

PROBE_BYTES = 64 * 2**20
PROBE_TIMEOUT_S = 50
"""Driver, torch and a product of matrices took 6.2 s (H100, 2026-11-22); a lost GPU can hang. Less than the units'
WatchdogSec, for nothing else is said meanwhile."""

RESERVE_BYTES = 2 * GIB
"""RAM left to the desktop and the kernel; not promised to a job."""

PINNED_SHARE = 0.75
"""Of RAM in all, that a job may take beside a GPU, whatever is available: what is pinned cannot be swapped out, and the
page cache needs the rest. 24 of 32 GiB."""

CORES = {(6, 0): 64, (7, 0): 64, (7, 2): 64, (7, 5): 64, (8, 0): 64}
"""CUDA cores of a multiprocessor by capability, where they are not CORES_SINCE (helper_cuda.h of NVIDIA's samples)."""

CORES_SINCE = 128

LANE_BYTES_PER_SECOND = {
    1: 2.5e9 / 8 * 8 / 10,
    2: 5e9 / 8 * 8 / 10,
    3: 8e9 / 8 * 128 / 130,
    4: 16e9 / 8 * 128 / 130,
    5: 32e9 / 8 * 128 / 130,
    6: 64e9 / 8 * 242 / 256,
}
"""Of a PCIe lane, by generation, after its line code (PCI Express base specifications)."""

LINK_SHARE = 0.85
"""Of that, what copies from pinned memory reach: 54.8 of 63.0 GB/s (H100, generation 5, 16 lanes, 2026-11-22)."""


CGROUP = (Path("/sys/fs/cgroup"), Path("/proc/self/cgroup"))
"""Where cgroups are, and what names this process's own."""


@dataclass(frozen=True)
class Own:
    """What the process that asks holds already, and what its next job will use: not taken by others."""

    device_bytes: int = 0
    host_bytes: int = 0
    """Anonymous memory, pinned included."""


NOTHING = Own()


def read_machine(config: Config, own: Own = NOTHING) -> Machine:
    """Return what the planner may use now.

    Args:
        own: the engine's, which a plan's predictions count as well: a warm engine would shrink its own next plan.

    Raises:
        NoUsableGpu: the configured GPU is not there, or its driver does not answer.
        BadConfig: a model in the settings is wrong.
    """
    machine = _read_device(config, own)
    table = models.load(config)
    usable = prepared.usable(config.paths.models, table)
    kept = fused.usable(config.paths.models, table, prepared.versions()) if config.settings.worker.fused_gib else []
    return machine.model_copy(
        update={
            "compiler": has_compiler(os.environ.get("CC")),
            "pinned_rounds_up": not torchversion.pins_exactly(torchversion.installed()),
            "prepared": tuple(manifest.name for manifest in usable),
            "fused": tuple(kept),
            "fused_room_bytes": fused.room_bytes(config, table, kept),
        }
    )


def _read_device(config: Config, own: Own) -> Machine:
    worker = config.settings.worker
    ram_total, ram_available = _ram(own.host_bytes)
    if worker.ram_gib != "auto":
        ram_available = min(ram_available, int(float(worker.ram_gib) * GIB))
    cpus = len(os.sched_getaffinity(0))
    if worker.device == "cpu":
        return Machine(device="cpu", ram_total_bytes=ram_total, ram_available_bytes=ram_available, cpus=cpus)
    machine = _read_gpu(worker.gpu)
    machine = machine.model_copy(
        update={
            "ram_total_bytes": ram_total, "cpus": cpus,
            "ram_available_bytes": beside_a_gpu(ram_total, ram_available),
            "vram_free_bytes": min(machine.vram_free_bytes + own.device_bytes, machine.vram_total_bytes),
        }
    )  # fmt: skip
    if worker.vram_gib == "auto":
        return machine
    limit = int(float(worker.vram_gib) * GIB)
    return machine.model_copy(update={"vram_free_bytes": min(machine.vram_free_bytes, limit)})


def _read_gpu(gpu: str) -> Machine:
    """Ask NVML for the GPU of this index or UUID. It counts all cards: CUDA_VISIBLE_DEVICES means nothing to it."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise NoUsableGpu(
            f"GPU {gpu}: the NVIDIA driver does not answer ({error}). Is it installed and loaded?"
        ) from error
    try:
        card = pynvml.nvmlDeviceGetHandleByIndex(int(gpu)) if gpu.isdigit() else pynvml.nvmlDeviceGetHandleByUUID(gpu)
        memory = pynvml.nvmlDeviceGetMemoryInfo(card)
        major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(card)
        return Machine(
            device="cuda",
            gpu=str(pynvml.nvmlDeviceGetName(card)),
            uuid=str(pynvml.nvmlDeviceGetUUID(card)),
            capability=(int(major), int(minor)),
            driver=str(pynvml.nvmlSystemGetDriverVersion()),
            multiprocessors=multiprocessors(
                _if_known(lambda: pynvml.nvmlDeviceGetNumGpuCores(card)), (int(major), int(minor))
            ),
            clock_mhz=_if_known(lambda: pynvml.nvmlDeviceGetMaxClockInfo(card, pynvml.NVML_CLOCK_SM)),
            link_bytes_per_second=link_bytes_per_second(
                _if_known(lambda: pynvml.nvmlDeviceGetMaxPcieLinkGeneration(card)),
                _if_known(lambda: pynvml.nvmlDeviceGetMaxPcieLinkWidth(card)),
            ),
            vram_total_bytes=int(memory.total),
            vram_free_bytes=int(memory.free),
            ram_total_bytes=0,
            ram_available_bytes=0,
            cpus=1,
        )
    except pynvml.NVMLError as error:
        raise NoUsableGpu(f"GPU {gpu}: {error}. `nvidia-smi -L` lists the GPUs; set [worker] gpu.") from error
    finally:
        pynvml.nvmlShutdown()


def _if_known(ask: Callable[[], object]) -> int:
    """Return what the driver answers, 0 where it does not say so of this card: a virtual one, or a part of one."""
    import pynvml

    try:
        return int(str(ask()))
    except pynvml.NVMLError_NotSupported:
        return 0


def multiprocessors(cores: int, capability: tuple[int, int]) -> int:
    """Return how many multiprocessors a card of that many CUDA cores has; 0 for none."""
    return cores // CORES.get(capability, CORES_SINCE)


def link_bytes_per_second(generation: int, lanes: int) -> int:
    """Return what copies from pinned memory reach over a PCIe link; 0 for one that is not known."""
    return int(LANE_BYTES_PER_SECOND.get(generation, 0) * lanes * LINK_SHARE)


def has_compiler(cc: str | None, headers: Path | None = None) -> bool:
    """Whether Triton can build its launchers: it runs $CC, gcc or clang, and includes Python.h.

    Args:
        headers: the folder of Python.h; None for this Python's.
    """
    compilers = [cc] if cc else ["gcc", "clang"]
    folder = headers or Path(sysconfig.get_path("include"))
    return any(map(shutil.which, compilers)) and (folder / "Python.h").is_file()


def beside_a_gpu(ram_total: int, ram_available: int) -> int:
    """Return what a job may take of RAM that is available, where it pins some of it for a GPU."""
    return min(ram_available, int(PINNED_SHARE * ram_total))


def _ram(own_bytes: int) -> tuple[int, int]:
    """Return RAM in all, and what a job may take: available, within the cgroup, less a reserve."""
    fields = {}
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, rest = line.partition(":")
        fields[name] = int(rest.split()[0]) * 1024
    available = min([fields["MemAvailable"], *cgroup_room()]) + own_bytes
    return fields["MemTotal"], max(available - RESERVE_BYTES, 0)


def idle_ram(total: int) -> int:
    """Return what a job might take of RAM, of `total` bytes, if no other program used any."""
    return max(min([total, *(limit for _, limit in _cgroup_limits(*CGROUP))]) - RESERVE_BYTES, 0)


def cgroup_room(root: Path = CGROUP[0], own: Path = CGROUP[1]) -> list[int]:
    """Return what each limiting cgroup above this process still allows: its limit less what cannot be reclaimed."""
    rooms = []
    for folder, limit in _cgroup_limits(root, own):
        stat = dict(part.split() for part in (folder / "memory.stat").read_text().splitlines())
        held = sum(int(stat.get(name, 0)) for name in ("anon", "unevictable", "kernel"))
        rooms.append(max(limit - held, 0))
    return rooms


def _cgroup_limits(root: Path, own: Path) -> list[tuple[Path, int]]:
    """Return each cgroup above this process that limits memory, and to how much."""
    line = next((line for line in own.read_text().splitlines() if line.startswith("0::")), "0::/")
    folder = root / line[3:].strip("/")
    found = []
    while folder.is_relative_to(root):  # in a container the root itself has the limit
        limits = [_number(folder / name) for name in ("memory.max", "memory.high")]
        limit = min((value for value in limits if value is not None), default=None)
        if limit is not None and (folder / "memory.stat").is_file():
            found.append((folder, limit))
        folder = folder.parent
    return found


def _number(file: Path) -> int | None:
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def gpu_is_well(config: Config, machine: Machine | None) -> str | None:
    """Ask a fresh process whether the device works; return None when it does, else what is wrong."""
    if config.settings.worker.device == "cpu":
        return None
    uuid = machine.uuid if machine else config.settings.worker.gpu
    try:
        done = subprocess.run(
            [sys.executable, "-m", "safelightd.probe", uuid],
            env=None if machine is None else engine_env(config, machine),
            capture_output=True, text=True, timeout=PROBE_TIMEOUT_S, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"the GPU did not answer within {PROBE_TIMEOUT_S} s"
    return None if done.returncode == 0 else (done.stderr.strip() or f"the probe ended with {done.returncode}")


class _Driver:
    """The few calls of libcuda that prove a GPU: cuda.h of CUDA 13; all return 0 or an error number."""

    def __init__(self) -> None:
        try:
            self._library = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise NoUsableGpu(f"libcuda.so.1 cannot be loaded: {error}") from error

    def call(self, name: str, *arguments: object) -> None:
        status = getattr(self._library, name)(*arguments)
        if status:
            raise NoUsableGpu(f"{name} returned {status}")


def prove() -> None:
    """Make a context on the visible GPU, write memory, read it back.

    Raises:
        NoUsableGpu: with the driver call that failed.
    """
    cuda = _Driver()
    device, context, memory = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_uint64()
    cuda.call("cuInit", 0)
    cuda.call("cuDeviceGet", ctypes.byref(device), 0)
    cuda.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
    cuda.call("cuCtxSetCurrent", context)
    cuda.call("cuMemAlloc_v2", ctypes.byref(memory), ctypes.c_size_t(PROBE_BYTES))
    cuda.call("cuMemsetD32_v2", memory, ctypes.c_uint(0x5AFE1164), ctypes.c_size_t(PROBE_BYTES // 4))
    read = (ctypes.c_uint32 * 2)()
    last = ctypes.c_uint64(memory.value + PROBE_BYTES - 8)
    cuda.call("cuMemcpyDtoH_v2", ctypes.byref(read), last, ctypes.c_size_t(8))
    if list(read) != [0x5AFE1164] * 2:
        raise NoUsableGpu(f"GPU memory gave back {list(read)}")
    cuda.call("cuMemFree_v2", memory)
    cuda.call("cuDevicePrimaryCtxRelease_v2", device)


def main() -> NoReturn:
    """Prove the GPU named on the command line; the exit code and one line on stderr are the answer."""
    gpu = sys.argv[1] if len(sys.argv) > 1 else ""
    if gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    os.environ["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
    try:
        prove()
        if gpu:
            _read_gpu(gpu)
    except SafelightError as error:
        print(error, file=sys.stderr)  # noqa: T201 - the answer to the process that asked
        sys.exit(error.exit_code)
    os.execv(sys.executable, [sys.executable, "-m", "safelightd.device"])


if __name__ == "__main__":
    main()
