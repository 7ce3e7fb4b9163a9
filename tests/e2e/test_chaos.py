"""The promise: drop prompt files into a folder, kill anything at any time, and find every job done exactly once."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest

from safelight import queueserver
from safelight.ids import submission_of
from safelight.jobqueue import JobQueue
from safelight.receipt import Receipt
from safelightd import verify
from tests.cli_steps import runner
from tests.conftest import Installation

REPOSITORY = Path(__file__).parents[2]
SEED = int(os.environ.get("CHAOS_SEED", "20261122"))
KILLS = {"redis": 4, "inbox": 4, "worker": 4, "horse": 3, "engine": 3}
"""How often each process is killed with SIGKILL while jobs run."""

FILES = 14
JOBS = FILES * 3
OVER_S = 400


def drop(inbox: Path, name: str, text: str) -> None:
    """As an editor saves: the whole file appears at once."""
    part = inbox / f".{name}.part"
    part.write_text(text, encoding="utf-8")
    part.rename(inbox / name)


def prompts(number: int) -> str:
    """Three jobs: two pictures and, in every fourth file, a clip."""
    lines = [f"a fox number {number}", f'--prompt "a boat number {number}" --steps 2']
    lines.append(
        f'--prompt "waves number {number}" --model tiny-wan-ti2v --frames 5 --steps 3'
        if number % 4 == 0
        else f'--prompt "a lighthouse number {number}" --model tiny-flux-dev --steps 3'
    )
    return "\n".join(lines) + "\n"


class Daemon:
    """`safelight up` as a person starts it, and its family."""

    def __init__(self, installation: Installation, env: dict[str, str] | None = None) -> None:
        folders = (REPOSITORY / "client", REPOSITORY / "daemon")
        env = {**(env or installation.env), "PYTHONPATH": ":".join(map(str, folders))}
        self.log = (installation.root / "up.log").open("wb")
        self.process = subprocess.Popen([sys.executable, "-m", "safelightd.cli", "up"], env=env, stderr=self.log)

    def family(self) -> list[psutil.Process]:
        return [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]

    def find(self, role: str) -> psutil.Process | None:
        """Return the process of a role, None while there is none; a horse is a fork of the worker."""
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                words, parent = process.cmdline(), process.parent()
                if role == "redis" and words and "valkey-server" in words[0]:
                    return process
                if role == "engine" and "safelightd.engine" in words:
                    return process
                forked = parent is not None and parent.cmdline() == words
                if role == "horse" and words[-1:] == ["worker"] and forked:
                    return process
                if role in ("inbox", "worker") and words[-1:] == [role] and not forked:
                    return process
            except (psutil.NoSuchProcess, psutil.ZombieProcess):
                continue
        return None

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        status = self.process.wait(60)
        self.log.close()
        return status


def receipts(installation: Installation) -> list[Receipt]:
    found = [installation.ledger.receipt(job) for job in sorted(installation.ledger.ended())]
    return [receipt for receipt in found if receipt is not None]


@pytest.mark.timeout(OVER_S + 100)
def test_every_job_is_done_exactly_once_whatever_is_killed(installation: Installation) -> None:
    """Kills are drawn by a seeded generator at random moments; CHAOS_SEED repeats a run."""
    rng = random.Random(SEED)
    paths = installation.paths
    paths.inbox.mkdir(parents=True)
    daemon = Daemon(installation)
    order = [role for role, times in KILLS.items() for _ in range(times)]
    rng.shuffle(order)
    waiting = list(range(1, FILES + 1))
    deadline = time.monotonic() + OVER_S
    killed: Counter[str] = Counter()
    try:
        while len(done := installation.ledger.ended()) < JOBS:
            assert time.monotonic() < deadline, f"{len(done)} of {JOBS} after {OVER_S} s; killed {dict(killed)}"
            if waiting and rng.random() < 0.6:
                number = waiting.pop(0)
                drop(paths.inbox, f"night-{number:02d}.txt", prompts(number))
            if order and (victim := daemon.find(order[0])) and _may_kill(installation, order[0]):
                victim.kill()
                killed[order.pop(0)] += 1
            time.sleep(rng.uniform(0.2, 2.0))  # the moment of the next kill is what is random here
        family = daemon.family()
        assert daemon.stop() == 0
        _, alive = psutil.wait_procs(family, timeout=10)
    finally:
        if daemon.process.poll() is None:
            daemon.process.kill()

    assert order == [], "every planned kill happened while jobs were left"
    assert alive == [], "no process is left behind"
    _check_outputs(installation)
    _check_order(installation)


def _may_kill(installation: Installation, role: str) -> bool:
    """Three crashes of one job would rightly quarantine it: spare the engine of a job that has two."""
    if role != "engine":
        return True
    return all(attempts.crashes < 2 for attempts in installation.ledger.interrupted())


def _check_outputs(installation: Installation) -> None:
    """Every job has one receipt, every receipt its verified file, and nothing else lies in the outbox."""
    ended = receipts(installation)
    paths = installation.paths

    assert Counter(receipt.state for receipt in ended) == {"done": JOBS}
    assert len({receipt.spec.prompt for receipt in ended}) == JOBS

    published = [output for receipt in ended for output in receipt.outputs]
    assert len({output.path for output in published}) == JOBS
    for receipt in ended:
        for output in receipt.outputs:
            file = paths.outbox / output.path
            assert hashlib.sha256(file.read_bytes()).hexdigest() == output.sha256
            verify.output(file, receipt.spec)
            assert json.loads(file.with_suffix(".json").read_text())["id"] == receipt.id
    there = {file.relative_to(paths.outbox) for file in paths.outbox.rglob("*") if file.is_file()}
    there = {file for file in there if file.parts[0] != "latest"}
    expected = {Path(output.path) for output in published} | {Path(o.path).with_suffix(".json") for o in published}
    expected |= {Path(output.poster.path) for output in published if output.poster}
    assert there == expected, "no half file, no second copy"
    left = [file for folder in (paths.claimed, paths.publishing, paths.attempts) for file in folder.glob("*")]
    assert left == []
    assert sorted(paths.inbox.glob("*.txt")) == []
    assert sorted(paths.rejected.rglob("*")) == []


def _check_order(installation: Installation) -> None:
    """Within a submission jobs finished in their order; submissions in theirs, but for those that came meanwhile."""
    ended = receipts(installation)
    by_submission: dict[str, list[Receipt]] = {}
    for receipt in ended:
        by_submission.setdefault(submission_of(receipt.id), []).append(receipt)
    for group in by_submission.values():
        finished = sorted(group, key=lambda receipt: receipt.finished_at)
        assert [r.spec.index for r in finished] == sorted(r.spec.index for r in group)


def test_a_wiped_queue_and_a_stopped_daemon_lose_nothing(installation: Installation) -> None:
    """Everything is stopped and the server's data deleted: the next start goes on from the ledger."""
    paths = installation.paths
    paths.inbox.mkdir(parents=True)
    daemon = Daemon(installation)
    try:
        drop(paths.inbox, "night.txt", "one\ntwo\nthree\nfour\n")
        deadline = time.monotonic() + 90
        while not installation.ledger.ended():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert daemon.stop() == 0
        for file in sorted(paths.redis.rglob("*"), reverse=True):
            if file.is_file():
                file.unlink()
        daemon = Daemon(installation)
        while len(installation.ledger.ended()) < 4:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        queue = JobQueue(queueserver.connect(installation.config.url))
        rows = list(queue.rows(queue.ended_ids()))
    finally:
        daemon.stop()

    assert sorted((row.prompt, row.state) for row in rows) == [
        ("four", "done"), ("one", "done"), ("three", "done"), ("two", "done"),
    ]  # fmt: skip
    assert len([file for file in paths.outbox.rglob("*.png") if "latest" not in file.parts]) == 4


