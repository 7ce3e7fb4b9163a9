"""`status`: what runs, what holds the queue, how much waits and when it will be done."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

import click

from safelight.commands.client import Client, pass_client

if TYPE_CHECKING:
    from safelight.calibration import Calibration
    from safelight.config import Config
    from safelight.dues import Due
    from safelight.jobqueue import JobQueue, WorkerRow
    from safelight.jobspec import JobSpec
    from safelight.machine import Machine
    from safelight.models import Models

DAY_S = 86_400


@dataclass(frozen=True)
class Waiting:
    """What waits, and how long it takes by what jobs of its models took on this machine."""

    jobs: int
    seconds: float
    """Of those that can be estimated, one after the other."""
    unknown: int
    """Jobs of a model that has not run here yet."""


def measure(queue: JobQueue, models: Models) -> Waiting:
    """Return what waits; one job of each shape stands for all."""
    from safelight.errors import InvalidJob

    calibration = queue.calibration()
    machine = next((worker.machine for worker in queue.workers() if worker.machine), None)
    jobs, seconds, unknown = 0, 0.0, 0
    for count, one in queue.shapes(queue.waiting_ids()).values():
        jobs += count
        try:
            spec = queue.spec(one)
        except InvalidJob:
            spec = None  # somebody else wrote it; the worker will refuse it and say so
        expected = _seconds(spec, machine, models, calibration, count) if spec and machine else None
        if expected is None:
            unknown += count
        else:
            seconds += expected
    return Waiting(jobs, seconds, unknown)


def _seconds(spec: JobSpec, machine: Machine, models: Models, calibration: Calibration, waiting: int) -> float | None:
    """Return what all such jobs take; None where their model has not run here yet, or no way of running it fits."""
    from safelight import planner, rung
    from safelight.errors import InvalidJob

    if not calibration.knows(spec.model):
        return None
    try:
        around = rung.Circumstances(waiting=waiting)
        return planner.make_plan(spec, machine, models, calibration, around).seconds_of(waiting)
    except InvalidJob:
        return None


def later(queue: JobQueue, config: Config) -> dict[str, Due]:
    """Return which waiting jobs may not start now, in the order of the line."""
    from safelight import dues

    return dues.later(queue.waiting_places(), config.settings.policy.window, datetime.now().astimezone())


def later_lines(queue: JobQueue, config: Config, ids: Collection[str]) -> list[str]:
    """Return what keeps jobs from starting now that are due later, a line a reason; of `ids`, or of all where empty."""
    from safelight import display

    moments: dict[str, list[datetime]] = {}
    for job, due in later(queue, config).items():
        if not ids or job in ids:
            moments.setdefault(due.why, []).append(due.at)
    lines = []
    for why, at in moments.items():
        jobs = "1 job does" if len(at) == 1 else f"{len(at)} jobs do"
        first = display.clock(min(at), datetime.now().astimezone())
        lines.append(f"{jobs} not start before {first} ({why}).")
    return lines


def hold_lines(queue: JobQueue, config: Config) -> list[str]:
    """Return why no job starts, a line a reason; [] when nothing keeps the next one from starting."""
    from safelight import units
    from safelight.display import line

    workers = queue.workers()
    absent = [] if workers else [f"No worker is running: jobs wait. {units.remedy()}"]
    return absent + [line(f"On hold ({name}): {reason}") for name, reason in holds(queue, config, workers).items()]


def holds(queue: JobQueue, config: Config, workers: list[WorkerRow]) -> dict[str, str]:
    """Return the named reasons in force, the user's first; a worker's name stands with its own where there are several.

    A pause holds from the moment it is written, also before a worker has seen it.
    """
    found: dict[str, str] = {}
    paused = user_hold(queue, config)
    if paused is not None:
        found["user"] = paused
    for worker in workers:
        for name, reason in sorted(worker.holds.items()):
            if name != "user":
                found[name if len(workers) == 1 else f"{name}, {worker.name}"] = reason
            else:
                found.setdefault(name, reason)
    return found


def user_hold(queue: JobQueue | None, config: Config) -> str | None:
    """Return the person's reason for the pause, None when there is no pause."""
    try:
        written = json.loads(config.paths.user_hold.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return queue.user_hold() if queue else None
    except ValueError:
        return "paused.json says so, and cannot be read"
    return str(written.get("reason") or "paused") if isinstance(written, dict) else "paused"


@click.command()
@click.option("--json", "as_json", is_flag=True, help="One object.")
@pass_client
def status(client: Client, *, as_json: bool) -> None:
    """Show what runs, what waits and what holds it up; how many ended, and what the inbox has refused.

    The estimate of when the waiting jobs will be done is what jobs of the same model took on this machine, one
    after the other. There is none while the queue is on hold, or while jobs wait for the window of [policy] or their
    --not-before. Exit code 0 also while the queue is on hold,
    4 when it does not answer.
    """
    with client.queue() as queue:
        found = _standing(queue, client)
    if as_json:
        click.echo(json.dumps(found, ensure_ascii=False, indent=2))
    else:
        _print_standing(found)


def _standing(queue: JobQueue, client: Client) -> dict[str, Any]:
    workers = queue.workers()
    running = running_jobs(queue)
    waiting = measure(queue, client.models)
    due_later = later(queue, client.config)
    seconds = waiting.seconds + sum(job["seconds_left"] or 0 for job in running)
    held = holds(queue, client.config, workers)
    foreseen = bool(workers) and not held and not due_later and waiting.unknown < waiting.jobs
    done_at = datetime.now().astimezone() + timedelta(seconds=seconds / max(len(workers), 1))
    return {
        "running": running,
        "workers": [_worker(worker) for worker in workers],
        "holds": held,
        "waiting": waiting.jobs,
        "later": len(due_later),
        "later_from": min(due.at for due in due_later.values()).isoformat(timespec="seconds") if due_later else None,
        "ended": queue.counts()["ended"],
        "ended_last_day": _ended_lately(queue),
        "rejected": _rejected(client.config),
        "seconds": round(seconds, 1),
        "without_estimate": waiting.unknown,
        "done_at": done_at.isoformat(timespec="seconds") if foreseen else None,
    }


def _ended_lately(queue: JobQueue) -> dict[str, int]:
    """Return how many jobs of the last 24 hours ended how."""
    ids = queue.ended_ids(since=time.time() - DAY_S)
    return dict(sorted(Counter(row.state for row in queue.rows(ids)).items()))


def _rejected(config: Config) -> dict[str, Any] | None:
    """Return how many files the inbox has refused; None where it is closed to this user."""
    from dataclasses import asdict

    from safelight import rejections

    try:
        return asdict(rejections.look(config.paths.rejected, datetime.now().astimezone()))
    except OSError:  # `doctor` says what is wrong with the inbox
        return None


def running_jobs(queue: JobQueue) -> list[dict[str, Any]]:
    """Return what runs and how far it is: id, worker, model, kind, batch, prompt, phase, i, n, seconds_left."""
    return [_running(queue, job, worker) for job, worker in sorted(queue.running().items())]


def _running(queue: JobQueue, job: str, worker: str) -> dict[str, Any]:
    fields = queue.fields(job)
    brief = json.loads(fields.get("brief", "{}"))
    progress = json.loads(fields.get("progress", "{}"))
    return {
        "id": job,
        "worker": worker,
        **{key: brief.get(key) for key in ("model", "kind", "batch", "prompt")},
        **{key: progress.get(key) for key in ("phase", "i", "n", "seconds_left")},
    }


def _worker(worker: WorkerRow) -> dict[str, Any]:
    return {
        "name": worker.name,
        "device": worker.device,
        "gpu": worker.machine.gpu if worker.machine else "",
        "engine": worker.engine,
        "seen_s_ago": round(time.time() - worker.seen_at, 1),
        "job": worker.job,
        "holds": worker.holds,
    }


def _print_standing(found: dict[str, Any]) -> None:
    from safelight import display
    from safelight.rejections import Rejections

    for job in found["running"]:
        click.echo(f"Running   {job['id']}  {progress_text(job)}  {display.line(job['prompt'] or '')}")
    for worker in found["workers"]:
        device = " ".join(word for word in (worker["device"], worker["gpu"]) if word)
        engine = f", engine {worker['engine']}" if worker["engine"] else ""
        click.echo(f"Worker    {worker['name']} on {device}{engine}, seen {worker['seen_s_ago']:.0f} s ago")
    if not found["workers"]:
        click.echo("Worker    none is running: jobs wait")
    for name, reason in found["holds"].items():
        click.echo(f"On hold   {name}: {display.line(reason)}")
    click.echo(f"Waiting   {_waiting_text(found)}")
    if found["ended_last_day"]:
        ended = ", ".join(f"{jobs} {state}" for state, jobs in found["ended_last_day"].items())
        click.echo(f"Ended     {ended} in the last 24 hours")
    if found["rejected"] and found["rejected"]["files"]:
        click.echo(f"Rejected  {display.line(str(Rejections(**found['rejected'])))}")


def progress_text(job: dict[str, Any]) -> str:
    """Return how far a running job is, in a few words: "denoise 4/28, 12 s left"."""
    from safelight import display

    text = job.get("phase") or "starting"
    if job.get("n"):
        text += f" {job['i']}/{job['n']}"
    if job.get("seconds_left") is not None:
        text += f", {display.duration(job['seconds_left'])} left"
    return str(text)


def _waiting_text(found: dict[str, Any]) -> str:
    from safelight import display

    jobs, unknown = found["waiting"], found["without_estimate"]
    if not jobs:
        return "nothing"
    text = "1 job" if jobs == 1 else f"{jobs} jobs"
    if unknown < jobs:
        text += f", about {display.duration(found['seconds'])} of work"
    now = datetime.now().astimezone()
    if found["done_at"]:
        text += f", done about {display.clock(datetime.fromisoformat(found['done_at']), now)}"
    if found["later"]:
        which = "" if found["later"] == jobs else f"{found['later']} of them "
        text += f"; {which}not before {display.clock(datetime.fromisoformat(found['later_from']), now)}"
    if unknown:
        which = "no estimate" if unknown == jobs else f"{unknown} of them without an estimate"
        text += f"; {which}: no such model has run here yet"
    return text
