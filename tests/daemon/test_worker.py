"""The worker against a real server, with real processes and real signals; the engine is scripted (no torch)."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timedelta
from pathlib import Path

import psutil
import pytest

from safelight import jobspec
from safelight.ids import job_id, submission_id, submission_of
from safelight.jobqueue import JobQueue
from safelight.jobspec import JobSpec
from safelight.ledger import Attempts
from safelight.machine import Machine
from safelight.place import Place
from safelightd import gpulock, redis_server
from safelightd.worker import SERVER_TIMEOUT_S
from tests.conftest import Installation

REPOSITORY = Path(__file__).parents[2]
PROGRAM = [sys.executable, str(Path(__file__).with_name("worker_process.py"))]


def specs_of(
    installation: Installation, prompts: list[str], *, accepted: bool = True, **fields: object
) -> list[JobSpec]:
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
    if accepted:
        installation.ledger.accept({submission: made})
    return made


def eventually(true: Callable[[], object], timeout_s: float = 120) -> None:
    """Wait until something is so; the reading is a poll because what is waited for is another process's doing."""
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def gone(process: psutil.Process) -> bool:
    """Whether a process has ended; who reaps it is not our business."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


class Running:
    """A worker process of the test, and what became of its jobs."""

    def __init__(self, installation: Installation, queue: JobQueue, program: Sequence[str] = PROGRAM) -> None:
        self.installation = installation
        self.queue = queue
        self.program = program
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(self.program, env=self.env())

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

    def all_in(self, specs: list[JobSpec], state: str, timeout_s: float = 120) -> None:
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

    def kill(self) -> None:
        """Kill the worker alone; its children die with it."""
        children = self._children() if self.process.poll() is None else []
        self.process.kill()
        self.process.wait()
        eventually(lambda: all(map(gone, children)), timeout_s=30)


@pytest.fixture
def worker(installation: Installation, queue: JobQueue) -> Iterator[Running]:
    running = Running(installation, queue)
    running.ready()
    yield running
    running.kill()


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
    worker.kill()
    worker.start()
    worker.all_in([first, second], "done")

    assert [worker.times_done(spec) for spec in (first, second)] == [1, 1]


def test_a_job_that_kills_the_engine_three_times_is_quarantined_and_the_rest_go_on(worker: Running) -> None:
    poison, fine = worker.submit("crash", "ok")
    worker.all_in([poison], "quarantined")
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


def test_a_fault_of_the_machine_is_not_counted_and_holds_the_next_start_off(worker: Running) -> None:
    (spec,) = worker.submit("machine ok")
    eventually(lambda: any("told to machine" in row.holds.get("machine", "") for row in worker.queue.workers()))
    attempts = worker.installation.ledger.attempts(spec.id)

    assert (attempts.crashes, attempts.returns) == (0, 1)

    worker.all_in([spec], "done")

    assert worker.queue.fields(spec.id)["attempts"] == "2"


def test_an_engine_that_has_no_files_or_threads_left_is_replaced_and_its_job_not_counted(worker: Running) -> None:
    (spec,) = worker.submit("spent ok")
    eventually(lambda: any("told to spent" in row.holds.get("machine", "") for row in worker.queue.workers()))
    attempts = worker.installation.ledger.attempts(spec.id)

    assert (attempts.crashes, attempts.returns) == (0, 1)

    worker.all_in([spec], "done")
    engines = (worker.installation.paths.outbox / "engines.log").read_text().split()

    assert len(set(engines)) == 2
    assert worker.queue.fields(spec.id)["attempts"] == "2"


def test_cancel_stops_a_running_job_within_a_step_and_a_waiting_one_at_once(worker: Running) -> None:
    running, waiting = worker.submit("slow", "slow")
    eventually(lambda: worker.log() == [f"start {running.id}"])

    assert worker.queue.cancel([running.id, waiting.id]) == ["asked", "cancelled"]

    worker.all_in([running, waiting], "cancelled", timeout_s=30)

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
    eventually(lambda: worker.installation.ledger.ended() == {spec.id for spec in specs})

    assert [worker.times_done(spec) for spec in specs] == [1, 1, 1, 1]
    worker.all_in(specs, "done")


def test_a_second_worker_on_the_same_device_is_refused(worker: Running) -> None:
    env = {**worker.installation.env, "PYTHONPATH": f"{REPOSITORY / 'client'}:{REPOSITORY / 'daemon'}:{REPOSITORY}"}
    second = subprocess.run(
        [sys.executable, str(REPOSITORY / "tests/daemon/worker_process.py")],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
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


Launch = Callable[..., Running]


@pytest.fixture
def launch(installation: Installation, queue: JobQueue) -> Iterator[Launch]:
    """Starts a worker with settings of its own: `worker` lines go into [worker], `rest` to the end of the file."""
    started: list[Running] = []

    def start(*, worker: str = "", rest: str = "", program: Sequence[str] = PROGRAM) -> Running:
        file = installation.root / "safelight.toml"
        file.write_text(file.read_text().replace('device = "cpu"\n', f'device = "cpu"\n{worker}\n') + rest)
        started.append(Running(installation, queue, program))
        return started[-1]

    yield start
    for running in started:
        running.kill()


class Server:
    """The queue server of the `queue` fixture, to be killed, stopped and started again."""

    def __init__(self, queue: JobQueue, installation: Installation) -> None:
        paths = installation.paths
        self.command = redis_server.command(redis_server.find_binary(), paths.socket, paths.redis)
        self.pid = int(queue.server.info("server")["process_id"])
        self.process: subprocess.Popen[bytes] | None = None

    def kill(self) -> None:
        process = psutil.Process(self.pid)
        process.kill()
        eventually(lambda: gone(process))

    def start(self) -> None:
        self.process = subprocess.Popen(self.command, stdout=subprocess.DEVNULL)
        self.pid = self.process.pid


@pytest.fixture
def server(queue: JobQueue, installation: Installation) -> Iterator[Server]:
    server = Server(queue, installation)
    yield server
    if server.process:
        server.process.kill()
        server.process.wait()


# -- the server goes away ---------------------------------------------------------------------------------------------


def test_a_server_killed_for_seconds_in_the_middle_of_a_job_costs_nothing(worker: Running, server: Server) -> None:
    first, second = worker.submit("slow", "ok")
    eventually(lambda: worker.log() == [f"start {first.id}"])
    server.kill()
    time.sleep(1.5)  # the point of the test: the server is away for a while
    server.start()
    worker.all_in([first, second], "done")

    assert [f"{word} {spec.id}" for spec in (first, second) for word in ("start", "done")] == worker.log()


def test_a_job_that_ends_while_the_server_is_away_is_done_and_not_run_again(worker: Running, server: Server) -> None:
    (spec,) = worker.submit("slow")
    eventually(lambda: worker.log() == [f"start {spec.id}"])
    server.kill()
    eventually(lambda: worker.times_done(spec) == 1)
    server.start()
    worker.all_in([spec], "done")

    assert worker.log() == [f"start {spec.id}", f"done {spec.id}"]
    assert worker.process.poll() is None


def test_a_worker_ends_politely_while_the_server_is_away_and_its_successor_knows_the_job(
    worker: Running, server: Server
) -> None:
    (spec,) = worker.submit("slow")
    eventually(lambda: worker.log() == [f"start {spec.id}"])
    server.kill()
    eventually(lambda: worker.times_done(spec) == 1)

    assert worker.stop() == 0

    server.start()
    worker.start()
    worker.all_in([spec], "done")

    assert worker.times_done(spec) == 1


def test_a_server_that_hangs_longer_than_the_timeout_costs_nothing(worker: Running, server: Server) -> None:
    (spec,) = worker.submit("slow")
    eventually(lambda: worker.log() == [f"start {spec.id}"])
    os.kill(server.pid, signal.SIGSTOP)
    time.sleep(SERVER_TIMEOUT_S + 1)  # the point of the test: answers come later than anyone waits
    os.kill(server.pid, signal.SIGCONT)
    worker.all_in([spec, *worker.submit("ok")], "done")

    assert worker.times_done(spec) == 1
    assert worker.queue.running() == {}


def test_a_job_that_comes_back_after_a_wipe_is_queued_again(worker: Running) -> None:
    """Progress written after the wipe must not look like a job that is known already."""
    (spec,) = worker.submit("slow ok")
    eventually(lambda: worker.log() == [f"start {spec.id}"])
    worker.queue.server.flushall()
    time.sleep(0.6)  # two reports of progress
    worker.horse().kill()
    worker.all_in([spec], "done")

    assert worker.times_done(spec) == 1


def test_a_worker_that_waits_for_its_server_ends_with_0_when_asked(installation: Installation) -> None:
    env = {**installation.env, "PYTHONPATH": f"{REPOSITORY / 'client'}:{REPOSITORY / 'daemon'}:{REPOSITORY}"}
    address = str(installation.root / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told:
        told.bind(address)
        told.settimeout(20)
        process = subprocess.Popen(PROGRAM, env={**env, "NOTIFY_SOCKET": address})

        assert told.recv(200) == b"STATUS=Waiting for the queue server"

    process.terminate()

    assert process.wait(10) == 0


# -- whose fault it was -----------------------------------------------------------------------------------------------


def test_an_engine_that_cannot_start_holds_the_queue_and_burns_no_job(launch: Launch) -> None:
    """A broken installation is not the job's fault."""
    worker = launch(program=[*PROGRAM, "/bin/false"])
    worker.ready()
    specs = worker.submit("ok", "ok")
    eventually(lambda: any("did not start" in row.holds.get("machine", "") for row in worker.queue.workers()))
    found = [worker.installation.ledger.attempts(spec.id) for spec in specs]

    assert [(attempts.crashes, attempts.returns) for attempts in found] == [(0, 0), (0, 0)]

    worker.stop()
    worker.program = PROGRAM
    worker.start()
    worker.all_in(specs, "done")


