"""The installation: `up`, `demo`, `doctor`, `models`, `service`, `completion`; `concat`, which the daemon does."""

from __future__ import annotations

import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click

from safelight.commands.client import Client, pass_client

if TYPE_CHECKING:
    from safelight.models import ModelFacts

PRECISIONS = (
    "bf16",
    "fp8-dynamic",
    "fp8-weight-only",
    "fp8-quanto",
    "int8-dynamic",
    "int8-weight-only",
    "int8-bnb",
    "nf4",
)
"""safelight.prepared.PRECISIONS, which is not imported for a command that only shows its help."""

NEEDED = ("rq", "torch")
"""What safelight[daemon] brings and the plain client lacks."""

PASS_ON = {"ignore_unknown_options": True, "allow_extra_args": True}


@click.command(context_settings=PASS_ON)
@click.pass_context
def up(ctx: click.Context) -> None:
    """Run queue server, inbox and worker until Ctrl-C.

    For machines without systemd, and for trying things out. Jobs that have not ended when it stops go on when it
    starts again. Needs safelight[daemon].
    """
    _become_daemon(ctx, "up", "up")


@click.command(context_settings=PASS_ON)
@click.option("--to", metavar="FOLDER", help="Where the demo puts everything; else ./safelight-demo.")
@click.pass_context
def demo(ctx: click.Context, to: str | None) -> None:
    """Show the whole way of a job, without a GPU.

    Sample prompts become pictures and a clip, on the CPU, through the whole daemon. Needs no GPU, no download and
    nothing installed but safelight[daemon]. The tiny models draw noise: it shows the way of a job, not what the
    real models draw.
    """
    _become_daemon(ctx, "demo", "demo", *(["--to", to] if to else []))


def _become_daemon(ctx: click.Context, command: str, *words: str, settings: Path | None = None) -> NoReturn:
    """Replace this process by the `safelightd` of the same installation; `command` is what the person called."""
    from safelight.errors import BadConfig

    client = ctx.find_object(Client)
    assert client is not None
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise BadConfig(
            f"safelight {command} needs the daemon, which is not installed here ({', '.join(missing)} missing). "
            "Install it: pip install 'safelight[daemon]'"
        )
    beside = Path(sys.executable).with_name("safelightd")
    program = [str(beside)] if beside.is_file() else [sys.executable, "-m", "safelightd.cli"]
    file = settings or client.config_file
    options = [*(["--config", str(file)] if file else []), *(["--verbose"] if client.verbose else [])]
    line = [*program, *options, *words, *ctx.args]
    sys.stdout.flush()
    os.execv(line[0], line)


@click.command()
@click.option("--json", "as_json", is_flag=True, help="An array of {name, look, says, remedy}.")
@pass_client
@click.pass_context
def doctor(ctx: click.Context, client: Client, *, as_json: bool) -> None:
    """Say what is wrong with the installation, and what would hurt tonight.

    A line a fact, with its remedy: folders, models, services, sleep and lid, GPU, disk, swap, clock. Changes
    nothing. Exit code 0 when nothing is FAIL; else 3 for settings or installation, 5 for the GPU, 4 for a queue that
    does not answer: the first of these.
    """
    from dataclasses import asdict

    from safelight import display, finding
    from safelight import doctor as examination

    findings = examination.examine(client.config_file)
    if as_json:
        shown = [asdict(found) for found in findings]
        click.echo(json.dumps(shown, ensure_ascii=False, indent=2))
    else:
        for found in findings:
            look = click.style(f"{found.look.upper():<4}", fg=display.LOOK_COLOURS[found.look])
            click.echo(f"{look}  {found.name:<9} {display.line(found.says)}")
            if found.remedy:
                click.echo(f"{'':16}{display.line(found.remedy)}")
    ctx.exit(finding.exit_code(findings))


@click.command()
@click.argument("batch")
@click.option("-o", "--to", "target", type=click.Path(path_type=Path), metavar="FILE", help="Else ./BATCH.mp4.")
@click.option("--date", "day", metavar="DATE", help="Only those in this folder of the outbox, such as 2026-11-22.")
@click.option("--force", is_flag=True, help="Replace FILE if it is there.")
@click.pass_context
def concat(ctx: click.Context, batch: str, target: Path | None, day: str | None, *, force: bool) -> None:
    """Join the clips of a batch into one MP4.

    They follow each other as their jobs were submitted. Nothing is encoded again: the clips must be MP4s of one size
    and rate, as they lie in the outbox; those that differ are named and nothing is written. Jobs of the batch that
    are not done are named and left out. The file is whole or absent. Prints its path. Needs safelight[daemon].

    \b
        safelight concat night -o night.mp4
        safelight concat night --date 2026-11-22
    """
    from safelight import clips

    client = ctx.find_object(Client)
    assert client is not None
    found = clips.of_batch(client.ledger, batch, day)
    for job, state in found.left_out:
        click.echo(f"{job} {state}: left out.", err=True)
    file = (target or Path(f"{batch}.mp4")).expanduser().absolute()
    words = [*(["--force"] if force else []), "--", str(file), *map(str, found.files)]
    _become_daemon(ctx, "concat", "concat", *words)


