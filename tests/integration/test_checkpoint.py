"""A clip that was stopped or killed goes on where it stood, and comes out as if nothing had been."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from safelight import durable
from safelight.caches import Cache
from safelight.jobspec import JobSpec
from safelight.plan import PhasePrediction
from safelightd import checkpoint
from safelightd.checkpoint import Checkpoint
from safelightd.progress import Cancelled
from tests.cli_steps import runner
from tests.conftest import Installation
from tests.daemon.test_worker import specs_of
from tests.integration.rendering import StopAt, plan_for, spec_for
from tests.integration.test_wan import JOBS, run_of
from tests.integration.warm_engine import receipts

STEPS = 6
OF_ANOTHER = "its checkpoint is of another plan, other weights or another version"
CPU = torch.device("cpu")


class Killed(BaseException):
    """The process ends here, as far as the loop can tell."""


def kept(folder: Path, every_s: float = 0.0) -> Checkpoint:
    return Checkpoint(folder / "job", "made by this", every_s)


def interrupted(fields: dict[str, Any], models_folder: Path, place: Checkpoint, after_step: int) -> None:
    """Run a job until so many steps are done, and end it there without a word."""
    run = run_of(fields, models_folder, checkpoint=place)

    def kill(told: dict[str, Any]) -> None:
        if told["type"] == "step" and told["phase"] == "denoise" and told["i"] == after_step:
            raise Killed

    run.watch._send = kill
    with pytest.raises(Killed):
        run.latents()


@pytest.mark.parametrize(
    "job", ["5B from text", "5B from a picture", "A14B from text", "A14B from a picture", "A14B from two pictures"]
)
def test_a_clip_that_was_killed_three_times_has_the_bits_of_an_undisturbed_one(
    job: str, tiny_models_folder: Path, tmp_path: Path
) -> None:
    fields = {**JOBS[job], "num_inference_steps": STEPS}
    undisturbed = run_of(fields, tiny_models_folder).latents()
    for after_step in (1, 3, 4):
        interrupted(fields, tiny_models_folder, kept(tmp_path), after_step)
    last = run_of(fields, tiny_models_folder, checkpoint=kept(tmp_path))

    assert torch.equal(last.latents(), undisturbed)
    assert last.watch.resumed_after_step == 4
    assert last.steps("denoise") == [(5, STEPS), (6, STEPS)]


def test_two_experts_are_parted_by_a_checkpoint_however_seldom_there_is_one(
    tiny_models_folder: Path, tmp_path: Path
) -> None:
    fields = {**JOBS["A14B from text"], "num_inference_steps": STEPS}
    undisturbed = run_of(fields, tiny_models_folder)
    latents = undisturbed.latents()
    interrupted(fields, tiny_models_folder, kept(tmp_path, every_s=3600.0), STEPS)
    last = run_of(fields, tiny_models_folder, checkpoint=kept(tmp_path, every_s=3600.0))

    assert torch.equal(last.latents(), latents)
    assert last.watch.resumed_after_step is not None
    assert 0 < last.watch.resumed_after_step < STEPS


def test_a_job_that_is_asked_to_stop_keeps_its_last_step(tiny_models_folder: Path, tmp_path: Path) -> None:
    """In the middle of a step: what the next attempt begins with is what the step before it ended with."""
    fields = {**JOBS["5B from text"], "num_inference_steps": STEPS}
    whole = run_of(fields, tiny_models_folder)
    undisturbed = whole.latents()
    stopped = run_of(
        fields, tiny_models_folder, checkpoint=kept(tmp_path, every_s=3600.0), stop=StopAt(whole.stop.asked * 2 // 3)
    )
    with pytest.raises(Cancelled):
        stopped.latents()
    last = run_of(fields, tiny_models_folder, checkpoint=kept(tmp_path, every_s=3600.0))

    assert torch.equal(last.latents(), undisturbed)
    assert last.watch.resumed_after_step == stopped.steps("denoise")[-1][0]


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "another plan"])
def test_what_is_damaged_or_of_another_plan_is_left_and_the_log_says_so(
    damage: str, tiny_models_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fields = {**JOBS["5B from text"], "num_inference_steps": STEPS}
    interrupted(fields, tiny_models_folder, kept(tmp_path), 3)
    file = tmp_path / "job"
    content = file.read_bytes()
    middle = len(content) // 2
    match damage:
        case "cut":
            file.write_bytes(content[:middle])
        case "flipped":
            file.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
        case "empty":
            file.write_bytes(b"")
    place = Checkpoint(file, "made by that" if damage == "another plan" else "made by this", 3600.0)
    with caplog.at_level(logging.WARNING):
        last = run_of(fields, tiny_models_folder, checkpoint=place)
        latents = last.latents()

    assert torch.equal(latents, run_of(fields, tiny_models_folder).latents())
    assert last.watch.resumed_after_step is None
    assert last.watch.began_anew == (OF_ANOTHER if damage == "another plan" else "its checkpoint is damaged")
    assert "first step" in caplog.text


def test_why_a_job_began_anew_is_known_to_the_attempts_after(tiny_models_folder: Path, tmp_path: Path) -> None:
    fields = {**JOBS["5B from text"], "num_inference_steps": STEPS}
    (tmp_path / "job").write_bytes(b"what a disk made of it")
    for after_step in (2, 4):
        interrupted(fields, tiny_models_folder, kept(tmp_path), after_step)
    last = run_of(fields, tiny_models_folder, checkpoint=kept(tmp_path))
    last.latents()

    assert (last.watch.began_anew, last.watch.resumed_after_step) == ("its checkpoint is damaged", 4)


def test_a_checkpoint_tells_the_way_that_the_job_was_begun_in(tiny_models_folder: Path, tmp_path: Path) -> None:
    fields = {**JOBS["5B from text"], "num_inference_steps": STEPS}
    plan = run_of(fields, tiny_models_folder).plan
    interrupted(fields, tiny_models_folder, replace(kept(tmp_path), plan=plan, versions={"torch": "2"}), 3)
    begun = checkpoint.begun(tmp_path / "job", {"torch": "2"})

    assert begun is not None
    assert begun.step in (2, 3)  # the kill came beside the third
    assert (begun.dtype, begun.precision, begun.compiled) == (plan.dtype, plan.precision, plan.compiled)
    assert (begun.text_encoder_precision, begun.text_encoder_device) == (None, "cpu")
    assert checkpoint.begun(tmp_path / "job", {"torch": "3"}) is None, "nothing goes on with what it holds"


@pytest.mark.parametrize("content", [None, b"", b"what a disk made of it" * 9], ids=["none", "empty", "damaged"])
def test_a_checkpoint_that_cannot_say_how_the_job_was_begun_binds_no_plan(
    content: bytes | None, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / "job").write_bytes(content)

    assert checkpoint.begun(tmp_path / "job", {}) is None


def test_one_of_before_that_was_told_binds_no_plan(tmp_path: Path) -> None:
    kept(tmp_path).keeper().save(1, {"latents": torch.zeros(1)}, FlowMatchEulerDiscreteScheduler())

    assert kept(tmp_path).load() is not None
    assert checkpoint.begun(tmp_path / "job", {}) is None


@pytest.mark.parametrize("damage", ["damaged", "another plan"])
def test_the_receipt_says_that_a_job_began_anew_and_why_and_show_shows_it(
    damage: str, installation: Installation
) -> None:
    (spec,) = specs_of(installation, ["a fox"], model="tiny-wan-ti2v")
    spec = spec.model_copy(update={"num_inference_steps": 2})
    file = installation.paths.checkpoints / spec.id
    if damage == "damaged":
        durable.write(file, b"what a disk made of it")
    else:
        Checkpoint(file, "another").keeper().save(1, {"latents": torch.zeros(1)}, FlowMatchEulerDiscreteScheduler())
    receipt = receipts(installation)(spec)
    reason = OF_ANOTHER if damage == "another plan" else "its checkpoint is damaged"

    assert (receipt.began_anew, receipt.resumed_after_step) == (reason, None)
    assert installation.ledger.receipt(spec.id) == receipt
    assert f"began anew  {reason}\n" in runner(installation)("show", spec.id).stdout


def test_the_receipt_of_a_job_that_found_no_checkpoint_says_nothing_of_it(installation: Installation) -> None:
    (spec,) = specs_of(installation, ["a fox"], model="tiny-wan-ti2v")
    receipt = receipts(installation)(spec.model_copy(update={"num_inference_steps": 2}))

    assert receipt.began_anew is None
    assert "began anew" not in runner(installation)("show", spec.id).stdout


def test_a_disk_that_takes_no_checkpoint_fails_no_job(
    tiny_models_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_given: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("safelight.durable.sync_file", full)
    fields = {**JOBS["5B from text"], "num_inference_steps": 2}
    run = run_of(fields, tiny_models_folder, checkpoint=kept(tmp_path))

    assert run.latents().isfinite().all()
    assert "No space left on device" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_the_reserve_of_the_disk_is_left_by_checkpoints_too(
    tiny_models_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fields = {**JOBS["5B from text"], "num_inference_steps": 2}
    run = run_of(fields, tiny_models_folder, checkpoint=replace(kept(tmp_path), leave_bytes=2**60))

    assert run.latents().isfinite().all()
    assert "of which 1.07374e+09 stay" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_what_an_engine_that_was_killed_while_it_wrote_has_left_makes_room_for_the_next(tmp_path: Path) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    left, other = (tmp_path / f".job.{process}.part" for process in (ended.pid, os.getppid()))
    for file in (left, other):
        file.write_bytes(b"half")
    kept(tmp_path).keeper().save(1, {"latents": torch.zeros(1)}, FlowMatchEulerDiscreteScheduler())

    assert sorted(tmp_path.iterdir()) == [other, tmp_path / "job"]


def test_what_takes_long_to_write_is_written_more_seldom() -> None:
    assert checkpoint.pause_s(60.0, 0.1) == 60.0
    assert checkpoint.pause_s(60.0, 4.0) == 200.0
    assert checkpoint.pause_s(60.0, 100.0) == 600.0
    assert checkpoint.pause_s(0.0, 100.0) == 0.0


@pytest.mark.parametrize(
    "new",
    [
        lambda: UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0),
        FlowMatchEulerDiscreteScheduler,
    ],
    ids=["UniPC", "FlowMatchEuler"],
)
@pytest.mark.parametrize("after", [1, 2, 5])
def test_a_scheduler_remembers_everything(new: Any, after: int, tmp_path: Path) -> None:
    torch.manual_seed(3)
    velocities = torch.randn(8, 1, 4, 3, 3)

    def run(scheduler: Any, latents: torch.Tensor, steps: range) -> torch.Tensor:
        for i in steps:
            latents = scheduler.step(velocities[i], scheduler.timesteps[i], latents, return_dict=False)[0]
        return latents

    noise = torch.randn(1, 4, 3, 3)
    schedulers = [new() for _ in range(3)]
    for scheduler in schedulers:
        scheduler.set_timesteps(8)
        scheduler.set_begin_index(0)
    whole, first, second = schedulers
    place = kept(tmp_path)
    place.keeper().save(after, {"latents": run(first, noise, range(after))}, first)
    saved = place.load()
    assert saved is not None
    saved.restore(second, CPU)

    assert torch.equal(run(second, saved.tensors["latents"], range(after, 8)), run(whole, noise, range(8)))


def test_what_no_checkpoint_can_hold_keeps_none_and_the_log_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.order_of_the_day = object()
    kept(tmp_path).keeper().save(1, {}, scheduler)

    assert list(tmp_path.iterdir()) == []
    assert "scheduler.order_of_the_day is a object" in caplog.text


def test_only_what_decides_bits_makes_another_job() -> None:
    spec, plan = spec_for("tiny-wan-ti2v"), plan_for("tiny-wan-ti2v")
    same = checkpoint.digest(spec, plan, [], {"torch": "2"})
    moved = plan.model_copy(update={"streamed": {"transformer": (1,)}, "predicted": {"encode": PhasePrediction(
        device_bytes=1, host_bytes=1)}})  # fmt: skip

    assert checkpoint.digest(spec, moved, [], {"torch": "2"}) == same
    for other in (
        checkpoint.digest(spec.model_copy(update={"seed": 8}), plan, [], {"torch": "2"}),
        checkpoint.digest(spec, plan.model_copy(update={"precision": "nf4"}), [], {"torch": "2"}),
        checkpoint.digest(spec, plan, [["a", 1, 2]], {"torch": "2"}),
        checkpoint.digest(spec, plan, [], {"torch": "3"}),
    ):
        assert other != same


@pytest.mark.parametrize("name", ["model_index.json", "scheduler/scheduler_config.json"])
def test_another_schedule_makes_another_job(name: str, tiny_models_folder: Path, tmp_path: Path) -> None:
    """Else the sigmas and the boundary of before would go on under what the model says now."""
    own = Path(shutil.copytree(tiny_models_folder, tmp_path / "models"))
    run = run_of(JOBS["5B from text"], own)
    before = run.loader.weights()
    config = own / run.spec.model / name
    config.write_text(config.read_text() + " ")

    assert run.loader.weights() != before


def test_a_checkpoint_of_before_there_were_caches_in_them_goes_on_where_the_job_has_none() -> None:
    spec, plan = spec_for("tiny-wan-ti2v"), plan_for("tiny-wan-ti2v")
    cached = spec.model_copy(update={"cache": Cache(kind="first-block")})

    def of_before(spec: JobSpec) -> str:
        told = {
            "spec": spec.model_dump(mode="json"),
            "plan": plan.model_dump(mode="json", include=set(checkpoint.DECIDES_THE_BITS)),
            "weights": [],
            "versions": {"torch": "2"},
        }
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()

    assert checkpoint.digest(spec, plan, [], {"torch": "2"}) == of_before(spec)
    assert checkpoint.digest(cached, plan, [], {"torch": "2"}) != of_before(cached)


def test_a_checkpoint_says_what_it_is_of(tiny_models_folder: Path, tmp_path: Path) -> None:
    fields = {**JOBS["5B from text"], "num_inference_steps": STEPS}
    interrupted(fields, tiny_models_folder, kept(tmp_path), 2)
    saved = kept(tmp_path).load()

    assert saved is not None
    assert saved.step == 2
    assert {"latents", "mask"} <= set(saved.tensors)
    assert json.dumps(saved.scheduler["model_outputs"])