def test_an_engine_that_hangs_is_killed_at_its_phases_deadline_and_cancelled_when_asked(launch: Launch) -> None:
    worker = launch(rest="[worker.deadline_s]\ndenoise = 1\n")
    hung, cancelled, fine = worker.submit("hang ok", "hang", "ok")
    worker.all_in([hung], "done")
    receipt = worker.installation.ledger.receipt(hung.id)

    assert receipt is not None
    assert receipt.attempts == 2

    eventually(lambda: f"start {cancelled.id}" in worker.log())

    assert worker.queue.cancel([cancelled.id]) == ["asked"]

    worker.all_in([cancelled], "cancelled")
    worker.all_in([fine], "done")


def test_a_step_that_is_expected_to_take_longer_than_the_deadline_is_waited_for(launch: Launch) -> None:
    worker = launch(rest="[worker.deadline_s]\ndenoise = 1\n")
    (spec,) = worker.submit("long")
    worker.all_in([spec], "done")

    assert [receipt.attempts for receipt in [worker.installation.ledger.receipt(spec.id)] if receipt] == [1]


def test_an_engine_that_dies_after_it_has_published_has_done_its_job(worker: Running) -> None:
    (spec,) = worker.submit("crash crash late")
    worker.all_in([spec], "done")
    receipt = worker.installation.ledger.receipt(spec.id)

    assert receipt is not None
    assert receipt.state == "done"
    assert worker.log() == [f"start {spec.id}"] * 3 + [f"done {spec.id}"]


