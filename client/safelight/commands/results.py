"""`collect`, `prune` and `rerun`: what to do with finished pictures and clips."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from datetime import date, datetime
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from safelight.commands.adding import DRY_RUN, JSON, hand_over
from safelight.commands.client import Client, pass_client
from safelight.commands.selecting import batch_option, jobs_argument

if TYPE_CHECKING:
    from safelight.collect import Copied
    from safelight.embedded import Embedded
    from safelight.errors import Fault
    from safelight.jobspec import JobSpec
    from safelight.lora import Lora
    from safelight.plan import Plan
    from safelight.receipt import Receipt

_SEED = re.compile(r"(\+?)(\d{1,10})")
_DIGEST = re.compile(r"[0-9a-f]{64}")


@click.command()
@jobs_argument()
@batch_option("All of this batch.")
@click.option("--date", "day", metavar="DATE", help="All of this folder of the outbox, such as 2026-11-22.")
@click.option("--all", "everything", is_flag=True, help="All that is done.")
@click.option("--to", "target", type=click.Path(path_type=Path), required=True, metavar="FOLDER", help="Where to.")
@click.option("--move", is_flag=True, help="Take the files out of the outbox.")
@pass_client
@click.pass_context
def collect(
    ctx: click.Context, client: Client, ids: tuple[str, ...], batch: str | None, day: str | None, target: Path,
    *, everything: bool, move: bool,
) -> None:  # fmt: skip
    """Copy finished pictures and clips to a folder.

    They go to FOLDER/<batch>/, with the records beside them. Each copy is compared with what was published. Doing
    it again copies what is new; nothing is ever overwritten. Prints the path of each file that lies in FOLDER now, and
    on stderr where those went that were collected before and are no longer in the outbox. Exit code 1 when a named job
    has nothing to collect, or a file in the outbox is not what was published.
    """
    from safelight import collect as collecting

    if sum((bool(ids), batch is not None, day is not None, everything)) != 1:
        raise click.UsageError("Say what to collect: IDs, or --batch, or --date, or --all: one of them.")
    damaged: list[str] = []
    receipts = list(_named(client, ids) if ids else _done(client, batch, _day(day), damaged))
    for problem in damaged:
        click.echo(problem, err=True)
    if not receipts:
        if batch is not None and not damaged:
            _refuse_unknown(client, batch)
        click.echo("Nothing is done that fits.", err=True)
        ctx.exit(1 if ids or damaged else 0)
    folder = target.expanduser().absolute()
    copied = collecting.collect(receipts, client.config.paths.outbox, folder, move=move)
    _note(client, copied)
    counts = Counter[str](one.outcome for one in copied)
    before = _taken_before(client, copied)
    for one in copied:
        if one.target:
            click.echo(str(one.target))
        elif taken := before.get(one.source):
            click.echo(f"{one.source} was collected before, to {taken} (job {one.id}).", err=True)
        else:
            why = "is no longer in the outbox" if one.outcome == "missing" else "is not what was published"
            click.echo(f"{one.source} {why} (job {one.id}).", err=True)
    incomplete = ids and (counts["missing"] or len(receipts) < len(ids))
    counts += Counter({"collected before": len(before), "missing": -len(before)})
    click.echo(", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items())) + ".", err=True)
    ctx.exit(1 if counts["changed"] or incomplete or damaged else 0)


def _refuse_unknown(client: Client, batch: str) -> None:
    """Refuse a batch that neither the queue nor the ledger has a job of.

    Raises:
        InvalidJob: as said.
    """
    from safelight.commands.selecting import no_such_batch
    from safelight.errors import LedgerDamaged, QueueUnreachable

    with suppress(QueueUnreachable), client.queue(retries=0) as queue:
        if queue.batch_ids(batch):
            return
    open_ones = (spec for one in client.ledger.open_submissions() for spec in client.ledger.submission(one))
    ended = (receipt.spec for job in client.ledger.ended() if (receipt := client.ledger.receipt(job)))
    with suppress(LedgerDamaged):  # of a file that nobody can read, nobody knows the batch
        if not any(spec.batch == batch for spec in chain(open_ones, ended)):
            raise no_such_batch(batch)


def _taken_before(client: Client, copied: list[Copied]) -> dict[Path, str]:
    """Return where what is missing was taken before, by where it lay in the outbox."""
    from safelight import collect as collecting

    by_job: dict[str, list[Copied]] = {}
    for one in copied:
        by_job.setdefault(one.id, []).append(one)
    found: dict[Path, str] = {}
    for job, outputs in by_job.items():
        if any(one.outcome == "missing" for one in outputs):
            taken = collecting.taken_to(job, client.config.paths)
            pairs = zip(outputs, taken, strict=True) if len(taken) == len(outputs) else ()
            found |= {one.source: place for one, place in pairs if one.outcome == "missing"}
    return found


def _note(client: Client, copied: list[Copied]) -> None:
    """Where it cannot be written down, outputs are kept too long and not too short."""
    from safelight import collect as collecting

    try:
        collecting.note(copied, client.config.paths, datetime.now().astimezone())
    except OSError as error:
        if client.config.settings.retention.outputs_days:
            click.echo(f"{error.filename}: {error.strerror}. [retention] takes these for not collected.", err=True)


def _named(client: Client, written: tuple[str, ...]) -> Iterator[Receipt]:
    from safelight.commands.selecting import resolve_anyhow

    ids, _away = resolve_anyhow(client, written)
    for job in ids:
        receipt = client.ledger.receipt(job)
        if receipt and receipt.state == "done":
            yield receipt
        else:
            state = f"is {receipt.state}" if receipt else "has not ended"
            click.echo(f"{job} {state}: there is nothing to collect.", err=True)


def _done(client: Client, batch: str | None, day: str | None, damaged: list[str]) -> Iterator[Receipt]:
    """Yield the receipts that fit; one that cannot be read is named in `damaged` and keeps no other from its owner."""
    from safelight.errors import LedgerDamaged

    for job in sorted(client.ledger.ended() - client.ledger.outputs_removed()):
        try:
            receipt = client.ledger.receipt(job)
        except LedgerDamaged as error:
            damaged.append(str(error))
            continue
        if (
            receipt
            and receipt.state == "done"
            and (batch is None or receipt.spec.batch == batch)
            and (day is None or any(output.path.split("/", 1)[0] == day for output in receipt.outputs))
        ):
            yield receipt


def _day(written: str | None) -> str | None:
    if written is None:
        return None
    try:
        return date.fromisoformat(written).isoformat()
    except ValueError:
        raise click.UsageError(f"--date {written!r} is not a date. Write it as 2026-11-22.") from None


@click.command()
@click.option("--dry-run", is_flag=True, help="Remove nothing: say what would go.")
@pass_client
def prune(client: Client, *, dry_run: bool) -> None:
    """Remove what [retention] in the settings says is too old.

    Outputs that were collected, and records of jobs that ended with the pictures they began with; the daemon does the
    same once a day. What was not
    collected stays unless the settings say `uncollected = "remove"`. What waits, runs or is quarantined stays, and so
    does every file in the outbox that is not as it was published. Prints what it removed, a line each.
    """
    from safelight import display, retention

    rules = retention.Rules.of(client.config.settings)
    if not rules:
        click.echo("Everything is kept: set [retention] outputs_days or ledger_days.", err=True)
        return
    size_bytes = 0
    counts = Counter[str]()
    for gone in retention.prune(client.config, client.ledger, datetime.now().astimezone(), dry_run=dry_run):
        click.echo(f"{gone.what} {display.line(gone.name)}")
        counts[gone.what] += 1
        size_bytes += gone.bytes
    shown = ", ".join(f"{count} {what}{'s' if count != 1 else ''}" for what, count in sorted(counts.items()))
    verb = "Would remove" if dry_run else "Removed"
    click.echo(f"{verb} {shown or 'nothing'} ({display.gib(size_bytes)}).", err=True)


@click.command()
@click.argument("files", metavar="FILE...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--seed", metavar="+N|N", help="Another seed: +1 is the next one. Left out: the same.")
@click.option(
    "-n", "--count", type=click.IntRange(min=1), metavar="N", default=1, help="How many, their seeds counting up."
)
@click.option(
    "--strength", type=float, metavar="0 TO 1", help="Start from the picture itself, and leave it as far as that."
)
@click.option("--batch", metavar="NAME", help="Another batch than the file's.")
@click.option("--priority", metavar="CLASS", help="high, normal, low or night; else the file's.")
@click.option("--replan", is_flag=True, help="Let the planner choose anew instead of running as the file's plan says.")
@DRY_RUN
@JSON
@pass_client
def rerun(
    client: Client, files: tuple[Path, ...], seed: str | None, count: int, strength: float | None, batch: str | None,
    priority: str | None, *, replan: bool, dry_run: bool, as_json: bool,
) -> None:  # fmt: skip
    """Queue again what made a file.

    \b
        safelight rerun 0001_a-red-fox_s7.png
        safelight rerun 0001_a-red-fox_s7.png --seed +1 -n 4
        safelight rerun 0001_a-red-fox_s7.png --strength 0.5 --seed +1

    FILE is a picture, a clip or the record (.json) beside it. The same job gets a new id; run as its plan says, the
    same machine makes the same file. With --strength the picture is what the new job starts from: a variation of it.
    Prints one job id a line on stdout.
    """
    from safelight import embedded
    from safelight.errors import InvalidJob
    from safelight.ids import submission_of

    if seed is not None and not _SEED.fullmatch(seed):
        raise click.UsageError(f"--seed {seed!r} is neither a seed nor a step such as +1.")
    faults: list[Fault] = []
    submissions: dict[str, list[JobSpec]] = {}
    for file in files:
        try:
            inside = embedded.read(file.expanduser())
            changes: dict[str, object] = {"batch": batch, "priority": priority, "strength": strength}
            if strength is not None:
                changes["image"] = _kept_picture(client, file.expanduser(), inside, dry_run=dry_run)
            specs = _again(client, file, inside, seed, count, changes, replan=replan)
            submissions[submission_of(specs[0].id)] = specs
        except InvalidJob as error:
            faults += error.faults
    if faults:
        raise InvalidJob(faults)
    hand_over(client, submissions, dry_run=dry_run, as_json=as_json)


def _again(
    client: Client, file: Path, inside: Embedded, seed: str | None, count: int, changes: dict[str, object],
    *, replan: bool,
) -> list[JobSpec]:  # fmt: skip
    """Return the jobs that a file asks for; it may come from anywhere, so that it is checked like a prompt file.

    Raises:
        InvalidJob: the model is not known any more, an input image is gone, or a value is not legal.
    """
    from safelight import ids

    now = datetime.now().astimezone()
    submission = ids.submission_id(now)
    first = _first_seed(inside.spec.seed, seed)
    given = {name: value for name, value in changes.items() if value is not None}
    plan = None if replan else inside.plan
    specs = []
    for index in range(1, count + 1):
        written = {**_written(client, inside.spec, plan), **given, "seed": first + index - 1}
        checked = _checked(client, file, written, here=changes.get("image"))
        axes = {**inside.spec.axes, "seed": checked.seed} if "seed" in inside.spec.axes else inside.spec.axes
        own = {
            "id": ids.job_id(submission, index),
            "index": index,
            "submitted_at": now.isoformat(timespec="seconds"),
            "template": inside.spec.template,
            "axes": axes,
        }
        specs.append(checked.model_copy(update=own))
    return specs


def _kept_picture(client: Client, file: Path, inside: Embedded, *, dry_run: bool) -> str:
    """Return the digest of the picture that a variation starts from, kept among the inputs unless nothing is queued.

    Raises:
        InvalidJob: it is no picture, or a damaged one.
    """
    from tempfile import TemporaryDirectory

    from safelight import inputs
    from safelight.errors import Fault, InvalidJob

    if inside.spec.kind != "image" or file.suffix.lower() == ".json":
        problem = "a variation starts from a picture, and this is none"
        raise InvalidJob([Fault(str(file), problem, "Name a picture that FLUX made, or leave --strength out.")])
    with TemporaryDirectory() as nowhere:
        return inputs.store(file.resolve(), Path(nowhere) if dry_run else client.config.paths.inputs).digest


def _first_seed(was: int, written: str | None) -> int:
    match = _SEED.fullmatch(written or "+0")
    assert match is not None
    return was + int(match[2]) if match[1] else int(match[2])


def _written(client: Client, spec: JobSpec, plan: Plan | None) -> dict[str, Any]:
    """Return what a person would have to write for this job: without what the model's defaults say anyway."""
    from safelight.jobspec import FIELDS

    known = client.models[spec.model].defaults.model_dump() if spec.model in client.models else {}
    values = {name: getattr(spec, name) for name in FIELDS}
    written = {name: value for name, value in values.items() if value is not None and known.get(name) != value}
    written = {name: value for name, value in written.items() if value != ()}
    written.pop("not_before", None)
    return {**written, **{name: how for name, how in _as_planned(plan).items() if written.get(name) == "auto"}}


