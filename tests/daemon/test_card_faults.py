"""Whose fault it was: a real worker on a card whose driver is a stand-in, with the real probe in a fresh process.

The stand-in is NVIDIA's two libraries, built from stand_in_driver.c; how the card is, the test writes into a file.
What torch does on it is done by the CPU, by a sitecustomize that the probe's process alone obeys.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from safelight.jobqueue import JobQueue
from safelightd.link import ENGINE
from safelightd.settle import CRASHES_MAX
from tests.conftest import Installation
from tests.daemon.test_worker import PROGRAM, Running, eventually

pytestmark = [
    pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="this machine has an NVIDIA driver of its own"),
    pytest.mark.skipif(not shutil.which("gcc"), reason="the stand-in for the driver needs gcc"),
]

TORCH = """\
import sys
if sys.orig_argv[-2:] == ["-m", "safelightd.device"]:
    import torch
    ones = torch.ones
    torch.ones = lambda *shape, device: ones(*shape)
"""


@pytest.fixture(scope="session")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both libraries and the sitecustomize."""
    folder = tmp_path_factory.mktemp("driver")
    source = Path(__file__).with_name("stand_in_driver.c")
    for library in ("libcuda.so.1", "libnvidia-ml.so.1"):
        subprocess.run(["gcc", "-shared", "-fPIC", "-o", folder / library, source], check=True)
    (folder / "sitecustomize.py").write_text(TORCH)
    return folder


class OnCard(Running):
    """A worker on the stand-in card."""

    def __init__(
        self, installation: Installation, queue: JobQueue, driver: Path, state: str, program: Sequence[str] = PROGRAM
    ) -> None:
        self.driver = driver
        self.card = installation.root / "card"
        self.is_now(state)
        super().__init__(installation, queue, program)

    def env(self) -> dict[str, str]:
        env = super().env()
        paths = os.pathsep.join((env["PYTHONPATH"], str(self.driver)))
        return {**env, "PYTHONPATH": paths, "LD_LIBRARY_PATH": str(self.driver), "STAND_IN_CARD": str(self.card)}

    def is_now(self, state: str) -> None:
        written = self.card.with_name("card-new")
        written.write_text(state)
        written.rename(self.card)

    def hold(self) -> str:
        return self.held_by("gpu")

    def held_by(self, name: str) -> str:
        return next((row.holds[name] for row in self.queue.workers() if name in row.holds), "")

    def held(self, timeout_s: float = 120) -> str:
        eventually(self.hold, timeout_s)
        return self.hold()


def with_a_card(installation: Installation) -> None:
    settings = installation.config.source
    settings.write_text(settings.read_text().replace('device = "cpu"', 'device = "cuda"'))


@pytest.fixture
def on_card(
    installation: Installation, queue: JobQueue, driver: Path, request: pytest.FixtureRequest
) -> Iterator[OnCard]:
    with_a_card(installation)
    running = OnCard(installation, queue, driver, getattr(request, "param", "well"))
    running.ready()
    yield running
    running.kill()


def test_a_card_that_is_lost_under_a_job_holds_the_queue_and_the_job_is_not_counted(on_card: OnCard) -> None:
    """The engine dies and a fresh process finds the card gone. When it is back, all goes on without a person."""
    lost, next_one = on_card.submit("hang ok", "ok")
    eventually(lambda: on_card.log() == [f"start {lost.id}"])
    on_card.is_now("lost")
    on_card.engine().kill()

    assert "cuInit returned 100" in on_card.held()
    assert (on_card.state(lost), on_card.state(next_one)) == ("queued", "queued")
    attempts = on_card.installation.ledger.attempts(lost.id)
    assert (attempts.crashes, attempts.returns) == (0, 1)

    on_card.is_now("well")
    on_card.all_in([lost, next_one], "done")

    assert on_card.hold() == ""
    assert on_card.log() == [f"start {lost.id}", f"start {lost.id}", f"done {lost.id}",
                             f"start {next_one.id}", f"done {next_one.id}"]  # fmt: skip


def test_a_job_that_breaks_cuda_every_time_is_set_aside_and_the_rest_go_on(on_card: OnCard) -> None:
    """Each time a fresh process finds the card well: so it was the job."""
    poisoned, next_one = on_card.submit("crash", "ok")
    on_card.all_in([poisoned], "quarantined", timeout_s=120)
    on_card.all_in([next_one], "done")

    assert on_card.log() == [f"start {poisoned.id}"] * CRASHES_MAX + [f"start {next_one.id}", f"done {next_one.id}"]
    assert on_card.hold() == ""


@pytest.mark.parametrize(
    ("on_card", "reason"), [("no-uvm", "cuInit returned 999"), ("unloaded", "Driver Not Loaded")], indirect=["on_card"]
)
def test_a_card_that_is_not_there_yet_is_awaited_and_nothing_runs_meanwhile(on_card: OnCard, reason: str) -> None:
    (spec,) = on_card.submit("ok")

    assert reason in on_card.held()
    assert (on_card.state(spec), on_card.log()) == ("queued", [])

    on_card.is_now("well")
    on_card.all_in([spec], "done")

    assert on_card.process.poll() is None
    assert on_card.log() == [f"start {spec.id}", f"done {spec.id}"]


@pytest.mark.parametrize(("state", "reason"), [("lost", "cuInit returned 100"), ("mute", "Unknown Error")])
def test_a_card_that_goes_between_two_jobs_holds_the_queue_and_burns_none(
    installation: Installation, queue: JobQueue, driver: Path, state: str, reason: str
) -> None:
    """With the real engine, which asks NVML of the card before each plan: it was there when the worker started."""
    with_a_card(installation)
    running = OnCard(installation, queue, driver, "well", [*PROGRAM, *ENGINE])
    try:
        running.ready()
        running.is_now(state)
        jobs = running.submit("a", "b", "c", "d")

        assert reason in running.held(60)
        assert [running.state(job) for job in jobs] == ["queued"] * len(jobs)
        attempts = [installation.ledger.attempts(job.id) for job in jobs]
        assert ([each.crashes for each in attempts], [each.attempts for each in attempts]) == ([0] * 4, [1, 0, 0, 0])
    finally:
        running.kill()


def test_a_card_that_other_programs_fill_burns_no_job_and_the_hold_says_who_has_it(
    installation: Installation, queue: JobQueue, driver: Path
) -> None:
    """With the real engine: what fits the card when nobody else uses it waits, however often it is tried."""
    with_a_card(installation)
    running = OnCard(installation, queue, driver, "well", [*PROGRAM, *ENGINE])
    try:
        running.ready()
        running.is_now("full")
        jobs = running.submit("a", "b")
        eventually(lambda: all(installation.ledger.attempts(job.id).attempts for job in jobs), 60)
        eventually(lambda: running.held_by("machine"))

        reason = running.held_by("machine")
        assert "of GPU memory on Stand-in. 0.1 GiB is free" in reason
        assert "Other programs hold 15.0 GiB of the GPU, most of it " in reason
        assert "(pid 1)" in reason
        assert [running.state(job) for job in jobs] == ["queued", "queued"]
        attempts = [installation.ledger.attempts(job.id) for job in jobs]
        assert [(each.crashes, each.returns) for each in attempts] == [(0, 0), (0, 0)]
    finally:
        running.kill()
