"""The installation: `up`, `demo`, `doctor`, `service`, `completion`; `concat`, which the daemon does."""

from __future__ import annotations

import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

import click

from safelight.commands.client import Client, pass_client

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
    become_daemon(ctx, "up", "up")


@click.command(context_settings=PASS_ON)
@click.option("--to", metavar="FOLDER", help="A new folder for everything; else ./safelight-demo.")
@click.pass_context
def demo(ctx: click.Context, to: str | None) -> None:
    """Show the whole way of a job, without a GPU.

    Sample prompts become pictures and clips, on the CPU, through the whole daemon. Needs no GPU, no download and
    nothing installed but safelight[daemon]. Its two small models draw coloured shapes as they are told, and nothing
    else.
    """
    become_daemon(ctx, "demo", "demo", *(["--to", to] if to else []))


def become_daemon(ctx: click.Context, command: str, *words: str, settings: Path | None = None) -> NoReturn:
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
    become_daemon(ctx, "concat", "concat", *words)


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
