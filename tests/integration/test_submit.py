"""Handing jobs over while the server comes and goes: none is lost, none is queued twice."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pytest

from safelight import ids, queueserver, submit
from safelight.errors import InvalidJob, QueueUnreachable, SafelightError
from safelight.jobqueue import JobQueue
from safelight.jobspec import JobSpec, check
from safelight.machine import GIB, Machine
from safelightd import redis_server
from tests.conftest import Installation


class Server:
    """A real server that a test may kill and start again on the same data."""

    def __init__(self, installation: Installation) -> None:
        paths = installation.paths
        paths.redis.mkdir(parents=True)
        paths.socket.parent.mkdir(parents=True)
        self._command = redis_server.command(redis_server.find_binary(), paths.socket, paths.redis)
        self._url = installation.config.url
        self.start()

    def start(self) -> None:
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def queue(self) -> JobQueue:
        while True:
            try:
                return JobQueue(queueserver.connect(self._url, retries=0))
            except QueueUnreachable:
                assert self._process.poll() is None


@pytest.fixture
def server(installation: Installation) -> Iterator[Server]:
    server = Server(installation)
    yield server
    server.kill()


def specs(installation: Installation, count: int, **written: object) -> list[JobSpec]:
    made = check(
        {"prompt": "a red fox", "seed": 1, **written}, installation.models, "test",
        image_model="tiny-flux-schnell", video_model="tiny-wan-ti2v",
    )  # fmt: skip
    assert isinstance(made, JobSpec)
    submission = ids.submission_id(datetime.now())
    return [made.model_copy(update={"id": ids.job_id(submission, i), "index": i}) for i in range(1, count + 1)]


def test_jobs_are_queued_once_over_a_restart_of_the_server(installation: Installation, server: Server) -> None:
    queue = server.queue()
    jobs = specs(installation, 3)
    queue.submit(jobs[:1])  # as if the connection had broken after a part of it
    server.kill()
    back = threading.Timer(0.5, server.start)
    back.start()

    notes = submit.submit({"s": jobs}, queue, installation.ledger)

    back.join()
    assert notes == []
    assert server.queue().waiting_ids() == [job.id for job in jobs]
    queue.server.close()


@pytest.mark.parametrize("lets_go", [True, False])
def test_a_submission_that_fails_says_truly_what_is_left_of_it(
    installation: Installation, queue: JobQueue, monkeypatch: pytest.MonkeyPatch, *, lets_go: bool
) -> None:
    """A folder in the second's place fails its rename; that the disk became read-only as well is stood in for."""
    first, second = specs(installation, 1), specs(installation, 1)
    names = [ids.submission_of(jobs[0].id) for jobs in (first, second)]
    (installation.paths.jobs / f"{names[1]}.jsonl").mkdir(parents=True)
    unlink = Path.unlink

    def refused(path: Path, *, missing_ok: bool = False) -> None:
        if path.suffix == ".jsonl":
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        unlink(path, missing_ok=missing_ok)

    if not lets_go:
        monkeypatch.setattr(Path, "unlink", refused)
    told = "Nothing was queued.$" if lets_go else f"will be queued; do not submit them again: {first[0].id}$"
    with pytest.raises(SafelightError, match=f"Is a directory. .*{told}"):
        submit.submit(dict(zip(names, (first, second), strict=True)), queue, installation.ledger)

    assert [installation.ledger.knows(jobs[0].id) for jobs in (first, second)] == [not lets_go, False]
    assert queue.waiting_ids() == []


def test_jobs_stay_in_the_ledger_when_the_server_does_not_come_back(installation: Installation, server: Server) -> None:
    queue = server.queue()
    jobs = specs(installation, 2)
    server.kill()

    (note,) = submit.submit({ids.submission_of(jobs[0].id): jobs}, queue, installation.ledger, patience_s=0.3)

    assert "do not submit them again" in note
    assert list(installation.ledger.accepted()) == jobs
    queue.server.close()


def test_without_a_ledger_a_server_that_goes_away_is_an_error_naming_the_jobs(
    installation: Installation, server: Server
) -> None:
    queue = server.queue()
    jobs = specs(installation, 2)
    server.kill()

    with pytest.raises(QueueUnreachable, match=jobs[1].id):
        submit.submit({"s": jobs}, queue, None, patience_s=0.3)

    queue.server.close()


def test_a_server_that_does_not_confirm_is_told_and_the_jobs_are_queued(
    installation: Installation, server: Server
) -> None:
    queue = server.queue()
    jobs = specs(installation, 1)
    queue.server.config_set("appendonly", "no")  # refuses WAITAOF, as servers do that are too old for it

    (note,) = submit.submit({"s": jobs}, queue, None)

    assert "power cut" in note
    assert queue.waiting_ids() == [jobs[0].id]
    queue.server.close()


def test_an_interrupt_waits_until_the_jobs_are_named() -> None:
    """Whoever presses Ctrl-C in between would have jobs without knowing it."""
    done: list[str] = []

    with pytest.raises(KeyboardInterrupt):
        _interrupt_while_naming(done)

    assert done == ["named"]


def _interrupt_while_naming(done: list[str]) -> None:
    with submit.undisturbed():
        signal.pthread_kill(threading.get_ident(), signal.SIGINT)  # the client has this one thread; pytest may not
        done.append("named")


def _machine(vram_gib: float, free_gib: float) -> Machine:
    return Machine(
        device="cuda", gpu="a GPU", capability=(8, 9), vram_total_bytes=int(vram_gib * GIB),
        vram_free_bytes=int(free_gib * GIB), ram_total_bytes=64 * GIB, ram_available_bytes=60 * GIB, cpus=8,
    )  # fmt: skip


def test_what_fits_the_idle_machine_is_tight_and_not_hopeless(installation: Installation) -> None:
    """A game that runs now does not run all night."""
    jobs = specs(installation, 1, model="flux-schnell", precision="bf16", offload="model")

    (tight,) = submit.refuse_hopeless(jobs, [_machine(40, 10)], installation.models)

    assert tight.startswith("Tight: ")
    assert submit.refuse_hopeless(jobs, [_machine(40, 39)], installation.models) == []


def test_what_fits_one_of_two_machines_is_welcome(installation: Installation) -> None:
    jobs = specs(installation, 1, model="flux-schnell", precision="bf16", offload="model")

    assert submit.refuse_hopeless(jobs, [_machine(6, 5), _machine(40, 39)], installation.models) == []
    with pytest.raises(InvalidJob):
        submit.refuse_hopeless(jobs, [_machine(6, 5)], installation.models)


def test_the_users_limit_of_gpu_memory_counts(installation: Installation) -> None:
    jobs = specs(installation, 1, model="flux-schnell", precision="bf16", offload="model")

    with pytest.raises(InvalidJob):
        submit.refuse_hopeless(jobs, [_machine(40, 39)], installation.models, vram_gib=8)


def test_a_picture_is_not_sent_to_a_worker_that_cannot_see_it(installation: Installation, queue: JobQueue) -> None:
    jobs = [job.model_copy(update={"image": "0" * 64}) for job in specs(installation, 1)]

    with pytest.raises(InvalidJob, match="inbox of the worker's host"):
        submit.submit({"s": jobs}, queue, None)
    assert queue.waiting_ids() == []
