"""Writes docs/cli.md from the commands themselves: `python -m safelight.clidoc > docs/cli.md`. A test compares them."""

from __future__ import annotations

from collections.abc import Iterator

import click

from safelight.cli import main

WIDTH = 100

HEAD = """\
# The command line

What `safelight COMMAND --help` says.
This page is generated: `python -m safelight.clidoc > docs/cli.md`.

"""


def document() -> str:
    """Return the page: the help of the group, of each command, and of each command of those."""
    return HEAD + "\n".join(_sections(main, "safelight", None))


def _sections(command: click.Command, name: str, parent: click.Context | None) -> Iterator[str]:
    # What a command sets for itself, such as other names of its options, counts in its help, too.
    settings = {**command.context_settings, "terminal_width": WIDTH, "max_content_width": WIDTH}
    ctx = click.Context(command, parent=parent, info_name=name, **settings)
    yield f"## {ctx.command_path}\n\n```text\n{command.get_help(ctx)}\n```\n"
    if isinstance(command, click.Group):
        for below in command.list_commands(ctx):
            found = command.get_command(ctx, below)
            assert found is not None
            yield from _sections(found, below, ctx)


if __name__ == "__main__":
    click.echo(document(), nl=False)
