"""What is true after a soak: files, ledger and server, each compared with what was asked for."""

from __future__ import annotations

import hashlib
import json
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import psutil

from bench.soak_jobs import Sheet, Wish
from safelight.config import Config
from safelight.errors import LedgerDamaged
from safelight.jobqueue import JobQueue
from safelight.jobspec import JobSpec
from safelight.ledger import Ledger
from safelight.place import Place
from safelight.receipt import Receipt
from safelightd import verify

SETTLING_JOBS = 50
"""Of a process's life, whose growth is not counted: imports, caches, pools."""

TICK_NS = 20_000_000
"""Times of files are those of the kernel's last tick, up to 10 ms ago; a job that runs again is later."""

SLOPE_JOBS_MIN = 50
"""A line through fewer jobs says nothing of a process's growth."""

COUNTS = (
    "lost", "duplicated", "out_of_order", "overtaken", "half_written", "wrong_end", "server_disagrees",
    "started_in_pause", "leaked",
)  # fmt: skip


@dataclass
class Findings:
    """What is wrong, by kind, each in words."""

    found: dict[str, list[str]] = field(default_factory=lambda: {name: [] for name in COUNTS})

    def add(self, kind: str, what: str) -> None:
        self.found[kind].append(what)

    def counts(self) -> dict[str, int]:
        return {kind: len(said) for kind, said in self.found.items()}


class Line:
    """Remembers between which looks at the waiting line each job stood in it."""

    def __init__(self) -> None:
        self._looks = 0
        self._first: dict[str, int] = {}
        self._last: dict[str, int] = {}

    def look(self, waiting: Iterable[str]) -> list[str]:
        """Note one look at the whole line; return the ids that had not been seen."""
        self._looks += 1
        new = []
        for job in waiting:
            if job not in self._first:
                self._first[job] = self._looks
                new.append(job)
            self._last[job] = self._looks
        return new

    def stood_together(self, first: str, second: str) -> bool:
        """Whether `second` was still waiting at a look after that which first saw `first`: whose turn came before.

        One look alone may fall between a worker's choice of `second` and its taking it, with `first` new in the line.
        """
        return first in self._first and second in self._last and self._first[first] < self._last[second]


class Growth:
    """Remembers the memory of processes, and says how much it grew with each job."""

    def __init__(self) -> None:
        self._lives: dict[str, dict[int, list[tuple[int, int]]]] = {}

    def look(self, role: str, process: psutil.Process, ended: int) -> None:
        """Note a process's memory after so many jobs have ended, once for each number of them."""
        try:
            held_bytes = process.memory_info().rss
        except psutil.Error:
            return
        life = self._lives.setdefault(role, {}).setdefault(process.pid, [])
        if not life or life[-1][0] != ended:
            life.append((ended, held_bytes))

    def slope_mib(self, role: str) -> float | None:
        """Return the growth a job of the role's longest life after its first SETTLING_JOBS; None where it was short."""
        lives = self._lives.get(role, {}).values()
        life = max(lives, key=lambda looks: looks[-1][0] - looks[0][0], default=[])
        settled = [(jobs, held) for jobs, held in life if jobs >= life[0][0] + SETTLING_JOBS]
        if not settled or settled[-1][0] - settled[0][0] < SLOPE_JOBS_MIN:
            return None
        jobs, held = zip(*settled, strict=True)
        return round(statistics.linear_regression(jobs, held).slope / 2**20, 4)


def files(
    config: Config, wishes: Sequence[Wish], sheets: Sequence[Sheet], starts: Path, found: Findings
) -> list[Receipt]:
    """Compare ledger, outbox and inbox with what was asked for; return the receipts."""
    ledger = Ledger(config.paths)
    accepted = _accepted(ledger, found)
    receipts = _receipts(ledger, found)
    _check_jobs(wishes, accepted, receipts, found)
    _check_outputs(config, receipts, found)
    _check_leftovers(config, found)
    _check_inbox(config, sheets, found)
    _check_starts(config, receipts, starts, found)
    return receipts


def _accepted(ledger: Ledger, found: Findings) -> list[JobSpec]:
    folders = (ledger.paths.jobs, ledger.paths.jobs / "closed")
    names = [file.stem for folder in folders if folder.is_dir() for file in sorted(folder.glob("[!.]*.jsonl"))]
    for name, times in Counter(names).items():
        if times > 1:
            found.add("duplicated", f"submission {name} is open and closed")
    specs: list[JobSpec] = []
    for name in sorted(set(names)):
        try:
            specs += ledger.submission(name)
        except LedgerDamaged as damaged:
            found.add("half_written", str(damaged))
    return specs


