"""Jobs of workers that died, and of others that live: who takes which up, and when."""

from __future__ import annotations

import secrets
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from safelight.jobqueue import JobQueue
from safelight.jobspec import JobSpec
from safelight.ledger import Attempts
from safelight.place import Place
from safelightd import gpulock, orphans
from safelightd.conclusion import Site
from tests.conftest import Installation
from tests.daemon.test_gpulock import holder
from tests.daemon.test_worker import Running, eventually, specs_of

HERE = socket.gethostname()


@pytest.fixture
def card() -> Iterator[str]:
    """The UUID of a card that no machine has; whoever looks at its lock leaves the file."""
    uuid = f"GPU-test-{secrets.token_hex(8)}"
    yield uuid
    (gpulock.SHARED / f"safelight-{uuid}.lock").unlink(missing_ok=True)


def lock_of(uuid: str) -> str:
    return str(gpulock.SHARED / f"safelight-{uuid}.lock")


def dispatched_to(worker: str, queue: JobQueue, installation: Installation, prompt: str = "ok") -> JobSpec:
    """Return a job that this worker has taken from the line and not yet noted in the ledger."""
    (spec,) = specs_of(installation, [prompt])
    queue.submit([spec])
    assert queue.dispatch(worker, Place.of(spec), f"rq:queue:{worker}", "x_1", "rq:job:x_1", {"status": "queued"})
    return spec


def run_by(worker: str, lock: str, queue: JobQueue, installation: Installation) -> JobSpec:
    """Return a job that this worker has begun."""
    spec = dispatched_to(worker, queue, installation)
    installation.ledger.note(Attempts(id=spec.id, attempts=1, running=True, worker=worker, lock=lock))
    return spec


def site_of(installation: Installation, queue: JobQueue) -> Site:
    def never() -> bool:
        raise AssertionError("nothing runs here")

    return Site(
        config=installation.config,
        models=installation.models,
        ledger=installation.ledger,
        queue=queue,
        worker=f"{HERE}-cpu",
        lock=str(installation.paths.state / "worker-cpu.lock"),
        kill_engine=never,
        device_is_well=lambda: None,
        wait=lambda _seconds: True,
    )


def test_a_job_of_a_card_that_was_taken_out_is_taken_up_at_the_next_start(
    installation: Installation, queue: JobQueue, card: str
) -> None:
    """The power went, and the machine came back with another card, or with its CPU in the settings."""
    spec = run_by(f"{HERE}-{card}", lock_of(card), queue, installation)
    worker = Running(installation, queue)
    try:
        worker.all_in([spec], "done")
    finally:
        worker.kill()

    assert worker.times_done(spec) == 1
    assert queue.running() == {}


@pytest.mark.parametrize("name", ["laptop.home-cpu", f"{HERE}-GPU-test-gone"])
def test_a_job_that_was_taken_and_not_begun_is_taken_up_under_another_name_or_device(
    installation: Installation, queue: JobQueue, name: str
) -> None:
    spec = dispatched_to(name, queue, installation)
    worker = Running(installation, queue)
    try:
        worker.all_in([spec], "done")
    finally:
        worker.kill()
        Path(lock_of("GPU-test-gone")).unlink(missing_ok=True)

    assert worker.times_done(spec) == 1


@pytest.mark.parametrize("has_begun", [True, False])
def test_a_live_workers_job_is_left_alone_until_that_worker_dies(
    installation: Installation, queue: JobQueue, card: str, *, has_begun: bool
) -> None:
    """However long the server has not heard of it; and no restart is needed when it dies for good."""
    other = holder(Path(lock_of(card)))
    name = f"{HERE}-{card}"
    spec = run_by(name, lock_of(card), queue, installation) if has_begun else dispatched_to(name, queue, installation)
    worker = Running(installation, queue)
    try:
        worker.all_in(worker.submit("ok"), "done")

        assert queue.running() == {spec.id: name}
        assert worker.times_done(spec) == 0

        other.kill()
        other.wait()
        worker.all_in([spec], "done")
    finally:
        worker.kill()
        other.kill()

    assert worker.times_done(spec) == 1


def test_a_job_that_only_the_ledger_knows_of_is_left_to_the_live_worker_and_taken_up_after_its_death(
    installation: Installation, queue: JobQueue, card: str
) -> None:
    """The server has lost everything since."""
    other = holder(Path(lock_of(card)))
    spec = run_by(f"{HERE}-{card}", lock_of(card), queue, installation)
    queue.server.flushall()
    worker = Running(installation, queue)
    try:
        worker.all_in(worker.submit("ok"), "done")

        assert worker.state(spec) is None

        other.kill()
        other.wait()
        worker.all_in([spec], "done")
    finally:
        worker.kill()
        other.kill()


