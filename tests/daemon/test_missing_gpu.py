"""A worker whose GPU is not there holds and says so; it neither ends nor takes the CPU instead."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from safelight.jobqueue import JobQueue
from tests.conftest import Installation
from tests.daemon.test_worker import REPOSITORY, eventually, specs_of


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="this machine has an NVIDIA GPU")
def test_a_worker_without_its_gpu_holds_with_the_reason_and_the_remedy_and_runs_nothing(
    installation: Installation, queue: JobQueue
) -> None:
    settings = installation.config.source
    settings.write_text(settings.read_text().replace('device = "cpu"', 'device = "cuda"'))
    folders = os.pathsep.join(str(REPOSITORY / name) for name in ("client", "daemon"))
    env = {**installation.env, "PYTHONPATH": folders}
    (spec,) = specs_of(installation, ["a fox"])
    queue.submit([spec])
    process = subprocess.Popen([sys.executable, "-m", "safelightd.cli", "worker"], env=env)
    try:
        eventually(lambda: [row.holds for row in queue.workers() if "gpu" in row.holds])
        (worker,) = queue.workers()
        remedy = (
            f'On a machine without a GPU: write [worker] device = "cpu" into {settings} and start the daemon again.'
        )

        assert worker.holds["gpu"].endswith(remedy)
        assert process.poll() is None
        assert queue.state(spec.id) == "queued"

        process.terminate()
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()
