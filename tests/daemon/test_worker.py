"""The worker against a real server, with real processes and real signals; the engine is scripted (no torch)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

import psutil
import pytest

from safelight import jobspec
from safelight.jobqueue import JobQueue
from safelight.jobspec import JobSpec
from safelight.ledger import job_id, submission_id
from tests.conftest import Installation

REPOSITORY = Path(__file__).parents[2]
PROGRAM = [sys.executable, str(Path(__file__).with_name("worker_process.py"))]


def specs_of(installation: Installation, prompts: list[str], **fields: object) -> list[JobSpec]:
    submission = submission_id(datetime.now())
    made = []
    for index, prompt in enumerate(prompts, start=1):
        written = {"prompt": prompt, "seed": index, **fields}
        spec = jobspec.check(
            written, installation.models, "test", image_model="tiny-flux-schnell", video_model="tiny-wan-ti2v"
        )
        assert isinstance(spec, JobSpec), spec
        now = datetime.now().astimezone().isoformat()
        made.append(spec.model_copy(update={"id": job_id(submission, index), "index": index, "submitted_at": now}))
    installation.ledger.accept({submission: made})
    return made


def eventually(true: Callable[[], object], timeout_s: float = 20) -> None:
    """Wait until something is so; the reading is a poll because what is waited for is another process's doing."""
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


class Running:
    """A worker process of the test, and what became of its jobs."""

    def __init__(self, installation: Installation, queue: JobQueue) -> None:
        self.installation = installation
        self.queue = queue
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(PROGRAM, env=self.env())

    def env(self) -> dict[str, str]:
        folders = (REPOSITORY / "client", REPOSITORY / "daemon", REPOSITORY)
        return {**self.installation.env, "PYTHONPATH": ":".join(map(str, folders))}

    def ready(self) -> None:
        eventually(lambda: self.queue.workers())

    def state(self, spec: JobSpec) -> str | None:
        return self.queue.state(spec.id)

    def submit(self, *prompts: str, **fields: object) -> list[JobSpec]:
        made = specs_of(self.installation, list(prompts), **fields)
        self.queue.submit(made)
        return made

    def all_in(self, specs: list[JobSpec], state: str, timeout_s: float = 20) -> None:
        eventually(lambda: all(self.state(spec) == state for spec in specs), timeout_s)

    def log(self) -> list[str]:
        file = self.installation.paths.outbox / "runs.log"
        return file.read_text().splitlines() if file.exists() else []

    def times_done(self, spec: JobSpec) -> int:
        return self.log().count(f"done {spec.id}")

    def engine(self) -> psutil.Process:
        return next(child for child in self._children() if any("scripted" in word for word in child.cmdline()))

    def horse(self) -> psutil.Process:
        return next(child for child in self._children() if not any("scripted" in word for word in child.cmdline()))

    def _children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children()

    def stop(self) -> int:
        self.process.terminate()
        return self.process.wait(20)


@pytest.fixture
def worker(installation: Installation, queue: JobQueue) -> Iterator[Running]:
    running = Running(installation, queue)
    running.ready()
    yield running
    family = [psutil.Process(running.process.pid), *running._children()] if running.process.poll() is None else []
    running.process.kill()
    running.process.wait()
    _, alive = psutil.wait_procs(family, timeout=5)
    assert alive == []


def test_jobs_run_in_order_within_their_priority(worker: Running) -> None:
    worker.queue.set_user_hold("for the test")
    eventually(lambda: any("user" in row.holds for row in worker.queue.workers()))
    low = worker.submit("ok", "ok", priority="low")
    normal = worker.submit("ok", "ok")
    high = worker.submit("ok", priority="high")
    worker.queue.lift_user_hold()
    worker.all_in([*low, *normal, *high], "done")

    expected = [spec.id for spec in (*high, *normal, *low)]
    assert expected == [line.split()[1] for line in worker.log() if line.startswith("start")]


def test_nothing_starts_while_the_user_holds_the_queue(worker: Running) -> None:
    worker.queue.set_user_hold("dinner")
    eventually(lambda: [row.holds.get("user") for row in worker.queue.workers()] == ["dinner"])
    (spec,) = worker.submit("ok")
    eventually(lambda: worker.queue.next_due([0, 1, 2, 3], time.time())[0] is not None)

    assert worker.state(spec) == "queued"
    assert worker.log() == []

    worker.queue.lift_user_hold()
    worker.all_in([spec], "done")


@pytest.mark.parametrize("victim", ["engine", "horse"])
def test_a_killed_process_means_the_job_runs_again_once_and_in_order(worker: Running, victim: str) -> None:
    first, second = worker.submit("slow ok", "ok")
    eventually(lambda: worker.log() == [f"start {first.id}"])
    getattr(worker, victim)().kill()
    worker.all_in([first, second], "done")

    assert [worker.times_done(spec) for spec in (first, second)] == [1, 1]
    assert [first.id, first.id, second.id] == [line.split()[1] for line in worker.log() if line.startswith("start")]


def test_a_killed_worker_takes_its_children_along_and_its_successor_finishes_the_job(worker: Running) -> None:
    first, second = worker.submit("slow ok", "ok")
    eventually(lambda: worker.log() == [f"start {first.id}"])
    children = worker._children()
    worker.process.kill()
    worker.process.wait()
    _, alive = psutil.wait_procs(children, timeout=5)

    assert alive == []

    worker.start()
    worker.all_in([first, second], "done")

    assert [worker.times_done(spec) for spec in (first, second)] == [1, 1]


