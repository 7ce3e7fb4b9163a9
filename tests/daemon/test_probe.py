"""What the machine has, read from files of the kernel, and what a machine without a GPU says of it."""

from __future__ import annotations

import ctypes.util
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from safelight.config import Config
from safelight.errors import NoUsableGpu
from safelight.machine import GIB
from safelightd import probe
from tests.conftest import Installation

NO_DRIVER = ctypes.util.find_library("cuda") is None


def cgroup(root: Path, path: str, **files: object) -> None:
    folder = root / path
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("_", ".", 1)).write_text(f"{content}\n")


def stat(anon: int = 0, unevictable: int = 0, kernel: int = 0, file: int = 0) -> str:
    return f"anon {anon}\nfile {file}\nkernel {kernel}\nunevictable {unevictable}"


def room(tmp_path: Path, own: str) -> list[int]:
    (tmp_path / "own").write_text(own)
    return probe.cgroup_room(tmp_path / "cgroup", tmp_path / "own")


def test_each_limit_above_the_process_counts_less_what_cannot_be_reclaimed(tmp_path: Path) -> None:
    root = tmp_path / "cgroup"
    cgroup(root, "user.slice", memory_max="max", memory_high="max", memory_stat=stat(anon=1))
    cgroup(root, "user.slice/app", memory_max=1000, memory_high=800, memory_stat=stat(100, 20, 30, file=600))
    cgroup(root, "user.slice/app/worker", memory_max=500, memory_stat=stat(anon=100, file=390))

    assert room(tmp_path, "0::/user.slice/app/worker\n") == [400, 650]


def test_in_a_container_the_root_has_the_limit(tmp_path: Path) -> None:
    cgroup(tmp_path / "cgroup", "", memory_max=1000, memory_stat=stat(anon=250))

    assert room(tmp_path, "0::/\n") == [750]


def test_a_cgroup_over_its_limit_has_no_room_and_not_less(tmp_path: Path) -> None:
    cgroup(tmp_path / "cgroup", "a", memory_max=100, memory_stat=stat(anon=150))

    assert room(tmp_path, "0::/a\n") == [0]


@pytest.mark.parametrize(
    "own", ["0::/gone\n", "12:memory:/a\n1:name=systemd:/\n", "", "0::/../outside\n", "12:memory:/a\n0::/b\n"]
)
def test_without_a_limit_there_is_none(tmp_path: Path, own: str) -> None:
    cgroup(tmp_path / "cgroup", "a", memory_current=1)
    cgroup(tmp_path / "cgroup", "b", memory_max="max", memory_stat=stat())

    assert room(tmp_path, own) == []


def test_a_cpu_machine_is_its_memory_less_a_reserve_and_its_cores(installation: Installation) -> None:
    machine = probe.read_machine(installation.config)
    memory = psutil.virtual_memory()

    assert (machine.device, machine.uuid, machine.vram_total_bytes) == ("cpu", "", 0)
    assert machine.ram_total_bytes == memory.total
    assert 0 <= machine.ram_available_bytes <= memory.total - probe.RESERVE_BYTES
    assert machine.cpus == len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("cores", "capability", "expected"),
    [
        (16896, (9, 0), 132),  # H100 SXM
        (9728, (8, 9), 76),  # RTX 4090 laptop
        (10496, (12, 0), 82),  # RTX 5090 laptop
        (6912, (8, 0), 108),  # A100
        (3072, (7, 5), 48),  # RTX 2080 Max-Q
        (0, (8, 9), 0),
    ],
)
def test_a_card_has_the_multiprocessors_that_its_maker_names(
    cores: int, capability: tuple[int, int], expected: int
) -> None:
    assert probe.multiprocessors(cores, capability) == expected


@pytest.mark.parametrize(
    ("generation", "lanes", "gigabytes"),
    [(5, 16, 53.6), (4, 16, 26.8), (4, 8, 13.4), (3, 8, 6.7), (0, 16, 0), (4, 0, 0)],
)
def test_a_link_is_as_fast_as_its_lanes_less_what_copies_lose(generation: int, lanes: int, gigabytes: float) -> None:
    assert probe.link_bytes_per_second(generation, lanes) / 1e9 == pytest.approx(gigabytes, abs=0.05)


