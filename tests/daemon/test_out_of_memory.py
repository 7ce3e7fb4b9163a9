"""A job whose plan runs out of memory is done once all the same, on a smaller one, by a fresh engine."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from safelight.jobqueue import JobQueue
from safelight.jobspec import JobSpec
from safelight.lora import Lora
from safelight.place import Place
from safelight.plan import Overrun, PhasePrediction, Plan
from safelight.receipt import Receipt
from safelightd import calibration, shortage
from safelightd.conclusion import Site
from safelightd.execution import Execution
from safelightd.horse import Requests, Shared
from safelightd.link import Link
from safelightd.progress import Watch
from safelightd.settle import CRASHES_MAX, OVERRUNS_MAX
from tests.cli_steps import runner
from tests.conftest import Installation
from tests.daemon.test_worker import PROGRAM, Running, eventually, specs_of

FIRST_RUNG = "fp8-dynamic, offload partial, 10 blocks of transformer streamed from pinned"
SECOND_RUNG = "fp8-dynamic, offload partial, 20 blocks of transformer streamed from pinned"

LIMIT_BYTES = 400 * 2**20
"""Of the worker and all it starts: three such Pythons hold 150 MiB."""


@pytest.fixture
def worker(installation: Installation, queue: JobQueue) -> Iterator[Running]:
    running = Running(installation, queue)
    running.ready()
    yield running
    running.kill()


def receipt_of(worker: Running, spec: JobSpec) -> Receipt:
    receipt = worker.installation.ledger.receipt(spec.id)
    assert receipt is not None
    return receipt


def told(worker: Running, spec: JobSpec) -> list[dict[str, Any]]:
    """Return what each attempt of a job was told."""
    lines = (worker.installation.paths.outbox / "told.log").read_text().splitlines()
    return [message for message in map(json.loads, lines) if message.pop("id") == spec.id]


def test_a_job_is_told_whether_another_with_its_loras_waits(worker: Running) -> None:
    style = Lora(name="style", sha256="a" * 64)
    specs = [spec.model_copy(update={"loras": (style,)}) for spec in specs_of(worker.installation, ["ok", "ok"])]
    (plain,) = specs_of(worker.installation, ["ok"])
    worker.queue.submit([*specs, plain])
    worker.all_in([*specs, plain], "done")

    assert [told(worker, spec)[0]["again"] for spec in (*specs, plain)] == [True, False, False]


def engines(worker: Running) -> list[str]:
    return (worker.installation.paths.outbox / "engines.log").read_text().split()


# -- on the GPU, as the engine says it ---------------------------------------------------------------------------------


def test_a_job_that_runs_out_is_done_once_on_the_next_rung_by_a_fresh_engine(worker: Running) -> None:
    spec, next_one = worker.submit("oom ok", "ok")
    worker.all_in([spec, next_one], "done")
    receipt = receipt_of(worker, spec)

    assert receipt.plan is not None
    assert [overrun.rung for overrun in receipt.overruns] == [FIRST_RUNG]
    assert receipt.plan.rung == SECOND_RUNG
    assert receipt.overruns[0].predicted_bytes == 13 << 30
    assert (receipt.attempts, receipt.spec.seed) == (2, spec.seed)
    assert worker.log() == [f"start {spec.id}", f"start {spec.id}", f"done {spec.id}",
                            f"start {next_one.id}", f"done {next_one.id}"]  # fmt: skip
    first, second, third = engines(worker)
    assert first != second == third


def test_a_person_is_shown_what_ran_out_and_the_planner_learns_it(worker: Running) -> None:
    (spec,) = worker.submit("oom ok")
    worker.all_in([spec], "done")
    shown = runner(worker.installation)("show", spec.id).stdout
    learned = calibration.load(worker.installation.paths.state)

    assert f"of GPU memory in denoise, on {FIRST_RUNG} (13.0 GiB predicted, 15.0 GiB reached)" in shown
    assert f"ran on      {SECOND_RUNG}" in shown
    (ratio,) = learned.device.values()
    assert ratio >= 15 / 13


def test_running_out_is_neither_a_crash_nor_a_return_and_is_on_disk_before_the_next_try(worker: Running) -> None:
    (spec,) = worker.submit("oom oom slow")
    eventually(lambda: len(worker.log()) == 3)
    attempts = worker.installation.ledger.attempts(spec.id)

    assert (attempts.attempts, attempts.crashes, attempts.returns) == (3, 0, 0)
    assert [overrun.rung for overrun in attempts.overruns] == [FIRST_RUNG, SECOND_RUNG]
    assert [len(message["overruns"]) for message in told(worker, spec)] == [0, 1, 2]

    worker.all_in([spec], "done")


def test_a_worker_killed_between_two_rungs_goes_on_with_the_second(worker: Running) -> None:
    (spec,) = worker.submit("oom slow ok")
    eventually(lambda: len(worker.log()) == 2)
    worker.kill()
    worker.start()
    worker.all_in([spec], "done")

    assert [len(message["overruns"]) for message in told(worker, spec)] == [0, 1, 1]
    assert worker.times_done(spec) == 1


def test_a_job_that_runs_out_for_ever_is_set_aside_with_its_rungs_and_the_rest_go_on(worker: Running) -> None:
    spec, fine = worker.submit("oom", "ok")
    worker.all_in([spec], "quarantined")
    worker.all_in([fine], "done")
    receipt = receipt_of(worker, spec)

    assert receipt.attempts == OVERRUNS_MAX + CRASHES_MAX
    assert len(receipt.overruns) == receipt.attempts
    assert "CUDA out of memory" in (receipt.error or "")


def test_a_job_cancelled_while_it_runs_out_is_cancelled(worker: Running) -> None:
    (spec,) = worker.submit("late-oom ok")
    eventually(lambda: worker.log() == [f"start {spec.id}"])

    assert worker.queue.cancel([spec.id]) == ["asked"]

    worker.all_in([spec], "cancelled")

    assert worker.times_done(spec) == 0


def test_a_job_stopped_while_it_runs_out_keeps_its_place_and_starts_on_the_next_rung(worker: Running) -> None:
    (spec,) = worker.submit("late-oom ok")
    eventually(lambda: worker.log() == [f"start {spec.id}"])

    assert worker.stop() == 0

    attempts = worker.installation.ledger.attempts(spec.id)
    assert (attempts.crashes, attempts.returns, len(attempts.overruns)) == (0, 0, 1)

    worker.start()
    worker.all_in([spec], "done")

    assert [overrun.rung for overrun in receipt_of(worker, spec).overruns] == [FIRST_RUNG]


# -- on a device that is not well --------------------------------------------------------------------------------------


@pytest.fixture
def execution(installation: Installation, queue: JobQueue) -> Iterator[Callable[[str], tuple[JobSpec, Link]]]:
    """Runs a job in this process, the test being its engine, on a device that says what the test says of it."""
    threads = []
    links = []

    def start(trouble: str) -> tuple[JobSpec, Link]:
        (spec,) = specs_of(installation, ["a fox"])
        queue.submit([spec])
        assert queue.dispatch("w", Place.of(spec), "rq:queue:w", "x", "rq:job:x", {"status": "queued"})
        ours, theirs = (Link(end) for end in socket.socketpair())
        links.extend([ours, theirs])
        site = Site(
            config=installation.config,
            models=installation.models,
            ledger=installation.ledger,
            queue=queue,
            worker="w",
            lock="",
            kill_engine=lambda: False,
            device_is_well=lambda: trouble or None,
            wait=lambda _seconds: True,
        )
        run = Execution(site, ours, Requests(), Shared(), spec.id, "x").run
        threads.append(threading.Thread(target=run))
        threads[-1].start()
        return spec, theirs

    yield start
    for thread in threads:
        thread.join(120)
    for link in links:
        link.close()


PLAN = Plan(
    model="tiny-flux-schnell",
    device="cuda",
    dtype="bfloat16",
    precision="fp8-dynamic",
    offload="model",
    text_encoder_device="cuda",
    vae_tiling=False,
    predicted={"decode": PhasePrediction(device_bytes=7, host_bytes=5)},
)


@pytest.mark.parametrize(("trouble", "overruns", "returns"), [("", 1, 0), ("the GPU has fallen off the bus", 0, 1)])
def test_running_out_on_a_device_that_is_not_well_is_the_machines_fault(
    execution: Callable[[str], tuple[JobSpec, Link]], installation: Installation, queue: JobQueue,
    trouble: str, overruns: int, returns: int,
) -> None:  # fmt: skip
    spec, engine = execution(trouble)
    assert engine.receive(20) is not None
    overrun = shortage.overrun(PLAN, "decode", "device")
    assert overrun is not None
    fields = {"memory": "device", "overrun": overrun.model_dump(mode="json")}
    engine.send("failed", "x", kind="oom", message="CUDA out of memory", phase="decode", **fields)
    eventually(lambda: queue.state(spec.id) == "queued")
    attempts = installation.ledger.attempts(spec.id)

    assert (len(attempts.overruns), attempts.returns, attempts.crashes) == (overruns, returns, 0)
    assert not attempts.running


# -- on the host, as the kernel does it --------------------------------------------------------------------------------


@pytest.fixture
def limited() -> Iterator[Path]:
    """A cgroup of LIMIT_BYTES, of whichever version this machine has."""
    name = f"safelight-test-{os.getpid()}"
    old = Path("/sys/fs/cgroup/memory/memory.limit_in_bytes").exists()
    root = Path("/sys/fs/cgroup/memory" if old else "/sys/fs/cgroup")
    folder = root / name
    try:
        if not old:
            (root / "cgroup.subtree_control").write_text("+memory")
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"no cgroup can be made here: {error}")
    (folder / ("memory.limit_in_bytes" if old else "memory.max")).write_text(str(LIMIT_BYTES))
    if (swap := folder / "memory.swap.max").exists():
        swap.write_text("0")
    yield folder
    eventually(lambda: not (folder / "cgroup.procs").read_text())
    folder.rmdir()


def test_an_engine_that_the_kernel_kills_for_memory_has_run_out_of_it(
    installation: Installation, queue: JobQueue, limited: Path
) -> None:
    enter = ["sh", "-c", 'echo $$ > "$0"/cgroup.procs && exec "$@"', str(limited)]
    worker = Running(installation, queue, [*enter, *PROGRAM])
    try:
        spec, fine = worker.submit("swell ok", "ok")
        worker.all_in([spec, fine], "done")
        receipt = receipt_of(worker, spec)
    finally:
        worker.kill()

    assert receipt.overruns == (
        Overrun(phase="denoise", memory="host", rung=FIRST_RUNG, predicted_bytes=9 << 30, reached_bytes=0),
    )
    assert receipt.attempts == 2
    assert worker.times_done(spec) == 1


def test_an_engine_that_a_person_kills_has_not_run_out_of_memory(worker: Running) -> None:
    (spec,) = worker.submit("slow ok")
    eventually(lambda: worker.log() == [f"start {spec.id}"])
    worker.engine().kill()
    worker.all_in([spec], "done")

    assert [message["overruns"] for message in told(worker, spec)] == [[], []]


def test_the_nearest_count_of_kills_is_taken_and_the_machines_where_no_cgroup_counts(tmp_path: Path) -> None:
    root, own, vmstat = tmp_path / "cgroup", tmp_path / "own", tmp_path / "vmstat"
    leaf = root / "user.slice" / "app.slice" / "worker.service"
    leaf.mkdir(parents=True)
    own.write_text("4:memory:/old\n0::/user.slice/app.slice/worker.service\n")
    vmstat.write_text("oom_kill_disable 9\nnr_free_pages 5\noom_kill 4\n")

    assert shortage.oom_kills(root, own, vmstat) == 4

    (leaf.parent / "memory.events").write_text("low 0\nhigh 8\nmax 3\noom 2\noom_kill 2\noom_group_kill 1\n")

    assert shortage.oom_kills(root, own, vmstat) == 2

    (leaf / "memory.events").write_text("oom 1\noom_kill 0\n")

    assert shortage.oom_kills(root, own, vmstat) == 0
    assert shortage.oom_kills(tmp_path / "none", own, tmp_path / "none") == 0


@pytest.mark.parametrize(("end", "killed"), [(signal.SIGKILL, True), (signal.SIGSEGV, False), (None, False)])
def test_a_process_that_nobody_has_reaped_yet_tells_whether_it_was_killed(
    end: signal.Signals | None, killed: bool
) -> None:
    process = subprocess.Popen(["sleep", "60" if end else "0"])
    if end:
        assert not shortage.was_killed(process.pid)
        process.send_signal(end)
    eventually(lambda: psutil.Process(process.pid).status() == psutil.STATUS_ZOMBIE)

    assert shortage.was_killed(process.pid) == killed

    process.wait()

    assert not shortage.was_killed(process.pid)


@pytest.mark.parametrize("phase", ["plan", "verify", "publish"])
def test_only_a_phase_that_a_smaller_plan_makes_smaller_runs_out_of_it(phase: Any) -> None:
    assert shortage.overrun(PLAN, phase, "host") is None
    assert shortage.overrun(None, "decode", "host") is None


def test_an_overrun_names_its_rung_and_what_was_predicted() -> None:
    assert shortage.overrun(PLAN, "decode", "host", 9) == Overrun(
        phase="decode", memory="host", rung=PLAN.rung, predicted_bytes=5, reached_bytes=9
    )
    loading = shortage.overrun(PLAN, "load", "device")
    assert loading is not None
    assert (loading.phase, loading.predicted_bytes) == ("encode", 0)


# -- broken results ----------------------------------------------------------------------------------------------------


def test_a_broken_result_is_tried_once_more_without_its_precision(worker: Running) -> None:
    (spec,) = worker.submit("refused ok")
    worker.all_in([spec], "done")
    receipt = receipt_of(worker, spec)

    assert receipt.plan is not None
    assert (receipt.plan.precision, receipt.attempts) == ("bf16", 2)
    assert [message["refused"] for message in told(worker, spec)] == [[], ["fp8-dynamic"]]


def test_a_result_that_is_broken_twice_fails_with_its_reason(worker: Running) -> None:
    (spec,) = worker.submit("refused refused ok")
    worker.all_in([spec], "failed")
    receipt = receipt_of(worker, spec)

    assert (receipt.error, receipt.phase, receipt.attempts) == ("The picture is black.", "verify", 2)
    assert worker.times_done(spec) == 0


# -- what an engine is told, and tells ---------------------------------------------------------------------------------


def test_an_engine_is_told_how_many_jobs_of_this_shape_wait(worker: Running) -> None:
    worker.queue.set_user_hold("for the test")
    eventually(lambda: any("user" in row.holds for row in worker.queue.workers()))
    small = worker.submit("ok", "ok", "ok", width=64, height=64)
    large = worker.submit("ok", width=128, height=64)
    worker.queue.lift_user_hold()
    worker.all_in([*small, *large], "done")

    assert [told(worker, spec)[0]["waiting"] for spec in (*small, *large)] == [3, 2, 1, 1]


def test_jobs_alike_are_counted_among_the_next_of_the_line_only(installation: Installation, queue: JobQueue) -> None:
    specs = specs_of(installation, ["a"] * 30)
    queue.submit(specs)

    assert [queue.alike(specs[0], among) for among in (1, 10, 50)] == [1, 10, 30]
    assert queue.alike(specs[0].model_copy(update={"num_inference_steps": 9}), 50) == 30
    assert queue.alike(specs[0].model_copy(update={"width": 1040}), 50) == 0


class NoMeter:
    def reset(self) -> None: ...

    def settle(self) -> None: ...

    def peaks(self) -> tuple[int, int]:
        return 3, 2


def test_the_phase_after_planning_carries_the_plan_and_no_other_does() -> None:
    sent: list[dict[str, Any]] = []
    watch = Watch(sent.append, threading.Event(), NoMeter())
    with watch.phase("plan"):
        watch.plan = PLAN
    for phase in ("load", "encode"):
        with watch.phase(phase):  # type: ignore[arg-type]  # mypy takes the loop's names for any text
            pass

    assert [message.get("plan") for message in sent] == [None, PLAN.model_dump(mode="json"), None]


# -- the real engine ---------------------------------------------------------------------------------------------------

STARVING = Path(__file__).with_name("starving_engine.py")


@pytest.fixture
def starving(installation: Installation, queue: JobQueue, tmp_path: Path) -> Iterator[Callable[[str, int], Running]]:
    """Starts a worker whose real engine runs out of memory in a phase, so many times."""
    started: list[Running] = []

    def start(phase: str, times: int) -> Running:
        engine = [sys.executable, str(STARVING), phase, str(times), str(tmp_path)]
        started.append(Running(installation, queue, [*PROGRAM, *engine]))
        return started[-1]

    yield start
    for running in started:
        running.kill()


@pytest.mark.parametrize("phase", ["encode", "denoise", "decode"])
def test_memory_that_runs_out_in_any_phase_ends_in_one_output_from_a_fresh_engine_on_a_smaller_rung(
    starving: Callable[[str, int], Running], phase: str
) -> None:
    worker = starving(phase, 1)
    spec, next_one = worker.submit("a fox", "an owl")
    worker.all_in([spec, next_one], "done")
    receipt, after = receipt_of(worker, spec), receipt_of(worker, next_one)

    assert receipt.plan is not None
    assert after.plan is not None
    assert [(overrun.phase, overrun.memory) for overrun in receipt.overruns] == [(phase, "host")]
    assert receipt.overruns[0].reached_bytes > 2 << 30
    assert receipt.plan.rung != receipt.overruns[0].rung
    assert (receipt.attempts, len(receipt.outputs)) == (2, 1)
    assert (receipt.spec.seed, receipt.spec.num_inference_steps) == (spec.seed, spec.num_inference_steps)
    assert (after.attempts, after.overruns, after.plan.rung) == (1, (), receipt.plan.rung)


def test_memory_that_runs_out_on_every_rung_fails_the_job_with_what_it_needs(
    starving: Callable[[str, int], Running],
) -> None:
    worker = starving("decode", 3)  # whole, in strips and in tiles
    (spec,) = worker.submit("a fox")
    worker.all_in([spec], "failed")
    receipt = receipt_of(worker, spec)

    assert len({overrun.rung for overrun in receipt.overruns}) == len(receipt.overruns) == 3
    assert (receipt.attempts, receipt.phase) == (4, "plan")
    assert "decode of tiny-flux-schnell at 64x64 needs" in (receipt.error or "")


def test_a_broken_result_fails_at_once_with_its_reason_where_there_is_one_precision(
    starving: Callable[[str, int], Running],
) -> None:
    worker = starving("broken", 1)
    (spec,) = worker.submit("a fox")
    worker.all_in([spec], "failed")
    receipt = receipt_of(worker, spec)

    assert (receipt.attempts, receipt.phase) == (1, "decode")
    assert "NaN" in (receipt.error or "")
