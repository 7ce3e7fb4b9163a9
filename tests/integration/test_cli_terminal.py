"""What tables look like on a terminal, of several widths."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import termios

import pytest

from safelight.jobqueue import JobQueue
from tests.cli_steps import end, ids_of, runner
from tests.conftest import Installation

REASON = "flux-schnell at 1536x1536 needs about 15.2 GiB, 13.9 GiB is free. Lower the size, or close other programs."


def shown(installation: Installation, columns: int, *words: str) -> str:
    """Return what a command draws on a terminal so wide, without colours."""
    terminal, its_side = pty.openpty()
    termios.tcsetwinsize(its_side, (50, columns))
    env = {name: value for name, value in installation.env.items() if name not in ("COLUMNS", "LINES")}
    command = subprocess.Popen(
        [sys.executable, "-m", "safelight.cli", *words],
        env={**env, "PYTHONPATH": "client:daemon", "TERM": "xterm"},
        stdout=its_side, stderr=subprocess.DEVNULL, stdin=its_side,
    )  # fmt: skip
    os.close(its_side)
    drawn = b""
    try:
        while part := os.read(terminal, 4096):
            drawn += part
    except OSError:  # EIO: the other side has closed
        os.close(terminal)
    assert command.wait(20) == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", drawn.decode()).replace("\r\n", "\n")
    assert max(map(len, text.splitlines())) <= columns
    return text


@pytest.mark.parametrize("columns", [80, 100, 120, 132])
def test_list_has_every_column_with_ids_and_states_whole(
    installation: Installation, queue: JobQueue, columns: int
) -> None:
    prompt = "a red fox in the snow, " * 6
    done, set_aside = ids_of(runner(installation)("add", prompt, prompt, "--batch", "the-animals-of-this-winter"))
    end(installation, queue, done)
    end(installation, queue, set_aside, "quarantined", REASON)

    text = shown(installation, columns, "list")

    head, *rows = text.splitlines()
    assert head.split()[:4] == ["ID", "STATE", "MODEL", "BATCH"]
    assert [row.split()[:2] for row in rows if row[0] != " "] == [[set_aside, "quarantined"], [done, "done"]]
    assert re.search(rf"{done} +done +tiny-f.* +the-an.* +a red fox.*…$", text, re.MULTILINE)
    last = head.index("PROMPT")
    assert " ".join(row[last:].strip() for row in rows if done not in row) == REASON


def test_list_says_on_a_terminal_from_when_a_job_may_start(installation: Installation, queue: JobQueue) -> None:
    ids_of(runner(installation)("add", "a blue cat", "--not-before", "2099-01-01T06:00"))

    assert "(from 01 Jan 2099 06:00) a blue cat" in shown(installation, 140, "list")


def test_list_is_in_paragraphs_where_no_table_fits(installation: Installation, queue: JobQueue) -> None:
    (job,) = ids_of(runner(installation)("add", "a red fox in the snow"))
    end(installation, queue, job, "failed", REASON)

    first, *rest = shown(installation, 40, "list").splitlines()

    assert first == job
    assert " ".join(" ".join(rest).split()) == (
        f"STATE failed MODEL tiny-flux-schnell BATCH single PROMPT OR ERROR {REASON}"
    )


@pytest.mark.parametrize("columns", [40, 80, 100, 120, 132, 250])
def test_models_list_names_every_model_whole(installation: Installation, columns: int) -> None:
    text = shown(installation, columns, "models", "list")

    assert {row.split()[0] for row in text.splitlines() if row[0] != " "} - {"MODEL"} == set(installation.models.keys())
    pictures = sum(facts.kind == "image" for facts in installation.models.values())
    assert text.count("text-to-image") == pictures