@click.group()
def models() -> None:
    """The models that jobs may name."""


@models.command("list")
@click.option("--json", "as_json", is_flag=True, help="An array of objects.")
@pass_client
def list_models(client: Client, *, as_json: bool) -> None:
    """Show the models: what each makes, its licence, its size in bf16, and whether it is there.

    Models of your own go into the settings file as [models.KEY]. Marked * is what a job gets that names no model.
    HERE tells one that is whole from one that is being pulled, or was until something stopped it, and from one whose
    folder lacks files. PREPARED is what `safelight models prepare` has stored; one made of other weights than are
    there now is not used.
    """
    from safelight import display
    from safelight.models import folder, is_there

    defaults = client.config.settings.defaults
    default_keys = (defaults.image_model, defaults.video_model)
    stored = _prepared(client)
    rows = [
        {
            "key": facts.key,
            "kind": facts.kind,
            "default": facts.key in default_keys,
            "licence": facts.licence,
            "bf16_bytes": 2 * sum(facts.components.values()),
            "present": is_there(facts, client.config.paths.models),
            "here": _here(client, facts),
            "tiny": facts.tiny,
            "folder": str(folder(facts, client.config.paths.models)),
            "repository": facts.repository,
            "prepared": stored.get(facts.key, []),
        }
        for facts in client.models.values()
    ]
    if as_json:
        click.echo(json.dumps(rows, ensure_ascii=False, indent=2))
        return
    cells = [
        [
            f"{row['key']}{' *' if row['default'] else ''}",
            str(row["kind"]),
            "tiny" if row["tiny"] else display.gib(float(str(row["bf16_bytes"]))),
            str(row["here"]),
            _shown(stored.get(str(row["key"]), [])),
            str(row["licence"]),
            str(row["folder"]),
        ]
        for row in rows
    ]
    display.columns(["MODEL", "KIND", "BF16", "HERE", "PREPARED", "LICENCE", "FOLDER"], cells)


def _here(client: Client, facts: ModelFacts) -> str:
    """Return how much of a model is there, in words."""
    from safelight import display, models, pulled

    if facts.tiny:
        return "built on first use"
    place = models.folder(facts, client.config.paths.models)
    if models.is_there(facts, client.config.paths.models):
        return "incomplete" if models.missing_files(facts, place) or pulled.mismatch(place) else "present"
    if (arrived := pulled.arrived(place)) is None:
        return "missing"
    return f"{display.gib(arrived.size_bytes)} of {display.gib(arrived.of_bytes)} pulled"


def _prepared(client: Client) -> dict[str, list[dict[str, object]]]:
    """Return what is prepared, by model: {precision, component, bytes, current}."""
    from safelight import prepared

    found: dict[str, list[dict[str, object]]] = {}
    for manifest, current in prepared.manifests(client.config.paths.models, client.models):
        row = {
            "precision": manifest.precision,
            "component": manifest.component,
            "bytes": manifest.size_bytes,
            "current": current,
        }
        found.setdefault(manifest.key, []).append(row)
    return found


def _shown(stored: list[dict[str, object]]) -> str:
    words = (
        f"{row['precision']} {row['component']}{'' if row['current'] else ' (of other weights)'}" for row in stored
    )
    return ", ".join(words) or "-"


@models.command()
@click.argument("key")
@click.option("--precision", required=True, type=click.Choice(PRECISIONS), help="How the weights are held.")
@click.option(
    "--component", "components", metavar="NAME", multiple=True, help="Which component; may be given several times."
)
@click.option("--force", is_flag=True, help="Make anew what is ready.")
@click.pass_context
def prepare(ctx: click.Context, key: str, *, precision: str, components: tuple[str, ...], force: bool) -> None:
    """Store a model's weights in the precision they run in.

    Jobs then load fewer bytes and quantise nothing. Without --component: the transformers; in bf16 every large
    component that is not published in it. Runs on the GPU where [worker] device is cuda, needs little RAM, and may be
    interrupted: what is not whole is never used, and the next run removes it. Prints KEY/PRECISION/COMPONENT of each
    that is ready. Needs safelight[daemon].

    \b
        safelight models prepare flux-dev --precision fp8-dynamic
        safelight models prepare flux-dev --precision nf4 --component text_encoder_2
    """
    client = ctx.find_object(Client)
    assert client is not None
    config = client.config  # the daemon's that this client would reach, which may be the system's
    words = [key, "--precision", precision, "--models", str(config.paths.models)]
    words += [word for name in components for word in ("--component", name)] + ["--force"] * force
    _become_daemon(ctx, "models prepare", "prepare", *words, settings=config.source if config.source.exists() else None)


