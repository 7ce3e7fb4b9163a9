"""`list` and `show`: what is queued, runs and has ended."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from safelight.commands.client import Client, pass_client
from safelight.commands.selecting import batch_option

if TYPE_CHECKING:
    from safelight.dues import Due
    from safelight.errors import Fault
    from safelight.jobqueue import JobQueue, Row
    from safelight.jobspec import JobSpec
    from safelight.paths import Paths
    from safelight.receipt import Receipt

STATES = ("queued", "running", "done", "failed", "quarantined", "cancelled")

BROKEN = ("failed", "quarantined")

ROWS_SHOWN = 50

OBJECTS_A_WRITE = 1_000

PEAKS = (("device_peak_bytes", "on the GPU"), ("host_peak_bytes", "of RAM"))


@click.command("list")
@click.option("--state", type=click.Choice(STATES), help="Only jobs in this state.")
@batch_option("Only jobs of this batch.")
@click.option("--tag", metavar="WORD", help="Only jobs that have this among their --tags.")
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    metavar="N",
    default=ROWS_SHOWN,
    show_default=True,
    help="Rows of the table.",
)
@click.option("--all", "everything", is_flag=True, help="The whole table.")
@click.option("--json", "as_json", is_flag=True, help="All jobs as an array of objects, whatever --limit says.")
@pass_client
def list_jobs(
    client: Client, state: str | None, batch: str | None, tag: str | None, limit: int,
    *, everything: bool, as_json: bool,
) -> None:  # fmt: skip
    """Show all jobs, or some.

    \b
        safelight list
        safelight list --state failed
        safelight list --json | jq -r '.[] | select(.state == "done") | .outputs[]'

    First what runs, then what waits in order, then what ended, newest first.

    The objects of --json have id, state, model, kind, batch, tags, attempts, outputs (absolute paths, of what was
    moved by `collect` the new ones), error, and the beginning of the prompt. Jobs that ended longer ago than [queue]
    keep_days are no longer listed; `show` still knows them.
    """
    from safelight.commands.standing import hold_lines, later

    with client.queue() as queue:
        ids = _selected(queue, state, batch)
        if tag is not None:
            ids = [row.id for row in queue.rows(ids) if tag in row.tags]
        if as_json:
            _print_json(queue, ids, state, client.config.paths)
            return
        shown, left = _rows(queue, ids, state, None if everything else limit)
        _print_table(shown, later(queue, client.config))
        if left:
            click.echo(f"... and {left} more: --all, or --limit N.", err=True)
        for text in hold_lines(queue, client.config):
            click.echo(text, err=True)


def _selected(queue: JobQueue, state: str | None, batch: str | None) -> list[str]:
    """Return the ids in listing order, narrowed as far as the queue's own lists can."""
    from safelight.commands.selecting import in_order, of_batch

    if batch is not None:
        return of_batch(queue, batch)
    if state == "queued":
        return queue.waiting_ids()
    if state == "running":
        return list(queue.running())
    if state is not None:
        return list(reversed(queue.ended_ids()))
    return in_order(queue)


def _rows(queue: JobQueue, ids: list[str], state: str | None, limit: int | None) -> tuple[list[Row], int]:
    """Return the first rows and how many more there are."""
    if state is None:
        shown = list(islice(queue.rows(ids if limit is None else ids[:limit]), limit))
        return shown, len(ids) - len(shown)
    fitting = [row for row in queue.rows(ids) if row.state == state]
    return fitting[:limit], len(fitting[limit:]) if limit else 0


def _print_table(rows: list[Row], due_later: Mapping[str, Due]) -> None:
    from safelight import display

    if not rows:
        click.echo("No jobs.")
        return
    cells = [[row.id, row.state, row.model, row.batch, _said_of(row, due_later.get(row.id))] for row in rows]
    broken = {number for number, row in enumerate(rows) if row.state in BROKEN}
    display.columns(["ID", "STATE", "MODEL", "BATCH", "PROMPT OR ERROR"], cells, styled=1, cut=(2, 3), wrapped=broken)


def _said_of(row: Row, due: Due | None) -> str:
    from safelight import display

    if row.state in BROKEN:
        return row.error
    if due is None or not display.on_terminal():  # what a script reads stays as it was
        return row.prompt
    return f"(from {display.clock(due.at, datetime.now().astimezone())}) {row.prompt}"


def _print_json(queue: JobQueue, ids: list[str], state: str | None, paths: Paths) -> None:
    """Print an array, one object a line, as the queue hands them out: 100,000 jobs are never all in memory."""
    from safelight.collect import whereabouts

    objects = queue.objects(ids, partial(whereabouts, paths=paths), state=state)
    click.echo("[" + next(objects, ""), nl=False)
    while some := list(islice(objects, OBJECTS_A_WRITE)):
        click.echo(",\n" + ",\n".join(some), nl=False)
    click.echo("]")


@click.command()
@click.argument("job", metavar="ID|FILE")
@click.option("--json", "as_json", is_flag=True, help="One object, with the whole spec and receipt.")
@pass_client
def show(client: Client, job: str, *, as_json: bool) -> None:
    """Show one job, or what made a file.

    \b
        safelight show 20261122-2131
        safelight show ~/Pictures/0001_a-red-fox_s7.png

    An ID may be shortened to any part of it that fits one job only. What the queue no longer lists, or while it does
    not answer, comes from the ledger on disk.
    """
    file = Path(job).expanduser()
    found = _of_file(client, file) if file.is_file() else _of_id(client, job)
    if as_json:
        click.echo(json.dumps(found, ensure_ascii=False, indent=2))
        return
    _print_job(found, client.config.paths.receipts)


