"""How soon a dropped file is queued, and what 10,000 files at once cost. Real server, real inbox process, real files.

    python -m bench.inbox [--files 10000] [--singles 30]

Prints JSON and exits 1 when a bar is missed: median of single files <= 2 s from close to queued with settle_s 1.0;
10,000 files queued once each within 120 s, the inbox process never above 200 MiB.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from bench.scratch import Scratch, scratch
from safelight.config import Config
from safelight.jobqueue import JobQueue

MEDIAN_S_MAX = 2.0
ALL_QUEUED_S_MAX = 120.0
PEAK_MIB_MAX = 200.0

WORKER = "bench"
"""The queue wakes the workers it knows at every submission: being one is how we learn of it at once."""


def start(place: Scratch) -> tuple[JobQueue, list[subprocess.Popen[bytes]]]:
    """Start a server and the inbox process; return the queue and both, ready."""
    server = place.start("redis")
    queue = place.connect(server)
    queue.publish_worker(WORKER, 3600)
    inbox = place.config.paths.inbox
    inbox.mkdir()
    (inbox / "warm-up.txt").write_text("the process is up when this is queued\n", encoding="utf-8")
    process = place.start("inbox")
    await_queued(queue, 1, 60.0)
    return queue, [server, process]


def single_files(config: Config, queue: JobQueue, files: int) -> list[float]:
    """Return the seconds from closing a file to its job being queued, one file after the other."""
    waits = []
    before = queue.counts()["queued"]
    rhythm = random.Random(1)
    for number in range(files):
        time.sleep(rhythm.uniform(0.0, 1.0))  # so that no file keeps step with the scans
        (config.paths.inbox / f"single-{number}.txt").write_text(f"single {number}\n", encoding="utf-8")
        closed_at = time.monotonic()
        await_queued(queue, before + number + 1, 60.0)
        waits.append(time.monotonic() - closed_at)
    return waits


def await_queued(queue: JobQueue, jobs: int, timeout_s: float) -> None:
    """Wait until that many jobs wait in the line."""
    ends_at = time.monotonic() + timeout_s
    while queue.counts()["queued"] < jobs:
        if time.monotonic() > ends_at:
            raise SystemExit(f"{queue.counts()['queued']} of {jobs} jobs were queued within {timeout_s:.0f} s.")
        queue.wait_for_wake(WORKER, 1.0)


def drop_at_once(config: Config, queue: JobQueue, files: int) -> dict[str, float]:
    """Move many files into the inbox and return the seconds from the first until the first and all are queued."""
    prepared = config.paths.inbox.with_name("prepared")
    prepared.mkdir()
    for number in range(files):
        (prepared / f"many-{number}.txt").write_text(f"many {number}\n", encoding="utf-8")
    before = queue.counts()["queued"]
    started = time.monotonic()
    for number in range(files):
        (prepared / f"many-{number}.txt").rename(config.paths.inbox / f"many-{number}.txt")
    moved_s = time.monotonic() - started
    await_queued(queue, before + 1, 600.0)
    first_s = time.monotonic() - started
    await_queued(queue, before + files, 600.0)
    return {"moving_s": moved_s, "first_queued_s": first_s, "all_queued_s": time.monotonic() - started}


def queued_once(queue: JobQueue, files: int) -> int:
    """Return how many of the dropped files made exactly one job."""
    prompts = Counter(row.prompt for row in queue.rows(queue.waiting_ids()))
    return sum(prompts[f"many {number}"] == 1 for number in range(files))


def peak_mib(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    return int(found[1]) / 1024 if found else float("nan")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--singles", type=int, default=30)
    asked = parser.parse_args()
    with scratch() as place:
        queue, processes = start(place)
        try:
            waits = sorted(single_files(place.config, queue, asked.singles))
            many = drop_at_once(place.config, queue, asked.files)
            once = queued_once(queue, asked.files)
            peak = peak_mib(processes[1].pid)
            processes[1].send_signal(signal.SIGTERM)
            stopped = time.monotonic()
            status = processes[1].wait(60)
            stop_s = time.monotonic() - stopped
        finally:
            for process in reversed(processes):
                process.terminate()
                process.wait()
    figures = {
        "machine": {"cpus": os.cpu_count(), "kernel": platform.release(), "python": platform.python_version()},
        "single_files": {
            "files": len(waits),
            "median_s": round(statistics.median(waits), 3),
            "p95_s": round(waits[int(0.95 * (len(waits) - 1))], 3),
            "bar_median_s": MEDIAN_S_MAX,
        },
        "at_once": {
            "files": asked.files,
            **{name: round(seconds, 2) for name, seconds in many.items()},
            "queued_exactly_once": once,
            "peak_rss_mib": round(peak, 1),
            "bar_all_queued_s": ALL_QUEUED_S_MAX,
            "bar_peak_rss_mib": PEAK_MIB_MAX,
        },
        "sigterm": {"exit_status": status, "seconds": round(stop_s, 3)},
    }
    print(json.dumps(figures, indent=1))
    good = statistics.median(waits) <= MEDIAN_S_MAX and many["all_queued_s"] <= ALL_QUEUED_S_MAX
    return 0 if good and once == asked.files and peak <= PEAK_MIB_MAX and status == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