def test_a_damaged_queue_goes_on_from_the_ledger_with_the_persons_pause_and_renders_nothing_twice(
    installation: Installation,
) -> None:
    paths = installation.paths
    paths.inbox.mkdir(parents=True)
    safelight = runner(installation)
    daemon = Daemon(installation)
    try:
        drop(paths.inbox, "night.txt", "one\ntwo\nthree\nfour\n")
        deadline = time.monotonic() + 120
        while not installation.ledger.ended():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        safelight("pause", "dinner")
        assert daemon.stop() == 0
        done_before = set(installation.ledger.ended())
        (file,) = (paths.redis / "appendonlydir").glob("*.incr.aof")
        content = bytearray(file.read_bytes())
        content[len(content) // 3 : len(content) // 3 + 200] = b"\xff" * 200
        file.write_bytes(content)
        daemon = Daemon(installation)
        while "dinner" not in safelight("status").stdout:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        still = set(installation.ledger.ended())
        safelight("resume")
        while len(installation.ledger.ended()) < 4:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        ended = receipts(installation)
    finally:
        daemon.stop()

    assert still == done_before
    assert sorted(receipt.spec.prompt for receipt in ended) == ["four", "one", "three", "two"]
    assert all(receipt.state == "done" for receipt in ended)
    assert len([file for file in paths.outbox.rglob("*.png") if "latest" not in file.parts]) == 4
    assert len(list(paths.redis.glob("damaged-*"))) == 1
