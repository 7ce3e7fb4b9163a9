"""`wait` and `watch`: follow jobs until they have ended.

The queue is asked again and again, because the end of a job is a change of several keys and no message: one call
for all jobs that are still open. A server that goes away meanwhile is waited for, like everything else.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from safelight.commands.client import Client
from safelight.commands.selecting import batch_option, jobs_argument

if TYPE_CHECKING:
    from safelight.jobqueue import JobQueue

LOOK_EVERY_S = 0.2
"""A person does not notice it; a look at one job takes 0.6 ms (Valkey 9.1, 2 cores, 2026-11-22)."""

LOOK_SHARE = 0.2
"""At most this share of the time goes into looking: at 10,000 open jobs a look takes 0.18 s."""

HOLDS_EVERY_S = 2.0

AWAY_EVERY_S = 1.0

OPEN = ("queued", "running")


@dataclass(frozen=True)
class Ended:
    """One job that has ended, and what came of it: its outputs, or its error."""

    id: str
    state: str
    outputs: tuple[str, ...] = ()
    error: str = ""

    def __str__(self) -> str:
        return " ".join([self.id, self.state, *(self.outputs or ([self.error] if self.error else []))])


@dataclass(frozen=True)
class Look:
    """What one look at the queue found."""

    running: list[dict[str, Any]] = field(default_factory=list)
    ended: list[Ended] = field(default_factory=list)
    """Those that ended since the last look."""
    waiting: int = 0
    holds: list[str] = field(default_factory=list)
    """Why nothing starts, as lines; unchanged between two readings."""


class Following:
    """Follows jobs, or whatever runs; `left` are the named ones that have not ended."""

    def __init__(self, client: Client, ids: Sequence[str], *, timeout_s: float | None = None) -> None:
        self.client = client
        self.left = dict.fromkeys(ids)
        self.timed_out = False
        self._named = bool(ids)
        self._deadline = None if timeout_s is None else time.monotonic() + timeout_s
        self._holds: list[str] = []
        self._holds_at = float("-inf")
        self._ran: set[str] = set()

    def looks(self) -> Iterator[Look]:
        """Yield look after look until all named jobs have ended or the time is over."""
        from safelight.errors import QueueUnreachable

        while True:
            try:
                with self.client.queue() as queue:
                    yield from self._while_it_answers(queue)
                    return
            except QueueUnreachable as away:
                yield Look(ended=self._ended(None), holds=[f"{away} Waiting for it."])
            if self._over():
                return
            self._sleep(AWAY_EVERY_S)

    def _while_it_answers(self, queue: JobQueue) -> Iterator[Look]:
        while True:
            started = time.monotonic()
            yield self._look(queue)
            if self._over():
                return
            self._sleep(max(LOOK_EVERY_S, (time.monotonic() - started) / LOOK_SHARE))

    def _over(self) -> bool:
        if self._named and not self.left:
            return True
        self.timed_out = self._deadline is not None and time.monotonic() >= self._deadline
        return self.timed_out

    def _sleep(self, seconds: float) -> None:
        if self._deadline is not None:
            seconds = min(seconds, self._deadline - time.monotonic())
        time.sleep(max(seconds, 0))

    def _look(self, queue: JobQueue) -> Look:
        from safelight.commands.standing import hold_lines, later_lines, running_jobs

        ended = self._ended(queue) if self._named else self._gone(queue)
        running = [job for job in running_jobs(queue) if not self._named or job["id"] in self.left]
        self._ran = {job["id"] for job in running}
        if time.monotonic() - self._holds_at >= HOLDS_EVERY_S:
            held = hold_lines(queue, self.client.config)
            self._holds = held + later_lines(queue, self.client.config, self.left)
            self._holds_at = time.monotonic()
        return Look(running, ended, queue.counts()["queued"], self._holds)

    def _ended(self, queue: JobQueue | None) -> list[Ended]:
        """Return the named jobs that have ended since, and follow them no longer."""
        rows = {row.id: row for row in queue.rows(list(self.left))} if queue else {}
        found = []
        for job in self.left:
            if row := rows.get(job):
                ended = None if row.state in OPEN else self._from(job, row.state, row.outputs, row.error)
            else:
                ended = self._in_ledger(job, queue_knows_nothing=queue is not None)
            if ended:
                found.append(ended)
        for ended in found:
            del self.left[ended.id]
        return found

    def _gone(self, queue: JobQueue) -> list[Ended]:
        """Return what ran at the last look and no longer does."""
        gone = sorted(self._ran - queue.running().keys())
        return [self._from(row.id, row.state, row.outputs, row.error) for row in queue.rows(gone)]

    def _in_ledger(self, job: str, *, queue_knows_nothing: bool) -> Ended | None:
        """A job that the queue does not list has ended long ago, or waits for a worker to fill the line again."""
        ledger = self.client.ledger
        if receipt := ledger.receipt(job):
            return self._from(job, receipt.state, [output.path for output in receipt.outputs], receipt.error or "")
        if queue_knows_nothing and not ledger.knows(job):
            return Ended(job, "unknown", error="neither the queue nor the ledger knows it any more")
        return None

    def _from(self, job: str, state: str, outputs: Sequence[str], error: str) -> Ended:
        from safelight.collect import whereabouts

        return Ended(job, state, tuple(whereabouts(job, outputs, self.client.config.paths)), error)


def _begin(client: Client, ids: tuple[str, ...], batch: str | None) -> list[str]:
    """Return the jobs to follow, [] for whatever runs.

    Raises:
        QueueUnreachable: it does not answer now, and one of them has not ended by the ledger.
    """
    from safelight.commands import selecting

    if not ids and batch is None:
        with client.queue():
            return []
    if batch is not None:
        with client.queue() as queue:
            return [*selecting.resolve(ids, queue, client.ledger), *selecting.of_batch(queue, batch)]
    chosen, away = selecting.resolve_anyhow(client, ids)
    if away and not all(selecting.has_ended(job, client.ledger) for job in chosen):
        raise away
    return chosen


@click.command()
@jobs_argument()
@batch_option("All jobs of this batch.")
@click.option("--timeout", "timeout_s", type=click.FloatRange(min=0), metavar="S", help="Seconds to wait at most.")
@click.pass_context
def wait(ctx: click.Context, ids: tuple[str, ...], batch: str | None, timeout_s: float | None) -> None:
    """Wait until jobs have ended.

    \b
        safelight add "a red fox" | xargs safelight wait && echo ready

    Prints a line a job as it ends: its id, its state, and its outputs or its error. What keeps jobs from starting is
    said on stderr. Exit code 0 when all are done, 1 when one failed, was quarantined or cancelled, or time ran out.
    """
    if not ids and batch is None:
        raise click.UsageError("Name the jobs to wait for by ID, or use --batch.")
    client = ctx.find_object(Client)
    assert client is not None
    following = Following(client, _begin(client, ids, batch), timeout_s=timeout_s)
    all_done = True
    said: list[str] = []
    for look in following.looks():
        for ended in look.ended:
            all_done &= ended.state == "done"
            click.echo(_line(ended))
        if following.left and look.holds != said:
            said = look.holds
            click.echo("\n".join(said) or "Nothing holds the queue any more.", err=True)
    if following.timed_out:
        left = "1 job has" if len(following.left) == 1 else f"{len(following.left)} jobs have"
        click.echo(f"{left} not ended within {timeout_s:g} s.", err=True)
    ctx.exit(0 if all_done and not following.left else 1)


def _line(ended: Ended) -> str:
    from safelight import display

    return display.line(str(ended))


@click.command()
@jobs_argument()
@click.option("--json", "as_json", is_flag=True, help="One object a line, whenever something changes.")
@click.pass_context
def watch(ctx: click.Context, ids: tuple[str, ...], *, as_json: bool) -> None:
    """Show live what runs, step by step.

    Until Ctrl-C, or until the jobs named have ended. Where the output is no terminal it is a line whenever a job
    enters another phase or ends. With IDs the exit code is that of `wait`.
    """
    from safelight import display

    client = ctx.find_object(Client)
    assert client is not None
    following = Following(client, _begin(client, ids, None))
    if as_json:
        all_done = _watch_json(following)
    elif display.on_terminal():
        all_done = _watch_live(following, client.config.paths.previews)
    else:
        all_done = _watch_plain(following)
    ctx.exit(0 if all_done else 1)


def _watch_json(following: Following) -> bool:
    all_done = True
    said: dict[str, dict[str, Any]] = {}
    for look in following.looks():
        for job in look.running:
            if said.get(job["id"]) != job:
                said[job["id"]] = job
                click.echo(json.dumps({"state": "running", **job}, ensure_ascii=False))
        for ended in look.ended:
            all_done &= ended.state == "done"
            shown = {"id": ended.id, "state": ended.state, "outputs": ended.outputs, "error": ended.error or None}
            click.echo(json.dumps(shown, ensure_ascii=False))
    return all_done


def _watch_plain(following: Following) -> bool:
    all_done = True
    said: dict[str, Any] = {}
    held: list[str] = []
    for look in following.looks():
        for job in look.running:
            if said.get(job["id"]) != job["phase"]:
                said[job["id"]] = job["phase"]
                click.echo(f"{job['id']} {job['phase'] or 'starting'}")
        for ended in look.ended:
            all_done &= ended.state == "done"
            click.echo(_line(ended))
        if look.holds != held:
            held = look.holds
            click.echo("\n".join(held) or "Nothing holds the queue any more.", err=True)
    return all_done


def _watch_live(following: Following, folder: Path) -> bool:
    from safelight import display
    from safelight.commands.standing import progress_text

    all_done = True
    with display.LiveBoard() as board:
        for look in following.looks():
            for ended in look.ended:
                all_done &= ended.state == "done"
                board.say(_line(ended))
            bars = [(job["id"], progress_text(job), job["i"] or 0, job["n"]) for job in look.running]
            previews = [folder / f"{job['id']}.jpg" for job in look.running]
            board.show(bars, [*look.holds, f"{look.waiting} waiting"], previews)
    return all_done
