"""Clips of a batch joined into one file: the same frames, or a refusal that names what differs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from safelight import clips
from safelight.errors import InvalidJob, SafelightError
from safelight.jobspec import JobSpec
from safelight.ledger import Ledger
from safelight.receipt import Receipt
from safelightd import outputs, video
from safelightd.concat import Joined, concat
from tests.conftest import Installation
from tests.integration import making

ROOT = Path(__file__).parents[2]

needs_ffprobe = pytest.mark.skipif(not shutil.which("ffprobe"), reason="no ffprobe here: apt install ffmpeg")


def make(path: Path, frames: int = 9, *, fps: int = 24, seed: int | None = None, **size: int) -> Path:
    spec = making.clip_spec(num_frames=frames, **size)
    pictures = making.moving(spec) if seed is None else (making.noise(spec, seed + n) for n in range(frames))
    video.write_mp4(path, pictures, fps=fps, width=spec.width, height=spec.height, comment='{"a": 1}')
    return path


def three(folder: Path) -> list[Path]:
    names = ["one.mp4", "it's two.mp4", "drei & vier.mp4"]
    return [
        make(folder / name, frames, seed=number)
        for number, (name, frames) in enumerate(zip(names, (9, 5, 13), strict=True))
    ]


def below(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


@pytest.mark.parametrize("fps", [7, 16, 24, 120])
@pytest.mark.parametrize("lengths", [(9, 9), (5, 13, 5), (33, 5, 9, 81), (5,) * 12])
def test_joined_clip_has_exactly_the_frames_of_all(lengths: tuple[int, ...], fps: int, tmp_path: Path) -> None:
    parts = [make(tmp_path / f"{n}.mp4", frames, fps=fps, seed=n) for n, frames in enumerate(lengths)]

    joined = concat(parts, tmp_path / "all.mp4")

    assert joined == Joined(sum(lengths), sum(lengths) / fps)
    written = (frame for part in parts for frame in video.read_frames(part))
    for frame, its in zip(video.read_frames(tmp_path / "all.mp4"), written, strict=True):
        assert (frame == its).all()
    assert video.timing(tmp_path / "all.mp4") == video.Timing(96, 64, sum(lengths), fps)


@pytest.mark.parametrize("lengths", [(5, 9), (81, 49, 121), (5,) * 150])
@pytest.mark.parametrize("fps", [16, 24])
def test_clips_whose_length_is_no_whole_milliseconds_follow_evenly(
    lengths: tuple[int, ...], fps: int, tmp_path: Path
) -> None:
    made = {count: tmp_path / f"{count}.mp4" for count in set(lengths)}
    y, x = np.mgrid[0:64, 0:96]
    for count, path in made.items():
        # Slow enough for frames that are stored out of their order.
        pictures = (np.stack([3 * x + 5 * n, 3 * y, x + y + 3 * n], -1).astype(np.uint8) for n in range(count))
        video.write_mp4(path, pictures, fps=fps, width=96, height=64)

    concat([made[count] for count in lengths], tmp_path / "all.mp4")

    assert video.timing(tmp_path / "all.mp4") == video.Timing(96, 64, sum(lengths), fps)


def test_clips_that_cannot_follow_evenly_are_said_and_nothing_is_kept(tmp_path: Path) -> None:
    """H.264 of one frame is decoded without delay, that of more is not."""
    parts = [make(tmp_path / f"{count}.mp4", count, fps=16) for count in (5, 1)]

    with pytest.raises(SafelightError, match="not evenly spaced"):
        concat(parts, tmp_path / "all.mp4")

    assert below(tmp_path) == ["1.mp4", "5.mp4"]


@needs_ffprobe
def test_another_program_decodes_the_exact_frames_evenly_spaced(tmp_path: Path) -> None:
    concat(three(tmp_path), tmp_path / "all.mp4")

    command = ["ffprobe", "-v", "error", "-count_frames", "-show_streams", "-show_frames", "-of", "json"]
    said = subprocess.run([*command, str(tmp_path / "all.mp4")], capture_output=True, text=True, check=True)
    found = json.loads(said.stdout)
    (stream,) = found["streams"]
    assert said.stderr == ""
    assert (stream["nb_frames"], stream["nb_read_frames"], stream["r_frame_rate"]) == ("27", "27", "24/1")
    assert set(np.diff([frame["pts"] for frame in found["frames"]])) == {512}


def test_index_comes_first_and_no_clips_record_is_taken_for_that_of_all(tmp_path: Path) -> None:
    concat(three(tmp_path), tmp_path / "all.mp4")

    written = (tmp_path / "all.mp4").read_bytes()
    assert written.index(b"moov") < written.index(b"mdat")
    assert b'{"a": 1}' not in written


def test_clips_that_differ_are_all_named_and_nothing_is_written(tmp_path: Path) -> None:
    (tmp_path / "text.mp4").write_text("no clip")
    parts = [
        make(tmp_path / "first.mp4"),
        make(tmp_path / "wide.mp4", width=128),
        make(tmp_path / "like.mp4"),
        make(tmp_path / "fast.mp4", fps=30),
        tmp_path / "text.mp4",
        tmp_path / "gone.mp4",
    ]
    before = below(tmp_path)

    with pytest.raises(InvalidJob) as refused:
        concat(parts, tmp_path / "all.mp4")

    like = "and the first clip, first.mp4, is 96x64 at 24 frames a second"
    named = {Path(fault.where).name: fault.problem for fault in refused.value.faults}
    assert named == {
        "wide.mp4": f"is 128x64 at 24 frames a second, {like}",
        "fast.mp4": f"is 96x64 at 30 frames a second, {like}",
        "text.mp4": named["text.mp4"],
        "gone.mp4": "is not there any more",
    }
    assert named["text.mp4"].startswith("is no MP4 that can be joined: ")
    assert below(tmp_path) == before


def test_clip_of_another_encoder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = make(tmp_path / "first.mp4")
    with monkeypatch.context() as other:
        other.setattr(video, "ENCODE", [*video.ENCODE[:-2], "-bf", "0", "-profile:v", "baseline", "-f", "mp4"])
        second = make(tmp_path / "second.mp4")

    with pytest.raises(InvalidJob, match=r"second\.mp4: was encoded in another way than the first clip, first\.mp4"):
        concat([first, second], tmp_path / "all.mp4")


def test_what_is_there_is_replaced_only_when_told(tmp_path: Path) -> None:
    target = tmp_path / "all.mp4"
    target.write_bytes(b"a person's own")
    parts = three(tmp_path)

    with pytest.raises(InvalidJob, match=r"all\.mp4: is there already\. Write --force to replace it"):
        concat(parts, target)
    assert target.read_bytes() == b"a person's own"

    concat(parts, target, force=True)
    assert video.timing(target).num_frames == 27


def test_folder_is_replaced_by_no_force(tmp_path: Path) -> None:
    (tmp_path / "all.mp4").mkdir()

    with pytest.raises(InvalidJob, match=r"is there already\. Name a file"):
        concat(three(tmp_path), tmp_path / "all.mp4", force=True)


def test_target_that_comes_meanwhile_is_not_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, join = tmp_path / "all.mp4", video.join

    def slow(parts: Any, path: Path) -> None:
        join(parts, path)
        target.write_bytes(b"another's")

    monkeypatch.setattr(video, "join", slow)

    with pytest.raises(InvalidJob, match="is there already"):
        concat(three(tmp_path), target)
    assert target.read_bytes() == b"another's"
    assert [name for name in below(tmp_path) if name.endswith(".part")] == []


def test_file_that_the_disk_refuses_leaves_nothing_and_keeps_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "all.mp4"
    target.write_bytes(b"of last week")
    parts = three(tmp_path)
    before = below(tmp_path)

    with making.file_size_limit(1024), pytest.raises(OSError, match="File too large"):
        concat(parts, target, force=True)

    assert below(tmp_path) == before
    assert target.read_bytes() == b"of last week"


def test_what_does_not_decode_to_all_frames_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video, "join", lambda parts, path: shutil.copyfile(parts[0], path))

    with pytest.raises(SafelightError, match="with 9 frames, not 96x64 at 24 frames a second with 27"):
        concat(three(tmp_path), tmp_path / "all.mp4")

    assert "all.mp4" not in below(tmp_path)
    assert [name for name in below(tmp_path) if name.endswith(".part")] == []


PAUSED = """
import sys, time
from pathlib import Path
sys.path[:0] = {path!r}
from safelightd import concat, video