@models.command()
@click.argument("key")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--force", is_flag=True, help="Read what is there, and fetch again what is damaged or has changed.")
@click.pass_context
def pull(ctx: click.Context, key: str, *, yes: bool, force: bool) -> None:
    """Fetch a model from the hub.

    Only the files that jobs load: safetensors, settings and vocabularies, never a pickle, nothing twice. Says the
    size, the licence and the free disk, then asks; without a terminal to ask at it needs --yes. May be interrupted:
    run it again and it goes on where it was. The model appears when every byte of it was read back and has the digest
    that the hub lists, and not before. [models.KEY] revision pins a commit. For a gated model put your token into
    HF_TOKEN, or where `hf auth login` puts it. HF_ENDPOINT names another hub. With --force a damaged model is away
    until it is mended. Prints the folder. Needs safelight[daemon].

    \b
        safelight models pull flux-schnell
        safelight models pull wan-ti2v-5b --yes
    """
    client = ctx.find_object(Client)
    assert client is not None
    config = client.config  # the daemon's that this client would reach, which may be the system's
    words = ["--models", str(config.paths.models), *["--yes"] * yes, *["--force"] * force, "--", key]
    _become_daemon(ctx, "models pull", "pull", *words, settings=config.source if config.source.exists() else None)


@models.command()
@click.argument("key", required=False)
@pass_client
@click.pass_context
def verify(ctx: click.Context, client: Client, key: str | None) -> None:
    """Read what was pulled or prepared and compare it with its digests.

    All models, or one. Exit code 1 when a file is damaged; the line says which, and what to do.
    """
    from safelight import prepared, pulled
    from safelight.errors import Fault, InvalidJob

    if key is not None and key not in client.models:
        known = f"Known: {', '.join(client.models.near(key))} (safelight models list)."
        raise InvalidJob([Fault(key, "is not a model", known)])
    found = faults = 0
    for facts, folder in pulled.folders(client.config.paths.models, client.models):
        if key in (None, facts.key):
            found += 1
            faults += _told(pulled.damage(facts.key, folder), f"{facts.key} is as it was pulled")
    for folder in prepared.folders(client.config.paths.models):
        if key in (None, folder.parts[-3]):
            found += 1
            faults += _told(prepared.damage(folder), f"{'/'.join(folder.parts[-3:])} is as it was written")
    if not found:
        click.echo(f"nothing{f' of {key}' if key else ''} is pulled or prepared", err=True)
    ctx.exit(1 if faults else 0)


def _told(wrong: list[str], well: str) -> int:
    """Say what is wrong with a folder, or that nothing is; return how many lines were wrong."""
    from safelight import display

    for line in wrong or [well]:
        click.echo(display.line(line))
    return len(wrong)


@click.group()
def service() -> None:
    """Run in the background, with systemd."""


FOR_WHOM = click.option(
    "--user/--system",
    "for_user",
    default=True,
    show_default=True,
    help="For this person, or for everybody on the machine (needs root).",
)

DRY_RUN = click.option("--dry-run", is_flag=True, help="Only say what would be done.")


@service.command()
@FOR_WHOM
@click.option("--gpu", metavar="GPU", help="Index or UUID of the GPU to use; else [worker] gpu.")
@DRY_RUN
@pass_client
def install(client: Client, *, for_user: bool, gpu: str | None, dry_run: bool) -> None:
    """Install the units, and start them."""
    from safelight import config as settings
    from safelight import service as units

    own = settings.load(os.environ, client.config_file)
    lines = units.install(system=not for_user, gpu=gpu or own.settings.worker.gpu, dry_run=dry_run, config=own)
    click.echo("\n".join(lines))


@service.command()
@FOR_WHOM
@DRY_RUN
def uninstall(*, for_user: bool, dry_run: bool) -> None:
    """Stop and remove the units; settings, jobs, models and outputs stay."""
    from safelight import service as units

    click.echo("\n".join(units.uninstall(system=not for_user, dry_run=dry_run)))


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the script that completes commands.

    \b
        safelight completion bash > ~/.local/share/bash-completion/completions/safelight
        safelight completion zsh > ~/.zfunc/_safelight
        safelight completion fish > ~/.config/fish/completions/safelight.fish
    """
    from click.shell_completion import get_completion_class

    found = get_completion_class(shell)
    assert found is not None
    click.echo(found(ctx.find_root().command, {}, "safelight", "_SAFELIGHT_COMPLETE").source())