def test_a_job_that_is_finished_but_for_its_publishing_is_never_set_aside(worker: Running) -> None:
    """Its third crash would have been the last, and its file would have been removed."""
    (spec,) = worker.submit("crash crash torn ok")
    worker.all_in([spec], "done")

    assert (worker.installation.paths.outbox / f"{spec.id}.png").exists()
    assert worker.times_done(spec) == 1


def test_a_job_that_was_asked_to_cancel_is_not_run_after_its_worker_was_killed(worker: Running) -> None:
    (spec,) = worker.submit("hang slow")
    eventually(lambda: worker.log() == [f"start {spec.id}"])

    assert worker.queue.cancel([spec.id]) == ["asked"]

    eventually(lambda: not worker.queue.server.exists(f"safelight:cancel:{spec.id}"))  # the horse has heard it
    worker.kill()
    worker.start()
    worker.all_in([spec], "cancelled")

    assert worker.times_done(spec) == 0


def test_cancelling_jobs_as_they_end_leaves_queue_and_ledger_of_one_mind(worker: Running) -> None:
    specs = worker.submit(*["ok"] * 12)
    ids = [spec.id for spec in specs]
    eventually(lambda: worker.times_done(specs[1]) == 1)
    answers = worker.queue.cancel(ids)
    eventually(lambda: worker.queue.counts() == {"queued": 0, "running": 0, "ended": 12})

    assert {"done", "cancelled"} <= set(answers)
    for spec in specs:
        receipt = worker.installation.ledger.receipt(spec.id)
        assert worker.state(spec) == (receipt.state if receipt else "cancelled")
        assert worker.times_done(spec) == (worker.state(spec) == "done")