def _of_file(client: Client, file: Path) -> dict[str, Any]:
    """Return the job that a file was made by: its own metadata, and the receipt where this ledger has it."""
    from safelight import embedded
    from safelight.ids import is_id

    inside = embedded.read(file)
    receipt = client.ledger.receipt(inside.id) if is_id(inside.id) else None
    found = _object(inside.id, inside.spec, receipt, client.config.paths)
    return {**found, "state": found["state"] if receipt else "done", "outputs": [str(file.absolute())]}


def _of_id(client: Client, written: str) -> dict[str, Any]:
    from safelight.commands.selecting import resolve_anyhow
    from safelight.errors import InvalidJob

    (job,), away = resolve_anyhow(client, [written])
    fields: dict[str, str] = {}
    if away:
        click.echo(f"{away} This is from the ledger.", err=True)
    else:
        with client.queue() as queue:
            fields = queue.fields(job)
    receipt = client.ledger.receipt(job)
    spec = receipt.spec if receipt else _spec(fields) or client.ledger.spec(job)
    if spec is None:
        raise InvalidJob([_forgotten(job)])
    found = _object(job, spec, receipt, client.config.paths)
    return found if receipt else _with_queue(found, fields, client.config.paths)


def _spec(fields: dict[str, str]) -> JobSpec | None:
    from safelight.jobspec import JobSpec

    return JobSpec.model_validate(json.loads(fields["spec"]), strict=False) if "spec" in fields else None


def _forgotten(job: str) -> Fault:
    from safelight.errors import Fault

    return Fault(job, "neither the queue nor the ledger says what it was", "safelight list shows what is known.")


def _object(job: str, spec: JobSpec, receipt: Receipt | None, paths: Paths) -> dict[str, Any]:
    """Return what scripts get of one job; an accepted job that the queue does not list waits for the worker's start."""
    from safelight.collect import whereabouts

    outputs = [output.path for output in receipt.outputs] if receipt else []
    return {
        "id": job,
        "state": receipt.state if receipt else "queued",
        "model": spec.model,
        "kind": spec.kind,
        "batch": spec.batch,
        "attempts": receipt.attempts if receipt else 0,
        "outputs": whereabouts(job, outputs, paths),
        "receipt": receipt.model_dump(mode="json") if receipt else None,
        "error": receipt.error if receipt else None,
        "progress": None,
        "spec": spec.model_dump(mode="json"),
    }


def _with_queue(found: dict[str, Any], fields: dict[str, str], paths: Paths) -> dict[str, Any]:
    """Return the job as the queue sees it: the ledger has no receipt of it."""
    from safelight.collect import whereabouts

    if not fields:
        return found
    return {
        **found,
        "state": fields["state"],
        "attempts": int(fields.get("attempts", 0)),
        "outputs": whereabouts(found["id"], json.loads(fields.get("outputs", "[]")), paths),
        "error": fields.get("error") or None,
        "progress": json.loads(fields["progress"]) if "progress" in fields else None,
    }


def _print_job(found: dict[str, Any], receipts: Path) -> None:
    from safelight import display

    spec, receipt = found["spec"], found["receipt"]
    lines = [
        ("job", found["id"]),
        ("state", _state(found)),
        ("model", f"{found['model']}, {_size(spec)}, {spec['num_inference_steps']} steps, seed {spec['seed']}"),
        ("batch", f"{found['batch']}, job {spec['index']}, priority {spec['priority']}"),
        ("tags", ", ".join(spec["tags"])),
        ("prompt", spec["prompt"]),
        ("template", spec["template"]),
        ("negative", spec["negative_prompt"]),
        ("submitted", spec["submitted_at"]),
        ("not before", spec["not_before"]),
        *(("output", path) for path in found["outputs"]),
        ("error", found["error"]),
    ]
    if receipt:
        lines += [
            *(("ran out", _overrun(overrun)) for overrun in receipt["overruns"]),
            ("began anew", receipt["began_anew"]),
            ("ran on", _rung(receipt["plan"])),
            *((phase, _phase(record)) for phase, record in receipt["phases"].items()),
            ("receipt", str(receipts / f"{found['id']}.json")),
        ]
    for head, text in lines:
        if text:
            click.echo(f"{head:<11} {display.line(text)}")


def _state(found: dict[str, Any]) -> str:
    attempts = found["attempts"]
    text = str(found["state"]) + (f", attempt {attempts}" if attempts > 1 else "")
    progress = found["progress"] or {}
    if "phase" in progress:
        text += f", {progress['phase']}" + (f" {progress['i']}/{progress['n']}" if "i" in progress else "")
    return text


def _size(spec: dict[str, Any]) -> str:
    frames = f", {spec['num_frames']} frames" if spec["num_frames"] else ""
    return f"{spec['width']}x{spec['height']}{frames}"


def _rung(plan: dict[str, Any] | None) -> str | None:
    from safelight.plan import Plan

    return Plan.model_validate(plan, strict=False).rung if plan else None


def _overrun(overrun: dict[str, Any]) -> str:
    """Return what a plan ran out of: "of GPU memory in denoise, on fp8-dynamic, offload none (13.1 GiB predicted)"."""
    from safelight import display

    memory = {"device": "GPU memory", "host": "RAM"}[overrun["memory"]]
    expected = f"{display.gib(overrun['predicted_bytes'])} predicted"
    reached = f", {display.gib(overrun['reached_bytes'])} reached" if overrun["reached_bytes"] else ""
    return f"of {memory} in {overrun['phase']}, on {overrun['rung']} ({expected}{reached})"


def _phase(record: dict[str, Any]) -> str:
    from safelight import display

    peaks = [f"{display.gib(record[key])} {where}" for key, where in PEAKS if record[key]]
    return ", ".join([display.duration(record["seconds"]), *peaks])
