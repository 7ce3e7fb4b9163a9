"""Waiting for a GPU that is not there: a worker holds and says so. Knows no RQ."""

from __future__ import annotations

import itertools
import socket
import time
from contextlib import suppress

from safelight import queueserver
from safelight.config import Config
from safelight.errors import NoUsableGpu, QueueUnreachable
from safelight.jobqueue import JobQueue
from safelight.machine import Machine
from safelight.queueserver import AWAY
from safelightd import probe, systemd
from safelightd.logs import Log

LOOKS_S = (2.0, 5.0, 15.0)
"""Waits between two looks; the last repeats. Less than half of the units' WatchdogSec."""

log = Log("safelight.worker")


def await_device(config: Config, forgotten_s: int) -> Machine:
    """Read the device, and hold for as long as it is not there: a headless boot may start us before its driver, and a
    lost GPU may be back in the morning. Never the CPU instead."""
    name = f"{socket.gethostname()}-gpu-{config.settings.worker.gpu}"
    for wait_s in itertools.chain(LOOKS_S, itertools.repeat(LOOKS_S[-1])):
        try:
            machine = probe.read_machine(config)
        except NoUsableGpu as error:
            reason = f"{error} {config.without_a_gpu}"
            log.error("gpu.missing", reason=reason)
            systemd.notify("READY=1", "WATCHDOG=1", f"STATUS=Held: gpu: {reason}")
            _tell(config, name, reason, forgotten_s)
            time.sleep(wait_s)  # a signal ends it
            continue
        _tell(config, name, None, forgotten_s)
        return machine
    raise AssertionError("the waits repeat for ever")


def _tell(config: Config, name: str, reason: str | None, forgotten_s: int) -> None:
    """Let `status` name the hold of a worker that has no device yet; without a queue nobody could ask."""
    with suppress(QueueUnreachable, *AWAY):
        queue = JobQueue(queueserver.connect(config.url, timeout_s=2.0, retries=0))
        if reason is None:
            queue.forget_worker(name)
            return
        queue.publish_worker(name, forgotten_s, device="cuda")
        queue.set_holds(name, {"gpu": reason})