def _receipts(ledger: Ledger, found: Findings) -> list[Receipt]:
    receipts = []
    for job in sorted(ledger.ended()):
        try:
            receipt = ledger.receipt(job)
        except LedgerDamaged as damaged:
            found.add("half_written", str(damaged))
            continue
        if receipt:
            receipts.append(receipt)
    return receipts


def _check_jobs(
    wishes: Sequence[Wish], accepted: Sequence[JobSpec], receipts: Sequence[Receipt], found: Findings
) -> None:
    """Each wish became one job, and each job has one end, the one that was meant."""
    jobs: dict[str, list[str]] = {}
    for spec in accepted:
        jobs.setdefault(spec.prompt, []).append(spec.id)
    ended = {receipt.id: receipt for receipt in receipts}
    for wish in wishes:
        ids = jobs.pop(wish.prompt, [])
        if not ids:
            found.add("lost", f"{wish.prompt}: never accepted")
        if len(ids) > 1:
            found.add("duplicated", f"{wish.prompt}: accepted as {', '.join(ids)}")
        for job in ids:
            receipt = ended.pop(job, None)
            if receipt is None:
                found.add("lost", f"{job} ({wish.prompt}): no receipt")
            elif receipt.state not in wish.ends():
                meant = " or ".join(sorted(wish.ends()))
                found.add("wrong_end", f"{job} ({wish.prompt}): {receipt.state}, not {meant}: {receipt.error}")
    for prompt, ids in jobs.items():
        found.add("duplicated", f"{', '.join(ids)} ({prompt}): nobody asked for it")
    for job in ended:
        found.add("duplicated", f"{job}: a receipt of what was never accepted")


def _check_outputs(config: Config, receipts: Sequence[Receipt], found: Findings) -> None:
    """Each job that is done has its one file, whole, and its sidecar; no other has any; nothing else lies there."""
    outbox = config.paths.outbox
    expected: dict[Path, str] = {}
    for receipt in receipts:
        if len(receipt.outputs) != (receipt.state == "done"):
            found.add("wrong_end", f"{receipt.id}: {receipt.state} with {len(receipt.outputs)} outputs")
        for output in receipt.outputs:
            file = outbox / output.path
            for path in (file, file.with_suffix(".json")):
                if other := expected.get(path):
                    found.add("duplicated", f"{path.name}: of {other} and of {receipt.id}")
                expected[path] = receipt.id
            if output.poster:
                expected[outbox / output.poster.path] = receipt.id
            _check_output(file, output.sha256, receipt, found)
    there = {path for path in outbox.rglob("*") if path.is_file() and "latest" not in path.relative_to(outbox).parts}
    for path in sorted(there - set(expected)):
        kind = "half_written" if config.paths.unfinished in path.parents else "duplicated"
        found.add(kind, f"{path.relative_to(outbox)}: no receipt knows it")


def _check_output(file: Path, sha256: str, receipt: Receipt, found: Findings) -> None:
    if not file.is_file():
        found.add("lost", f"{receipt.id}: {file.name} is not there")
        return
    if hashlib.sha256(file.read_bytes()).hexdigest() != sha256:
        found.add("half_written", f"{receipt.id}: {file.name} is not what its receipt says")
        return
    try:
        verify.output(file, receipt.spec)
    except verify.Refused as refused:
        found.add("half_written", f"{receipt.id}: {file.name}: {refused}")
    sidecar = file.with_suffix(".json")
    if not sidecar.is_file():
        found.add("lost", f"{receipt.id}: no {sidecar.name}")
    elif json.loads(sidecar.read_bytes()) != json.loads(receipt.model_dump_json(exclude_none=True)):
        found.add("half_written", f"{receipt.id}: {sidecar.name} is not the receipt")


def _check_leftovers(config: Config, found: Findings) -> None:
    """Nothing is on its way any more."""
    paths = config.paths
    for folder in (paths.unfinished, paths.publishing, paths.attempts, paths.claimed):
        for path in sorted(folder.glob("*")) if folder.is_dir() else []:
            found.add("half_written", f"{path.relative_to(paths.state.parent.parent)} is left")
    for top in (paths.state, paths.outbox, paths.inbox):
        for path in sorted(top.rglob("*.part")):
            if path.parent not in (paths.unfinished, paths.publishing, paths.attempts, paths.claimed):
                found.add("half_written", f"{path} is left")


