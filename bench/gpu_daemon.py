"""The whole daemon on a CUDA machine with the tiny picture models: what the GPU holds between jobs, and after a kill.

    python -m bench.gpu_daemon                 # needs no weights
    python -m bench.gpu_daemon --wan FOLDER    # also cancels a full-size clip in the middle of a step;
                                               # bench.gpu_phases wan --folder FOLDER --keep makes one of random weights

Prints JSON lines as it goes and exits 1 when the GPU keeps what it should have given back.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import psutil
import pynvml

from bench.scratch import Scratch, scratch
from safelight.ledger import Ledger
from safelight.machine import GIB

JOBS = 12
CONTEXT_BYTES_MAX = 1 * GIB
"""An idle context holds 527 MiB on this driver; libraries that stay loaded add to it."""


def say(**facts: object) -> None:
    print(json.dumps(facts), flush=True)


def used_bytes() -> int:
    return int(pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(0)).used)


def engine_of(worker: int) -> psutil.Process | None:
    children = psutil.Process(worker).children(recursive=True)
    return next((child for child in children if "safelightd.engine" in child.cmdline()), None)


def ended(ledger: Ledger, count: int) -> None:
    deadline = time.monotonic() + 240
    while len(ledger.ended()) < count:
        if time.monotonic() > deadline:
            raise SystemExit(f"only {len(ledger.ended())} of {count} jobs ended")
        time.sleep(0.1)


def measure(place: Scratch, worker: int, before: int) -> bool:
    ledger = Ledger(place.config.paths)
    started = time.monotonic()
    place.client("add", "a fox", "--model", "tiny-flux-schnell", "--count", str(JOBS))
    ended(ledger, JOBS)
    say(step="jobs", count=JOBS, seconds=round(time.monotonic() - started, 1))
    receipts = [receipt for job in sorted(ledger.ended()) if (receipt := ledger.receipt(job))]
    for receipt in (receipts[0], receipts[-1]):
        assert receipt.plan
        assert receipt.machine
        say(step="receipt", state=receipt.state, error=receipt.error, plan=receipt.plan.model_dump(mode="json"),
            machine=receipt.machine.model_dump(mode="json"), device_bytes_after=receipt.device_bytes_after,
            phases={name: phase.model_dump() for name, phase in receipt.phases.items()})  # fmt: skip
    idle = used_bytes() - before
    say(step="idle after jobs", gpu_bytes_above_baseline=idle)
    engine = engine_of(worker)
    assert engine is not None
    killed_at = time.monotonic()
    engine.kill()
    engine.wait(10)
    while used_bytes() - before > 16 * 2**20 and time.monotonic() - killed_at < 10:
        time.sleep(0.01)
    say(step="engine killed", seconds=round(time.monotonic() - killed_at, 3), gpu_bytes=used_bytes() - before)
    place.client("add", "a boat", "--model", "tiny-flux-dev")
    ended(ledger, JOBS + 1)
    kept = [receipt.device_bytes_after for receipt in receipts]
    good = all(receipt.state == "done" for receipt in receipts) and set(kept) == {0} and idle < CONTEXT_BYTES_MAX
    say(step="verdict", good=good, device_bytes_after=sorted({str(value) for value in kept}))
    return good


def cancel_a_clip(place: Scratch, before: int) -> bool:
    """Cancel a full-size clip while it denoises; True when it stops soon and the GPU is given back."""
    queue = place.connect()
    job = place.client("add", "waves", "--model", "wan-ti2v-5b", "--steps", "20").stdout.strip()
    deadline = time.monotonic() + 180
    while json.loads(queue.fields(job).get("progress", "{}")).get("i", 0) < 2:
        if time.monotonic() > deadline:
            say(step="clip", fields=queue.fields(job))
            return False
        time.sleep(0.05)
    say(step="clip denoises", progress=json.loads(queue.fields(job)["progress"]), gpu_bytes=used_bytes() - before)
    asked_at = time.monotonic()
    place.client("cancel", job)
    place.client("wait", job, "--timeout", "60", check=False)
    stopped_s = time.monotonic() - asked_at
    while used_bytes() - before > CONTEXT_BYTES_MAX and time.monotonic() - asked_at < 10:
        time.sleep(0.05)
    idle = used_bytes() - before
    say(step="clip cancelled", state=queue.state(job), seconds=round(stopped_s, 2), gpu_bytes_after=idle)
    return queue.state(job) == "cancelled" and idle < CONTEXT_BYTES_MAX


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--wan", type=Path, help="a diffusers folder of Wan 2.2 TI2V-5B")
    folder: Path | None = parser.parse_args().wan
    own = f'[models.wan-ti2v-5b]\npath = "{folder.absolute()}"\n' if folder else ""
    pynvml.nvmlInit()
    with scratch(device="cuda", more=own) as place:
        before = used_bytes()
        server = place.start("redis")
        place.connect(server)
        worker = place.start("worker")
        try:
            good = measure(place, worker.pid, before)
            if folder:
                good = cancel_a_clip(place, before) and good
        finally:
            worker.terminate()
            worker.wait()
            server.terminate()
            server.wait()
        say(step="worker stopped", gpu_bytes=used_bytes() - before)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
