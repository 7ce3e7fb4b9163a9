"""A contact sheet: many pictures on one, each with what was asked for below it. Knows no job."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from safelight import durable

COLUMNS = 4
SIDE = 192
"""Pixels of each picture's longer side."""
MARGIN = 12
TEXT_SIZE, TEXT_LINES, TEXT_COLUMNS = 12, 3, 30
PAPER, INK = (250, 250, 248), (40, 40, 40)


@dataclass(frozen=True)
class Entry:
    """One picture of a sheet."""

    picture: Path
    caption: str


def sheet(entries: Sequence[Entry], columns: int = COLUMNS) -> Image.Image:
    """Return the entries row by row; a picture smaller than its place is enlarged without smoothing."""
    font = ImageFont.load_default(TEXT_SIZE)
    width, height = SIDE + MARGIN, SIDE + MARGIN + TEXT_LINES * (TEXT_SIZE + 4)
    rows = -(-len(entries) // columns)
    across = min(columns, len(entries))
    paper = Image.new("RGB", (across * width + MARGIN, rows * (height + MARGIN) + MARGIN), PAPER)
    pen = ImageDraw.Draw(paper)
    for i, entry in enumerate(entries):
        left, top = MARGIN + i % columns * width, MARGIN + i // columns * (height + MARGIN)
        with Image.open(entry.picture) as opened:
            picture = _fitted(opened.convert("RGB"))
        paper.paste(picture, (left + (SIDE - picture.width) // 2, top + (SIDE - picture.height) // 2))
        lines = textwrap.wrap(entry.caption, TEXT_COLUMNS, max_lines=TEXT_LINES, placeholder=" ...")
        pen.multiline_text((left, top + SIDE + 6), "\n".join(lines), fill=INK, font=font, spacing=4)
    return paper


def write(file: Path, entries: Sequence[Entry]) -> None:
    """Write the sheet as a PNG, whole or not at all."""
    made = io.BytesIO()
    sheet(entries).save(made, "PNG")
    durable.write(file, made.getvalue())


def _fitted(picture: Image.Image) -> Image.Image:
    scale = SIDE / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)
