"""What a person sees of a clip while it runs: real processes, a model that draws, a terminal that has the colours."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from safelightd import preview, video
from tests.cli_steps import Safelight, ids_of, runner
from tests.conftest import Installation
from tests.e2e.test_chaos import REPOSITORY, Daemon

PROMPT = "a red circle moving right on a white background"
CLIP = (PROMPT, "--model", "demo-wan", "--seed", "3")
LATENT_PIXELS = 16
"""To each side of a latent's: a clip of 128x128 is 8 x 8 small."""

BLOCK = re.compile(r"\x1b\[38;2;(\d+);(\d+);(\d+);48;2;(\d+);(\d+);(\d+)m(▀+)")


@pytest.mark.timeout(300)
def test_a_clip_is_seen_while_it_runs_and_its_preview_goes_with_it(installation: Installation) -> None:
    safelight = runner(installation)
    daemon = Daemon(installation)
    try:
        when_up(safelight)
        (first,) = ids_of(safelight("add", *CLIP, "--steps", "8"))  # nothing is known of the model's colours yet
        assert safelight("wait", first, "--timeout", "120").exit_code == 0
        (job,) = ids_of(safelight("add", *CLIP, "--steps", "100"))
        drawn, seen = watched(installation, job)
        receipt = installation.ledger.receipt(job)
    finally:
        daemon.stop()

    assert receipt is not None
    assert receipt.state == "done"
    pictures = [np.asarray(Image.open(io.BytesIO(content))) for content in seen]
    first_frame = next(video.read_frames(installation.paths.outbox / receipt.outputs[0].path))
    height, width = (side // LATENT_PIXELS for side in first_frame.shape[:2])
    assert {picture.shape for picture in pictures} == {(height, width, 3)}
    small = np.asarray(Image.fromarray(first_frame).resize((width, height), Image.Resampling.BOX), dtype=float)
    assert np.corrcoef(small.ravel(), pictures[-1].ravel().astype(float))[0, 1] > 0.8
    assert set(rows_drawn(drawn)) & {row for picture in pictures for row in rows_of(picture)}
    assert list(installation.paths.previews.glob("*.jpg")) == []
    assert list(installation.paths.previews.glob(".*")) == []


def when_up(safelight: Safelight) -> None:
    deadline = time.monotonic() + 60
    while safelight("status").exit_code:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def watched(installation: Installation, job: str) -> tuple[str, list[bytes]]:
    """Return what `safelight watch` draws until the job has ended, and each preview that lay there meanwhile."""
    terminal, its_side = pty.openpty()
    watching = subprocess.Popen(
        [sys.executable, "-m", "safelight.cli", "watch", job],
        env={
            **installation.env, "PYTHONPATH": f"{REPOSITORY}/client:{REPOSITORY}/daemon",
            "TERM": "xterm-256color", "COLORTERM": "truecolor", "COLUMNS": "100", "LINES": "40",
        },
        stdout=its_side, stderr=its_side, stdin=its_side,
    )  # fmt: skip
    os.close(its_side)
    drawn: list[bytes] = []
    reading = threading.Thread(target=read_all, args=(terminal, drawn))
    reading.start()
    file = preview.picture(installation.paths, job)
    seen: list[bytes] = []
    while watching.poll() is None:
        content = content_of(file)
        if content and content not in seen[-1:]:
            seen.append(content)
        time.sleep(0.02)
    reading.join()
    os.close(terminal)
    assert watching.returncode == 0
    assert seen, f"no preview while the job ran: it took less than the {preview.EVERY_S:g} s after which one is due?"
    return b"".join(drawn).decode(), seen


def read_all(terminal: int, drawn: list[bytes]) -> None:
    try:
        while part := os.read(terminal, 65536):
            drawn.append(part)
    except OSError:  # EIO: the other side has closed
        return


def content_of(file: Path) -> bytes | None:
    try:
        return file.read_bytes()
    except FileNotFoundError:
        return None


Row = tuple[tuple[int, ...], ...]
"""Of a terminal: the colours above and below of each character."""


def rows_drawn(drawn: str) -> list[Row]:
    rows = []
    for line in drawn.splitlines():
        blocks = [tuple(map(int, found.groups()[:6])) for found in BLOCK.finditer(line) for _ in found[7]]
        if blocks:
            rows.append(tuple(blocks))
    return rows


def rows_of(picture: np.ndarray) -> list[Row]:
    """Return the rows of characters that show a picture, two pixels each."""
    pairs = zip(picture[::2], picture[1::2], strict=True)
    return [tuple((*map(int, a), *map(int, b)) for a, b in zip(above, below, strict=True)) for above, below in pairs]
