"""Jobs that do not fit: those for which others must leave first wait, those that never will fit fail."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from safelight import jobspec
from safelight.calibration import NOTHING_LEARNED
from safelight.config import Config
from safelight.jobqueue import JobQueue
from safelight.jobspec import JobSpec
from safelight.machine import GIB, Machine
from safelight.models import Models
from safelight.plan import Overrun, Plan
from safelight.planner import NO_CIRCUMSTANCES, DoesNotFit
from safelight.rung import Circumstances
from safelightd import room
from safelightd.room import NoRoom
from tests.conftest import Installation
from tests.daemon.test_worker import Running, eventually


def card(total_gib: float, free_gib: float, ram_gib: float = 24) -> Machine:
    return Machine(
        device="cuda",
        gpu="Test card",
        capability=(8, 9),
        multiprocessors=70,
        clock_mhz=2000,
        link_bytes_per_second=20_000_000_000,
        vram_total_bytes=int(total_gib * GIB),
        vram_free_bytes=int(free_gib * GIB),
        ram_total_bytes=32 * GIB,
        ram_available_bytes=int(ram_gib * GIB),
        cpus=8,
    )


def clip_of(models: Models) -> JobSpec:
    written = {"prompt": "a fox", "seed": 1, "model": "wan-ti2v-5b"}
    spec = jobspec.check(written, models, "test", image_model="flux-schnell", video_model="wan-ti2v-5b")
    assert isinstance(spec, JobSpec)
    return spec


def planned(
    machine: Machine, installation: Installation, around: Circumstances = NO_CIRCUMSTANCES, **limits: float
) -> Plan:
    section = installation.config.settings.worker.model_copy(update=limits)
    settings = installation.config.settings.model_copy(update={"worker": section})
    config: Config = replace(installation.config, settings=settings)
    models = installation.models
    return room.plan_here(clip_of(models), machine, config, models, NOTHING_LEARNED, around)


@pytest.fixture
def running(installation: Installation, queue: JobQueue) -> Iterator[Running]:
    worker = Running(installation, queue)
    worker.ready()
    yield worker
    worker.kill()


def test_what_fits_a_card_that_nobody_else_uses_has_no_room_now(installation: Installation) -> None:
    assert planned(card(16, 15.5), installation).device == "cuda"
    with pytest.raises(NoRoom, match=r"GiB of GPU memory on Test card\. 1\.0 GiB is free"):
        planned(card(16, 1), installation)


def test_so_has_what_fits_the_ram_that_others_hold(installation: Installation) -> None:
    with pytest.raises(NoRoom, match="GiB of RAM"):
        planned(card(16, 15.5, ram_gib=1), installation)


def test_what_a_card_is_too_small_for_does_not_wait(installation: Installation) -> None:
    with pytest.raises(DoesNotFit):
        planned(card(2, 1), installation)


def test_nor_does_what_the_settings_leave_no_room_for(installation: Installation) -> None:
    with pytest.raises(DoesNotFit):
        planned(card(16, 1), installation, vram_gib=1.0)
    with pytest.raises(DoesNotFit):
        planned(card(16, 15.5, ram_gib=1), installation, ram_gib=1.0)


def test_nor_does_what_has_run_out_of_memory_in_its_smallest_way(installation: Installation) -> None:
    """Else it would be tried again for ever."""
    small = Overrun(phase="denoise", memory="device", rung="least", predicted_bytes=GIB)
    with pytest.raises(DoesNotFit):
        planned(card(16, 15.5), installation, Circumstances(overruns=(small,)))


def test_a_job_without_room_waits_uncounted_and_lets_others_go_first(running: Running) -> None:
    large, small = running.submit("no-room ok", "ok")
    running.all_in([small], "done")

    assert running.state(large) == "queued"
    attempts = running.installation.ledger.attempts(large.id)
    assert (attempts.attempts, attempts.crashes, attempts.returns) == (1, 0, 0)

    running.all_in([large], "done")

    assert running.log() == [f"start {large.id}", f"start {small.id}", f"done {small.id}",
                            f"start {large.id}", f"done {large.id}"]  # fmt: skip


def test_the_hold_after_a_job_without_room_says_why(running: Running) -> None:
    running.submit("no-room ok")
    eventually(lambda: any("told to no-room" in row.holds.get("machine", "") for row in running.queue.workers()))


def test_a_job_that_is_too_large_for_every_card_fails_with_the_reason(running: Running) -> None:
    (spec,) = running.submit("too-large ok")
    running.all_in([spec], "failed")
    receipt = running.installation.ledger.receipt(spec.id)

    assert receipt is not None
    assert receipt.error == "it was told to too-large"


def test_a_job_that_fits_the_card_of_another_worker_is_left_to_it(running: Running) -> None:
    running.queue.publish_worker("other", 60, device="cuda", machine=card(24, 1).model_dump_json())
    (spec,) = running.submit("too-large ok")
    eventually(lambda: running.installation.ledger.attempts(spec.id).attempts == 1 and running.state(spec) == "queued")

    assert running.installation.ledger.receipt(spec.id) is None
    assert not any("machine" in row.holds for row in running.queue.workers())
