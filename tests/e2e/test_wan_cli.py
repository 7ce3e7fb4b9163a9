"""A job for Wan's own program, from the queue to a verified clip in the outbox: the real worker and engine, real child
processes, and a stand-in for the program that answers as the first word of the prompt says."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from PIL import Image

from safelight import config as settings
from safelight import embedded, models
from safelight.calibration import NOTHING_LEARNED
from safelight.jobqueue import JobQueue
from safelight.receipt import Receipt
from safelightd import calibration, video
from tests.cli_steps import runner
from tests.conftest import Installation
from tests.daemon.test_wan_cli import DATA, is_gone, pids_of
from tests.daemon.test_worker import PROGRAM, Running, eventually
from tests.integration.test_inbox_service import drop, running

ENGINE = Path(__file__).parents[1] / "daemon" / "roomy_engine.py"
CHECKPOINTS = ("models_t5_umt5-xxl-enc-bf16.pth", "google/umt5-xxl/spiece.model", "Wan2.2_VAE.pth", "config.json")
JOB = {"model": "wan-ti2v-5b", "backend": "wan-cli", "num_frames": 5, "num_inference_steps": 4}
START_S = 90
"""An engine imports for 11 to 17 s, and longer beside other work."""

SETTINGS = f"""\
[wan_cli]
checkout = "Wan2.2"
python = "{sys.executable}"
[models.wan-ti2v-5b]
native = "native"
"""


@pytest.fixture
def worker(installation: Installation, queue: JobQueue) -> Iterator[Running]:
    """A worker where the program is installed beside the settings."""
    (installation.root / "Wan2.2").mkdir()
    for name in ("generate.py", "transcript.txt"):
        (installation.root / "Wan2.2" / name).write_bytes((DATA / name).read_bytes())
    for name in CHECKPOINTS:
        (installation.root / "native" / name).parent.mkdir(parents=True, exist_ok=True)
        (installation.root / "native" / name).touch()
    with installation.config.source.open("a") as file:
        file.write(SETTINGS)
    config = settings.load(installation.env)
    installed = replace(installation, config=config, models=models.load(config))
    started = Running(installed, queue, [*PROGRAM, sys.executable, str(ENGINE)])
    started.ready()
    yield started
    started.kill()


def receipt_of(worker: Running, job: str) -> Receipt:
    receipt = worker.installation.ledger.receipt(job)
    assert receipt is not None
    return receipt


def told(worker: Running) -> dict[str, Any]:
    said: dict[str, Any] = json.loads((worker.installation.root / "Wan2.2/told.json").read_text())
    return said


def test_a_clip_of_wans_own_program_is_published_with_its_record(worker: Running) -> None:
    (spec,) = worker.submit("a fox", **JOB)
    worker.all_in([spec], "done", START_S)
    receipt = receipt_of(worker, spec.id)
    (output,) = receipt.outputs
    clip = worker.installation.paths.outbox / output.path

    assert video.timing(clip) == video.Timing(1280, 704, 5, 24)
    assert len(list(video.read_frames(clip))) == 5
    assert embedded.read(clip).spec == spec
    assert clip.with_suffix(".json").is_file()
    assert receipt.plan is not None
    assert receipt.plan.backend == "wan-cli"
    assert receipt.versions["wan-cli"] == "unknown"
    assert [*receipt.phases] == ["plan", "load", "encode", "denoise", "decode", "verify"]
    assert receipt.seconds_per_step is not None
    assert "TQDM_DISABLE" not in told(worker)["env"]
    assert "--t5_cpu" in told(worker)["argv"]
    assert not (worker.installation.paths.unfinished / spec.id).exists()
    assert calibration.load(worker.installation.paths.state) == NOTHING_LEARNED
    assert "Wan's own program" in runner(worker.installation)("show", spec.id).stdout


def test_a_job_shows_the_steps_that_the_program_itself_has_told(worker: Running) -> None:
    (spec,) = worker.submit("replay it", **{**JOB, "num_inference_steps": 50})
    shown: list[tuple[str, int, int]] = []

    def has_ended() -> bool:
        told = json.loads(worker.queue.fields(spec.id).get("progress", "{}"))
        if (
            told.get("phase") == "denoise"
            and told.get("i")
            and (now := (told["phase"], told["i"], told["n"])) not in shown
        ):
            shown.append(now)
        return worker.queue.state(spec.id) == "done"

    eventually(has_ended, START_S)
    receipt = receipt_of(worker, spec.id)

    assert shown  # of many, those that the worker passes on
    assert shown == sorted(shown)
    assert {(phase, n) for phase, _, n in shown} == {("denoise", 50)}
    assert [*receipt.phases] == ["plan", "load", "encode", "denoise", "decode", "verify"]
    assert len(list(video.read_frames(worker.installation.paths.outbox / receipt.outputs[0].path))) == 5


def test_a_picture_is_brought_to_the_clips_size_and_a_gif_and_frames_are_made_of_the_clip(worker: Running) -> None:
    paths = worker.installation.paths
    picture = worker.installation.root / "input.png"
    Image.effect_mandelbrot((300, 500), (-2, -1, 1, 1), 50).save(picture)
    digest = hashlib.sha256(picture.read_bytes()).hexdigest()
    paths.inputs.mkdir(parents=True, exist_ok=True)
    picture.rename(paths.inputs / digest)
    upright, frames = [
        *worker.submit("a fox", image=digest, width=704, height=1280, interpolate=2, **JOB),
        *worker.submit("a fox", output_format="png", **JOB),
    ]
    worker.all_in([upright, frames], "done", START_S)
    clip = paths.outbox / receipt_of(worker, upright.id).outputs[0].path
    folder = paths.outbox / receipt_of(worker, frames.id).outputs[0].path

    assert video.timing(clip) == video.Timing(704, 1280, 9, 48)
    assert [file.name for file in sorted(folder.iterdir())] == [f"000{number}.png" for number in range(1, 6)]


def test_what_goes_wrong_is_the_jobs_failure_in_the_programs_words_and_the_night_goes_on(worker: Running) -> None:
    said = {
        "crash": "Wan's own program ended with exit status 1 in denoise: RuntimeError: Given groups=1",
        "oom": "Wan's own program ran out of GPU memory in decode: torch.OutOfMemoryError: CUDA out of memory",
        "unsaved": "Wan's own program ended well, but without a clip: save_video failed",
        "broken": "Wan's own program left a broken clip. The clip cannot be decoded",
    }
    specs = worker.submit(*said, **JOB)
    (last,) = worker.submit("a fox", **JOB)
    worker.all_in(specs, "failed", START_S)
    worker.all_in([last], "done", START_S)
    receipts = [receipt_of(worker, spec.id) for spec in specs]

    assert [(receipt.error or "")[: len(words)] for receipt, words in zip(receipts, said.values(), strict=True)] == [
        *said.values()
    ]
    assert {receipt.attempts for receipt in receipts} == {1}
    assert [receipt.phase for receipt in receipts] == ["denoise", "decode", "decode", "decode"]
    assert not any(worker.installation.paths.unfinished.iterdir())


def test_a_cancelled_job_and_a_killed_engine_leave_no_process_behind(worker: Running) -> None:
    checkout = worker.installation.root / "Wan2.2"
    (spec,) = worker.submit("hang on", **JOB)
    eventually(lambda: (checkout / "pids").exists(), START_S)
    pids = pids_of(checkout)

    assert worker.queue.cancel([spec.id]) == ["asked"]

    worker.all_in([spec], "cancelled")
    eventually(lambda: all(map(is_gone, pids)))

    (checkout / "pids").unlink()
    worker.submit("hang on", **JOB)
    eventually(lambda: (checkout / "pids").exists(), START_S)
    pids = pids_of(checkout)
    children = psutil.Process(worker.process.pid).children()
    next(child for child in children if any("roomy" in word for word in child.cmdline())).kill()

    eventually(lambda: all(map(is_gone, pids)))


def test_the_inbox_rejects_what_the_settings_name_no_program_for(installation: Installation, queue: JobQueue) -> None:
    text = "---\nmodel: wan-ti2v-5b\nbackend: wan-cli\n---\na fox\n"
    installation.paths.inbox.mkdir(parents=True)
    rejected = installation.paths.rejected
    with running(installation.config):
        drop(installation.paths.inbox, "night.md", text)
        eventually(lambda: rejected.is_dir() and [*rejected.glob("*night.md.error.txt")])
    said = next(rejected.glob("*night.md.error.txt")).read_text()

    assert "does not say where Wan's own program is" in said
    assert queue.counts()["queued"] == 0
