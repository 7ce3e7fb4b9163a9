"""A clip whose processes are killed three times goes on where it stood, and is the one that nobody disturbed.

It has a cache, which a checkpoint holds besides all that one of a clip without has.
"""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import numpy as np

from safelight import queueserver
from safelight.jobqueue import JobQueue
from safelightd import video
from tests.cli_steps import runner
from tests.conftest import Installation
from tests.e2e.test_chaos import Daemon

STEPS, FRAMES = 100, 33
CLIP = ("waves", "--model", "tiny-wan-ti2v", "--steps", str(STEPS), "--frames", str(FRAMES), "--seed", "3",
        "--cache", "first-block:threshold=0.1")  # fmt: skip


def frames(installation: Installation, job: str) -> list[np.ndarray]:
    receipt = installation.ledger.receipt(job)
    assert receipt is not None
    return list(video.read_frames(Path(installation.paths.outbox / receipt.outputs[0].path)))


def test_a_clip_killed_three_times_equals_the_undisturbed_one(installation: Installation) -> None:
    settings = installation.config.source
    settings.write_text(settings.read_text().replace("[worker]\n", "[worker]\ncheckpoint_s = 0\n"))
    safelight = runner(installation)
    deadline = time.monotonic() + 200
    daemon = Daemon(installation)
    try:
        while safelight("status").exit_code:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        undisturbed = safelight("add", *CLIP).stdout.split()[0]
        safelight("wait", undisturbed)
        killed = safelight("add", *CLIP).stdout.split()[0]
        queue = JobQueue(queueserver.connect(installation.config.url))
        reached = [0]
        for role in ("engine", "horse", "worker"):
            while (i := step(queue, killed)) <= reached[-1]:
                assert time.monotonic() < deadline
                time.sleep(0.005)
            process = daemon.find(role)
            assert process is not None
            os.kill(process.pid, signal.SIGKILL)
            reached.append(i)
        safelight("wait", killed)
        receipt, other = (installation.ledger.receipt(job) for job in (killed, undisturbed))
    finally:
        daemon.stop()

    assert receipt is not None
    assert other is not None
    assert receipt.state == "done"
    assert receipt.cache == other.cache
    assert receipt.cache is not None
    assert 0 < receipt.cache.skipped < receipt.cache.forwards == 2 * STEPS
    assert receipt.began_anew is None
    assert receipt.resumed_after_step is not None
    assert reached[-1] <= receipt.resumed_after_step < STEPS
    assert all(map(np.array_equal, frames(installation, killed), frames(installation, undisturbed)))
    assert len(frames(installation, killed)) == FRAMES
    assert list(installation.paths.checkpoints.iterdir()) == []


def step(queue: JobQueue, job: str) -> int:
    """Return the step of the attempt that runs."""
    told = json.loads(queue.fields(job).get("progress", "{}"))
    return int(told.get("i", 0)) if told.get("phase") == "denoise" and queue.state(job) == "running" else 0
