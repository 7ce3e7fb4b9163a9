"""An outbox that goes away: no job is burnt, and none is done into the mount point of a disk that is not there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from safelight.jobqueue import JobQueue
from safelight.jobspec import JobSpec
from safelight.receipt import Receipt
from safelightd import holds, outputs, verify
from safelightd.failure import failure
from safelightd.outputs import OutboxUnwritable
from tests.conftest import Installation
from tests.daemon.test_engine_failure import ON_CPU, watch_of
from tests.daemon.test_worker import Running, eventually, specs_of

MODELS = {"png": "tiny-flux-schnell", "jpg": "tiny-flux-schnell", "mp4": "tiny-wan-ti2v", "webp": "tiny-wan-ti2v"}


def job(installation: Installation, output_format: str) -> JobSpec:
    (spec,) = specs_of(installation, ["a fox"], model=MODELS[output_format], output_format=output_format)
    return spec


def frames_of(spec: JobSpec) -> Iterator[NDArray[Any]]:
    rng = np.random.default_rng(1)
    for _ in range(spec.num_frames or 1):
        yield rng.random((spec.height, spec.width, 3), dtype=np.float32)


def unmount(installation: Installation) -> None:
    outbox = installation.paths.outbox
    outbox.rename(outbox.with_name("disk"))
    outbox.mkdir()


def receipt_of(spec: JobSpec) -> Any:
    at = "2026-11-26T00:00:00+00:00"
    return lambda found: Receipt(id=spec.id, state="done", spec=spec, outputs=found, finished_at=at)


@pytest.mark.parametrize("output_format", MODELS)
@pytest.mark.parametrize("moment", ["write", "verify", "publish"])
def test_an_outbox_that_goes_at_any_moment_is_the_machines_fault(
    installation: Installation, output_format: str, moment: str
) -> None:
    spec = job(installation, output_format)
    paths = installation.paths

    def frames() -> Iterator[NDArray[Any]]:
        if moment == "write":
            unmount(installation)
        yield from frames_of(spec)

    def render() -> None:
        file = outputs.write(spec, ON_CPU, frames(), installation.config)
        if moment == "verify":
            unmount(installation)
        with outputs.explained(paths):
            verify.output(file, spec)
        unmount(installation)
        outputs.publish(receipt_of(spec), file, spec, installation.ledger, paths)

    with pytest.raises(OutboxUnwritable, match="outputs cannot be written below") as raised:
        render()

    assert failure(raised.value, watch_of(ON_CPU, "decode"))["kind"] == "machine"
    assert installation.ledger.intended(spec.id) is None


def test_nothing_is_rendered_into_an_empty_mount_point(installation: Installation) -> None:
    first, second = (job(installation, "png") for _ in range(2))
    paths = installation.paths
    file = outputs.write(first, ON_CPU, frames_of(first), installation.config)
    outputs.publish(receipt_of(first), file, first, installation.ledger, paths)
    holds.of_disks(installation.config)
    unmount(installation)
    with pytest.raises(OutboxUnwritable, match="is its disk mounted") as raised:
        outputs.write(second, ON_CPU, frames_of(second), installation.config)

    assert failure(raised.value, watch_of(ON_CPU, "decode"))["kind"] == "machine"
    assert list(paths.outbox.iterdir()) == []


def test_an_outbox_that_a_person_has_emptied_is_no_hold(installation: Installation) -> None:
    """What they see of it: the folder of unfinished files stays."""
    spec = job(installation, "png")
    paths = installation.paths
    file = outputs.write(spec, ON_CPU, frames_of(spec), installation.config)
    outputs.publish(receipt_of(spec), file, spec, installation.ledger, paths)

    assert holds.of_disks(installation.config) is None

    for each in paths.outbox.glob("[!.]*"):
        each.rename(installation.root / each.name)

    assert holds.of_disks(installation.config) is None


def test_an_outbox_whose_disk_is_not_mounted_holds_the_queue_until_it_is_back(
    installation: Installation, queue: JobQueue
) -> None:
    running = Running(installation, queue)
    try:
        running.ready()
        (first,) = running.submit("ok")
        running.all_in([first], "done")
        eventually(installation.paths.outbox_seen.exists)
        outbox = installation.paths.outbox
        # A worker between its look at the disks and the next job would run that, as it would a moment before.
        queue.set_user_hold("the disk is about to go")
        eventually(lambda: any("user" in row.holds for row in queue.workers()))
        unmount(installation)
        (second,) = running.submit("ok")
        queue.lift_user_hold()
        eventually(lambda: any("is its disk mounted?" in row.holds.get("disk", "") for row in queue.workers()))

        assert running.state(second) == "queued"
        assert list(outbox.iterdir()) == []

        outbox.rmdir()
        outbox.with_name("disk").rename(outbox)
        running.all_in([second], "done")
        assert [running.times_done(spec) for spec in (first, second)] == [1, 1]
    finally:
        running.kill()


def test_weights_that_go_while_frames_are_written_are_not_taken_for_the_outbox(installation: Installation) -> None:
    """Some are read while the first frame is decoded."""
    weights = installation.root / "vae.safetensors"

    def frames() -> Iterator[NDArray[Any]]:
        weights.read_bytes()
        yield from ()

    with pytest.raises(FileNotFoundError) as raised:
        outputs.write(job(installation, "png"), ON_CPU, frames(), installation.config)

    assert raised.value.filename == str(weights)
    assert not isinstance(raised.value, OutboxUnwritable)
