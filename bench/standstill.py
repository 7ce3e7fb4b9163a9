"""Everything stands still for minutes in the middle of a job, while clients ask: no job runs twice.

    python -m bench.standstill                 # two minutes, as when a laptop's every process is stopped
    python -m bench.standstill --seconds 5

Server, worker, horse, engine and inbox are stopped (SIGSTOP) and go on (SIGCONT); meanwhile `safelight list`, `status`
and `add` are run again and again, and one `safelight wait` was there from the start. Prints a JSON object; exits 1
unless each job is done once, by its first attempt, and the one that waited was told so.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import psutil

from bench.scratch import Scratch, scratch
from safelight.jobqueue import JobQueue
from safelight.ledger import Ledger

JOBS = 4
STEPS = "40"
ASKED = (("list", "--json"), ("status",), ("add", "a late fox"))
ANSWER_S = 60.0
"""A client gives a server that does not answer no longer than that."""

ENDED_WITHIN_S = 300.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=125.0)
    found = stand_still(parser.parse_args().seconds)
    print(json.dumps(found), flush=True)
    return 0 if found["ok"] else 1


def stand_still(seconds: float) -> dict[str, object]:
    """Return what became of the jobs, and how the clients that asked meanwhile ended, as "list 4"."""
    with scratch() as place, _daemon(place) as processes:
        jobs = [
            place.client("add", f"a fox, {i}", "--model", "tiny-flux-dev", "--steps", STEPS).stdout.strip()
            for i in range(JOBS)
        ]
        waiting = subprocess.Popen([sys.executable, "-m", "safelight.cli", "wait", *jobs], env=place.env)
        # a client that first asks while the server stands still is told so and ends: that is what the others do
        _await("safelight wait has reached the server", lambda: psutil.Process(waiting.pid).net_connections("unix"))
        queue = place.connect()
        _await(f"{jobs[0]} has begun", lambda: _has_begun(queue, jobs[0]))
        stopped = [each for process in processes for each in (process, *process.children(recursive=True))]
        for process in stopped:
            process.send_signal(signal.SIGSTOP)
        asked: Counter[str] = Counter()
        until = time.monotonic() + seconds
        added = []
        while time.monotonic() < until:
            with ThreadPoolExecutor() as clients:
                for words, done in zip(ASKED, clients.map(lambda words: _ask(place, *words), ASKED), strict=True):
                    asked[f"{words[0]} {done.returncode}"] += 1
                    added += done.stdout.split() if words[0] == "add" and done.returncode == 0 else []
        for process in stopped:
            process.send_signal(signal.SIGCONT)
        ledger = Ledger(place.config.paths)
        accepted = {spec.id for spec in ledger.accepted()}
        _await(f"{len(accepted)} jobs have ended", lambda: len(ledger.ended()) >= len(accepted))
        receipts = [receipt for job in sorted(ledger.ended()) if (receipt := ledger.receipt(job))]
        waited = waiting.wait(ENDED_WITHIN_S)
        files = len(list(place.config.paths.outbox.rglob("*.png")))
    once = all((receipt.state, receipt.attempts) == ("done", 1) for receipt in receipts)
    whole = {receipt.id for receipt in receipts} == accepted >= {*jobs, *added} and len(receipts) == files
    return {
        "seconds": seconds, "jobs": len(receipts), "files": files, "stopped": len(stopped), "clients": dict(asked),
        "waited": waited, "ok": once and whole and waited == 0,
    }  # fmt: skip


@contextmanager
def _daemon(place: Scratch) -> Iterator[list[psutil.Process]]:
    """Have the three services; none of their processes is left afterwards."""
    started = [place.start("redis")]
    try:
        place.connect(started[0])
        place.config.paths.inbox.mkdir(exist_ok=True)
        started += [place.start("inbox"), place.start("worker")]
        yield [psutil.Process(process.pid) for process in started]
    finally:
        for process in reversed(started):
            process.send_signal(signal.SIGCONT)
            process.terminate()
            process.wait()


def _has_begun(queue: JobQueue, job: str) -> bool:
    return bool(json.loads(queue.fields(job).get("progress", "{}")).get("i", 0))


def _await(what: str, is_so: Callable[[], object]) -> None:
    deadline = time.monotonic() + ENDED_WITHIN_S
    while not is_so():
        if time.monotonic() > deadline:
            raise SystemExit(f"Not within {ENDED_WITHIN_S:.0f} s: {what}.")
        time.sleep(0.01)


def _ask(place: Scratch, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "safelight.cli", *words]
    return subprocess.run(command, env=place.env, capture_output=True, text=True, timeout=ANSWER_S, check=False)


if __name__ == "__main__":
    sys.exit(main())
