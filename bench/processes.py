"""What the engine's process keeps: RAM over fifty jobs, GPU memory between jobs and after its end."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import fullsize
from bench.engine import engine
from bench.measured import SUBMITTED_AT, card_used_bytes
from bench.scratch import Scratch, scratch
from safelight import models, prepared
from safelight.config import Config
from safelight.jobspec import JobSpec
from safelight.ledger import Ledger

WARM_UP_JOBS = 10
ENDED_WITHIN_S = 2.0
"""After the engine's exit. The driver gives a process's memory back a moment later."""

OOM_STEPS = 30

MIB = 2**20


def run_slope(device: str, jobs: int) -> list[Any]:
    """Run tiny pictures and clips in turn in one engine; return how much its RAM grows a job after the first ten."""
    with scratch(device=device) as place, engine(place.config) as running:
        held: list[float] = []
        for i in range(jobs):
            model = "tiny-wan-ti2v" if i % 2 else "tiny-flux-schnell"
            running.run(_spec(place.config, model, i))
            held.append(running.memory_bytes() / MIB)
    after = held[WARM_UP_JOBS:]
    line = {"jobs": jobs, "slope_mib_a_job": round(slope(after), 4), "rss_mib": [round(mib, 1) for mib in held]}
    return [{"part": "slope", "name": f"{jobs} tiny jobs on {device}", **line}]


def slope(values: list[float]) -> float:
    """Return the least-squares slope of values at 0, 1, 2 ..."""
    middle, mean = (len(values) - 1) / 2, sum(values) / len(values)
    across = sum((i - middle) * (value - mean) for i, value in enumerate(values))
    return across / sum((i - middle) ** 2 for i in range(len(values)))


def run_release(device: str, model: str, folders: dict[str, Path], shrink: int) -> list[Any]:
    """Return what the card holds more than before: after a job in an engine that stays, and after its end."""
    own = "".join(f'[models.{key}]\npath = "{folder.absolute()}"\n' for key, folder in folders.items())
    with scratch(device=device, more=own) as place:
        before = card_used_bytes()
        with engine(place.config) as running:
            side = 1024 // shrink
            spec = _spec(place.config, model, 0, width=side, height=side, num_inference_steps=2)
            receipt = running.run(spec)
            warm = card_used_bytes() - before
        ended_at = time.monotonic()
        while (left := card_used_bytes() - before) > 0 and time.monotonic() - ended_at < ENDED_WITHIN_S:
            time.sleep(0.01)
    torch_held = receipt.device_bytes_after
    line = {"warm_bytes": warm, "torch_bytes_after": torch_held, "ended_bytes": left}
    return [{"part": "release", "name": f"{model} on {device}", "device": device, **line}]


def run_prepare(config: Config, model: str, held: str) -> list[Any]:
    """Prepare a model's transformer in a process of its own; return the most RAM it held besides mapped files."""
    words = ["--config", str(config.source), "prepare", model, "--precision", held]
    began = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "safelightd.cli", *words])
    held_bytes = 0
    while process.poll() is None:
        held_bytes = max(held_bytes, fullsize.status("RssAnon", process.pid))  # not reaped yet: its file is there
        time.sleep(0.02)
    seconds = time.monotonic() - began
    stored = sum(manifest.size_bytes for manifest in prepared.usable(config.paths.models, models.load(config)))
    return [
        {
            "part": "prepare", "name": f"{model} {held}", "exit": process.returncode, "seconds": round(seconds, 1),
            "host_gib": round(held_bytes / 2**30, 3), "stored_gib": round(stored / 2**30, 3),
        }
    ]  # fmt: skip


def run_oom(model: str, folders: dict[str, Path], leave_gib: float, shrink: int) -> list[Any]:
    """Take the card's memory away while a real worker denoises, give it back, and return how the job ended.

    What torch holds already nobody can take: it is the phase after that runs out.
    """
    own = "".join(f'[models.{key}]\npath = "{folder.absolute()}"\n' for key, folder in folders.items())
    with scratch(device="cuda", more=own) as place, _thief(leave_gib) as thief:
        server = place.start("redis")
        queue = place.connect(server)
        worker = place.start("worker")
        try:
            size = f"{1024 // shrink}x{1024 // shrink}"
            words = ["add", "a fox", "--model", model, "--size", size, "--steps", str(OOM_STEPS)]
            job, after = (place.client(*words).stdout.strip() for _ in range(2))
            _await(lambda: _steps(queue.fields(job)) > 0 or _has_ended(place, job), worker)
            assert thief.stdin is not None
            thief.stdin.write(b"now\n")
            thief.stdin.flush()
            _await(lambda: _overruns(place, job) > 0 or _has_ended(place, job), worker)
            thief.terminate()
            _await(lambda: _has_ended(place, after), worker)
            receipts = [Ledger(place.config.paths).receipt(each) for each in (job, after)]
        finally:
            for process in (worker, server):
                process.terminate()
                process.wait()
            thief.terminate()
    lines = []
    for name, receipt in zip(("", ", the next job"), receipts, strict=True):
        assert receipt is not None
        lines.append(
            {
                "part": "oom", "name": f"{model}, all but {leave_gib} GiB taken{name}", "next": bool(name),
                "state": receipt.state, "error": receipt.error,
                "attempts": receipt.attempts, "outputs": len(receipt.outputs),
                "overruns": [overrun.model_dump(mode="json") for overrun in receipt.overruns],
                "rung": receipt.plan.rung if receipt.plan else None,
            }
        )  # fmt: skip
    return lines


def _steps(fields: dict[str, str]) -> int:
    return int(json.loads(fields.get("progress", "{}")).get("i", 0))


def _has_ended(place: Scratch, job: str) -> bool:
    return Ledger(place.config.paths).receipt(job) is not None


def _overruns(place: Scratch, job: str) -> int:
    return len(Ledger(place.config.paths).attempts(job).overruns)


def _thief(leave_gib: float) -> subprocess.Popen[bytes]:
    """Start a process that, from a line on its stdin until its end, holds the card's memory but for so much."""
    program = (
        "import sys, time, torch\n"
        f"leave = int({leave_gib} * 2**30)\n"
        "torch.zeros(1, device='cuda')\n"
        "sys.stdin.readline()\n"
        "held = []\n"
        "while True:\n"
        "    more = torch.cuda.mem_get_info()[0] - leave\n"
        "    if more > 2**21:\n"
        "        try:\n"
        "            held.append(torch.empty(more, dtype=torch.uint8, device='cuda'))\n"
        "        except torch.OutOfMemoryError:\n"
        "            pass  # the job was quicker; there is less to take now\n"
        "    time.sleep(0.005)\n"
    )
    return subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE)


def _await(happened: Callable[[], bool], worker: subprocess.Popen[bytes], timeout_s: float = 100.0) -> None:
    """Return once it happened; a worker that has ended, or so long a time, ends the bench."""
    began = time.monotonic()
    while not happened():
        if worker.poll() is not None:
            raise SystemExit(f"The worker ended with exit code {worker.returncode}.")
        if time.monotonic() - began > timeout_s:
            raise SystemExit(f"Nothing happened for {timeout_s:.0f} s.")
        time.sleep(0.02)


def _spec(config: Config, model: str, index: int, **written: object) -> JobSpec:
    facts = models.load(config)[model]
    spec = fullsize.spec_of(facts, tiny=False, prompt=f"a red fox, {index}", **written)
    update = {"id": f"bench-{index}", "index": index + 1, "submitted_at": SUBMITTED_AT, "batch": "bench"}
    return spec.model_copy(update=update)
