"""What the ledger holds is in the line after every start, also where a part of it cannot be read or was never handed
over."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest

from safelight.ids import submission_of
from safelight.jobqueue import JobQueue
from safelightd.recovery import LATE_S, Late
from tests.conftest import Installation
from tests.daemon.test_worker import Running, eventually, specs_of


def write_down(installation: Installation, name: str, age_s: float = 0.0) -> None:
    installation.ledger.accept({name: specs_of(installation, ["a fox"], accepted=False)})
    moment = time.time() - age_s
    os.utime(installation.paths.jobs / f"{name}.jsonl", (moment, moment))


def test_a_submission_is_late_once_its_client_has_had_its_time_and_only_once(installation: Installation) -> None:
    write_down(installation, "known")
    ledger = installation.ledger
    late = Late(ledger.open_submissions())

    assert late.look(ledger, 0) == []

    write_down(installation, "a")
    write_down(installation, "b")

    assert late.look(ledger, LATE_S) == []
    assert late.look(ledger, 2 * LATE_S - 0.1) == []  # too soon to look again
    assert late.look(ledger, 2 * LATE_S) == ["a", "b"]
    assert late.look(ledger, 9 * LATE_S) == []


@pytest.mark.parametrize("age_s", [3600.0, 7.0, -3600.0])
def test_no_clock_that_is_set_and_no_slow_disk_hides_a_submission(installation: Installation, age_s: float) -> None:
    """Its file has the time of another clock, or that at which its bytes were written: the name came when those were on
    the disk, after looks that did not see it."""
    late, ledger = Late(), installation.ledger
    assert late.look(ledger, 0) == []
    assert late.look(ledger, 1800) == []

    write_down(installation, "a", age_s)

    assert [late.look(ledger, now) for now in (1806, 1812, 1820)] == [[], ["a"], []]


def test_a_submission_that_is_closed_and_opened_again_is_looked_at_again(installation: Installation) -> None:
    write_down(installation, "a")
    late, file = Late(["a"]), installation.paths.jobs / "a.jsonl"
    away = file.rename(installation.root / "away")

    assert late.look(installation.ledger, 0) == []

    away.rename(file)

    assert [late.look(installation.ledger, now) for now in (10, 20, 30)] == [[], ["a"], []]


def test_files_that_cannot_be_read_keep_no_worker_from_starting_and_no_other_job_from_running(
    installation: Installation, queue: JobQueue
) -> None:
    """Each a folder: what reading answers then is an error of the system's, as for a bad sector or another's file."""
    paths = installation.paths
    counted, ended, begun, fine = specs_of(installation, ["ok", "ok", "ok", "ok"])
    for file in (
        paths.jobs / "20200101-000000-000abcd.jsonl",
        paths.attempts / f"{counted.id}.json",
        paths.receipts / f"{ended.id}.json",
        paths.publishing / f"{begun.id}.json",
        paths.state / "calibration.json",
    ):
        file.mkdir(parents=True)
    (paths.state / "models.seen").write_bytes(b"\xff\xfe")
    queue.submit([counted, ended, begun, fine])
    worker = Running(installation, queue)
    try:
        worker.all_in([fine], "done")
        worker.all_in([counted, ended, begun], "failed")

        assert "cannot be read" in queue.fields(counted.id)["error"]

        worker.stop()
        worker.start()
        worker.all_in(worker.submit("ok"), "done")
    finally:
        worker.kill()


@pytest.fixture
def daemon(installation: Installation, queue: JobQueue) -> Iterator[Running]:
    running = Running(installation, queue)
    running.ready()
    yield running
    running.kill()


@pytest.mark.parametrize("lost", ["the request", "the old receipt, too"])
def test_a_retry_that_the_queue_never_heard_of_or_forgot_is_brought_back(daemon: Running, lost: str) -> None:
    """`retry` was killed between ledger and queue, or a power cut took the last second of the server's file."""
    retried, other = daemon.submit("fail", "fail")
    daemon.all_in([retried, other], "failed")
    daemon.stop()
    ledger = daemon.installation.ledger
    ledger.reopen(retried.id)
    if lost != "the request":
        (daemon.installation.paths.receipts / "old" / f"{retried.id}.1.json").write_text("{")
    daemon.start()
    eventually(lambda: ledger.ended() == {retried.id, other.id})
    daemon.stop()
    daemon.start()
    daemon.all_in(daemon.submit("ok"), "done")

    assert [daemon.log().count(f"start {spec.id}") for spec in (retried, other)] == [2, 1]
    assert [daemon.state(spec) for spec in (retried, other)] == ["failed", "failed"]


def test_a_retried_job_that_somebody_without_a_ledger_cancelled_stays_cancelled(daemon: Running) -> None:
    (spec,) = daemon.submit("fail")
    daemon.all_in([spec], "failed")
    daemon.stop()
    daemon.installation.ledger.reopen(spec.id)

    assert daemon.queue.requeue(spec.id)
    assert daemon.queue.cancel([spec.id]) == ["cancelled"]

    daemon.start()
    daemon.all_in(daemon.submit("ok"), "done")

    assert daemon.state(spec) == "cancelled"
    assert daemon.log().count(f"start {spec.id}") == 1


def test_a_submission_with_the_time_of_another_clock_is_found_by_a_running_worker(daemon: Running) -> None:
    daemon.all_in(daemon.submit("ok"), "done")
    (spec,) = specs_of(daemon.installation, ["ok"])
    os.utime(daemon.installation.paths.jobs / f"{submission_of(spec.id)}.jsonl", (time.time() - 60,) * 2)
    daemon.all_in([spec], "done")

    assert daemon.times_done(spec) == 1
