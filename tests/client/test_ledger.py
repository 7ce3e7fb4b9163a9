"""The ledger: what was accepted, started and ended, in files that survive the queue."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safelight.errors import Forgotten, LedgerDamaged
from safelight.ids import job_id, submission_id, submission_of
from safelight.ledger import Attempts, Ledger
from safelight.receipt import Receipt
from tests.client.test_paths import at
from tests.integration.making import image_spec

DATA = Path(__file__).parents[1] / "data"
FIRST, SECOND = "20261122-210000-000abcd", "20261122-210000-001abcd"


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(at(str(tmp_path)))


def specs(submission: str, count: int = 2) -> list:
    return [image_spec(id=job_id(submission, n), index=n) for n in range(1, count + 1)]


def receipt(job: str, state: str = "done", **fields: object) -> Receipt:
    made = {"id": job, "state": state, "spec": image_spec(id=job), "finished_at": "2026-11-23T06:00:00+01:00"}
    return Receipt.model_validate(made | fields)


# -- ids ---------------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(-10_000, 10_000), min_size=2, max_size=20))
def test_submission_ids_sort_in_the_order_they_were_given_whatever_the_clock_does(jumps_ms: list[int]) -> None:
    now = datetime(2026, 11, 22, 21, tzinfo=UTC)
    given_ids = []
    for jump in jumps_ms:
        now += timedelta(milliseconds=jump)
        given_ids.append(submission_id(now))

    assert sorted(given_ids) == given_ids
    assert len(set(given_ids)) == len(given_ids)


def test_job_ids_sort_and_lead_back_to_their_submission() -> None:
    ids = [job_id(FIRST, n) for n in (1, 2, 10, 99_999)]

    assert sorted(ids) == ids
    assert {submission_of(job) for job in ids} == {FIRST}


# -- accepted ----------------------------------------------------------------------------------------------------------


def test_what_was_accepted_is_there_in_its_order_and_known_by_id(ledger: Ledger) -> None:
    first, second = specs(FIRST), specs(SECOND)
    ledger.accept({SECOND: second, FIRST: first})

    assert [*first, *second] == list(ledger.accepted())
    assert ledger.open_submissions() == [FIRST, SECOND]
    assert first[1] == ledger.spec(first[1].id)
    assert ledger.knows(second[0].id)
    assert ledger.spec(job_id(FIRST, 3)) is None
    assert not ledger.knows("20200101-000000-000abcd-00001")


def test_an_empty_ledger_answers_everything(ledger: Ledger) -> None:
    job = job_id(FIRST, 1)

    assert ([], set(), [], None) == (list(ledger.accepted()), ledger.ended(), ledger.interrupted(), ledger.receipt(job))
    assert Attempts(id=job) == ledger.attempts(job)
    ledger.close_ended()


def test_a_submission_whose_every_job_has_ended_is_closed_and_still_known(ledger: Ledger) -> None:
    ledger.accept({FIRST: specs(FIRST), SECOND: specs(SECOND)})
    ledger.record_all([receipt(job_id(FIRST, 1)), receipt(job_id(FIRST, 2), "failed"), receipt(job_id(SECOND, 1))])
    ledger.close_ended()

    assert ledger.open_submissions() == [SECOND]
    assert specs(FIRST) == ledger.submission(FIRST)
    assert ledger.knows(job_id(FIRST, 1))


def test_a_job_written_down_alone_is_known_closed_and_opened_again(ledger: Ledger) -> None:
    """A client that could not write the ledger: the worker wrote the one job it saw."""
    (spec,) = specs(FIRST, 1)
    ledger.accept({spec.id: [spec]})
    ledger.record(receipt(spec.id, "failed"))
    ledger.close_ended()

    assert ledger.open_submissions() == []
    assert ledger.knows(spec.id)

    ledger.reopen(spec.id)

    assert [spec] == list(ledger.accepted())


def test_a_job_that_is_retried_loses_its_receipt_and_attempts_and_is_open_again(ledger: Ledger) -> None:
    ledger.accept({FIRST: specs(FIRST)})
    job = job_id(FIRST, 1)
    ledger.note(Attempts(id=job, attempts=3, crashes=3))
    for spec in specs(FIRST):
        ledger.record(receipt(spec.id, "quarantined"))
    ledger.close_ended()
    ledger.reopen(job)
    ledger.record(receipt(job, "failed"))
    ledger.reopen(job)

    assert ledger.receipt(job) is None
    assert ledger.ended() == {job_id(FIRST, 2)}
    assert ledger.attempts(job) == Attempts(id=job)
    assert ledger.open_submissions() == [FIRST]
    old = ledger.paths.receipts / "old"
    assert sorted(file.name for file in old.iterdir()) == [f"{job}.1.json", f"{job}.2.json"]


def test_jobs_that_were_opened_again_are_known_until_they_end_with_what_they_were_last(ledger: Ledger) -> None:
    jobs = [spec.id for spec in specs(FIRST)]
    ledger.accept({FIRST: specs(FIRST)})
    assert ledger.reopened() == {}
    for number, state in enumerate(("failed", *["quarantined"] * 9, "cancelled"), start=1):
        ledger.record(receipt(jobs[0], state))
        assert ledger.reopened() == {}
        ledger.reopen(jobs[0])
        assert ledger.reopened() == {jobs[0]: state}, number


def test_forgotten_jobs_are_known_to_have_ended_and_cannot_be_opened_again(ledger: Ledger) -> None:
    ledger.accept({FIRST: specs(FIRST), SECOND: specs(SECOND, 1)})
    ledger.record_all([receipt(job_id(FIRST, 1), "failed"), receipt(job_id(FIRST, 2)), receipt(job_id(SECOND, 1))])
    ledger.close_ended()

    assert ledger.forget({FIRST: [job_id(FIRST, 1), job_id(FIRST, 2)]}) == [FIRST]
    assert ledger.ended() == {job_id(SECOND, 1)}
    for refused in (ledger.receipt, ledger.reopen):
        with pytest.raises(Forgotten, match=f"{job_id(FIRST, 1)}: .*submit it anew"):
            refused(job_id(FIRST, 1))
    assert ledger.receipt(job_id(FIRST[:-1] + "e", 1)) is None


def test_what_is_open_or_has_not_ended_is_not_forgotten(ledger: Ledger) -> None:
    """It may have been retried since somebody decided."""
    ledger.accept({FIRST: specs(FIRST), SECOND: specs(SECOND)})
    ledger.record_all([receipt(spec.id, "failed") for spec in [*specs(FIRST), *specs(SECOND, 1)]])

    asked = {name: [spec.id for spec in specs(name)] for name in (FIRST, SECOND)}

    assert ledger.forget(asked) == []

    ledger.close_ended()
    ledger.reopen(job_id(FIRST, 2))

    assert ledger.forget(asked) == []
    assert ledger.forgotten() == set()
    assert len(ledger.ended()) == 2


def test_a_start_does_not_wait_for_whoever_moves_records(ledger: Ledger) -> None:
    ledger.accept({FIRST: specs(FIRST)})
    ledger.record_all([receipt(spec.id) for spec in specs(FIRST)])
    with (ledger.paths.state / "ledger.lock").open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        ledger.close_ended()

    assert ledger.open_submissions() == [FIRST]

    ledger.close_ended()

    assert ledger.open_submissions() == []


@pytest.mark.parametrize("content", ["", "{", '{"v": 1}\n', "[]\n", "\x00\n", '{"v": 2, "id": "x"}\n'])
def test_a_damaged_submission_is_named_and_the_others_are_still_closed(ledger: Ledger, content: str) -> None:
    damaged = ledger.paths.jobs / f"{FIRST}.jsonl"
    ledger.accept({SECOND: specs(SECOND, 1)})
    damaged.write_text(content or "\n")
    with pytest.raises(LedgerDamaged, match=rf"{damaged}:1: .*Move the file aside") as raised:
        list(ledger.accepted())

    assert "\n" not in str(raised.value)

    ledger.record(receipt(job_id(SECOND, 1)))
    ledger.close_ended()

    assert ledger.open_submissions() == [FIRST]


READ = [
    (lambda paths: paths.jobs, "jsonl", lambda ledger, name: ledger.submission(name)),
    (lambda paths: paths.attempts, "json", lambda ledger, name: ledger.attempts(name)),
    (lambda paths: paths.receipts, "json", lambda ledger, name: ledger.receipt(name)),
    (lambda paths: paths.publishing, "json", lambda ledger, name: ledger.intended(name)),
]


@pytest.mark.parametrize(("folder", "suffix", "read"), READ)
@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES])
def test_one_file_that_cannot_be_read_is_damaged_and_a_folder_that_cannot_is_the_machines_fault(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch, folder: Any, suffix: str, read: Any, code: int
) -> None:
    """A bad sector or another user's umask, which root's tests meet nowhere: the kernel's answer is stood in for."""
    file = folder(ledger.paths) / f"{FIRST}.{suffix}"
    file.parent.mkdir(parents=True)
    file.touch()

    def fail(path: Path) -> bytes:
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(LedgerDamaged, match=f"^{file}: cannot be read: {os.strerror(code)}. Move (it|the file) aside"):
        read(ledger, FIRST)

    def closed(path: Path) -> list[str]:
        raise PermissionError(errno.EACCES, "of the folder", str(path))

    monkeypatch.setattr(os, "listdir", closed)
    with pytest.raises(PermissionError, match="of the folder"):
        read(ledger, FIRST)