def test_a_quarantined_job_that_is_retried_has_all_its_attempts_again(worker: Running) -> None:
    (spec,) = worker.submit("crash")
    worker.all_in([spec], "quarantined")
    worker.installation.ledger.reopen(spec.id)

    assert worker.queue.requeue(spec.id)

    worker.all_in([spec], "quarantined")

    assert [f"start {spec.id}"] * 6 == worker.log()
    assert len(list((worker.installation.paths.receipts / "old").iterdir())) == 1


# -- when jobs may start ----------------------------------------------------------------------------------------------


def test_night_jobs_wait_for_the_window_and_dated_jobs_for_their_time(launch: Launch) -> None:
    opens, closes = (f"{datetime.now() + timedelta(hours=hours):%H:%M}" for hours in (2, 3))
    worker = launch(rest=f'window = "{opens}-{closes}"\n')
    (night,) = worker.submit("ok", priority="night")
    (normal,) = worker.submit("ok", priority="low")
    eventually(lambda: f"start {normal.id}" in worker.log())  # else a busy machine may come to it when both are due
    soon = (datetime.now().astimezone() + timedelta(seconds=3)).isoformat(timespec="seconds")
    (later,) = worker.submit("ok", not_before=soon)
    worker.all_in([later, normal], "done")

    assert datetime.now().astimezone() >= datetime.fromisoformat(soon)
    assert worker.state(night) == "queued"

    worker.stop()
    file = worker.installation.root / "safelight.toml"
    file.write_text(file.read_text().replace(f'"{opens}-{closes}"', f'"{closes}-{opens}"'))
    worker.start()
    worker.all_in([night], "done")


def test_the_engine_leaves_after_each_job_or_when_idle_as_the_settings_say(launch: Launch) -> None:
    worker = launch(worker='idle_exit_s = 0\nrelease = "warm"')
    worker.all_in(worker.submit("ok"), "done")
    eventually(lambda: worker._children() == [])
    worker.stop()
    file = worker.installation.root / "safelight.toml"
    file.write_text(file.read_text().replace("idle_exit_s = 0", "").replace("warm", "process"))
    worker.start()
    worker.all_in(worker.submit("ok", "ok"), "done")
    eventually(lambda: worker._children() == [])
    engines = (worker.installation.paths.outbox / "engines.log").read_text().split()

    assert len(set(engines)) == 3


# -- what others wrote ------------------------------------------------------------------------------------------------


def test_a_job_of_a_client_that_cannot_write_the_ledger_gets_its_entry_here(worker: Running) -> None:
    ledger = worker.installation.ledger
    (spec,) = specs_of(worker.installation, ["ok"], accepted=False)
    worker.queue.submit([spec])
    worker.all_in([spec], "done")

    assert ledger.spec(spec.id) == spec

    worker.queue.server.flushall()
    worker.all_in([spec], "done")

    assert worker.times_done(spec) == 1