def _check_inbox(config: Config, sheets: Sequence[Sheet], found: Findings) -> None:
    """What could be read was taken, what could not was refused with a reason, and nothing is left."""
    inbox, rejected = config.paths.inbox, config.paths.rejected
    for path in sorted(inbox.rglob("*sheet-*.txt")):
        if config.paths.accepted not in path.parents and rejected not in path.parents:
            found.add("lost", f"{path.relative_to(inbox)} was never taken")
    reasons = list(rejected.glob("*.error.txt"))
    refused = Counter(path.name.rpartition("~")[2] for path in rejected.glob("*") if path not in reasons)
    meant = Counter(sheet.name for sheet in sheets if sheet.is_broken)
    for name in (refused - meant).elements():
        found.add("wrong_end", f"{name} was refused")
    for name in (meant - refused).elements():
        found.add("wrong_end", f"{name} was not refused")
    if len(reasons) != refused.total():
        found.add("wrong_end", f"{refused.total()} refused files have {len(reasons)} reasons")


def _check_starts(config: Config, receipts: Sequence[Receipt], starts: Path, found: Findings) -> None:
    """No job was rendered again once it had ended: a done one has when its receipt-to-be was written."""
    ended_ns = {r.id: (config.paths.receipts / f"{r.id}.json").stat().st_mtime_ns for r in receipts}
    for line in starts.read_text(encoding="ascii").splitlines():
        moment, job = line.split()
        if int(moment) > ended_ns.get(job, int(moment)) + TICK_NS:
            found.add("duplicated", f"{job} was rendered again after its end")


def order(config: Config, receipts: Sequence[Receipt], line: Line, found: Findings) -> None:
    """Of two jobs that waited together, the one whose turn was first ended first, unless it came back or was cancelled.

    `finished_at` is too coarse for this, and older than the end of a job that died while it published: a file's ctime
    is that of the rename which made it the receipt.
    """
    ended = sorted(receipts, key=lambda r: (config.paths.receipts / f"{r.id}.json").stat().st_ctime_ns)
    places = {receipt.id: Place.of(receipt.spec) for receipt in ended}
    ran: list[Receipt] = []
    for late in ended:
        if late.state == "cancelled":
            continue
        if late.attempts == 1:
            before = [r for r in ran if places[late.id] < places[r.id] and line.stood_together(late.id, r.id)]
            for kind, is_same in (("out_of_order", True), ("overtaken", False)):
                early = [r.id for r in before if (r.spec.priority == late.spec.priority) == is_same]
                if early:
                    found.add(kind, f"{late.id} ended after {', '.join(early[:3])}")
        ran.append(late)


def pauses(receipts: Sequence[Receipt], paused: Sequence[tuple[float, float]], found: Findings) -> None:
    """While the user's hold was in force nothing started, but for one job that was under way to the engine."""
    for since, until in paused:
        started = [
            receipt.id
            for receipt in receipts
            if receipt.started_at and since < datetime.fromisoformat(receipt.started_at).timestamp() < until
        ]
        for job in sorted(started)[1:]:
            found.add("started_in_pause", job)


def server(queue: JobQueue, receipts: Mapping[str, str], *, wiped: bool, found: Findings) -> None:
    """Compare what the server says with the ledger; one that was wiped need not list what ended before.

    Args:
        receipts: id -> state.
    """
    for job in queue.waiting_ids():
        found.add("server_disagrees", f"{job} still waits")
    for job in queue.running():
        found.add("server_disagrees", f"{job} still runs")
    known = {row.id: row.state for row in queue.rows([*receipts, *queue.ended_ids()])}
    for job, state in known.items():
        if receipts.get(job) != state:
            found.add("server_disagrees", f"{job} is {state}, its receipt says {receipts.get(job)}")
    for job in receipts.keys() - known.keys():
        if not wiped:
            found.add("server_disagrees", f"{job} is not known")


def processes(config: Config, found: Findings) -> None:
    """No process that was started with these settings is left."""
    own = psutil.Process().pid
    left = [process for process in psutil.process_iter() if process.pid != own and _is_ours(process, config)]
    _, alive = psutil.wait_procs(left, timeout=10)
    for process in alive:
        found.add("leaked", f"{process.pid} {' '.join(process.cmdline())[:120]}")


def _is_ours(process: psutil.Process, config: Config) -> bool:
    try:
        return process.environ().get("SAFELIGHT_CONFIG") == str(config.source)
    except psutil.Error:
        return False
