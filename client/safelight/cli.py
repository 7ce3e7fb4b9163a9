"""The command line of the client: the group, its global options, and the one place where errors become exit codes.

Imports click and nothing heavier: a command's module is imported when the command is asked for, and imports what it
needs when it runs, so that `--help` stays fast.
"""

from __future__ import annotations

import difflib
import errno
import io
import sys
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import click

from safelight import __version__
from safelight.commands.client import Client
from safelight.errors import SafelightError

COMMANDS = {
    "add": "adding:add",
    "batch": "adding:batch",
    "list": "listing:list_jobs",
    "show": "listing:show",
    "wait": "following:wait",
    "watch": "following:watch",
    "status": "standing:status",
    "cancel": "changing:cancel",
    "retry": "changing:retry",
    "pause": "changing:pause",
    "resume": "changing:resume",
    "collect": "results:collect",
    "prune": "results:prune",
    "rerun": "results:rerun",
    "concat": "machine:concat",
    "plan": "planning:plan",
    "up": "machine:up",
    "demo": "machine:demo",
    "doctor": "machine:doctor",
    "models": "models:models",
    "service": "machine:service",
    "completion": "machine:completion",
}
"""Each command, in the order of --help, and the function below safelight.commands that is it."""

INTERRUPTED = 130
"""128 + SIGINT, as shells count."""


WORDS = "safelight.words"
"""Where a context keeps what was typed, for messages."""


class Commands(click.Group):
    """A group whose commands are imported when they are asked for, and whose errors leave by one door."""

    def list_commands(self, _ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, _ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module, function = COMMANDS[name].split(":")
        command: click.Command = getattr(import_module(f"safelight.commands.{module}"), function)
        return command

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta[WORDS] = list(args)
        return super().parse_args(ctx, args)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in COMMANDS and not args[0].startswith("-"):
            near = difflib.get_close_matches(args[0], COMMANDS, n=1)
            remedy = f"Did you mean {near[0]}?" if near else "safelight --help lists them."
            ctx.fail(f"There is no command {args[0]!r}. {remedy}")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except SafelightError as error:
            _leave(ctx, str(error), error.exit_code)
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise  # whoever read us has gone; click ends quietly
            _leave(ctx, f"{error.filename or 'The system'}: {error.strerror or error}.", SafelightError.exit_code)
        except UnicodeEncodeError as error:
            _leave(ctx, _not_utf8(ctx.meta[WORDS], error), click.UsageError.exit_code)
        except KeyboardInterrupt:
            ctx.exit(INTERRUPTED)


def _not_utf8(words: list[str], error: UnicodeEncodeError) -> str:
    """Return what a person wrote that is no text; the name of a file may be any bytes, what says a job may not."""
    wrong = [word for word in words if word != word.encode(errors="ignore").decode()]
    shown = ", ".join(map(repr, wrong)) or repr(error.object[error.start : error.end])
    return f"{shown} is not UTF-8 text. Type it again, or copy it from safelight list."


def _leave(ctx: click.Context, message: str, exit_code: int) -> NoReturn:
    if ctx.params.get("verbose"):
        traceback.print_exc()
    from safelight.display import line

    click.echo("\n".join(line(text) for text in message.splitlines()), err=True)
    ctx.exit(exit_code)


@click.command(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option(
    "--config",
    "config_file",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="The settings file to use, instead of $SAFELIGHT_CONFIG or the usual one.",
)
@click.option("-v", "--verbose", is_flag=True, help="Say which installation is used; show the traceback of an error.")
@click.version_option(__version__, prog_name="safelight")
@click.pass_context
def main(ctx: click.Context, config_file: Path | None, verbose: bool) -> None:  # noqa: FBT001 - click passes by name
    """Make pictures and clips overnight: queue prompts now, collect the files in the morning.

    \b
    Queue one picture, and wait for it:
        safelight add "a red fox in the snow" --steps 4 --seed 7
        safelight wait ID && safelight show ID

    \b
    Queue a night's work from files, one prompt a line, and take the results:
        safelight batch prompts.txt
        safelight collect --batch prompts --to ~/Pictures

    Jobs run in the background, one at a time, in order of --priority. Nothing is lost when the machine or a
    program stops: what was accepted is on disk first. `safelight status` says what runs and what holds it up,
    `safelight doctor` what is wrong with the installation.

    \b
    Exit codes: 0 done, 1 a job failed, or the system refused (a full disk, a failed copy), 2 usage,
    3 bad settings or installation, 4 the queue does not answer, 5 no usable GPU, 130 interrupted.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a prompt in any language, on a terminal of any encoding
    ctx.obj = Client(config_file, verbose=verbose)


if __name__ == "__main__":
    main(prog_name="safelight")
