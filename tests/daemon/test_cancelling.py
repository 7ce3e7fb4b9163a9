"""What `safelight cancel` leaves behind: real commands, a real worker, full disks and lost queues."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import Result

from safelight.jobqueue import JobQueue
from safelight.jobspec import JobSpec
from tests.cli_steps import runner
from tests.conftest import Installation
from tests.daemon.test_worker import Running, eventually


@pytest.fixture
def worker(installation: Installation, queue: JobQueue) -> Iterator[Running]:
    running = Running(installation, queue)
    running.ready()
    yield running
    running.kill()


def safelight(worker: Running, *words: str) -> Result:
    return runner(worker.installation)(*words)


def has_ended(worker: Running, spec: JobSpec) -> str | None:
    receipt = worker.installation.ledger.receipt(spec.id)
    return receipt.state if receipt else None


def wipe(worker: Running) -> None:
    """Lose all that the queue knew, and wait until the worker has filled it from the ledger."""
    worker.queue.server.flushall()
    eventually(worker.queue.filled)


@pytest.fixture
def small_receipts(installation: Installation) -> Iterator[Path]:
    """The folder of receipts on a file system of 64 KiB."""
    folder = installation.paths.receipts
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_cancellation_that_cannot_be_written_down_keeps_no_worker_from_being_heard(
    small_receipts: Path, worker: Running
) -> None:
    worker.queue.set_user_hold("for the test")
    (job,) = worker.submit("ok")
    (small_receipts / ".filler").write_bytes(b"x" * 65536)
    worker.queue.cancel([job.id])
    seen = worker.queue.workers()[0].seen_at
    eventually(lambda: worker.queue.workers()[0].seen_at > seen + 4)

    assert worker.queue.unwritten() == [job.id]


def test_what_cannot_be_removed_of_a_job_that_ended_stops_no_worker(worker: Running) -> None:
    """A folder of another user, or a file system below it."""
    worker.queue.set_user_hold("for the test")
    gone, other = worker.submit("ok", "ok")
    stuck = worker.installation.paths.unfinished / gone.id
    stuck.mkdir(parents=True)
    if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(stuck)], capture_output=True, check=False).returncode:
        pytest.skip("mounting a file system needs root")
    try:
        worker.queue.cancel([gone.id])
        worker.queue.lift_user_hold()
        worker.all_in([other], "done")
        eventually(lambda: has_ended(worker, gone) == "cancelled")
    finally:
        subprocess.run(["umount", "--lazy", str(stuck)], check=True)


def test_jobs_cancelled_while_the_disk_is_full_stay_cancelled_when_the_queue_is_lost(
    small_receipts: Path, worker: Running
) -> None:
    safelight(worker, "pause")
    jobs = worker.submit("ok", "ok")
    filler = small_receipts / ".filler"
    filler.write_bytes(b"x" * 65536)

    cancelled = safelight(worker, "cancel", "--all")

    assert cancelled.stdout.splitlines() == [f"{spec.id} cancelled" for spec in jobs]
    assert "No space left on device" in cancelled.stderr
    assert [has_ended(worker, spec) for spec in jobs] == [None, None]

    filler.unlink()
    eventually(lambda: [has_ended(worker, spec) for spec in jobs] == ["cancelled", "cancelled"])
    wipe(worker)
    assert [worker.state(spec) for spec in jobs] == ["cancelled", "cancelled"]


def test_what_was_cancelled_in_the_queue_alone_is_written_down_by_the_worker(worker: Running) -> None:
    worker.queue.set_user_hold("for the test")
    kept, retried = worker.submit("ok", "ok")

    assert worker.queue.cancel([kept.id, retried.id]) == ["cancelled", "cancelled"]
    assert safelight(worker, "retry", retried.id).exit_code == 0
    eventually(lambda: has_ended(worker, kept) == "cancelled")
    wipe(worker)
    worker.queue.lift_user_hold()
    worker.all_in([retried], "done")

    assert worker.state(kept) == "cancelled"
    assert worker.times_done(kept) == 0


def test_what_was_retried_and_cancelled_again_in_the_queue_alone_stays_cancelled_over_a_restart(
    worker: Running,
) -> None:
    worker.queue.set_user_hold("for the test")
    (spec,) = worker.submit("ok")
    safelight(worker, "cancel", spec.id)
    safelight(worker, "retry", spec.id)
    assert worker.state(spec) == "queued"
    worker.kill()
    assert worker.queue.cancel([spec.id]) == ["cancelled"]
    worker.queue.lift_user_hold()
    worker.start()
    eventually(lambda: has_ended(worker, spec))

    assert has_ended(worker, spec) == "cancelled"
    assert worker.times_done(spec) == 0


def test_a_job_that_waits_to_be_published_is_not_cancelled(worker: Running) -> None:
    """Its engine died while it published: it is finished, and the next attempt only gives its file the name."""
    (spec,) = worker.submit("torn")
    note = worker.installation.paths.publishing / f"{spec.id}.json"
    eventually(note.exists)
    worker.queue.set_user_hold("for the test")
    eventually(lambda: worker.state(spec) == "queued")

    assert safelight(worker, "cancel", "--all").stdout == f"{spec.id} finished: is not cancelled, but published\n"
    assert worker.state(spec) == "queued"

    assert worker.queue.cancel([spec.id]) == ["cancelled"]  # as a client does that cannot see the ledger
    eventually(lambda: worker.state(spec) == "queued")
    worker.queue.lift_user_hold()
    worker.all_in([spec], "done")

    assert has_ended(worker, spec) == "done"
    assert not note.exists()
    assert worker.times_done(spec) == 1


def test_a_cancelled_job_whose_engine_was_killed_leaves_no_half_file(worker: Running) -> None:
    (spec,) = worker.submit("hang")
    eventually(lambda: worker.log() == [f"start {spec.id}"])
    begun = worker.installation.paths.unfinished / spec.id / "output.mp4"
    begun.parent.mkdir(parents=True)
    begun.write_bytes(b"half a clip")
    worker.queue.set_user_hold("for the test")
    worker.kill()
    worker.start()
    eventually(lambda: worker.state(spec) == "queued")

    assert safelight(worker, "cancel", spec.id).stdout == f"{spec.id} cancelled\n"
    assert not begun.parent.exists()


def test_a_running_job_that_the_queue_has_lost_is_asked_to_stop(worker: Running) -> None:
    (spec,) = worker.submit("slow ok")
    eventually(lambda: worker.log() == [f"start {spec.id}"])
    worker.queue.server.flushall()

    assert safelight(worker, "cancel", spec.id).stdout == f"{spec.id} running: asked to stop\n"
    worker.all_in([spec], "cancelled")

    assert has_ended(worker, spec) == "cancelled"
    assert worker.times_done(spec) == 0

    assert safelight(worker, "retry", spec.id).exit_code == 0
    worker.all_in([spec], "done")
