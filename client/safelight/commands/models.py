"""`models`: what there is, fetching it, registering what is on disk already, preparing, checking, forgetting."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from safelight.commands.client import Client, pass_client
from safelight.commands.machine import become_daemon

if TYPE_CHECKING:
    from safelight.errors import SafelightError
    from safelight.registered import Registration

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


@click.group()
def models() -> None:
    """The models that jobs may name."""


@models.command("list")
@click.option("--json", "as_json", is_flag=True, help="An array of objects.")
@pass_client
def list_models(client: Client, *, as_json: bool) -> None:
    """Show the models: what each serves, how it is stored, whether it is there, and what it lacks.

    Models of your own are registered (`safelight models add`), or go into the settings file as [models.KEY]. Marked *
    is what a job gets that names no model. STORED is what most of its transformer is held as on disk, and how large all
    of it is; BF16 its size in memory unless it is held in less. HERE tells one that is whole from one that is being
    pulled, or was until something stopped it, from one that lacks files, and from one whose disk has gone; and says how
    much of a registered one has digests, until all has. CONTROLNETS says the same of what may lead it. PREPARED is
    what `safelight models prepare` has stored; one made of other weights than are there now is not used. What is kept
    of jobs with LoRAs ([worker] fused_gib) stands behind it.
    """
    from safelight.commands import modeltable

    modeltable.show(client, as_json=as_json)


@models.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--as", "key", metavar="KEY", help="What jobs call it; else what it is, or the file's name.")
@click.option("--like", metavar="KEY", help="The model whose facts it has; else the one of its size.")
@click.option(
    "--with",
    "folder",
    metavar="FOLDER",
    type=click.Path(path_type=Path),
    help="Where text encoders, VAE, tokenizers and scheduler come from; else from what it is like.",
)
@click.option("--component", "components", metavar="NAME=PATH", multiple=True, help="A further transformer.")
@click.option("--digests", is_flag=True, help="Write its digests down now, not in the background.")
@pass_client
@click.pass_context
def add(
    ctx: click.Context,
    client: Client,
    path: Path,
    *,
    key: str | None,
    like: str | None,
    folder: Path | None,
    components: tuple[str, ...],
    digests: bool,
) -> None:
    """Register weights that are on disk already.

    They are read where they lie: nothing is copied or changed. PATH is a folder in the layout of diffusers; the hub's
    cache, or one model of it; or a transformer alone: a folder, a .safetensors file or a .gguf file of FLUX.1 or
    Wan 2.2, by the names of diffusers or of its authors, also with 8-bit floats. A transformer alone takes the rest
    from the model that it is like where that is there, or from --with, or `safelight models pull KEY` fetches it.
    The A14B models have two: PATH is the high-noise one, --component transformer_2=PATH the other. A pickle is never
    opened. Prints the key of each. While the daemon runs it reads them once in the background, for their digests.

    \b
        safelight models add ~/.cache/huggingface/hub
        safelight models add ~/ComfyUI/models/unet/flux1-dev-fp8.safetensors --as flux-dev-fp8
        safelight models add ~/flux1-schnell-Q4_K_S.gguf --with ~/FLUX.1-schnell
    """
    from safelight import inventory, register, registered
    from safelight.commands import modeltable
    from safelight.errors import Fault, InvalidJob

    pairs = dict(each.partition("=")[::2] for each in components)
    if bad := [name for name, place in pairs.items() if not name or not place]:
        raise InvalidJob([Fault(f"--component {name}", "names no path", "Write NAME=PATH.") for name in bad])
    places = {name: Path(place) for name, place in pairs.items()}
    asked = register.Asked(path, key, like, folder, places)
    found, others = register.registrations(asked, client.config, client.models)
    try:
        for registration in found:
            registered.write(client.config.paths.models, registration)
    except OSError as error:
        raise _unwritable(client, error) from error
    for line in others:
        click.echo(line, err=True)
    table = client.models.current()
    for registration in found:
        facts = table[registration.key]
        standing = inventory.standing(facts, client.config.paths.models)
        click.echo(f"{registration.key}: {modeltable.stored(standing)}, {modeltable.here(standing, facts)}", err=True)
        click.echo(registration.key)
    wrong = [line for registration in found if digests for line in _read(client, registration)]
    lacking = [each.key for each in found if not digests and _lacks_digests(client, each)]
    if lacking:
        now = f"safelight models verify {lacking[0]}" if len(lacking) == 1 else "safelight models verify"
        click.echo(f"digests: made in the background while the daemon runs, or now: {now}", err=True)
    ctx.exit(1 if wrong or not found else 0)


def _lacks_digests(client: Client, registration: Registration) -> bool:
    from safelight import registered

    try:
        return bool(registered.digested(client.config.paths.models, registration).lacking)
    except OSError:
        return False  # it is gone already, which was said


def _unwritable(client: Client, error: OSError) -> SafelightError:
    from safelight.errors import BadConfig

    place = error.filename or client.config.paths.models
    return BadConfig(f"{place}: {error.strerror}. Make {client.config.paths.models} writable for this user.")


def _read(client: Client, registration: Registration) -> list[str]:
    """Read a registered model, telling how far that is; return what is wrong, which was said."""
    from safelight import display, registered

    last = [time.monotonic()]
    terminal = sys.stderr.isatty()

    def tell(file: Path, done: int, of: int) -> None:
        now = time.monotonic()
        if now - last[0] < (0.5 if terminal else 30.0):
            return
        last[0] = now
        line = f"{display.gib(done)} of {display.gib(of)}: {file.name}"
        click.echo(f"\r\x1b[K{line[:100]}" if terminal else line, nl=not terminal, err=True)

    new, wrong = registered.verify(client.config.paths.models, registration, tell)
    if terminal:
        click.echo("\r\x1b[K", nl=False, err=True)
    first = f"; {new} files were read for the first time, and are known now" if new else ""
    _told(wrong, f"{registration.key} is as it was{first}")
    return wrong


@models.command()
@click.argument("key")
@click.option("--yes", is_flag=True, help="Do not ask before files are removed.")
@click.option("--fused", "only_fused", is_flag=True, help="Only what is kept of its jobs with LoRAs, without asking.")
@click.option(
    "--delete",
    "doomed",
    metavar="PATH",
    multiple=True,
    type=click.Path(path_type=Path),
    help="A registered file or folder that is removed, too; may be given several times.",
)
@pass_client
@click.pass_context
def rm(ctx: click.Context, client: Client, key: str, *, yes: bool, only_fused: bool, doomed: tuple[Path, ...]) -> None:
    """Remove a model from safelight.

    A registered one is forgotten: its own files stay, unless --delete names them. A pulled one is removed, after a
    question or with --yes. What was prepared or kept of either goes with it. Of a folder that you put below the models
    folder by hand, nothing is touched. With --fused the model stays, and what jobs have kept of its LoRAs goes.
    """
    from safelight import display, removal
    from safelight.errors import Fault, InvalidJob

    config = client.config
    if only_fused:
        if doomed:
            raise click.UsageError("--delete is for files of your own, and --fused leaves those alone.")
        ctx.exit(_empty_fused(client, key))
    plan = removal.plan(key, config, client.models, [place.expanduser().absolute() for place in doomed])
    for place in plan.doomed:
        click.echo(f"{place}: {display.gib(removal.size_bytes(place))}", err=True)
    if plan.doomed and not yes:
        if not (sys.stdin.isatty() and sys.stderr.isatty()):
            command = f"safelight models rm {key}"
            raise InvalidJob(
                [Fault(command, "asks before it removes, and there is no terminal to ask at", "Add --yes.")]
            )
        if not click.confirm("Remove this for good?", err=True):
            ctx.exit(1)
    try:
        removal.carry_out(plan, config)
    except OSError as error:
        raise _unwritable(client, error) from error
    click.echo(f"{key} is {'forgotten' if plan.registered else 'removed'}")


def _empty_fused(client: Client, key: str) -> int:
    """Remove what is kept of a model's LoRAs; return the exit code."""
    from safelight import display, removal
    from safelight.errors import Fault, InvalidJob
    from safelight.models import KEY

    if not KEY.fullmatch(key):
        raise InvalidJob([Fault(key, "is not a model", f"Known: {', '.join(client.models.near(key))}.")])
    try:
        freed, left = removal.empty_fused(key, client.config)
    except OSError as error:
        raise _unwritable(client, error) from error
    for place in left:
        click.echo(f"{place}: a job uses it. Run this again when it is done.", err=True)
    click.echo(f"{display.gib(freed)} of {key} with LoRAs removed")
    return 1 if left else 0


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
    become_daemon(ctx, "models prepare", "prepare", *words, settings=config.source if config.source.exists() else None)