@pytest.mark.parametrize(("folder", "suffix", "read"), READ)
def test_a_folder_in_the_place_of_a_file_is_damaged(ledger: Ledger, folder: Any, suffix: str, read: Any) -> None:
    (folder(ledger.paths) / f"{FIRST}.{suffix}").mkdir(parents=True)

    with pytest.raises(LedgerDamaged, match="Is a directory"):
        read(ledger, FIRST)


def test_leftovers_of_a_killed_writer_are_nobodys_jobs(ledger: Ledger) -> None:
    ledger.accept({FIRST: specs(FIRST)})
    for folder, name in ((ledger.paths.jobs, f".{SECOND}.jsonl.77.part"), (ledger.paths.receipts, ".x.json.7.part")):
        folder.mkdir(exist_ok=True)
        (folder / name).write_text("half a li")

    assert specs(FIRST) == list(ledger.accepted())
    assert ledger.ended() == set()


def test_a_disk_that_cannot_take_the_submission_raises_and_keeps_nothing(ledger: Ledger) -> None:
    ledger.paths.jobs.mkdir(parents=True)
    (ledger.paths.jobs / f"{SECOND}.jsonl").mkdir()  # a rename onto a folder fails, after the first was staged
    with pytest.raises(OSError, match="directory"):
        ledger.accept({SECOND: specs(SECOND)})

    assert os.listdir(ledger.paths.jobs) == [f"{SECOND}.jsonl"]