def test_a_job_that_kills_the_engine_three_times_is_quarantined_and_the_rest_go_on(worker: Running) -> None:
    poison, fine = worker.submit("crash", "ok")
    worker.all_in([poison], "quarantined", timeout_s=30)
    worker.all_in([fine], "done")
    receipt = worker.installation.ledger.receipt(poison.id)

    assert receipt is not None
    assert (receipt.state, receipt.attempts) == ("quarantined", 3)
    assert "3 times" in (receipt.error or "")


def test_a_job_of_its_own_fault_fails_at_once_with_its_reason(worker: Running) -> None:
    bad, fine = worker.submit("fail", "ok")
    worker.all_in([bad], "failed")
    worker.all_in([fine], "done")
    receipt = worker.installation.ledger.receipt(bad.id)

    assert receipt is not None
    assert (receipt.error, receipt.phase, receipt.attempts) == ("it was told to fail", "denoise", 1)


def test_a_fault_of_the_machine_is_not_counted_until_the_sixth_time(worker: Running) -> None:
    (spec,) = worker.submit("machine machine machine machine machine ok")
    worker.all_in([spec], "done")

    assert (worker.queue.fields(spec.id) == 6 and True) or int(worker.queue.fields(spec.id)["attempts"]) == 6


def test_cancel_stops_a_running_job_within_a_step_and_a_waiting_one_at_once(worker: Running) -> None:
    running, waiting = worker.submit("slow", "slow")
    eventually(lambda: worker.log() == [f"start {running.id}"])

    assert worker.queue.cancel([running.id, waiting.id]) == ["asked", "cancelled"]

    worker.all_in([running, waiting], "cancelled", timeout_s=5)

    assert [f"start {running.id}"] == worker.log()


def test_sigterm_gives_the_running_job_back_uncounted_and_exits_0(worker: Running) -> None:
    (spec,) = worker.submit("slow ok")
    eventually(lambda: worker.log() == [f"start {spec.id}"])

    assert worker.stop() == 0
    assert worker.state(spec) == "queued"
    attempts = worker.installation.ledger.attempts(spec.id)
    assert (attempts.crashes, attempts.returns, attempts.running) == (0, 0, False)

    worker.start()
    worker.all_in([spec], "done")


def test_two_quick_sigterms_lose_nothing(worker: Running) -> None:
    (spec,) = worker.submit("slow ok")
    eventually(lambda: worker.log() == [f"start {spec.id}"])
    worker.process.terminate()
    worker.process.terminate()

    assert worker.process.wait(20) == 0
    assert worker.state(spec) == "queued"


def test_a_wiped_server_is_filled_again_from_the_ledger(worker: Running) -> None:
    specs = worker.submit("ok", "slow ok", "ok", "ok")
    eventually(lambda: f"start {specs[1].id}" in worker.log())
    worker.queue.server.flushall()
    eventually(lambda: worker.installation.ledger.ended() == {spec.id for spec in specs}, timeout_s=30)

    assert [worker.times_done(spec) for spec in specs] == [1, 1, 1, 1]
    worker.all_in(specs, "done")


def test_a_second_worker_on_the_same_device_is_refused(worker: Running) -> None:
    env = {**worker.installation.env, "PYTHONPATH": f"{REPOSITORY / 'client'}:{REPOSITORY / 'daemon'}:{REPOSITORY}"}
    second = subprocess.run(
        [sys.executable, str(REPOSITORY / "tests/daemon/worker_process.py")],
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
    )

    assert second.returncode != 0
    assert "Another worker uses this device" in second.stderr


def test_a_job_in_redis_that_calls_something_else_is_not_run(worker: Running, tmp_path: Path) -> None:
    """Whoever can write to Redis can put any function name into an RQ job; ours call one function only."""
    from rq.job import Job
    from rq.serializers import JSONSerializer

    marker = tmp_path / "owned"
    queue_name = next(row.name for row in worker.queue.workers())
    evil = Job.create("os.system", args=(f"touch {marker}",), connection=worker.queue.server, serializer=JSONSerializer,
                      origin=queue_name, id="evil", timeout=-1)  # fmt: skip
    evil.save()
    worker.queue.server.rpush(f"rq:queue:{queue_name}", "evil")
    (fine,) = worker.submit("ok")
    worker.queue.wake_all()
    worker.all_in([fine], "done")

    assert not marker.exists()


@pytest.mark.parametrize("name", ["os.system", "subprocess.run", "safelightd.worker.serve"])
def test_no_function_but_ours_is_ever_looked_up(queue: JobQueue, name: str) -> None:
    """RQ imports any dotted name a job asks for; a SafeJob does not, nor does it call back or call out."""
    from rq.job import Callback
    from rq.serializers import JSONSerializer

    from safelightd.worker import SafeJob

    call = Callback(name)
    SafeJob.create(name, args=("true",), id="evil", connection=queue.server, serializer=JSONSerializer,
                   on_success=call, on_failure=call, on_stopped=call).save()  # fmt: skip
    job = SafeJob.fetch("evil", connection=queue.server, serializer=JSONSerializer)

    with pytest.raises(PermissionError, match=name):
        job.func  # noqa: B018 - reading it is what RQ does
    assert (job.success_callback, job.failure_callback, job.stopped_callback) == (None, None, None)


def test_a_suspended_and_resumed_worker_runs_no_job_twice(worker: Running) -> None:
    (spec,) = worker.submit("slow")
    eventually(lambda: worker.log() == [f"start {spec.id}"])
    os.kill(worker.process.pid, signal.SIGSTOP)
    time.sleep(3)  # the point of the test: time passes while the worker stands still
    os.kill(worker.process.pid, signal.SIGCONT)
    worker.all_in([spec], "done")

    assert worker.times_done(spec) == 1
