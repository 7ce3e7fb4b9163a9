"""`wait`, `watch` and `status` as a person uses them, on a real server and a real ledger."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from datetime import datetime, timedelta
from typing import Any

import pytest
from click.testing import Result

from safelight import queueserver
from safelight.calibration import Calibration
from safelight.jobqueue import JobQueue
from tests.cli_steps import (
    CPU,
    WORKER,
    Safelight,
    end,
    ids_of,
    process,
    receipt_of,
    runner,
    start,
)
from tests.conftest import Installation


@pytest.fixture
def safelight(installation: Installation, queue: JobQueue) -> Safelight:
    """Runs a command line against the installation, whose server is up."""
    return runner(installation)


def test_wait_ends_when_all_are_done(safelight: Safelight, installation: Installation, queue: JobQueue) -> None:
    a, b = ids_of(safelight("add", "a b", "c d"))
    end(installation, queue, a)
    later = threading.Timer(0.5, end, (installation, queue, b))
    later.start()

    result = safelight("wait", a, b, "--timeout", "20")

    later.join()
    assert result.exit_code == 0, result.output
    assert [line.split()[:2] for line in result.stdout.splitlines()] == [[a, "done"], [b, "done"]]


@pytest.mark.parametrize("state", ["failed", "quarantined", "cancelled"])
def test_wait_is_1_when_one_did_not_make_it(
    safelight: Safelight, installation: Installation, queue: JobQueue, state: str
) -> None:
    a, b = ids_of(safelight("add", "a b", "c d"))
    end(installation, queue, a)
    end(installation, queue, b, state, "because")

    result = safelight("wait", a, b)

    assert result.exit_code == 1
    assert f"{b} {state} because" in result.stdout


def test_wait_is_1_when_time_runs_out_and_says_what_holds(safelight: Safelight) -> None:
    (job,) = ids_of(safelight("add", "a red fox"))
    started = time.monotonic()

    result = safelight("wait", job, "--timeout", "0.4")

    assert result.exit_code == 1
    assert 0.4 <= time.monotonic() - started < 30
    assert "No worker is running" in result.stderr


def test_wait_counts_what_only_the_ledger_knows(
    safelight: Safelight, installation: Installation, queue: JobQueue
) -> None:
    (job,) = ids_of(safelight("add", "a red fox"))
    end(installation, queue, job)
    queue.server.flushall()

    assert safelight("wait", job).exit_code == 0


def test_wait_survives_a_restart_of_the_server(installation: Installation) -> None:
    """systemd restarts a server that died; a script that waits must not notice."""
    from safelightd import redis_server

    paths = installation.paths
    paths.redis.mkdir(parents=True)
    paths.socket.parent.mkdir(parents=True)
    command = redis_server.command(redis_server.find_binary(), paths.socket, paths.redis)
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        (job,) = ids_of(_when_up(runner(installation), "add", "a red fox"))
        waiting = process(installation, "wait", job, "--timeout", "30")
        assert waiting.stderr is not None
        assert "No worker" in waiting.stderr.readline()
        server.kill()
        server.wait()
        assert "does not answer" in waiting.stderr.readline() + waiting.stderr.readline()
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        connection = _connected(installation.config.url)
        end(installation, JobQueue(connection), job)
        connection.close()

        assert waiting.wait(20) == 0
        waiting.communicate()
    finally:
        server.kill()
        server.wait()


def _when_up(safelight: Safelight, *words: str) -> Result:
    deadline = time.monotonic() + 20
    while (result := safelight(*words)).exit_code == 4 and time.monotonic() < deadline:
        pass
    return result


def _connected(url: str) -> Any:
    deadline = time.monotonic() + 20
    while True:
        try:
            return queueserver.connect(url)
        except queueserver.QueueUnreachable:
            if time.monotonic() > deadline:
                raise


def test_interrupt_ends_wait_quietly_with_130(installation: Installation, queue: JobQueue) -> None:
    (job,) = ids_of(runner(installation)("add", "a red fox"))
    waiting = process(installation, "wait", job)
    assert waiting.stderr is not None
    assert "No worker" in waiting.stderr.readline()

    waiting.send_signal(signal.SIGINT)
    out, err = waiting.communicate(timeout=300)

    assert (waiting.returncode, out, err) == (130, "", "")


def test_a_reader_that_goes_away_is_not_an_error(installation: Installation, queue: JobQueue) -> None:
    runner(installation)("add", "a red fox, " * 30, "-n", "2000")
    listing = process(installation, "list", "--json")
    assert listing.stdout is not None
    listing.stdout.read(10)
    listing.stdout.close()

    assert listing.stderr is not None
    assert listing.stderr.read() == ""
    listing.stderr.close()
    listing.wait(10)


def test_watch_follows_a_job_through_its_phases(
    safelight: Safelight, installation: Installation, queue: JobQueue
) -> None:
    (job,) = ids_of(safelight("add", "a red fox"))
    start(queue, job)
    queue.progress(job, {"phase": "denoise", "i": 1, "n": 4, "seconds_left": 3.0})
    spec = queue.spec(job)
    assert spec is not None
    receipt = receipt_of(installation, spec, "done")
    installation.ledger.record(receipt)
    later = threading.Timer(0.5, queue.conclude, (receipt, WORKER))
    later.start()

    result = safelight("watch", job, "--json")

    later.join()
    first, last = (json.loads(line) for line in result.stdout.splitlines())
    assert (first["phase"], first["i"], first["n"], first["seconds_left"]) == ("denoise", 1, 4, 3.0)
    assert (last["state"], len(last["outputs"])) == ("done", 1)
    assert result.exit_code == 0


def test_watch_in_a_terminal_draws_and_ends_with_its_jobs(installation: Installation, queue: JobQueue) -> None:
    safelight = runner(installation)
    (job,) = ids_of(safelight("add", "a red fox"))
    start(queue, job)
    queue.progress(job, {"phase": "denoise", "i": 1, "n": 4, "seconds_left": 3.0})
    terminal, its_side = pty.openpty()
    watching = subprocess.Popen(
        [sys.executable, "-m", "safelight.cli", "watch", job],
        env={**installation.env, "PYTHONPATH": "client:daemon", "TERM": "xterm", "COLUMNS": "100"},
        stdout=its_side, stderr=its_side, stdin=its_side,
    )  # fmt: skip
    os.close(its_side)
    drawn = b""
    while b"denoise 1/4" not in drawn:
        drawn += os.read(terminal, 4096)
    spec = queue.spec(job)
    assert spec is not None
    receipt = receipt_of(installation, spec, "done")
    installation.ledger.record(receipt)
    queue.conclude(receipt, WORKER)
    try:
        while True:
            drawn += os.read(terminal, 4096)
    except OSError:  # EIO: the other side has closed
        os.close(terminal)

    assert watching.wait(10) == 0
    assert b"done" in drawn


def test_status_says_when_all_will_be_done(safelight: Safelight, queue: JobQueue) -> None:
    safelight("add", "a red fox", "-n", "3", "--steps", "2")
    safelight("add", "a red fox", "--model", "tiny-flux-dev")
    shown = Calibration(
        load={"tiny-flux-schnell/encode/float32 on cpu": 1.0}, work={"tiny-flux-schnell/decode/whole": 100.0}
    )  # fmt: skip
    queue.set_calibration(shown)
    queue.publish_worker(WORKER, 60, device="cpu", machine=CPU.model_dump_json(), engine="idle")

    result = safelight("status", "--json")

    found = json.loads(result.stdout)
    assert (found["waiting"], found["without_estimate"]) == (4, 1)
    assert 3 * 30 < found["seconds"] < 3 * 40
    assert found["done_at"] is not None
    assert found["workers"][0]["name"] == WORKER
    text = safelight("status").stdout
    assert "4 jobs, about 2 min of work" in text
    assert "1 of them without an estimate" in text


def closed_window() -> str:
    """A window that opens in two hours, for an hour."""
    opens = datetime.now() + timedelta(hours=2)
    return f"{opens:%H}:00-{opens + timedelta(hours=1):%H}:00"


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--priority", "night"], 'priority night, [policy] window = "{window}"'),
        (["--not-before", "2099-01-01T06:00"], "not_before"),
    ],
)
def test_jobs_that_may_not_start_yet_are_given_no_end_and_the_reason(
    safelight: Safelight, installation: Installation, queue: JobQueue, words: list[str], why: str
) -> None:
    window = closed_window()  # once: the hour may change while this test runs
    why = why.format(window=window)
    with installation.config.source.open("a") as settings:
        settings.write(f'window = "{window}"\n')  # below [policy], which is the last section
    queue.set_calibration(Calibration(load={"tiny-flux-schnell/encode/float32 on cpu": 1.0}))
    queue.publish_worker(WORKER, 60, device="cpu", machine=CPU.model_dump_json(), engine="")
    (now,) = ids_of(safelight("add", "a red fox"))
    assert json.loads(safelight("status", "--json").stdout)["done_at"] is not None
    (job,) = ids_of(safelight("add", "a blue cat", *words))

    found = json.loads(safelight("status", "--json").stdout)
    waiting = safelight("wait", job, "--timeout", "0")

    opens = datetime.fromisoformat(found["later_from"])
    start = f"{opens:%d %b %Y %H:%M}" if why == "not_before" else f"{opens:%H:%M}"
    assert (found["waiting"], found["later"], found["done_at"]) == (2, 1, None)
    assert opens.strftime("%H:%M") == ("06:00" if why == "not_before" else window[:5])
    assert re.search(
        rf"^Waiting   2 jobs, .*; 1 of them not before .*{start}$", safelight("status").stdout, re.MULTILINE
    )
    assert re.search(rf"^{job} .* single +a blue cat$", safelight("list").stdout, re.MULTILINE)
    assert re.search(rf"^1 job does not start before .*{start} \({re.escape(why)}\)\.$", waiting.stderr, re.MULTILINE)
    assert "not start before" not in safelight("wait", now, "--timeout", "0").stderr


def test_status_shows_how_far_a_running_job_is(safelight: Safelight, queue: JobQueue) -> None:
    (job,) = ids_of(safelight("add", "a red fox"))
    start(queue, job)
    queue.progress(job, {"phase": "denoise", "i": 3, "n": 4, "seconds_left": 12.0})

    assert f"{job}  denoise 3/4, 12 s left" in safelight("status").stdout


def test_status_counts_how_the_jobs_of_the_last_day_ended(
    safelight: Safelight, installation: Installation, queue: JobQueue
) -> None:
    long_ago, *jobs = ids_of(safelight("add", "a b", "c d", "e f", "g h"))
    for job, state in zip((long_ago, *jobs), ("failed", "done", "done", "quarantined"), strict=True):
        end(installation, queue, job, state, "because")
    queue.server.zincrby("safelight:ended", -86_500, long_ago)

    assert json.loads(safelight("status", "--json").stdout)["ended_last_day"] == {"done": 2, "quarantined": 1}
    assert "Ended     2 done, 1 quarantined in the last 24 hours" in safelight("status").stdout.splitlines()


def test_status_and_doctor_count_what_the_inbox_has_refused(
    safelight: Safelight, installation: Installation, queue: JobQueue
) -> None:
    rejected = installation.paths.rejected
    assert "Rejected" not in safelight("status").stdout
    rejected.mkdir(parents=True)
    for name in ("old", "new"):
        (rejected / f"20261122-213145-1234567~{name}.txt").write_text("--stpes 4")
        (rejected / f"20261122-213145-1234567~{name}.txt.error.txt").write_text("unknown option")
    two_days_ago = time.time() - 2 * 86_400
    os.utime(rejected / "20261122-213145-1234567~old.txt.error.txt", (two_days_ago, two_days_ago))

    found = json.loads(safelight("status", "--json").stdout)["rejected"]
    warnings = [one for one in json.loads(safelight("doctor", "--json").stdout) if one["name"] == "rejected"]

    assert found == {"folder": str(rejected), "files": 2, "last_day": 1}
    says = f"2 files became no jobs, 1 in the last 24 hours: {rejected}/*.error.txt say why"
    assert f"Rejected  {says}" in safelight("status").stdout.splitlines()
    assert [(one["look"], one["says"]) for one in warnings] == [("warn", says)]


def test_a_folder_of_the_refused_that_cannot_be_read_is_told_by_doctor_and_stops_no_status(
    safelight: Safelight, installation: Installation, queue: JobQueue
) -> None:
    installation.paths.rejected.parent.mkdir(parents=True, exist_ok=True)
    installation.paths.rejected.write_text("in its place")

    status = safelight("status", "--json")
    found = [one for one in json.loads(safelight("doctor", "--json").stdout) if one["name"] == "rejected"]

    assert (status.exit_code, json.loads(status.stdout)["rejected"]) == (0, None)
    assert [(one["look"], one["says"]) for one in found] == [
        ("fail", f"{installation.paths.rejected}: Not a directory")
    ]