def _as_planned(plan: Plan | None) -> dict[str, str]:
    """Return the settings with which a planner has no other choice."""
    from safelight.computed import Computed

    if plan is None:
        return {}
    decoding = "on" if plan.vae_tiling else "strips" if plan.vae_strip_rows else "off"
    where = {"offload": plan.offload} if plan.device == "cuda" else {}
    return {**Computed.of(plan).settings, **where, "vae_tiling": decoding}


def _checked(client: Client, file: Path, written: dict[str, Any], here: object) -> JobSpec:
    """Return the job that is asked for. `here` is the digest of a picture that was just seen.

    Raises:
        InvalidJob: a value is not legal, or a file of its inputs is gone.
    """
    from safelight import jobspec
    from safelight.errors import Fault, InvalidJob

    defaults = client.config.settings.defaults
    found = jobspec.check(
        written, client.models, str(file), image_model=defaults.image_model, video_model=defaults.video_model
    )
    if isinstance(found, list):
        raise InvalidJob(found)
    gone = [
        Fault(str(file), f"its {name} is not in {client.config.paths.inputs}", "Submit it anew, with the picture.")
        for name, digest in (
            ("image", found.image),
            ("last_image", found.last_image),
            ("controlnet image", found.controlnet.image if found.controlnet else None),
        )
        if digest is not None
        and digest != here
        and not (_DIGEST.fullmatch(digest) and (client.config.paths.inputs / digest).is_file())
    ]
    loras = []
    for lora in found.loras:
        try:
            loras.append(_still_there(client, lora))
        except InvalidJob as error:
            gone += [Fault(str(file), f"{fault.where}: {fault.problem}", fault.remedy) for fault in error.faults]
    if gone:
        raise InvalidJob(gone)
    return found.model_copy(update={"loras": tuple(loras)})


def _still_there(client: Client, lora: Lora) -> Lora:
    """Return a LoRA that is what it was when the file was made, or that nobody here can look at.

    Raises:
        InvalidJob: it is gone, or another file now.
    """
    from safelight import lorafiles

    paths = client.config.paths
    if not client.is_on_workers_host or not lorafiles.may_look(paths.models):
        return lora
    if not lora.sha256:
        return lorafiles.find(lora, paths.models)
    lorafiles.file_of(lora, paths.models, paths.inputs)
    return lora
