"""What the ledger holds is in the line after every start, also where a part of it cannot be read or was never handed
over."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from safelight.jobqueue import JobQueue
from safelightd.recovery import LATE_S, written_late
from tests.conftest import Installation
from tests.daemon.test_worker import Running, eventually, specs_of

NOON = 1_800_000_000.0
HOUR = 3600.0


def written_at(installation: Installation, name: str, moment: float) -> None:
    spec = specs_of(installation, ["a fox"])[0]
    installation.ledger.accept({name: [spec]})
    file = installation.paths.jobs / f"{name}.jsonl"
    os.utime(file, (moment, moment))


def test_a_submission_is_late_once_its_client_has_had_its_time(installation: Installation) -> None:
    written_at(installation, "a", NOON)
    ledger = installation.ledger

    assert written_late(ledger, NOON - 1, NOON + 1) == ([], NOON - 1)  # looked a moment ago
    late, looked = written_late(ledger, NOON - LATE_S, NOON + LATE_S + 1)
    assert (late, looked) == (["a"], NOON + 1)
    assert written_late(ledger, looked, NOON + 60) == ([], NOON + 60 - LATE_S)


def test_a_clock_that_is_set_back_an_hour_hides_nothing(installation: Installation) -> None:
    looked = NOON - LATE_S
    written_at(installation, "before", NOON)  # by the old clock
    late, looked = written_late(installation.ledger, looked, NOON - HOUR)

    assert late == ["before"]

    written_at(installation, "after", NOON - HOUR + 1)
    late, looked = written_late(installation.ledger, looked, NOON - HOUR + 1 + 2 * LATE_S)

    assert late == ["after"]


def test_a_clock_that_is_set_forward_an_hour_hides_nothing(installation: Installation) -> None:
    written_at(installation, "before", NOON)
    late, looked = written_late(installation.ledger, NOON - LATE_S, NOON + HOUR)

    assert late == ["before"]
    assert looked == NOON + HOUR - LATE_S


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
