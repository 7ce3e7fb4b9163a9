"""A night in minutes: hundreds of jobs while everything is killed, stopped, filled and taken away; then an audit.

    python -m bench.soak [--jobs 500] [--faults random|none] [--seed 1] [--engine scripted|real] [--keep FOLDER]

Real server, inbox, worker, client, files and signals; the scripted engine draws noise, and publishes it as the real one
does. Prints a JSON line for what can happen here and one for what was found; exits 1 unless every count is 0 and no
process grows by more than 0.05 MiB a job after its first 50. Jobs, faults and their moments are drawn from the seed;
what they meet depends on the machine's load as well.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import sys
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import redis

from bench import soak_audit, soak_engine, soak_faults, soak_jobs, soak_processes
from bench.scratch import SETTINGS, Scratch, scratch
from bench.soak_faults import Faults
from bench.soak_jobs import Commands, Said, Sheet, Wish
from bench.soak_processes import Processes
from safelight import config as settings
from safelight import queueserver
from safelight.errors import QueueUnreachable
from safelight.jobqueue import JobQueue
from safelight.ledger import Ledger

SLOPE_MIB_MAX = 0.05
BACKLOG_JOBS = 30
"""Jobs that are asked for and have not ended: the next sheets wait, so that the inbox has work all night."""

LOOK_S = 0.03
ANSWER_S = 0.5
SETTLE_S = 30.0
STALLED_S = 180.0
"""Without an end for so long the soak is over: a night has stood still."""

CALM_FROM_JOBS = 200
"""A soak of as many leaves its second half without kills of what is measured: memory needs long lives."""

JOBS_A_FAULT = 3

SHOWN = 20
"""Findings of a kind that are printed in words."""

MORE = """\
[inbox]
settle_s = 0.2
partner_s = 2.0
"""
DEADLINES = "[worker.deadline_s]\nload = 8\nencode = 8\ndenoise = 8\ndecode = 8\npublish = 8\n"
"""For jobs that hang; the scripted engine alone answers that fast on a busy machine."""


@dataclass(frozen=True)
class Ground:
    """Where a soak runs, and what can happen there."""

    place: Scratch
    disks: dict[str, Path]
    """What can be filled, by the name that faults have for it."""
    disk: str
    """What kind of disk that is, "" where it is the machine's own and must not be filled."""
    left_out: dict[str, str]
    """Faults that cannot happen here, and why."""


