"""Log lines: one event a line, for journald or for a person."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

PROGRAM = """
import logging, os, sys
from safelightd import logs
if sys.argv[1:] == ["journal"]:
    stat = os.fstat(2)
    os.environ["JOURNAL_STREAM"] = f"{stat.st_dev}:{stat.st_ino}"
logs.set_up(verbose="--verbose" in sys.argv)
log = logs.Log("safelight.test")
"""


def said(lines: str, *arguments: str, env: dict[str, str] | None = None) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM + lines, *arguments],
        env={**os.environ, "PYTHONPATH": ":".join(sys.path), **(env or {})},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == ""
    return done.stderr.splitlines()


def test_a_person_sees_time_level_event_and_facts() -> None:
    (line,) = said('log.info("job.done", id="a-1", seconds=41.25, text="two words", empty="", nothing=None)')

    assert re.fullmatch(r"\d\d:\d\d:\d\d I job\.done id=a-1 seconds=41\.25 text='two words' empty=''", line)


def test_journald_gets_the_priority_on_every_line_and_no_time() -> None:
    lines = said(
        'log.debug("a.b")\nlog.info("a.b")\nlog.warning("a.b")\nlog.error("a.b")\n'
        'try: raise ValueError("x")\nexcept ValueError: log.exception("job.broke")',
        "journal",
    )

    assert lines[:4] == ["<6>a.b", "<4>a.b", "<3>a.b", "<3>job.broke"]
    assert lines[4] == "<3>Traceback (most recent call last):"
    assert all(line.startswith("<3>") for line in lines[4:])


def test_a_terminal_that_is_a_service_itself_gets_lines_for_a_person() -> None:
    """JOURNAL_STREAM is inherited; only a stderr that is that very stream goes to the journal."""
    (line,) = said('log.info("a.b")', env={"JOURNAL_STREAM": "9:12345"})

    assert re.fullmatch(r"\d\d:\d\d:\d\d I a\.b", line)


@pytest.mark.parametrize(
    ("written", "shown"),
    [("a\\nb", r"'a\nb'"), ("\\x1b[31mred", r"'\x1b[31mred'"), ("\\udcff.txt", r"'\udcff.txt'"), ("Füchse", "Füchse")],
)
def test_no_fact_can_forge_a_line_or_colour_a_terminal(written: str, shown: str) -> None:
    (line,) = said(f'log.info("a.b", file="{written}")', env={"PYTHONUTF8": "1"})

    assert line.endswith(f"a.b file={shown}")


def test_libraries_speak_from_warning_up_and_verbose_means_ours() -> None:
    program = (
        'logging.getLogger("diffusers").info("chatter")\nlogging.getLogger("x").warning("careful")\nlog.debug("d")'
    )

    assert [line.split(" ", 1)[1] for line in said(program)] == ["W careful"]
    assert [line.split(" ", 1)[1] for line in said(program, "--verbose")] == ["W careful", "D d"]


def test_setting_up_twice_says_everything_once() -> None:
    assert len(said('logs.set_up()\nlog.info("a.b")')) == 1
