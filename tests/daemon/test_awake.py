"""A job keeps the machine awake and never spans a sleep: what is noticed, and what a real worker does about it."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from safelight import durable
from safelight.jobqueue import JobQueue
from safelightd import awake as awake_module
from safelightd.awake import Awake
from tests.conftest import Installation
from tests.daemon.login1 import Bus, Login1, Serve, serving
from tests.daemon.test_worker import Running, eventually, gone

needs_bus = pytest.mark.skipif(not shutil.which("dbus-daemon"), reason="dbus-daemon is not installed")

BLOCKS = ["handle-lid-switch:block", "idle:block", "sleep:block"]
DELAY = "sleep:delay"


class Clock:
    """How long the machine has slept, as the test says."""

    def __init__(self) -> None:
        self.slept_s = 100.0

    def __call__(self) -> float:
        return self.slept_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


# -- the clocks alone --------------------------------------------------------------------------------------------------


@pytest.fixture
def no_bus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", f"unix:path={tmp_path}/no-bus")


def test_a_sleep_is_noticed_without_a_bus_once_and_by_the_clocks(no_bus: None, clock: Clock) -> None:
    awake = Awake(clock)
    awake.look()

    assert (awake.must_stop, awake.take_resumed()) == (False, False)

    clock.slept_s += 3600
    awake.look()

    assert (awake.must_stop, awake.hold) == (True, None)
    assert (awake.take_resumed(), awake.take_resumed(), awake.must_stop) == (True, False, False)

    awake.look()

    assert not awake.take_resumed()


def test_clocks_that_drift_apart_a_little_are_no_sleep(no_bus: None, clock: Clock) -> None:
    awake = Awake(clock)
    clock.slept_s += awake_module.JUMP_S
    awake.look()

    assert not awake.take_resumed()


def test_the_real_clocks_of_a_machine_that_stays_awake_do_not_jump(no_bus: None) -> None:
    awake = Awake()
    awake.look()

    assert awake_module.asleep_s() > -1
    assert not awake.take_resumed()


def test_without_a_bus_a_job_starts_and_ends_all_the_same(no_bus: None, clock: Clock) -> None:
    awake = Awake(clock)
    awake.job_starts()

    assert awake.wait_for(os.getpid())

    awake.job_ended()
    awake.let_sleep()
    awake.leave()


# -- with a logind -----------------------------------------------------------------------------------------------------


@pytest.fixture
def bus(installation: Installation, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bus]:
    bus = Bus(installation.root)
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", bus.address)
    installation.env["DBUS_SYSTEM_BUS_ADDRESS"] = bus.address
    yield bus
    bus.kill()


@pytest.fixture
def serve(bus: Bus) -> Iterator[Serve]:
    with serving(bus) as start:
        yield start


@pytest.fixture
def login1(serve: Serve) -> Login1:
    return serve()


def hears(awake: Awake, true: Callable[[], object]) -> None:
    def looked() -> object:
        awake.look()
        return true()

    eventually(looked)


@needs_bus
def test_everything_is_blocked_while_a_job_runs_and_nothing_but_a_delay_before_and_after(
    login1: Login1, clock: Clock
) -> None:
    awake = Awake(clock)

    assert login1.held() == [DELAY]

    awake.job_starts()

    assert login1.held() == sorted([*BLOCKS, DELAY])

    awake.job_ended()

    assert login1.held() == [DELAY]

    awake.leave()

    assert login1.held() == []


@needs_bus
def test_what_polkit_denies_is_said_once_and_the_rest_is_blocked(
    serve: Serve, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    login1 = serve(denied=("sleep:block", "handle-lid-switch:block"))
    awake = Awake(clock)
    for _ in range(3):
        awake.job_starts()

        assert login1.held() == ["idle:block", DELAY]

        awake.job_ended()

    said = [record.getMessage() for record in caplog.records if "sleep.not_blocked" in record.getMessage()]
    assert len(said) == 1
    assert "what=sleep:handle-lid-switch" in said[0]
    assert "safelight service install" in said[0]
    awake.leave()


@needs_bus
def test_a_fork_that_leaves_neither_ends_nor_prolongs_what_is_inhibited(login1: Login1, clock: Clock) -> None:
    awake = Awake(clock)
    awake.job_starts()

    assert login1.held() == sorted([*BLOCKS, DELAY])  # and the stand-in has closed its own copies

    go_on, let_go = os.pipe()
    child = os.fork()
    if child == 0:
        awake.leave()
        os.close(let_go)
        os.read(go_on, 1)
        os._exit(0)

    assert login1.held() == sorted([*BLOCKS, DELAY])

    awake.leave()
    eventually(lambda: login1.held() == [])

    os.close(let_go)
    os.close(go_on)
    os.waitpid(child, 0)


@needs_bus
def test_a_program_that_is_started_holds_no_inhibitor(login1: Login1, clock: Clock) -> None:
    awake = Awake(clock)
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, close_fds=False):
        awake.leave()

        assert login1.held() == []


@needs_bus
def test_the_machine_may_sleep_when_nothing_is_on_the_gpu_and_is_held_off_again_afterwards(
    login1: Login1, clock: Clock
) -> None:
    awake = Awake(clock)
    login1.prepare_for_sleep(True)
    hears(awake, lambda: awake.hold)

    assert login1.held() == [DELAY]

    awake.let_sleep()

    assert login1.held() == []

    clock.slept_s += 3600
    login1.prepare_for_sleep(False)
    hears(awake, lambda: awake.hold is None)

    assert awake.take_resumed()

    hears(awake, lambda: login1.held() == [DELAY])

    assert not awake.take_resumed()

    awake.leave()


@needs_bus
def test_a_sleep_that_is_announced_and_never_comes_does_not_hold_the_queue_for_ever(
    login1: Login1, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(awake_module, "AWAKE_AGAIN_S", 0.5)
    awake = Awake(clock)
    login1.prepare_for_sleep(True)
    hears(awake, lambda: awake.hold)
    awake.let_sleep()
    hears(awake, lambda: awake.hold is None)

    assert awake.take_resumed()
    assert login1.held() == [DELAY]

    awake.leave()


@needs_bus
def test_waiting_for_a_job_ends_when_the_bus_speaks_or_the_job_ends(login1: Login1, clock: Clock) -> None:
    awake = Awake(clock)
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as job:
        awake.look()
        login1.prepare_for_sleep(True)

        assert not awake.wait_for(job.pid)

        hears(awake, lambda: awake.must_stop)

        assert not awake.wait_for(job.pid)

        job.stdin.close()
        eventually(lambda: awake.wait_for(job.pid))
    awake.leave()


@needs_bus
def test_a_bus_that_dies_hurts_nobody_and_one_that_comes_back_is_used(
    bus: Bus, serve: Serve, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(awake_module, "CONNECT_AGAIN_S", 0.0)
    first = serve()
    awake = Awake(clock)
    awake.job_starts()
    bus.kill()
    awake.look()

    assert first.held() == sorted([*BLOCKS, DELAY])

    awake.job_ended()
    bus.start()
    second = serve()
    awake.job_starts()

    assert second.held() == BLOCKS
    awake.leave()


# -- a worker ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def slept(installation: Installation) -> Path:
    """The file in which the machine's seconds of sleep stand."""
    file = installation.root / "slept"
    file.write_text("100")
    installation.env["SLEPT"] = str(file)
    return file