class Soak:
    """One run: what it asks for, what happens meanwhile, and what it sees."""

    def __init__(self, ground: Ground, asked: argparse.Namespace) -> None:
        rng = random.Random(asked.seed)
        self.place = place = ground.place
        self.engine: str = asked.engine
        self.jobs: int = asked.jobs
        calm_from = self.jobs // 2 if self.jobs >= CALM_FROM_JOBS else self.jobs
        scripted = self.engine == "scripted"
        self.sheets = soak_jobs.sheets(
            self.jobs, rng, with_clips=not scripted, with_hangs=scripted, harmful_until=calm_from
        )
        self.wishes = [wish for sheet in self.sheets for wish in sheet.wishes]
        count = 0 if asked.faults == "none" else self.jobs // JOBS_A_FAULT
        due = soak_faults.schedule(count, self.jobs, calm_from, ground.left_out, rng) if count else []
        logs = place.root / "logs"
        logs.mkdir()
        self.starts = place.root / "starts"
        self.starts.touch()
        self.commands = Commands(place)
        self.processes = Processes(place, self.engine, environment(self.starts), logs)
        self.faults = Faults(due, place, self.processes, self.commands, ground.disks)
        self.ledger = Ledger(place.config.paths)
        self.line = soak_audit.Line()
        self.growth = soak_audit.Growth()
        self.stalled: list[str] = []
        """What stood still when nothing ended any more."""
        self._to_come = list(self.sheets)
        self._by_number = {wish.number: wish for wish in self.wishes}
        self._asked_for = 0
        self._queue: JobQueue | None = None
        self._wishes_by_job: dict[str, Wish] = {}

    def run(self) -> None:
        """Ask for everything, let the faults come, and return when all has ended or nothing ends any more."""
        ended, moved_at = 0, time.monotonic()
        while ended < self.jobs or self.faults.lasting or self.commands.busy:
            self.processes.tend()
            self.commands.tend()
            now_ended = len(self.ledger.ended())
            if now_ended != ended:
                if now_ended // 50 != ended // 50:
                    print(f"{now_ended} of {self.jobs} ended, {self.faults.left} faults to come", file=sys.stderr)
                ended, moved_at = now_ended, time.monotonic()
                self._weigh(ended)
            self.faults.tend(ended)
            self._ask_for_more(ended)
            self._look()
            if time.monotonic() - moved_at > STALLED_S:
                self.stalled = [f"{ended} of {self.jobs} have ended", *self.faults.state(), *self.processes.state()]
                print(f"Nothing ended for {STALLED_S:.0f} s: {self.stalled}", file=sys.stderr)
                break
            time.sleep(LOOK_S)  # the line, the ledger, a dozen processes and a clock: no one descriptor tells of all
        self.faults.end_all()

    def settle(self) -> None:
        """Start what is not running, and wait until the worker has recovered and the server has heard of every end."""
        since = time.time()
        deadline = time.monotonic() + SETTLE_S
        while time.monotonic() < deadline:
            self.processes.tend()
            try:
                counts = self._connected().counts()
                has_worker = any(worker.seen_at > since for worker in self._connected().workers())
                if has_worker and self._connected().filled() and not counts["queued"] and not counts["running"]:
                    return
            except (QueueUnreachable, redis.RedisError):
                self._queue = None
            time.sleep(LOOK_S)

    def queue(self) -> JobQueue:
        return self.place.connect()

    def _weigh(self, ended: int) -> None:
        for role in ("worker", "inbox", "engine"):
            if process := self.processes.find(role):
                self.growth.look(role, process, ended)

    def _ask_for_more(self, ended: int) -> None:
        if not self._to_come or self._asked_for - ended >= BACKLOG_JOBS:
            return
        sheet = self._to_come[0]
        if sheet.by_add:
            self._add(sheet)
        elif not soak_jobs.drop(sheet, self.place.config.paths.inbox):
            return
        self._asked_for += len(sheet.wishes)
        self._to_come.pop(0)

    def _add(self, sheet: Sheet) -> None:
        """Queue a sheet with the client, again and again while that says that nothing was queued."""

        def added(said: Said) -> None:
            if said.status:
                self._add(sheet)
                return
            for wish, job in zip(sheet.wishes, said.out.split(), strict=True):
                self._name(wish, job)

        self.commands.start(soak_jobs.add_words(sheet), added)

    def _name(self, wish: Wish, job: str) -> None:
        wish.job = job
        self._wishes_by_job[job] = wish

    def _connected(self) -> JobQueue:
        if self._queue is None:
            url = self.place.config.url
            self._queue = JobQueue(queueserver.connect(url, timeout_s=ANSWER_S, retries=0))
        return self._queue

    def _look(self) -> None:
        """See who waits and who runs, and cancel what is to be cancelled; an absent server shows nothing."""
        try:
            queue = self._connected()
            waiting = queue.waiting_ids()
            running = list(queue.running())
            new = self.line.look(waiting) + [job for job in running if job not in self._wishes_by_job]
            for row in queue.rows(new):
                self._name(self._by_number[int(row.prompt.split()[1])], row.id)
        except (QueueUnreachable, redis.RedisError):
            self._queue = None
            return
        for job in [*waiting, *running]:
            wish = self._wishes_by_job.get(job)
            # slow ones are cancelled while they run: the others are over before the client has started
            if wish and wish.cancel and not wish.cancelling and (wish.word != "slow" or job in running):
                wish.cancelling = True
                self._cancel(wish)

    def _cancel(self, wish: Wish) -> None:
        def cancelled(said: Said) -> None:
            if said.status:
                self._cancel(wish)
                return
            wish.answer = said.out.partition(" ")[2].strip()

        self.commands.start(["cancel", wish.job], cancelled)


def environment(starts: Path) -> dict[str, str]:
    """Return what the daemon's processes need to find the soak's engines."""
    folders = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    return {soak_engine.STARTS: str(starts), "PYTHONPATH": os.pathsep.join(filter(None, folders))}


