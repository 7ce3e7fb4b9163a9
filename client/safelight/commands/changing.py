"""`cancel`, `retry`, `pause`, `resume`: what changes jobs that are queued, and whether any may start."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from datetime import datetime
from typing import TYPE_CHECKING

import click

from safelight.commands.client import Client, pass_client
from safelight.commands.selecting import batch_option, has_ended, jobs_argument, one_of

if TYPE_CHECKING:
    from safelight.jobqueue import JobQueue
    from safelight.jobspec import JobSpec
    from safelight.ledger import Ledger

RETRIED = ("failed", "quarantined", "cancelled")


@click.command()
@jobs_argument()
@batch_option("All jobs of this batch that have not ended.")
@click.option("--all", "everything", is_flag=True, help="All jobs that have not ended.")
@pass_client
def cancel(client: Client, ids: tuple[str, ...], batch: str | None, *, everything: bool) -> None:
    """Cancel jobs.

    A waiting one at once, a running one at its next chance to stop, and none that is rendered and only waits to be
    published. Prints a line a job: its id and what became of it. Doing it again changes nothing. `retry` brings a job
    back.
    """
    from safelight import cancelling

    one_of(ids, batch, everything=everything, remedy="Name the jobs to cancel by ID, or use --batch, or --all.")
    with client.queue() as queue:
        chosen = _open_jobs(client, queue, ids, batch)
        ledger = client.own_ledger
        finished = [job for job in chosen if ledger and cancelling.is_finished(job, ledger)]
        answers = dict.fromkeys(chosen, "finished")
        open_ones = [job for job in chosen if job not in finished]
        answers |= zip(open_ones, queue.cancel(open_ones), strict=True)
        if ledger:
            answers |= _cancel_unheard(queue, ledger, [job for job in chosen if answers[job] == "unknown"])
            _write_down(queue, ledger)
        elif "cancelled" in answers.values():
            place = client.ledger.paths.state
            click.echo(f"Cancelled in the queue alone: {place} is not written from here. A worker does it.", err=True)
    words = {"asked": "running: asked to stop", "finished": "finished: is not cancelled, but published"}
    if answers:
        click.echo("\n".join(f"{job} {words.get(answer, answer)}" for job, answer in answers.items()))
    else:
        click.echo("Nothing to cancel: all of them have ended.", err=True)


def _open_jobs(client: Client, queue: JobQueue, ids: tuple[str, ...], batch: str | None) -> list[str]:
    from safelight.commands import selecting

    if ids:
        return selecting.resolve(ids, queue, client.ledger)
    still_open = [*queue.running(), *queue.waiting_ids()]
    if batch is None:
        return still_open
    members = set(selecting.of_batch(queue, batch))
    return [job for job in still_open if job in members]


def _cancel_unheard(queue: JobQueue, ledger: Ledger, jobs: list[str]) -> dict[str, str]:
    """Cancel accepted jobs that the queue does not know: the server lost them, and no worker has filled it yet.

    Like all others they go through the queue: a worker that fills it in this moment is of the same mind. One that runs
    is asked to stop.
    """
    from safelight import cancelling

    answers: dict[str, str] = {}
    for job in jobs:
        if receipt := ledger.receipt(job):
            answers[job] = receipt.state
        elif cancelling.is_running(job, ledger):
            queue.ask_to_stop(job)
            answers[job] = "asked"
    lost = [job for job in jobs if job not in answers]
    queue.submit(_specs(lost, ledger))
    return answers | dict(zip(lost, queue.cancel(lost), strict=True))


def _write_down(queue: JobQueue, ledger: Ledger) -> None:
    """Write the receipts of what was cancelled, now or by somebody before; a worker does it where we cannot."""
    from safelight import cancelling

    try:
        cancelling.write_down(queue, ledger)
    except OSError as error:
        fault = f"{error.filename or ledger.paths.receipts}: {error.strerror}"
        click.echo(f"Cancelled in the queue alone: {fault}. A worker writes it down once it can.", err=True)


def _specs(ids: Iterable[str], ledger: Ledger) -> Iterator[JobSpec]:
    """Yield the specs of jobs from the ledger, whose files are read once each; without those it does not know."""
    from safelight.ids import submission_of

    submission, known = "", dict[str, "JobSpec"]()
    for job in ids:
        if submission_of(job) != submission:
            submission = submission_of(job)
            known = {spec.id: spec for spec in ledger.submission(submission)}
        if spec := known.get(job) or ledger.spec(job):
            yield spec


@click.command()
@jobs_argument()
@batch_option("All jobs of this batch that failed, were quarantined or cancelled.")
@click.option("--all", "everything", is_flag=True, help="All jobs that failed, were quarantined or cancelled.")
@click.option("--state", "states", type=click.Choice(RETRIED), multiple=True, help="Only these (repeatable).")
@pass_client
def retry(
    client: Client, ids: tuple[str, ...], batch: str | None, states: tuple[str, ...], *, everything: bool
) -> None:
    """Queue failed, quarantined or cancelled jobs again.

    Same id, same seed, attempts counted anew. Prints a line a job: its id and its state now. What waits, runs or is
    done stays as it is; `rerun FILE` makes a finished one again.
    """
    from safelight.errors import BadConfig

    one_of(ids, batch, everything=everything, remedy="Name the jobs to retry by ID, or use --batch, or --all.")
    ledger = client.own_ledger
    if ledger is None:
        raise BadConfig(
            f"{client.ledger.paths.state} is not written from here, and the receipts there say that these jobs have "
            "ended. Retry them on the worker's machine, as its user; or submit them again."
        )
    told = False
    with client.queue() as queue:
        for job in _ended_jobs(client, queue, ids, batch):
            state = _state(job, queue, ledger)
            if state in (states or RETRIED):
                _retry(job, queue, ledger)
                state = "queued"
            if state in ("queued", "running") or ids:
                click.echo(f"{job} {state}")
                told = True
    if not told:
        click.echo(f"Nothing to retry: none of them is {' or '.join(states or RETRIED)}.", err=True)


def _ended_jobs(client: Client, queue: JobQueue, ids: tuple[str, ...], batch: str | None) -> list[str]:
    """Return what was named, or what has ended, oldest first."""
    from safelight.commands import selecting

    if ids:
        return selecting.resolve(ids, queue, client.ledger)
    members = set(selecting.of_batch(queue, batch)) if batch is not None else None
    return [row.id for row in queue.rows(queue.ended_ids())
            if row.state in RETRIED and (members is None or row.id in members)]  # fmt: skip


def _state(job: str, queue: JobQueue, ledger: Ledger) -> str:
    if state := queue.state(job):
        return state
    receipt = ledger.receipt(job)
    return receipt.state if receipt else "queued"


def _retry(job: str, queue: JobQueue, ledger: Ledger) -> None:
    """The receipt goes first: a job that is queued while it has one would be answered, not run."""
    from safelight.errors import SafelightError

    if has_ended(job, ledger):
        ledger.reopen(job)
    if queue.requeue(job):
        ledger.reopen_cancelled(job)  # a worker may have written in between that it was cancelled
        return
    if queue.state(job):
        return
    spec = ledger.spec(job)
    if spec is None:
        raise SafelightError(f"{job}: neither the queue nor the ledger has its spec any more. Submit it again.")
    queue.submit([spec])


@click.command()
@click.argument("reason", required=False, default="")
@pass_client
def pause(client: Client, reason: str) -> None:
    """Let no further job start until `resume`.

    What runs goes on to its end. The pause is on disk: it outlives restarts of everything. REASON is shown by
    status, list and wait.
    """
    from safelight import durable
    from safelight.errors import QueueUnreachable

    reason = reason or "paused by safelight pause"
    since = datetime.now().astimezone().isoformat(timespec="seconds")
    file = client.config.paths.user_hold
    on_disk = True
    try:
        durable.write(file, json.dumps({"reason": reason, "since": since}, ensure_ascii=False).encode() + b"\n")
    except PermissionError:
        on_disk = False
        click.echo(f"{file} cannot be written by this user: the pause is in the queue alone.", err=True)
    try:
        with client.queue() as queue:
            queue.set_user_hold(reason)
    except QueueUnreachable as away:
        if not on_disk:
            raise
        click.echo(f"{away} The pause is on disk and holds when it starts.", err=True)
    click.echo("Paused. safelight resume goes on.", err=True)


@click.command()
@pass_client
def resume(client: Client) -> None:
    """Let jobs start again after `pause`. Other holds (battery, disk, GPU ...) stay as they are."""
    from safelight import durable
    from safelight.commands.standing import hold_lines
    from safelight.errors import QueueUnreachable

    file = client.config.paths.user_hold
    if file.exists():
        file.unlink()
        durable.sync_folder(file.parent)
    try:
        with client.queue() as queue:
            queue.lift_user_hold()
            still = [text for text in hold_lines(queue, client.config) if not text.startswith("On hold (user)")]
    except QueueUnreachable as away:
        click.echo(
            f"{away} The pause is gone from disk, but a server keeps what it was told: resume again when it answers.",
            err=True,
        )
        return
    for text in ["Resumed.", *still]:
        click.echo(text, err=True)