@models.command()
@click.argument("key")
@click.option("--controlnet", metavar="NAME", help="This ControlNet of it, and not the model.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--force", is_flag=True, help="Read what is there, and fetch again what is damaged or has changed.")
@click.pass_context
def pull(ctx: click.Context, key: str, *, controlnet: str | None, yes: bool, force: bool) -> None:
    """Fetch a model, or a ControlNet of it, from the hub.

    Only the files that jobs load: safetensors, settings and vocabularies, never a pickle, nothing twice. Says the
    size, the licence and the free disk, then asks; without a terminal to ask at it needs --yes. May be interrupted:
    run it again and it goes on where it was. It appears when every byte of it was read back and has the digest
    that the hub lists, and not before. [models.KEY] revision pins a commit. For a gated model put your token into
    HF_TOKEN, or where `hf auth login` puts it. HF_ENDPOINT names another hub. With --force a damaged model is away
    until it is mended. Prints the folder. Needs safelight[daemon].

    \b
        safelight models pull flux-schnell
        safelight models pull wan-ti2v-5b --yes
        safelight models pull flux-dev --controlnet union-pro-2
    """
    client = ctx.find_object(Client)
    assert client is not None
    config = client.config  # the daemon's that this client would reach, which may be the system's
    words = ["--models", str(config.paths.models), *["--yes"] * yes, *["--force"] * force]
    words += [f"--controlnet={controlnet}"] * (controlnet is not None) + ["--", key]
    become_daemon(ctx, "models pull", "pull", *words, settings=config.source if config.source.exists() else None)


