"""`add` and `batch`: what a person wrote becomes jobs in the queue."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import click

from safelight.commands.client import Client, pass_client
from safelight.commands.options import JOB_OPTIONS_CONTEXT, SWEEP, JobCommand, drafts_of, job_options

if TYPE_CHECKING:
    from safelight.draft import Draft
    from safelight.errors import Fault
    from safelight.jobspec import JobSpec
    from safelight.lora import Lora
    from safelight.sizes import KeptPicture

FORMATS = ("txt", "md", "csv", "json", "jsonl", "yaml")


@dataclass(frozen=True)
class Source:
    """Drafts that were written in one place, and become one submission."""

    drafts: list[Draft]
    base: Path
    """The folder that pictures are named from."""
    batch: str
    """Of the jobs that name none."""
    trusted: bool = False
    """Typed by the person at the keyboard, who may name any picture; a file may only name those beside it."""
    faults: tuple[Fault, ...] = ()
    """Of what could not be read as a draft; the drafts may have faults of their own."""


BATCH = click.option("--batch", metavar="NAME", help="The folder of the outputs, and a name for all these jobs.")
DRY_RUN = click.option(
    "--dry-run", is_flag=True, help="Queue nothing: say what would be queued, and what it would take."
)
JSON = click.option("--json", "as_json", is_flag=True, help="One object instead of ids.")


@click.command(cls=JobCommand, context_settings=JOB_OPTIONS_CONTEXT)
@click.argument("words", metavar="PROMPT...", nargs=-1)
@click.option("-p", "--prompt", "prompts", metavar="PROMPT", multiple=True, help="A prompt, also of a single word.")
@job_options
@SWEEP
@BATCH
@DRY_RUN
@JSON
@pass_client
def add(
    client: Client, /, words: tuple[str, ...], prompts: tuple[str, ...], sweeps: tuple[str, ...], batch: str | None,
    *, dry_run: bool, as_json: bool, **written: str | tuple[str, ...] | None,
) -> None:  # fmt: skip
    """Queue a job for each PROMPT.

    \b
        safelight add "a red fox in the snow" --steps 4 --seed 7
        safelight add "a {red|blue} door" --expand all -n 3 --priority night
        safelight add "she turns and smiles" --image portrait.jpg --frames 121

    Prints one job id a line, and nothing else, on stdout. Each PROMPT is one argument: put it in quotes. What is
    wrong is an error that says so; nothing is corrected silently and nothing is queued then. Exit code 4 means that
    nothing was accepted; once ids are printed the jobs are safe on disk.
    """
    if len(words) > 1 and not any(" " in word.strip() for word in words):
        quoted = " ".join(words)
        raise click.UsageError(f'These are {len(words)} prompts of one word each. One prompt: "{quoted}"')
    texts = (*words, *prompts)
    if not texts:
        raise click.UsageError('Write a prompt: safelight add "a red fox in the snow"')
    source = Source(drafts_of(texts, {**written, "batch": batch}, sweeps), Path.cwd(), "single", trusted=True)
    hand_over(client, expand_all(client, [source], keep_images=not dry_run), dry_run=dry_run, as_json=as_json)


@click.command()
@click.argument("files", metavar="FILE...", nargs=-1, required=True)
@click.option("--format", "suffix", type=click.Choice(FORMATS), help="The format of stdin, when FILE is -.")
@click.option("--priority", metavar="CLASS", help="high, normal, low or night: over what the files say.")
@click.option(
    "--max-jobs", type=click.IntRange(min=1), metavar="N", help="Refuse to make more; else [inbox] max_jobs_per_file."
)
@SWEEP
@BATCH
@DRY_RUN
@JSON
@pass_client
def batch(
    client: Client, files: tuple[str, ...], suffix: str | None, priority: str | None, max_jobs: int | None,
    sweeps: tuple[str, ...], batch: str | None, *, dry_run: bool, as_json: bool,
) -> None:  # fmt: skip
    """Queue the jobs of prompt files.

    \b
        safelight batch night.txt cats.yaml --dry-run
        safelight batch night.txt --priority night --sweep steps=20,30
        generate-prompts | safelight batch - --format jsonl --batch generated

    A FILE is .txt (a prompt a line), .md, .csv, .json, .jsonl or .yaml; - is stdin. Prints one job id a line, and
    nothing else, on stdout. Each file is a batch with its name, unless --batch gives
    one. All faults of all files are told at once, and then nothing is queued.
    """
    fields = {"batch": batch, "priority": priority}
    sources = sources_of_files([Path(file) for file in files], fields, sweeps, suffix=suffix)
    submissions = expand_all(client, sources, max_jobs=max_jobs, keep_images=not dry_run)
    hand_over(client, submissions, dry_run=dry_run, as_json=as_json)


def sources_of_files(
    files: Sequence[Path], fields: Mapping[str, str | None], sweeps: tuple[str, ...], *, suffix: str | None = None
) -> list[Source]:
    """Return what prompt files say, and what is wrong with how it is written.

    Args:
        fields: what the command line says of every job, over the file; so does `sweeps`.
        suffix: the format of stdin, which `-` names.
    """
    from safelight import promptfile
    from safelight.draft import sweep
    from safelight.errors import InvalidJob
    from safelight.promptfile import InvalidPromptFile

    axes = dict(sweep(text) for text in sweeps)
    sources: list[Source] = []
    for file in files:
        path = file.expanduser()
        stdin = str(file) == "-"
        base, batch = (Path.cwd(), "stdin") if stdin else (path.parent, path.stem)
        try:
            drafts = promptfile.parse(*_stdin(suffix)) if stdin else promptfile.parse_file(path)
            sources.append(Source(_over(drafts, fields, axes), base, batch))
        except InvalidPromptFile as error:
            sources.append(Source(_over(error.drafts, fields, axes), base, batch, faults=error.faults))
        except InvalidJob as error:  # not even read
            sources.append(Source([], base, batch, faults=error.faults))
    return sources


def _stdin(suffix: str | None) -> tuple[bytes, str]:
    from safelight import promptfile

    return sys.stdin.buffer.read(promptfile.TABLE_BYTES_MAX + 1), f"stdin.{_stdin_format(suffix)}"


def _stdin_format(suffix: str | None) -> str:
    if suffix is None:
        raise click.UsageError(f"Say what stdin is: --format {' or '.join(FORMATS)}.")
    return suffix


def _over(
    drafts: Sequence[Draft], fields: Mapping[str, str | None], axes: Mapping[str, tuple[object, ...]]
) -> list[Draft]:
    """Return the drafts with what the command line says, which wins over the file."""
    given = {name: value for name, value in fields.items() if value is not None}
    replaced = (*given, *axes)
    return [
        replace(
            draft,
            fields={**{name: value for name, value in draft.fields.items() if name not in replaced}, **given},
            matrix={**{name: values for name, values in draft.matrix.items() if name not in replaced}, **axes},
            places=draft.places.without(replaced),
        )
        for draft in drafts
    ]


def expand_all(
    client: Client, sources: Sequence[Source], *, max_jobs: int | None = None, keep_images: bool = True
) -> dict[str, list[JobSpec]]:
    """Return the jobs of each source, by submission.

    Args:
        keep_images: False leaves nothing behind in state/inputs; the jobs are not fit for the queue then.

    Raises:
        InvalidJob: every fault of every source.
    """
    from safelight import ids
    from safelight.errors import InvalidJob, in_order
    from safelight.expand import expand

    now = datetime.now().astimezone()
    submissions: dict[str, list[JobSpec]] = {}
    faults: list[Fault] = []
    with TemporaryDirectory() as nowhere:
        inputs = client.config.paths.inputs if keep_images else Path(nowhere)
        for source in sources:
            faults += source.faults
            submission = ids.submission_id(now)
            try:
                submissions[submission] = expand(
                    source.drafts,
                    client.models,
                    client.config,
                    submission=submission,
                    now=now,
                    batch=source.batch,
                    store_image=partial(_store_image, source, inputs),
                    keep_lora=partial(_keep_lora, client, source, inputs),
                    wildcards=client.config.paths.wildcards,
                    max_jobs=max_jobs or client.config.settings.inbox.max_jobs_per_file,
                )
            except InvalidJob as error:
                faults += error.faults
    if faults:
        raise InvalidJob(in_order(faults))
    return submissions


def _store_image(source: Source, inputs: Path, name: str) -> KeptPicture:
    from safelight import inputs as pictures

    path = Path(name).expanduser().resolve() if source.trusted else pictures.resolve(name, source.base)
    return pictures.store(path, inputs)


def _keep_lora(client: Client, source: Source, inputs: Path, lora: Lora) -> Lora:
    from safelight import inputs as files
    from safelight import lorafiles

    if lora.name:
        models_folder = client.config.paths.models
        can_look = client.is_on_workers_host and lorafiles.may_look(models_folder)
        return lorafiles.find(lora, models_folder) if can_look else lora
    trusted = source.trusted
    path = Path(lora.path).expanduser().resolve() if trusted else files.resolve(lora.path, source.base, "LoRA")
    return lorafiles.store(lora, path, inputs)


def hand_over(client: Client, submissions: Mapping[str, Sequence[JobSpec]], *, dry_run: bool, as_json: bool) -> None:
    """Queue jobs and print their ids, or say what they would take."""
    from safelight import submit, wan_cli
    from safelight.commands import planning
    from safelight.errors import InvalidJob

    specs = [spec for group in submissions.values() for spec in group]
    notes = lacking(client, specs)
    if dry_run:
        ground = planning.ground_of(client)
        found = submit.forecast(specs, ground.machine, client.models, ground.calibration)
        planning.show(ground, found, as_json=as_json, notes=notes)
        if ground.told and not all(shape.plan for shape in found):
            click.get_current_context().exit(InvalidJob.exit_code)
        return
    if client.config.embedded:  # the daemon of another host has settings of its own
        wan_cli.refuse_unconfigured(specs, client.models, client.config)
    vram_gib = client.config.settings.worker.vram_gib
    with client.queue() as queue:
        machines = [worker.machine for worker in queue.workers() if worker.machine]
        limit = None if isinstance(vram_gib, str) else vram_gib
        notes += submit.refuse_hopeless(specs, machines, client.models, vram_gib=limit)
        ids = [spec.id for spec in specs]
        with submit.undisturbed():
            notes += submit.submit(submissions, queue, client.own_ledger)
            _print_ids(ids, as_json=as_json)
    for note in notes:
        click.echo(note, err=True)


def lacking(client: Client, specs: Sequence[JobSpec]) -> list[str]:
    """Return which models of these jobs are not whole on this host, where it is the worker's."""
    from safelight import inventory, lorafiles

    folder = client.config.paths.models
    if not (client.is_on_workers_host and lorafiles.may_look(folder)):
        return []
    return inventory.lacking(specs, client.models, folder, os.environ)


def _print_ids(ids: list[str], *, as_json: bool) -> None:
    """Print what was accepted; where stdout takes nothing, say at least that it was."""
    try:
        click.echo(json.dumps({"jobs": len(ids), "ids": ids}) if as_json else "\n".join(ids))
    except OSError:
        click.echo(f"The jobs are queued all the same, {ids[0]} to {ids[-1]}: do not submit them again.", err=True)
        raise