def prepared(place: Scratch, engine: str) -> Ground:
    """Lay an installation out, on small disks of its own where that is possible."""
    disks = {"state": place.root / "state", "out": place.root / "out"}
    for folder in disks.values():
        folder.mkdir()
    written = SETTINGS.format(device="cpu").replace('"inbox"', '"out/inbox"').replace('"outbox"', '"out/outbox"')
    reserve = f"min_free_disk_gib = {soak_faults.RESERVE_BYTES / 2**30}"
    more = MORE + (DEADLINES if engine == "scripted" else "")
    (place.root / "safelight.toml").write_text(written.replace("min_free_disk_gib = 0", reserve) + more)
    left_out: dict[str, str] = {}
    disk, reason = soak_processes.mount_disks(list(disks.values()))
    if reason:
        left_out["fill"] = reason
    if engine == "real":
        left_out["hide"] = "the engine builds its tiny models in that folder, and maps them"
    config = settings.load(place.env)
    config.paths.inbox.mkdir(parents=True)
    if engine == "scripted":
        model = config.paths.models / "tiny-flux-schnell"
        model.mkdir(parents=True)
        (model / "model_index.json").write_text("{}\n")
    return Ground(replace(place, config=config), disks, disk, left_out)


def audited(soak: Soak) -> soak_audit.Findings:
    """Stop the daemon and compare all that it left with all that was asked of it.

    It is started once more before that: what a kill has left is cleared by the next start, and no later.
    """
    found = soak_audit.Findings()
    config = soak.place.config
    soak.settle()
    _stop(soak, found)
    soak.settle()
    states = {job: receipt.state for job in soak.ledger.ended() if (receipt := soak.ledger.receipt(job))}
    soak_audit.server(soak.queue(), states, wiped=soak.faults.struck["wipe redis"] > 0, found=found)
    _stop(soak, found)
    soak_audit.processes(config, found)
    receipts = soak_audit.files(config, soak.wishes, soak.sheets, soak.starts, found)
    soak_audit.order(config, receipts, soak.line, found)
    soak_audit.pauses(receipts, soak.faults.pauses, found)
    return found


def _stop(soak: Soak, found: soak_audit.Findings) -> None:
    for name, status in soak.processes.stop().items():
        if status:
            found.add("wrong_end", f"{name} was asked to stop and ended with {status}")


def figures(soak: Soak, found: soak_audit.Findings) -> dict[str, Any]:
    """Return every figure that has a bar."""
    measured: dict[str, Any] = {**found.counts(), "gave_up": soak.processes.gave_up, "stalled": int(bool(soak.stalled))}
    roles = ("worker", "inbox", "engine") if soak.engine == "real" else ("worker", "inbox")
    return measured | {f"rss_slope_mib_a_job_{role}": soak.growth.slope_mib(role) for role in roles}


def seen(soak: Soak, found: soak_audit.Findings) -> dict[str, Any]:
    """Return what happened, without bars."""
    states = Counter(receipt.state for job in soak.ledger.ended() if (receipt := soak.ledger.receipt(job)))
    return {
        "ends": dict(states),
        "struck": dict(sorted(soak.faults.struck.items())),
        "stalled": soak.stalled,
        "not_struck": soak.faults.left,
        "exits": dict(sorted(soak.processes.exits.items())),
        "commands": dict(sorted(soak.commands.statuses.items())),
        "found": {kind: said[:SHOWN] for kind, said in found.found.items() if said},
    }


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--jobs", type=int, default=500)
    parser.add_argument("--faults", choices=("random", "none"), default="random")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--engine", choices=("scripted", "real"), default="scripted")
    parser.add_argument("--keep", type=Path, help="copy the installation there when a bar was missed")
    return parser.parse_args()


def main() -> int:
    asked = parsed()
    began = time.monotonic()
    with scratch() as bare:
        ground = prepared(bare, asked.engine)
        soak = Soak(ground, asked)
        machine = {"cpus": os.cpu_count(), "kernel": platform.release(), "python": platform.python_version()}
        words = {name: getattr(asked, name) for name in ("jobs", "faults", "seed", "engine")}
        said = {"soak": words, "disk": ground.disk, "left_out": ground.left_out, "machine": machine}
        print(json.dumps(said), flush=True)
        try:
            soak.run()
            seconds = round(time.monotonic() - began, 1)
            found = audited(soak)
            measured, meanwhile = figures(soak, found), seen(soak, found)
            bars = {name: SLOPE_MIB_MAX if name.startswith("rss") else 0 for name in measured}
            missed = [name for name, bar in bars.items() if measured[name] is not None and measured[name] > bar]
            if missed and asked.keep:
                shutil.copytree(
                    bare.root, asked.keep, symlinks=True, ignore=shutil.ignore_patterns("*.sock", "*.ext4", "models")
                )
        finally:
            soak.processes.stop()
            soak_processes.unmount(list(ground.disks.values()))
    print(json.dumps({"seconds": seconds, "figures": measured, "bars": bars, "missed": missed, **meanwhile}))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