@pytest.fixture
def told(installation: Installation) -> Iterator[list[str]]:
    """What the service manager hears."""
    address = str(installation.root / "notify")
    installation.env["NOTIFY_SOCKET"] = address
    heard: list[str] = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(address)

        def listen() -> None:
            while (said := manager.recv(4096)) != b"end":
                heard.append(said.decode())

        listener = threading.Thread(target=listen, daemon=True)
        listener.start()
        yield heard
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as last:
            last.sendto(b"end", address)
        listener.join()


@pytest.fixture
def worker(slept: Path, installation: Installation, queue: JobQueue) -> Iterator[Running]:
    running = Running(installation, queue)
    running.ready()
    yield running
    running.kill()


def sleep_hold(worker: Running) -> bool:
    return any("sleep" in row.holds for row in worker.queue.workers())


def engines(worker: Running) -> list[str]:
    return (worker.installation.paths.outbox / "engines.log").read_text().split()


def test_a_warm_engine_does_not_outlive_a_sleep_that_only_the_clocks_tell_of(worker: Running, slept: Path) -> None:
    worker.all_in(worker.submit("ok"), "done")
    engine = worker.engine()
    durable.write(slept, b"3700")  # whole: the worker may read it at any moment
    eventually(lambda: gone(engine))
    worker.all_in(worker.submit("ok"), "done")

    assert len(set(engines(worker))) == 2