def test_a_job_in_the_queue_that_is_no_job_is_set_aside_and_the_rest_go_on(worker: Running) -> None:
    worker.queue.set_user_hold("for the test")
    eventually(lambda: any("user" in row.holds for row in worker.queue.workers()))
    strange, other, known, fine = (
        *specs_of(worker.installation, ["ok", "ok"], accepted=False),
        *worker.submit("ok", "ok"),
    )
    worker.queue.submit([strange, other])
    write = worker.queue.server.hset
    write(f"safelight:job:{strange.id}", "spec", '{"prompt": 1}')
    write(f"safelight:job:{other.id}", "spec", other.model_copy(update={"id": "../../evil"}).model_dump_json())
    write(f"safelight:job:{known.id}", "spec", "not even JSON")
    for place in ("1:000000000000:../../evil", "1:", "1:soon:x", b"1:\xff"):
        worker.queue.server.zadd("safelight:waiting", {place: 0})
    worker.queue.lift_user_hold()
    worker.all_in([strange, other], "failed")
    worker.all_in([known, fine], "done")

    assert "nor the ledger knows" in worker.queue.fields(strange.id)["error"]
    eventually(lambda: worker.queue.waiting_ids() == [])
    assert worker.process.poll() is None
    assert not list(worker.installation.root.rglob("*evil*"))


def test_damaged_files_of_the_ledger_stop_no_other_job(installation: Installation, queue: JobQueue) -> None:
    paths = installation.paths
    counted, ended, fine = specs_of(installation, ["ok", "ok", "ok"])
    (paths.jobs / "20200101-000000-000abcd.jsonl").write_text("half a li")
    for folder in (paths.attempts, paths.receipts):
        folder.mkdir()
    (paths.attempts / f"{counted.id}.json").write_text("{")
    (paths.state / "calibration.json").write_text("{")
    queue.submit([counted, ended, fine])
    (paths.receipts / f"{ended.id}.json").write_text("{")
    worker = Running(installation, queue)
    worker.all_in([fine], "done")
    worker.all_in([counted, ended], "failed")

    assert f"{counted.id}.json" in queue.fields(counted.id)["error"]
    worker.kill()


def test_a_job_whose_record_was_removed_does_not_run_when_an_old_queue_brings_it_back(worker: Running) -> None:
    (spec,) = worker.submit("fox")
    worker.all_in([spec], "done")
    ledger = worker.installation.ledger
    ledger.close_ended()
    submission = submission_of(spec.id)

    assert ledger.forget({submission: [spec.id]}) == [submission]
    assert worker.queue.requeue(spec.id)

    worker.all_in([spec], "failed")
    assert worker.times_done(spec) == 1
    assert "submit it anew" in worker.queue.fields(spec.id)["error"]


def test_an_orphan_is_found_although_the_machine_has_another_name_now(
    installation: Installation, queue: JobQueue
) -> None:
    (spec,) = specs_of(installation, ["ok"])
    queue.submit([spec])
    lock = str(
        gpulock.lock_path(Machine(device="cpu", ram_total_bytes=0, ram_available_bytes=0, cpus=1), installation.config)
    )
    installation.ledger.note(Attempts(id=spec.id, attempts=1, running=True, worker="old-name-cpu", lock=lock))
    assert queue.dispatch("old-name-cpu", Place.of(spec), "rq:queue:old", "x_1", "rq:job:x_1", {"status": "queued"})

    worker = Running(installation, queue)
    worker.all_in([spec], "done")
    worker.kill()


def test_a_job_whose_client_died_before_it_was_queued_is_found_in_the_ledger(worker: Running) -> None:
    """Accepted means accepted, also when the client was killed between the ledger and the queue."""
    (spec,) = specs_of(worker.installation, ["ok"])

    worker.all_in([spec], "done")

    assert worker.times_done(spec) == 1
