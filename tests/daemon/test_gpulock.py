"""One worker a GPU, held by the kernel for as long as its holder lives."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from safelight.errors import BadConfig
from safelight.machine import Machine
from safelightd import gpulock
from tests.conftest import Installation

CPU = Machine(device="cpu", ram_total_bytes=1, ram_available_bytes=1, cpus=1)
HOLD = """
import sys, time
from pathlib import Path
from safelightd import gpulock
held = gpulock.take(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def holder(path: Path) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, env={"PYTHONPATH": ":".join(sys.path)}
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    process.stdout.close()
    return process


def test_a_lock_keeps_others_out_until_its_holder_is_dead_however_it_died(tmp_path: Path) -> None:
    path = tmp_path / "some" / "lock"

    assert not gpulock.is_taken(path)
    assert not path.exists()

    other = holder(path)

    assert gpulock.is_taken(path)
    with pytest.raises(BadConfig, match=f"Another worker uses this device.*{path}"):
        gpulock.take(path, patience_s=0.1)

    other.kill()
    other.wait()

    assert not gpulock.is_taken(path)
    os.close(gpulock.take(path, patience_s=0.0))
    assert not gpulock.is_taken(path)


def test_a_successor_waits_for_a_predecessor_that_is_still_dying(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    other = holder(path)
    killer = subprocess.Popen(["sh", "-c", f"sleep 0.5; kill -9 {other.pid}"])
    began = time.monotonic()
    os.close(gpulock.take(path, patience_s=20))

    assert time.monotonic() - began >= 0.3
    killer.wait()
    other.wait()


def test_looking_does_not_take(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    held = gpulock.take(path)

    assert gpulock.is_taken(path)
    assert gpulock.is_taken(path)

    os.close(held)
    os.close(gpulock.take(path, patience_s=0.0))


def test_a_link_in_the_place_of_the_lock_is_not_followed(tmp_path: Path) -> None:
    """The folder is world-writable: another user may have put anything there."""
    (tmp_path / "lock").symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match="symbolic links"):
        gpulock.take(tmp_path / "lock")

    assert not (tmp_path / "precious").exists()


def test_the_lock_is_not_inherited_by_programs_that_the_worker_starts(tmp_path: Path) -> None:
    held = gpulock.take(tmp_path / "lock")
    child = subprocess.Popen(["sleep", "60"], close_fds=False)
    os.close(held)

    assert not gpulock.is_taken(tmp_path / "lock")
    child.kill()
    child.wait()


def test_workers_of_all_users_meet_at_one_gpu_and_cpu_workers_at_their_state_folder(
    installation: Installation,
) -> None:
    config = installation.config
    gpu = Machine(device="cuda", uuid="GPU-1", ram_total_bytes=1, ram_available_bytes=1, cpus=1)
    elsewhere = replace(config, paths=replace(config.paths, runtime=Path("/elsewhere")))

    assert Path("/dev/shm/safelight-GPU-1.lock") == gpulock.lock_path(gpu, config)
    assert gpulock.lock_path(CPU, config) == gpulock.lock_path(CPU, elsewhere)
    assert gpulock.lock_path(CPU, config).is_relative_to(config.paths.state)