def check(*_):
    print("written", flush=True)
    time.sleep(60)

concat._check = check
concat.concat([Path(name) for name in sys.argv[2:]], Path(sys.argv[1]))
"""


def test_killed_join_leaves_no_file_of_that_name(tmp_path: Path) -> None:
    parts, target = three(tmp_path), tmp_path / "all.mp4"
    program = [sys.executable, "-c", PAUSED.format(path=sys.path), str(target), *map(str, parts)]
    with subprocess.Popen(program, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"written\n"
        process.send_signal(signal.SIGKILL)

    assert not target.exists()
    concat(parts, target)
    assert video.timing(target).num_frames == 27


# The clips of a batch, and the command.


def done(installation: Installation, job: str, *, batch: str = "night", **changes: Any) -> Receipt:
    """Render and publish a job as the daemon does."""
    fields = {"id": job, "batch": batch, "index": int(job.rsplit("-", 1)[1]), **changes}
    spec = making.clip_spec(**fields)
    installation.ledger.accept({job: [spec]})
    return published(installation, spec)


def published(installation: Installation, spec: JobSpec) -> Receipt:
    file = outputs.write(spec, making.PLAN, making.frames(spec), installation.config)
    ledger = Ledger(installation.paths)
    return outputs.publish(lambda out: making.receipt(spec, out), file, spec, ledger, installation.paths)


FIRST, SECOND = "20261122-210000-000abcd", "20261123-210000-000abcd"


def test_clips_of_a_batch_come_in_the_order_of_their_jobs(installation: Installation) -> None:
    jobs = [f"{SECOND}-00001", f"{FIRST}-00010", f"{FIRST}-00002"]
    receipts = {job: done(installation, job) for job in jobs}
    done(installation, f"{FIRST}-00003", batch="other")

    found = clips.of_batch(installation.ledger, "night")

    assert found.files == tuple(installation.paths.outbox / receipts[job].outputs[0].path for job in sorted(jobs))
    assert found.left_out == ()


def test_jobs_without_a_clip_are_told(installation: Installation) -> None:
    done(installation, f"{FIRST}-00001")
    waiting, failed = (making.clip_spec(id=f"{FIRST}-0000{n}", index=n) for n in (2, 3))
    installation.ledger.accept({waiting.id: [waiting], failed.id: [failed]})
    installation.ledger.record(making.receipt(failed, ()).model_copy(update={"state": "failed"}))

    found = clips.of_batch(installation.ledger, "night")

    assert len(found.files) == 1
    assert found.left_out == ((waiting.id, "has not ended"), (failed.id, "is failed"))


def test_batch_without_clips_and_clips_of_other_formats_are_refused(installation: Installation) -> None:
    with pytest.raises(InvalidJob, match="batch night: has no clip that is done"):
        clips.of_batch(installation.ledger, "night")
    done(installation, f"{FIRST}-00001")
    done(installation, f"{FIRST}-00002", output_format="webp")

    with pytest.raises(InvalidJob, match=r"0002_a-red-fox_s7\.webp: is webp, not mp4"):
        clips.of_batch(installation.ledger, "night")


def safelight(installation: Installation, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    env = installation.env | {"PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in ("client", "daemon"))}
    command = [sys.executable, "-m", "safelight.cli", *words]
    return subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, timeout=300)


def test_command_joins_a_batch_and_prints_the_path(installation: Installation, tmp_path: Path) -> None:
    done(installation, f"{FIRST}-00001")
    done(installation, f"{FIRST}-00002", num_frames=5)
    done(installation, f"{SECOND}-00001", submitted_at="2026-11-23T12:00:00+00:00")

    both = safelight(installation, tmp_path, "concat", "night", "--date", "2026-11-22")
    again = safelight(installation, tmp_path, "concat", "night")
    forced = safelight(installation, tmp_path, "concat", "night", "-o", "night.mp4", "--force")

    assert (both.returncode, both.stdout) == (0, f"{tmp_path}/night.mp4\n"), both.stderr
    assert "2 clips, 14 frames, 0.6 s." in both.stderr
    assert (again.returncode, again.stdout) == (2, "")
    assert "night.mp4: is there already. Write --force to replace it, or name another." in again.stderr
    assert (forced.returncode, video.timing(tmp_path / "night.mp4").num_frames) == (0, 23), forced.stderr


def test_folder_that_is_not_there_is_said_without_a_traceback(installation: Installation, tmp_path: Path) -> None:
    done(installation, f"{FIRST}-00001")

    said = safelight(installation, tmp_path, "concat", "night", "-o", "none/night.mp4")

    assert (said.returncode, said.stdout) == (1, "")
    assert said.stderr.splitlines()[-1].endswith(
        "No such file or directory. Name a file in a folder that you may write, with room for it."
    )
    assert "Traceback" not in said.stderr
