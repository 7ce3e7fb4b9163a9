"""From one job's verdict to the engine starting the next, and the worker's memory. JSON out, exit by bar.

Read from the receipts: a job's `finished_at` is taken before its files are renamed and synced, the next one's
`started_at` when the engine has it, so publishing is counted as well.
"""

from __future__ import annotations

import itertools
import json
import statistics
import subprocess
import sys
import time
from datetime import datetime

import psutil

from bench.scratch import Scratch, scratch
from safelight.ledger import Ledger

JOBS = 40
BARS = {"handover_ms_median": 100.0, "worker_rss_mib": 120.0}


def measure(place: Scratch, worker: subprocess.Popen[bytes]) -> dict[str, float]:
    place.client("add", "a fox", "--model", "tiny-flux-schnell", "--count", str(JOBS))
    ledger = Ledger(place.config.paths)
    rss_bytes = 0
    while len(ledger.ended()) < JOBS:
        rss_bytes = max(rss_bytes, psutil.Process(worker.pid).memory_info().rss)
        time.sleep(0.1)
    receipts = [receipt for job in sorted(ledger.ended()) if (receipt := ledger.receipt(job))]
    gaps_ms = [
        (datetime.fromisoformat(after.started_at or "") - datetime.fromisoformat(before.finished_at)).total_seconds()
        * 1000
        for before, after in itertools.pairwise(receipts)
    ]
    return {
        "handover_ms_median": round(statistics.median(gaps_ms), 1),
        "handover_ms_max": round(max(gaps_ms), 1),
        "worker_rss_mib": round(rss_bytes / 2**20, 1),
    }


def _moment(written: str) -> float:
    return datetime.fromisoformat(written).timestamp()


def main() -> int:
    with scratch() as place:
        server = place.start("redis")
        place.connect(server)
        worker = place.start("worker")
        try:
            figures = measure(place, worker)
        finally:
            worker.terminate()
            worker.wait()
            server.terminate()
            server.wait()
    missed = [name for name, bar in BARS.items() if figures[name] > bar]
    print(json.dumps({"figures": figures, "bars": BARS, "missed": missed}, indent=1))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
