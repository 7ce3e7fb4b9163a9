"""How fast the client is: help, a batch of 10,000 prompts, a listing of 100,000 waiting jobs. JSON out, exit by bar."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

from bench.scratch import Scratch, scratch

BARS_S = {"help": 0.25, "batch_10000": 15.0, "list_100000_waiting": 1.5}


def seconds(run: Callable[[], object], times: int = 1) -> float:
    """Return the median wall-clock time of whole processes."""
    taken = []
    for _ in range(times):
        started = time.perf_counter()
        run()
        taken.append(time.perf_counter() - started)
    return round(statistics.median(taken), 3)


def measure(place: Scratch) -> dict[str, float]:
    prompts = place.root / "night.txt"
    prompts.write_text("".join(f"a fox number {n} in the snow, oil painting\n" for n in range(10_000)))
    place.client("--help")  # the first run compiles bytecode
    figures = {"help": seconds(lambda: place.client("--help"), 9)}
    figures["batch_10000"] = seconds(lambda: place.client("batch", str(prompts)))
    for _ in range(9):
        place.client("batch", str(prompts))
    counts = place.connect().counts()
    assert counts["queued"] == 100_000, counts
    figures["list_100000_waiting"] = seconds(lambda: place.client("list"), 5)
    figures["list_json_100000_waiting"] = seconds(lambda: place.client("list", "--json"), 3)
    figures["status_100000_waiting"] = seconds(lambda: place.client("status"), 3)
    return figures


def main() -> int:
    with scratch() as place:
        server: subprocess.Popen[bytes] = place.start("redis")
        try:
            place.connect(server)
            figures = measure(place)
        finally:
            server.terminate()
            server.wait()
    missed = [name for name, bar in BARS_S.items() if figures[name] > bar]
    print(json.dumps({"seconds": figures, "bars": BARS_S, "missed": missed}, indent=1))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