@pytest.mark.parametrize("has_begun", [True, False])
def test_a_job_of_another_hosts_worker_is_taken_up_once_that_was_silent_for_long(
    installation: Installation, queue: JobQueue, card: str, *, has_begun: bool
) -> None:
    """Its lock cannot be looked at from here. A server that was away has forgotten every worker."""
    now = [1000.0]
    site, silence = site_of(installation, queue), orphans.Silence(clock=lambda: now[0])
    name = f"elsewhere-{card}"
    spec = run_by(name, lock_of(card), queue, installation) if has_begun else dispatched_to(name, queue, installation)

    def left_after(seconds: float) -> list[str]:
        now[0] += seconds
        return orphans.take_up(site, silence, [])

    queue.publish_worker(name, 60)
    assert left_after(0) == left_after(orphans.SILENT_S) == [spec.id]

    queue.forget_worker(name)
    assert left_after(0) == left_after(orphans.SILENT_S - 1) == [spec.id]

    queue.publish_worker(name, 60)
    assert left_after(1) == [spec.id]

    queue.forget_worker(name)
    assert left_after(1) == left_after(orphans.SILENT_S - 1) == [spec.id]
    assert left_after(1) == []
    assert queue.state(spec.id) == "queued"
    assert installation.ledger.interrupted() == []


def test_whoever_takes_a_job_up_keeps_its_worker_from_starting_and_others_from_doing_the_same(
    installation: Installation, queue: JobQueue, card: str
) -> None:
    spec = run_by(f"{HERE}-{card}", lock_of(card), queue, installation)
    with gpulock.deserted(Path(lock_of(card))) as is_mine:
        assert is_mine
        assert orphans.take_up(site_of(installation, queue), orphans.Silence(), [spec.id]) == [spec.id]
        assert queue.running() == {spec.id: f"{HERE}-{card}"}

    assert orphans.take_up(site_of(installation, queue), orphans.Silence(), [spec.id]) == []
    assert queue.state(spec.id) == "queued"


def test_a_lock_of_a_folder_that_is_gone_keeps_no_job(installation: Installation, queue: JobQueue) -> None:
    """The state folder was moved while the power was off."""
    gone = installation.root / "before" / "worker-cpu.lock"
    spec = run_by(f"{HERE}-cpu", str(gone), queue, installation)

    assert orphans.take_up(site_of(installation, queue), orphans.Silence(), [spec.id]) == []
    assert queue.state(spec.id) == "queued"
    assert not gone.parent.exists()


@pytest.mark.parametrize("finds_it", ["in the line", "as its own"])
def test_a_job_that_another_live_worker_runs_is_left_to_it_and_the_queue_hears_whose_it_is(
    installation: Installation, queue: JobQueue, card: str, finds_it: str
) -> None:
    """The server has lost that the other took it: its file was cut, or a copy of it was put in place."""
    other, name = holder(Path(lock_of(card))), f"{HERE}-{card}"
    spec = run_by(name, lock_of(card), queue, installation)
    assert queue.give_back(spec.id, name, 0)
    if finds_it == "as its own":  # its horse had died before it could look
        assert queue.dispatch(f"{HERE}-cpu", Place.of(spec), "rq:queue:q", "x_2", "rq:job:x_2", {"status": "queued"})
    worker = Running(installation, queue)
    try:
        eventually(lambda: queue.running() == {spec.id: name})
        worker.all_in(worker.submit("ok"), "done")

        assert queue.running() == {spec.id: name}
        assert queue.fields(spec.id)["worker"] == name
        assert installation.ledger.attempts(spec.id).worker == name
        assert worker.times_done(spec) == 0

        other.kill()
        other.wait()
        worker.all_in([spec], "done")
    finally:
        worker.kill()
        other.kill()

    assert worker.times_done(spec) == 1


def test_a_live_worker_keeps_its_job_though_the_file_of_its_lock_was_removed(
    installation: Installation, queue: JobQueue, card: str
) -> None:
    """logind does that to what a person had in /dev/shm, at their last logout."""
    worker = f"{HERE}-{card}"
    alive = holder(Path(lock_of(card)))
    spec = run_by(worker, lock_of(card), queue, installation)
    Path(lock_of(card)).unlink()
    queue.publish_worker(worker, 90, device="cuda")

    assert orphans.take_up(site_of(installation, queue), orphans.Silence(), []) == [spec.id]
    assert queue.running() == {spec.id: worker}

    alive.kill()
    alive.wait()
