"""What a person is told: once each, by commands that can hurt nothing."""

from __future__ import annotations

import json
import logging
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from safelight.config import NotifySection
from safelight.jobqueue import JobQueue
from safelight.receipt import Receipt
from safelightd.notices import ENDS_WITHIN_S, Notices
from tests.conftest import Installation
from tests.daemon.test_worker import Running, eventually
from tests.integration.making import image_spec

Make = Callable[..., Notices]


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def told(tmp_path: Path) -> Path:
    return tmp_path / "told.jsonl"


@pytest.fixture
def notices() -> Iterator[Callable[..., Notices]]:
    """Makes Notices that are closed at the end, as the worker closes its own."""
    made: list[Notices] = []

    def make(command: str, clock: Clock | None = None, **settings: Any) -> Notices:
        made.append(Notices(NotifySection(command=command, **settings), clock or Clock()))
        return made[-1]

    yield make
    for each in made:
        each.close()


def counts(queued: int) -> dict[str, int]:
    return {"queued": queued, "running": 0, "ended": 0}


def writes(file: Path) -> str:
    """A command that appends its stdin to a file."""
    return f"sh -c {shlex.quote(f'cat >> {shlex.quote(str(file))}')}"


def events(file: Path) -> list[dict[str, Any]]:
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text().splitlines()]


def receipt(state: str, error: str | None = None) -> Receipt:
    spec = image_spec(id="a-00001")
    return Receipt.model_validate(
        {"id": spec.id, "state": state, "spec": spec, "error": error, "finished_at": "2026-11-22T07:00:00+00:00"}
    )


def test_an_empty_line_is_told_once_with_what_became_of_the_jobs(told: Path, notices: Make) -> None:
    night = notices(writes(told))
    for state in ("done", "done", "failed"):
        night.ended(receipt(state))
        night.look(counts(2), holds={})
    for _ in range(3):
        night.look(counts(0), holds={})
    eventually(lambda: events(told))

    (event,) = events(told)
    assert (event["event"], event["done"], event["failed"]) == ("queue.empty", 2, 1)
    assert event["message"] == "All jobs have ended: 2 done, 1 failed."


def test_a_line_is_not_empty_while_another_worker_runs_its_last_job(told: Path, notices: Make) -> None:
    night = notices(writes(told))
    night.ended(receipt("done"))
    night.look({"queued": 0, "running": 1, "ended": 3}, holds={})
    night.close()

    assert events(told) == []


def test_a_line_that_was_never_filled_is_not_told(told: Path, notices: Make) -> None:
    night = notices(writes(told))
    night.look(counts(0), holds={})
    night.ended(None)  # it came back to the line
    night.look(counts(0), holds={})
    night.close()

    assert events(told) == []


def test_a_job_that_was_set_aside_is_told_at_once_with_its_reason(told: Path, notices: Make) -> None:
    notices(writes(told)).ended(receipt("quarantined", "It broke the engine 3 times"))
    eventually(lambda: events(told))

    (event,) = events(told)
    assert (event["event"], event["id"]) == ("job.quarantined", "a-00001")
    assert "It broke the engine 3 times" in event["message"]


def test_a_hold_is_told_when_it_lasts_and_again_only_after_it_was_lifted(told: Path, notices: Make) -> None:
    clock = Clock()
    night = notices(writes(told), clock, hold_minutes=10)
    for minute in (0, 5, 9, 11, 20):
        clock.now = 60.0 * minute
        night.look(counts(5), holds={"disk": "1.0 GiB free"})
        if minute == 11:
            eventually(lambda: events(told))
    night.look(counts(5), holds={})
    for minute in (21, 25, 32):
        clock.now = 60.0 * minute
        night.look(counts(5), holds={"disk": "0.5 GiB free"})
    eventually(lambda: len(events(told)) == 2)

    assert [(event["hold"], event["reason"]) for event in events(told)] == [
        ("disk", "1.0 GiB free"), ("disk", "0.5 GiB free"),
    ]  # fmt: skip


