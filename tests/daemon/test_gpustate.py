"""The holds `thermal` and `gpu-busy`: off unless asked for, and never about ourselves."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from safelight import config as settings
from safelight.config import Config
from safelight.machine import GIB
from safelightd import gpustate, probe
from safelightd.gpustate import GpuState, Watch

REPOSITORY = Path(__file__).parents[2]
ENGINE = 4242
SOMEBODY = 2**22 + 1
"""No process of Linux has this id (PID_MAX_LIMIT)."""


def config_of(folder: Path, policy: str, device: str = "cuda") -> Config:
    file = folder / "safelight.toml"
    file.write_text(f'[worker]\ndevice = "{device}"\n[policy]\n{policy}\n')
    return settings.load({"HOME": str(folder), "XDG_RUNTIME_DIR": str(folder)}, file)


class Card:
    """A card that says what the test wants."""

    def __init__(self, temperature_c: int | None = 40) -> None:
        self.temperature_c = temperature_c
        self.held: dict[int, float] = {}
        self.looks = 0

    def __call__(self, uuid: str) -> GpuState:
        assert uuid == "GPU-1"
        self.looks += 1
        return GpuState(self.temperature_c, {pid: int(gib * GIB) for pid, gib in self.held.items()})


@pytest.fixture(autouse=True)
def each_look_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpustate, "LOOK_AGAIN_S", 0.0)


def test_both_are_off_by_default_and_the_card_is_not_even_asked(tmp_path: Path) -> None:
    card = Card(temperature_c=120)
    card.held = {SOMEBODY: 12.0}

    assert Watch(config_of(tmp_path, ""), "GPU-1", card).holds(ENGINE) == {}
    assert card.looks == 0


def test_a_cpu_worker_does_not_ask_a_card(tmp_path: Path) -> None:
    card = Card(temperature_c=120)
    watch = Watch(config_of(tmp_path, "thermal_ceiling_c = 80\ngpu_busy_gib = 0", "cpu"), "GPU-1", card)

    assert watch.holds(None) == {}
    assert card.looks == 0


def test_a_hot_card_holds_until_it_is_ten_degrees_below_its_ceiling(tmp_path: Path) -> None:
    card = Card()
    watch = Watch(config_of(tmp_path, "thermal_ceiling_c = 80"), "GPU-1", card)
    held = []
    for card.temperature_c in (79, 80, 75, 70, 69, 79, 85):
        held.append("thermal" in watch.holds(ENGINE))

    assert held == [False, True, True, True, False, False, True]
    assert watch.holds(ENGINE) == {
        "thermal": "the GPU is at 85 °C, thermal_ceiling_c = 80; jobs go on below 70 °C",
    }


@pytest.mark.parametrize("policy", ["thermal_ceiling_c = 80", "gpu_busy_gib = 0"])
def test_a_card_that_does_not_answer_is_the_probes_business(tmp_path: Path, policy: str) -> None:
    assert Watch(config_of(tmp_path, policy), "GPU-1", lambda _uuid: None).holds(ENGINE) == {}
    assert Watch(config_of(tmp_path, policy), "GPU-1", Card(temperature_c=None)).holds(ENGINE) == {}


def test_other_programs_hold_the_queue_while_together_they_have_more_than_allowed(tmp_path: Path) -> None:
    card = Card()
    watch = Watch(config_of(tmp_path, "gpu_busy_gib = 1"), "GPU-1", card)
    card.held = {ENGINE: 14.0, os.getpid(): 2.0, SOMEBODY: 0.6, 1: 0.4}

    assert watch.holds(ENGINE) == {}

    card.held[SOMEBODY] = 3.0
    reason = watch.holds(ENGINE)["gpu-busy"]

    assert reason == (
        "other programs hold 3.4 GiB of the GPU, gpu_busy_gib = 1; "
        f"most of it a process of somebody else (pid {SOMEBODY})"
    )


def test_an_engine_that_was_ours_and_is_gone_is_not_ours_any_more(tmp_path: Path) -> None:
    card = Card()
    card.held = {ENGINE: 0.5}
    watch = Watch(config_of(tmp_path, "gpu_busy_gib = 0"), "GPU-1", card)

    assert watch.holds(ENGINE) == {}
    assert set(watch.holds(None)) == {"gpu-busy"}


def test_a_card_is_not_asked_more_often_than_is_good_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpustate, "LOOK_AGAIN_S", 60.0)
    card = Card(temperature_c=90)
    watch = Watch(config_of(tmp_path, "thermal_ceiling_c = 80"), "GPU-1", card)
    found = [watch.holds(ENGINE) for _ in range(5)]

    assert card.looks == 1
    assert all(found)


NVML = """\
#include <string.h>
typedef struct { unsigned pid; unsigned long long held; unsigned gpu, compute; } process;
int nvmlInitWithFlags(unsigned flags) { return 0; }
int nvmlShutdown(void) { return 0; }
const char *nvmlErrorString(int error) { return "an error"; }
int nvmlDeviceGetHandleByUUID(const char *uuid, void **card) { *card = 0; return strcmp(uuid, "GPU-1") ? 6 : 0; }
int nvmlDeviceGetTemperature(void *card, int sensor, unsigned *celsius) { *celsius = 66; return 0; }
static int list(unsigned *count, process *found, const process *all, unsigned n) {
    if (*count < n) { *count = n; return 7; }
    memcpy(found, all, n * sizeof *all);
    *count = n;
    return 0;
}
int nvmlDeviceGetComputeRunningProcesses_v3(void *card, unsigned *count, process *found) {
    static const process all[] = {{42, 5000, 0, 0}, {43, -1ULL, 0, 0}};
    return list(count, found, all, 2);
}
int nvmlDeviceGetGraphicsRunningProcesses_v3(void *card, unsigned *count, process *found) {
    static const process all[] = {{42, 7000, 0, 0}, {44, 100, 0, 0}};
    return list(count, found, all, 2);
}
"""
"""The few calls of nvml.h that are asked, for one card."""


@pytest.mark.skipif(not shutil.which("gcc"), reason="gcc is not installed: there is no NVML to ask")
def test_a_process_that_computes_and_draws_counts_once_and_one_of_unknown_size_as_nothing(tmp_path: Path) -> None:
    """Through the real binding, in a process of its own: the binding loads NVML once."""
    (tmp_path / "nvml.c").write_text(NVML)
    library = tmp_path / "libnvidia-ml.so.1"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, tmp_path / "nvml.c"], check=True)
    ask = "from safelightd import gpustate; print(gpustate.read('GPU-1'), gpustate.read('GPU-2'), sep='\\n')"
    folders = os.pathsep.join(str(REPOSITORY / name) for name in ("client", "daemon"))
    said = subprocess.run(
        [sys.executable, "-c", ask],
        env={**os.environ, "LD_LIBRARY_PATH": str(tmp_path), "PYTHONPATH": folders},
        capture_output=True,
        text=True,
        check=True,
    )

    state = GpuState(66, {42: 7000, 43: 0, 44: 100})
    assert said.stdout.splitlines() == [str(state), "None"]


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="this machine has an NVIDIA GPU")
def test_a_machine_without_nvml_has_no_card_to_ask() -> None:
    assert gpustate.read("GPU-1") is None


@pytest.mark.gpu
@pytest.mark.skipif(not Path("/dev/nvidiactl").exists(), reason="this machine has no NVIDIA GPU")
def test_a_real_card_says_how_warm_it_is_and_who_is_on_it() -> None:
    uuid = probe._read_gpu("0").uuid
    program = (
        "import torch; x = torch.ones(2**28, device='cuda'); torch.cuda.synchronize(); print(1, flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "1\n"
        state = gpustate.read(uuid)
        other.communicate("\n")

    assert state is not None
    assert state.temperature_c is not None
    assert 10 < state.temperature_c < 110
    assert sum(state.held_bytes.values()) > GIB