def test_of_two_submissions_of_which_one_cannot_be_written_neither_is_there(ledger: Ledger) -> None:
    (ledger.paths.jobs / f"{SECOND}.jsonl").mkdir(parents=True)
    with pytest.raises(OSError, match="directory"):
        ledger.accept({FIRST: specs(FIRST), SECOND: specs(SECOND)})

    assert os.listdir(ledger.paths.jobs) == [f"{SECOND}.jsonl"]


def test_a_client_whose_state_folder_cannot_be_made_knows_that_it_cannot_write(ledger: Ledger) -> None:
    ledger.paths.state.parent.mkdir(parents=True, exist_ok=True)
    ledger.paths.state.write_text("a file, not a folder")

    assert not ledger.writable()
    ledger.paths.state.unlink()
    assert ledger.writable()


# -- started -----------------------------------------------------------------------------------------------------------


def test_attempts_of_version_1_load(ledger: Ledger) -> None:
    job = "20261122-210000-000abcd-00001"
    ledger.paths.attempts.mkdir(parents=True)
    shutil.copy(DATA / "v1_attempts.json", ledger.paths.attempts / f"{job}.json")
    found = ledger.attempts(job)

    assert (found.attempts, found.crashes, found.returns, found.running, found.worker) == (
        4,
        1,
        2,
        True,
        "laptop-GPU-0",
    )
    assert ledger.interrupted() == [found]


def test_interrupted_jobs_are_those_that_run_and_have_no_receipt(ledger: Ledger) -> None:
    running, given_back, ended, damaged = (job_id(FIRST, n) for n in range(1, 5))
    for job in (running, given_back, ended, damaged):
        ledger.note(Attempts(id=job, attempts=1, running=job != given_back, worker="w"))
    ledger.record(receipt(ended))
    (ledger.paths.attempts / f"{damaged}.json").write_text("{")

    assert [found.id for found in ledger.interrupted()] == [running]
    with pytest.raises(LedgerDamaged, match="Move it aside to forget the attempts"):
        ledger.attempts(damaged)

    ledger.forget_attempts(running)
    ledger.forget_attempts(running)

    assert ledger.interrupted() == []


# -- ended -------------------------------------------------------------------------------------------------------------


def test_an_intention_becomes_the_receipt_in_one_step(ledger: Ledger) -> None:
    job = job_id(FIRST, 1)
    ledger.intend(receipt(job))

    assert ledger.receipt(job) is None
    assert ledger.intended(job) == receipt(job)

    ledger.fulfil(job)

    assert ledger.receipt(job) == receipt(job)
    assert ledger.intended(job) is None
    assert ledger.ended() == {job}


def test_a_receipt_of_version_1_loads(ledger: Ledger) -> None:
    ledger.paths.receipts.mkdir(parents=True)
    job = "20261122-210000-000abcd-00001"
    shutil.copy(DATA / "v1_receipt.json", ledger.paths.receipts / f"{job}.json")
    found = ledger.receipt(job)

    assert found is not None
    assert (found.id, found.state, found.attempts) == (job, "done", 2)


def test_a_damaged_receipt_is_named_and_counts_as_an_end(ledger: Ledger) -> None:
    job = job_id(FIRST, 1)
    ledger.record(receipt(job))
    (ledger.paths.receipts / f"{job}.json").write_text("{")

    assert ledger.ended() == {job}
    with pytest.raises(LedgerDamaged, match=f"{job}.json: not a receipt"):
        ledger.receipt(job)


def test_a_thousand_receipts_are_written_together(ledger: Ledger) -> None:
    ids = {job_id(FIRST, n) for n in range(1, 1_001)}
    ledger.record_all(receipt(job, "cancelled") for job in sorted(ids))

    assert ledger.ended() == ids