def test_a_compiler_counts_with_the_headers_of_python_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs, headers = tmp_path / "bin", tmp_path / "include"
    programs.mkdir()
    headers.mkdir()
    monkeypatch.setenv("PATH", str(programs))

    assert not probe.has_compiler(None, headers)

    (programs / "clang").touch(mode=0o755)
    assert not probe.has_compiler(None, headers)

    (headers / "Python.h").touch()
    assert probe.has_compiler(None, headers)
    assert not probe.has_compiler("icx", headers)  # Triton runs $CC where it is set, and no other


def with_worker(config: Config, **changes: object) -> Config:
    worker = config.settings.worker.model_copy(update=changes)
    return replace(config, settings=config.settings.model_copy(update={"worker": worker}))


def test_a_person_may_lower_what_a_job_may_take_and_cannot_raise_it(installation: Installation) -> None:
    available = probe.read_machine(installation.config).ram_available_bytes

    assert probe.read_machine(with_worker(installation.config, ram_gib=0.5)).ram_available_bytes == GIB // 2
    raised = probe.read_machine(with_worker(installation.config, ram_gib=10_000.0)).ram_available_bytes
    assert abs(raised - available) < GIB


@pytest.mark.parametrize(("available", "promised"), [(28, 24), (24, 24), (10, 10)])
def test_a_job_beside_a_gpu_leaves_a_quarter_of_ram_to_the_page_cache(available: int, promised: int) -> None:
    assert probe.beside_a_gpu(32 * GIB, available * GIB) == promised * GIB


def test_what_an_engine_holds_itself_is_there_for_its_next_job(installation: Installation) -> None:
    """Else the blocks that stay pinned from one job to the next would make the next one's plan smaller."""
    before = probe.read_machine(installation.config).ram_available_bytes
    own = probe.Own(host_bytes=8 * GIB)
    after = probe.read_machine(installation.config, own).ram_available_bytes
    limited = probe.read_machine(with_worker(installation.config, ram_gib=0.5), own).ram_available_bytes

    assert after - before == pytest.approx(8 * GIB, abs=GIB)
    assert limited == GIB // 2


def test_a_cpu_worker_asks_no_gpu(installation: Installation) -> None:
    assert probe.gpu_is_well(installation.config, None) is None


@pytest.mark.skipif(not NO_DRIVER, reason="this machine has a driver")
def test_a_machine_without_a_driver_has_no_usable_gpu_and_says_why(installation: Installation) -> None:
    config = with_worker(installation.config, device="cuda")
    with pytest.raises(NoUsableGpu, match="GPU 0: the NVIDIA driver does not answer") as refused:
        probe.read_machine(config)

    assert refused.value.exit_code == 5
    assert "libcuda.so.1 cannot be loaded" in (probe.gpu_is_well(config, None) or "")


@pytest.mark.skipif(not NO_DRIVER, reason="this machine has a driver")
def test_a_driver_that_does_not_answer_ends_no_job_that_only_measures() -> None:
    from safelightd import device

    assert device._used_by_this_process() is None


@pytest.mark.skipif(not NO_DRIVER, reason="this machine has a driver")
@pytest.mark.parametrize("module", ["safelightd.probe", "safelightd.cli"])
def test_the_probe_exits_5_with_one_line_of_reason(module: str, installation: Installation) -> None:
    file = installation.config.source
    file.write_text(file.read_text().replace('"cpu"', '"cuda"'))
    arguments = ["GPU-0"] if module == "safelightd.probe" else ["probe"]
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        env={**installation.env, "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 5
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert "driver does not answer" in done.stderr or "libcuda" in done.stderr


def test_reading_the_machine_imports_no_torch() -> None:
    program = "import sys, safelightd.probe; sys.exit('torch' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", program], env={"PYTHONPATH": ":".join(sys.path)}).returncode == 0


def test_proving_the_gpu_through_torch_imports_no_diffusers() -> None:
    """It would take two seconds longer, at every start of a worker and after every engine that died."""
    program = "import sys, safelightd.device; sys.exit('diffusers' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", program], env={"PYTHONPATH": ":".join(sys.path)}).returncode == 0