@models.command()
@click.argument("key", required=False)
@pass_client
@click.pass_context
def verify(ctx: click.Context, client: Client, key: str | None) -> None:
    """Read what was pulled, registered, prepared or kept and compare it with its digests.

    All models, or one. A file of the hub's cache is compared with its name there. Any other registered file is read for
    the first time then, and compared with that from then on; stopped, it goes on with the next file. Exit code 1 when a
    file is damaged; the line says which, and what to do.
    """
    from safelight import fused, prepared, pulled, registered
    from safelight.errors import Fault, InvalidJob

    if key is not None and key not in client.models:
        known = f"Known: {', '.join(client.models.near(key))} (safelight models list)."
        raise InvalidJob([Fault(key, "is not a model", known)])
    found = faults = 0
    for what in pulled.all_of(client.config.paths.models, client.models):
        if key in (None, what.facts.key):
            found += 1
            faults += _told(pulled.damage(what), f"{what.name} is as it was pulled")
    for registration in registered.read_all(client.config.paths.models)[0]:
        if key in (None, registration.key):
            found += 1
            faults += len(_read(client, registration))
    for folder in prepared.folders(client.config.paths.models):
        if key in (None, folder.parts[-3]):
            found += 1
            faults += _told(prepared.damage(folder), f"{'/'.join(folder.parts[-3:])} is as it was written")
    for folder in fused.folders(client.config.paths.models):
        if key in (None, folder.parts[-4]):
            found += 1
            faults += _told(fused.damage(folder), f"{'/'.join(folder.parts[-4:])} is as it was written")
    if not found:
        click.echo(f"nothing{f' of {key}' if key else ''} is pulled, registered or prepared", err=True)
    ctx.exit(1 if faults else 0)


def _told(wrong: list[str], well: str) -> int:
    """Say what is wrong with a folder, or that nothing is; return how many lines were wrong."""
    from safelight import display

    for line in wrong or [well]:
        click.echo(display.line(line))
    return len(wrong)