def test_a_night_in_which_every_job_comes_back_is_told_once_until_one_ends(told: Path, notices: Make) -> None:
    clock = Clock()
    night = notices(writes(told), clock, hold_minutes=10)
    for minute, holds in enumerate([{"machine": "no room; the next job starts 5 s after that"}, {}] * 10):
        clock.now = 60.0 * minute
        night.ended(None)
        night.taken_back("no room: a game has 12.0 GiB")
        night.look(counts(5), holds)
        if minute == 10:
            eventually(lambda: events(told))
    night.ended(receipt("done"))
    night.look(counts(4), holds={})
    for minute in (30, 39):
        clock.now = 60.0 * minute
        night.taken_back("no room: a game has 12.0 GiB")
        night.look(counts(4), holds={})
    clock.now = 60.0 * 41
    night.look(counts(0), holds={})  # all were cancelled meanwhile
    eventually(lambda: len(events(told)) == 2)

    event, empty = sorted(events(told), key=lambda each: str(each["event"]))
    assert (event["event"], event["hold"], event["reason"]) == ("hold.lasts", "machine", "no room: a game has 12.0 GiB")
    assert event["message"] == "No job gets through: machine: no room: a game has 12.0 GiB"
    assert empty["event"] == "queue.empty"


def test_what_was_taken_back_before_the_line_was_cancelled_is_nothing_to_the_next_night(
    notices: Make, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    night = notices("true", clock, hold_minutes=10)
    night.taken_back("no room: a game has 12.0 GiB")
    night.look(counts(1), holds={})
    night.look(counts(0), holds={})
    with caplog.at_level(logging.INFO):
        for minute in (1000, 1011):
            clock.now = 60.0 * minute
            night.look(counts(5), holds={})

    assert "hold.lasts" not in caplog.text


@pytest.mark.parametrize("command", ["/no/such/program", "sh -c 'exit 3'", "true", "sh -c 'exec 0<&-; sleep 300'"])
def test_a_command_that_fails_reads_nothing_or_does_not_end_hurts_nothing(command: str, notices: Make) -> None:
    night = notices(command)
    began = time.monotonic()
    night.ended(receipt("quarantined", "x" * 200_000))
    night.look(counts(0), holds={})
    night.close()

    assert time.monotonic() - began < 60


def test_a_command_that_takes_too_long_is_killed_with_its_children(
    notices: Make, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    mark = f"{30_000 + os.getpid()}.5"
    night = notices(f"sh -c 'sleep {mark} & wait'", clock)
    night.ended(receipt("quarantined", "x"))

    def sleeping() -> list[psutil.Process]:
        return [process for process in psutil.process_iter(["cmdline"]) if mark in (process.info["cmdline"] or [])]

    eventually(sleeping)
    clock.now = ENDS_WITHIN_S + 1
    with caplog.at_level(logging.WARNING):
        night.look(counts(1), holds={})

    assert "notice.killed" in caplog.text
    eventually(lambda: not sleeping())


def test_what_is_under_way_does_not_outlive_the_worker(notices: Make) -> None:
    mark = f"{40_000 + os.getpid()}.5"
    night = notices(f"sleep {mark}")
    night.ended(receipt("quarantined", "x"))
    night.close()

    assert not [process for process in psutil.process_iter(["cmdline"]) if mark in (process.info["cmdline"] or [])]


def test_without_a_desktop_nothing_happens_but_a_line_in_the_log() -> None:
    bus = {"DBUS_SESSION_BUS_ADDRESS": "unix:path=/nonexistent/bus"}
    done = subprocess.run(
        [sys.executable, "-m", "safelightd.notices"], input='{"message": "All jobs have ended."}\n', text=True,
        capture_output=True, timeout=300, env={**os.environ, "PYTHONPATH": ":".join(sys.path), **bus},
    )  # fmt: skip

    assert done.returncode == 1
    assert done.stderr.startswith("no desktop could be told")


def test_a_worker_tells_of_a_job_that_was_set_aside_and_of_the_empty_line(
    installation: Installation, queue: JobQueue, told: Path
) -> None:
    file = installation.root / "safelight.toml"
    file.write_text(file.read_text() + f"[notify]\ncommand = {json.dumps(writes(told))}\n")
    worker = Running(installation, queue)
    try:
        fine, poisoned = worker.submit("ok", "crash")
        worker.all_in([fine], "done")
        worker.all_in([poisoned], "quarantined")
        eventually(lambda: len(events(told)) == 2)
    finally:
        worker.kill()

    assert [event["event"] for event in events(told)] == ["job.quarantined", "queue.empty"]
    assert (events(told)[0]["id"], events(told)[1]["done"]) == (poisoned.id, 1)
