"""`safelightd`: the processes of the daemon, one sub-command each. Units and `safelight up` start them."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import click

from safelight.errors import BadConfig, SafelightError

if TYPE_CHECKING:
    from safelight.config import Config

NEEDED = ("rq", "torch", "diffusers")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--config", "config_file", type=click.Path(path_type=Path), help="Settings file; else SAFELIGHT_CONFIG.")
@click.option("-v", "--verbose", is_flag=True, help="Log more.")
@click.pass_context
def group(context: click.Context, config_file: Path | None, *, verbose: bool) -> None:
    """The daemon's processes. People use `safelight`; units and `safelight up` start these."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise BadConfig(
            f"The daemon is not installed here ({', '.join(missing)} missing). pip install 'safelight[daemon]'"
        )
    from safelight import config
    from safelightd import logs

    logs.set_up(verbose=verbose)
    context.obj = config.load(file=config_file)


@group.command()
@click.pass_obj
def redis(config: Config) -> int:
    """Run the embedded queue server."""
    from safelightd import redis_server

    return redis_server.serve(config)


@group.command()
@click.pass_obj
def inbox(config: Config) -> int:
    """Watch the inbox folder."""
    from safelightd import inbox_service

    return inbox_service.serve(config)


@group.command()
@click.option("--gpu", help="Index or UUID; else [worker] gpu.")
@click.pass_obj
def worker(config: Config, gpu: str | None) -> int:
    """Run jobs on one GPU."""
    from safelightd import worker as process

    return process.serve(config if gpu is None else config.with_gpu(gpu))


@group.command()
@click.pass_obj
def digests(config: Config) -> int:
    """Read registered models that have no digests yet, and end."""
    from safelightd import digesting

    return digesting.serve(config)


@group.command()
@click.pass_obj
def up(config: Config) -> int:
    """Run server, inbox and worker in the foreground until Ctrl-C."""
    from safelightd.supervisor import Supervisor

    return Supervisor(config).run()


@group.command()
@click.option("--to", "folder", type=click.Path(path_type=Path), help="A new folder; else ./safelight-demo.")
def demo(folder: Path | None) -> int:
    """Turn sample prompts into pictures and clips with small models on the CPU, through the whole daemon."""
    from safelightd import demo as show

    return show.run(folder or Path("safelight-demo"))


@group.command()
@click.pass_obj
def probe(config: Config) -> int:
    """Say whether the configured device works; exit 0 or 5."""
    from safelightd import probe as reading

    machine = reading.read_machine(config)
    trouble = reading.gpu_is_well(config, machine)
    click.echo(machine.model_dump_json(indent=1))
    if trouble:
        click.echo(trouble, err=True)
    return 5 if trouble else 0


@group.command()
@click.argument("target", type=click.Path(path_type=Path))
@click.argument("clips", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--force", is_flag=True, help="Replace what is there.")
def concat(target: Path, clips: tuple[Path, ...], *, force: bool) -> None:
    """Join MP4 clips into one file; prints its path."""
    from safelightd import concat as joining

    try:
        joined = joining.concat(clips, target, force=force)
    except OSError as error:
        remedy = "Name a file in a folder that you may write, with room for it."
        raise SafelightError(f"{error.filename or target}: {error.strerror}. {remedy}") from error
    click.echo(f"{len(clips)} clips, {joined.num_frames} frames, {joined.seconds:.1f} s.", err=True)
    click.echo(str(target))


@group.command()
@click.argument("key")
@click.option("--precision", required=True, help="How the weights are held.")
@click.option("--component", "components", multiple=True, help="Which; else those that a job's time goes into.")
@click.option("--models", "folder", type=click.Path(path_type=Path), help="Models folder; else [paths] models.")
@click.option("--force", is_flag=True, help="Make anew what is ready.")
@click.pass_obj
def prepare(
    config: Config, key: str, precision: str, components: tuple[str, ...], folder: Path | None, *, force: bool
) -> None:
    """Store components of a model in the precision they run in; prints KEY/PRECISION/COMPONENT of each that is."""
    import json

    from safelight import models, prepared
    from safelight.errors import Fault, InvalidJob
    from safelightd.link import engine_env
    from safelightd.probe import read_machine

    config = _with_models(config, folder)
    table = models.load(config)
    faults = []
    if key not in table:
        faults.append(Fault(key, "is not a model", f"Known: {', '.join(table.near(key))} (safelight models list)."))
    if precision not in prepared.PRECISIONS:
        faults.append(Fault(f"--precision {precision}", "cannot be prepared", f"Use {', '.join(prepared.PRECISIONS)}."))
    if faults:
        raise InvalidJob(faults)
    request = {
        "key": key,
        "precision": precision,
        "components": components,
        "models_folder": str(config.paths.models),
        "force": force,
    }
    # A process of its own: torch, OpenMP and malloc read the environment when they start. Without the threshold malloc
    # keeps what tensors have freed, up to 64 MiB a thread.
    env = {**engine_env(config, read_machine(config)), "MALLOC_MMAP_THRESHOLD_": str(2**20)}
    program = [sys.executable, "-m", "safelightd.prepare", json.dumps(request)]
    os.execve(program[0], program, env)


@group.command()
@click.argument("key")
@click.option("--controlnet", metavar="NAME", help="This ControlNet of it, and not the model.")
@click.option("--models", "folder", type=click.Path(path_type=Path), help="Models folder; else [paths] models.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--force", is_flag=True, help="Read what is there, and fetch again what is not right.")
@click.pass_obj
def pull(config: Config, key: str, controlnet: str | None, folder: Path | None, *, yes: bool, force: bool) -> int:
    """Fetch a model, or a ControlNet of it, from the hub; prints its folder."""
    from safelight import models, published

    config = _with_models(config, folder)
    what = published.named(models.load(config), key, controlnet, config.paths.models)
    # huggingface_hub reads these when it is imported. Offline is for jobs; who asks for a pull wants the network.
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        os.environ.pop(name, None)
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    from safelightd import pull as pulling

    return pulling.run(config, what, yes=yes, force=force)


def _with_models(config: Config, folder: Path | None) -> Config:
    """Return the settings with another models folder, whose registrations count then."""
    from dataclasses import replace

    return replace(config, paths=replace(config.paths, models=folder or config.paths.models))


def main() -> None:
    """Run one process; the exit code is the class of what went wrong."""
    try:
        status = group.main(prog_name="safelightd", standalone_mode=False)
    except click.exceptions.Abort:
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except SafelightError as error:
        click.echo(str(error), err=True)
        sys.exit(error.exit_code)
    except OSError as error:
        if logging.getLogger("safelight").isEnabledFor(logging.DEBUG):
            traceback.print_exc()
        remedy = "safelight doctor looks at every folder; -v tells where this happened."
        click.echo(f"{error.filename or 'The system'}: {error.strerror or error}. {remedy}", err=True)
        sys.exit(SafelightError.exit_code)
    sys.exit(status or 0)


if __name__ == "__main__":
    main()
