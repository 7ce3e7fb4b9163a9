"""How the client shows things: columns, durations, sizes. On a terminal with rich; elsewhere as plain, whole lines."""

from __future__ import annotations

import sys
from collections.abc import Container, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

GIB = 2**30

PREVIEW_COLUMNS_MAX = 64

GAP = 2
"""Characters between two columns."""

LAST_LEAST, CUT_LEAST = 16, 8
"""Characters that are left of the last column, and of one that may be cut, where the line is too short."""

STATE_STYLES = {
    "running": "bold cyan",
    "queued": "",
    "done": "green",
    "failed": "red",
    "quarantined": "red",
    "cancelled": "dim",
}

LOOK_COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}


def on_terminal() -> bool:
    """Whether a person reads; there is no stdout at all where the shell has closed it (`>&-`)."""
    return sys.stdout is not None and sys.stdout.isatty()


def duration(seconds: float) -> str:
    """Return a duration as a person says it: "0.3 s", "45 s", "12 min", "3 h 20 min"."""
    minutes = round(seconds / 60)
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 90:
        return f"{seconds:.0f} s"
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if minutes else f"{hours} h"


def gib(size_bytes: float) -> str:
    return f"{size_bytes / GIB:.1f} GiB"


def clock(moment: datetime, now: datetime) -> str:
    """Return a moment as a wall clock shows it, with the date when it is not today's, and the year when it is far."""
    if abs((moment - now).days) > 300:
        return f"{moment:%d %b %Y %H:%M}"
    return f"{moment:%H:%M}" if moment.date() == now.date() else f"{moment:%a %d %b %H:%M}"


def line(text: str) -> str:
    """Return text as one line that no terminal takes for a command: control characters become spaces."""
    return "".join(character if character.isprintable() else " " for character in text)


def columns(
    heads: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    styled: int | None = None,
    cut: Sequence[int] = (),
    wrapped: Container[int] | None = None,
) -> None:
    """Print rows below their heads; on a terminal the last column gives way where the line is too short.

    Where even that is not enough each row is a paragraph that begins with its first cell, so that nothing is lost.

    Args:
        styled: the column that is coloured by what it says.
        cut: columns that are cut as well, before there are paragraphs.
        wrapped: the rows whose last cell goes on in further lines, where those of the others are cut; None: all.
    """
    rows = [[line(cell) for cell in row] for row in rows]
    if not on_terminal():
        _plain_columns(heads, rows)
        return
    from rich.console import Console
    from rich.text import Text

    texts = [[Text(cell) for cell in row] for row in rows]
    if styled is not None:
        for row in texts:
            row[styled].stylize(STATE_STYLES.get(row[styled].plain, ""))
    console = Console(highlight=False)
    widths = _widths(heads, texts, console.width, cut)
    if widths:
        _print_table(console, heads, texts, widths, wrapped)
    else:
        _print_paragraphs(console, heads, texts)


def _widths(heads: Sequence[str], rows: Sequence[Sequence[Text]], room: int, cut: Sequence[int]) -> list[int]:
    """Return how wide each column is within `room` characters; [] where they do not fit."""
    widths = [max(len(head), *(row[at].cell_len for row in rows), 0) for at, head in enumerate(heads)]
    last = len(heads) - 1
    left = room - sum(widths) - GAP * last
    for at, least in ((last, LAST_LEAST), *((at, CUT_LEAST) for at in reversed(cut))):
        taken = min(max(-left, 0), max(widths[at] - least, 0))
        widths[at] -= taken
        left += taken
    return widths if left >= 0 else []


def _print_table(
    console: Console,
    heads: Sequence[str],
    rows: Sequence[Sequence[Text]],
    widths: Sequence[int],
    wrapped: Container[int] | None,
) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0), header_style="bold")
    for head, width in zip(heads[:-1], widths[:-1], strict=True):
        table.add_column(head, width=width, no_wrap=True, overflow="ellipsis")
    table.add_column(heads[-1], width=widths[-1], overflow="fold")
    for number, row in enumerate(rows):
        if wrapped is not None and number not in wrapped:
            row[-1].no_wrap, row[-1].overflow = True, "ellipsis"
        table.add_row(*row)
    console.print(table)


def _print_paragraphs(console: Console, heads: Sequence[str], rows: Sequence[Sequence[Text]]) -> None:
    from rich.padding import Padding
    from rich.text import Text

    for row in rows:
        console.print(row[0], style="bold")
        named = [
            Text.assemble((f"{head} ", "dim"), cell)
            for head, cell in zip(heads[1:], row[1:], strict=True)
            if cell.plain not in ("", "-")
        ]
        console.print(Padding(Text("  ").join(named), (0, 0, 0, 4)))


def _plain_columns(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(cell) for cell in cells) for cells in zip(heads, *rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (heads, *rows)]
    click.echo("\n".join(text.rstrip() for text in lines))


class LiveBoard:
    """A few lines at the foot of the terminal that are drawn anew: a bar a running job, and notes below."""

    def __init__(self) -> None:
        from rich.live import Live

        self._live = Live(refresh_per_second=8, transient=True)

    def __enter__(self) -> LiveBoard:
        self._live.start()
        return self

    def __exit__(self, *_raised: object) -> None:
        self._live.stop()

    def say(self, text: str) -> None:
        """Print a line above the board, where it stays."""
        from rich.text import Text

        self._live.console.print(Text(text), soft_wrap=True)

    def show(
        self, bars: Sequence[tuple[str, str, int, int | None]], notes: Sequence[str], previews: Sequence[Path] = ()
    ) -> None:
        """Draw the board: (name, what it does, steps done, steps in all or None while unknown), and below it what the
        jobs look like so far, where there is such a file and the terminal has the colours."""
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        grid = Table.grid(padding=(0, 1))
        for name, text, done, total in bars:
            bar = ProgressBar(total=total, completed=done, width=30, pulse=total is None)
            grid.add_row(Text(name), bar, Text(text))
        shown = []
        if self._live.console.color_system == "truecolor":
            room = min(PREVIEW_COLUMNS_MAX, self._live.console.width), self._live.console.height // 2
            shown = [picture for file in previews if (picture := half_blocks(file, *room))]
        self._live.update(Group(grid, *shown, *(Text(line(note), style="dim") for note in notes)))


def half_blocks(file: Path, columns: int, lines: int) -> Text | None:
    """Return a picture as characters, two pixels each, no larger than that; None where there is no picture."""
    from PIL import Image
    from rich.text import Text

    try:
        with Image.open(file) as opened:
            picture = opened.convert("RGB")
    except (OSError, SyntaxError, ValueError):
        return None
    picture.thumbnail((max(columns, 1), 2 * max(lines, 1)))
    text = Text()
    for top in range(0, picture.height - 1, 2):
        for column in range(picture.width):
            above, below = (_hex(picture.getpixel((column, row))) for row in (top, top + 1))
            text.append("▀", style=f"{above} on {below}")
        text.append("\n")
    return text


def _hex(pixel: object) -> str:
    assert isinstance(pixel, tuple)
    return "#{:02x}{:02x}{:02x}".format(*pixel)