def test_after_a_sleep_the_device_is_probed_before_any_job_starts(
    slept: Path, told: list[str], installation: Installation, queue: JobQueue
) -> None:
    worker = Running(installation, queue)
    try:
        worker.ready()
        worker.queue.set_user_hold("for the test")
        eventually(lambda: any("Held: user" in said for said in told))
        (spec,) = worker.submit("ok")
        told.clear()
        durable.write(slept, b"3700")  # whole: the worker may read it at any moment
        eventually(lambda: any("Probing" in said for said in told))

        assert worker.log() == []

        worker.queue.lift_user_hold()
        worker.all_in([spec], "done")
    finally:
        worker.kill()


def test_a_job_under_which_the_machine_slept_runs_again_in_a_fresh_engine_uncounted(
    worker: Running, slept: Path
) -> None:
    (spec,) = worker.submit("slow slow slow ok", num_inference_steps=4)
    eventually(lambda: worker.log() == [f"start {spec.id}"])
    engine = worker.engine()
    os.kill(engine.pid, signal.SIGSTOP)  # so that the job is still there at the worker's next look
    durable.write(slept, b"3700")  # whole: the worker may read it at any moment
    worker.all_in([spec], "done")

    assert len(set(engines(worker))) == 2
    assert worker.times_done(spec) == 1
    receipt = worker.installation.ledger.receipt(spec.id)
    assert receipt is not None
    assert receipt.overruns == ()


@needs_bus
def test_the_machine_is_kept_awake_by_a_job_and_by_nothing_else(login1: Login1, worker: Running) -> None:
    assert login1.held() == [DELAY]

    (spec,) = worker.submit("slow")
    eventually(lambda: worker.log() == [f"start {spec.id}"])

    assert login1.held() == sorted([*BLOCKS, DELAY])

    worker.all_in([spec], "done")
    eventually(lambda: login1.held() == [DELAY])


@needs_bus
def test_an_inhibitor_does_not_outlive_a_killed_worker(login1: Login1, worker: Running) -> None:
    (spec,) = worker.submit("slow")
    eventually(lambda: worker.log() == [f"start {spec.id}"])
    worker.kill()

    eventually(lambda: login1.held() == [])


@needs_bus
def test_before_a_sleep_the_job_is_back_on_its_place_and_the_engine_gone_and_afterwards_it_runs(
    login1: Login1, worker: Running
) -> None:
    first, second = worker.submit("slow ok", "ok")
    eventually(lambda: worker.log() == [f"start {first.id}"])
    engine = worker.engine()
    login1.prepare_for_sleep(True)
    eventually(lambda: login1.held() == [], timeout_s=30)

    assert gone(engine)
    assert [worker.state(spec) for spec in (first, second)] == ["queued", "queued"]
    attempts = worker.installation.ledger.attempts(first.id)
    assert (attempts.crashes, attempts.returns, attempts.running) == (0, 0, False)

    eventually(lambda: sleep_hold(worker))

    assert worker.log() == [f"start {first.id}"]

    login1.prepare_for_sleep(False)
    worker.all_in([first, second], "done")

    assert [worker.times_done(spec) for spec in (first, second)] == [1, 1]
    assert worker.log()[1] == f"start {first.id}"


@needs_bus
def test_an_engine_that_does_not_stop_is_killed_within_the_delay_and_no_attempt_is_counted(
    serve: Serve, slept: Path, installation: Installation, queue: JobQueue
) -> None:
    login1 = serve(delay_max_s=5.0)  # logind's default
    worker = Running(installation, queue)
    try:
        worker.ready()
        (spec,) = worker.submit("hang ok")
        eventually(lambda: worker.log() == [f"start {spec.id}"])
        login1.prepare_for_sleep(True)
        eventually(lambda: login1.held() == [], timeout_s=30)

        assert worker.state(spec) == "queued"
        assert worker.installation.ledger.attempts(spec.id).crashes == 0

        login1.prepare_for_sleep(False)
        worker.all_in([spec], "done")
    finally:
        worker.kill()


@needs_bus
def test_a_bus_that_dies_under_a_job_costs_nothing(bus: Bus, login1: Login1, worker: Running) -> None:
    (spec,) = worker.submit("slow")
    eventually(lambda: worker.log() == [f"start {spec.id}"])
    bus.kill()
    worker.all_in([spec], "done")

    assert worker.log() == [f"start {spec.id}", f"done {spec.id}"]


@needs_bus
def test_a_bus_that_hangs_costs_nothing(bus: Bus, login1: Login1, worker: Running) -> None:
    bus.process.send_signal(signal.SIGSTOP)
    specs = worker.submit("ok", "ok")
    worker.all_in(specs, "done")

    assert [worker.times_done(spec) for spec in specs] == [1, 1]
