"""Collecting outputs into a person's own folder: again and again, beside other things, on small disks."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from safelight import collect as collecting
from safelight import content
from safelight.collect import Copied, collect
from safelight.errors import SafelightError
from safelight.receipt import Output, Poster, Receipt
from tests.conftest import Installation
from tests.integration import making

ROOT = Path(__file__).parents[2]
NOW = datetime(2026, 11, 23, 7, tzinfo=UTC)


@pytest.fixture
def outbox(tmp_path: Path) -> Path:
    folder = tmp_path / "outbox"
    folder.mkdir()
    return folder


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "Pictures"


def _publish(outbox: Path, path: str, content: bytes, job: str = "job-1", *, sidecar: bool = True) -> Receipt:
    """Put an output and its receipt where the daemon puts them."""
    file = outbox / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    output = Output(path=path, sha256=digest, bytes=len(content), width=64, height=48)
    receipt = making.receipt(making.image_spec(id=job), (output,))
    if sidecar:
        file.with_suffix(".json").write_text(receipt.model_dump_json())
    return receipt


def _files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def _outcomes(copied: list[Copied]) -> list[str]:
    return [one.outcome for one in copied]


def test_outputs_are_copied_by_batch_with_their_receipts(outbox: Path, target: Path) -> None:
    first = _publish(outbox, "2026-11-22/night/0001_fox_s1.png", b"fox", "job-1")
    second = _publish(outbox, "2026-11-23/day/0001_cat_s1.mp4", b"cat", "job-2")

    copied = collect([first, second], outbox, target)

    assert copied == [
        Copied("job-1", outbox / first.outputs[0].path, target / "night/0001_fox_s1.png", "copied"),
        Copied("job-2", outbox / second.outputs[0].path, target / "day/0001_cat_s1.mp4", "copied"),
    ]
    assert _files(target) == {
        "night/0001_fox_s1.png": b"fox",
        "night/0001_fox_s1.json": first.model_dump_json().encode(),
        "day/0001_cat_s1.mp4": b"cat",
        "day/0001_cat_s1.json": second.model_dump_json().encode(),
    }
    assert len(_files(outbox)) == 4


def test_collecting_again_changes_nothing(outbox: Path, target: Path) -> None:
    receipts = [_publish(outbox, f"2026-11-22/night/{n:04}_x_s1.png", bytes([n]), f"job-{n}") for n in range(3)]
    collect(receipts, outbox, target)
    before = {file: (target / file).stat().st_mtime_ns for file in _files(target)}

    again = collect(receipts, outbox, target)

    assert _outcomes(again) == ["already there"] * 3
    assert {file: (target / file).stat().st_mtime_ns for file in _files(target)} == before


def test_different_file_of_that_name_is_never_overwritten(outbox: Path, target: Path) -> None:
    """Two nights, one batch name, one prompt."""
    first = _publish(outbox, "2026-11-22/night/0001_fox_s1.png", b"one", "job-1")
    second = _publish(outbox, "2026-11-23/night/0001_fox_s1.png", b"two", "job-2")
    (target / "night").mkdir(parents=True)
    (target / "night/0001_fox_s1.png").write_bytes(b"mine")

    for _ in range(2):
        copied = collect([first, second], outbox, target)

    assert [one.target for one in copied] == [target / "night/0001_fox_s1-2.png", target / "night/0001_fox_s1-3.png"]
    assert _files(target) == {
        "night/0001_fox_s1.png": b"mine",
        "night/0001_fox_s1-2.png": b"one",
        "night/0001_fox_s1-2.json": first.model_dump_json().encode(),
        "night/0001_fox_s1-3.png": b"two",
        "night/0001_fox_s1-3.json": second.model_dump_json().encode(),
    }


def test_receipt_of_another_job_is_never_overwritten(outbox: Path, target: Path) -> None:
    """Same bytes, two jobs: without metadata inside, only the receipts tell them apart."""
    first = _publish(outbox, "2026-11-22/night/0001_fox_s1.png", b"same", "job-1")
    second = _publish(outbox, "2026-11-23/night/0001_fox_s1.png", b"same", "job-2")

    for _ in range(2):
        copied = collect([first, second], outbox, target)

    assert [one.target for one in copied] == [target / "night/0001_fox_s1.png", target / "night/0001_fox_s1-2.png"]
    assert (target / "night/0001_fox_s1.json").read_text() == first.model_dump_json()
    assert (target / "night/0001_fox_s1-2.json").read_text() == second.model_dump_json()


def test_output_that_a_person_moved_is_reported_and_the_rest_is_copied(outbox: Path, target: Path) -> None:
    gone = _publish(outbox, "2026-11-22/night/0001_fox_s1.png", b"one", "job-1")
    here = _publish(outbox, "2026-11-22/night/0002_fox_s1.png", b"two", "job-2")
    (outbox / gone.outputs[0].path).unlink()

    copied = collect([gone, here], outbox, target)

    assert copied[0] == Copied("job-1", outbox / gone.outputs[0].path, None, "missing")
    assert _outcomes(copied) == ["missing", "copied"]


def test_missing_outputs_alone_create_no_folder(outbox: Path, target: Path) -> None:
    gone = _publish(outbox, "2026-11-22/night/0001_fox_s1.png", b"one")
    shutil.rmtree(outbox)

    assert _outcomes(collect([gone], outbox, target)) == ["missing"]
    assert not target.exists()


def test_output_that_is_not_what_was_published_is_reported_not_copied(outbox: Path, target: Path) -> None:
    changed = _publish(outbox, "2026-11-22/night/0001_fox_s1.png", b"one")
    (outbox / changed.outputs[0].path).write_bytes(b"eno")

    assert _outcomes(collect([changed], outbox, target, move=True)) == ["changed"]
    assert _files(target) == {}
    assert len(_files(outbox)) == 2


def test_receipts_of_jobs_without_outputs_are_passed_over(outbox: Path, target: Path) -> None:
    assert collect([making.receipt(making.image_spec(), ())], outbox, target) == []


def test_moving_empties_the_outbox_and_may_be_repeated(outbox: Path, target: Path) -> None:
    receipt = _publish(outbox, "2026-11-22/night/0001_fox_s1.png", b"one")

    first = collect([receipt], outbox, target, move=True)
    second = collect([receipt], outbox, target, move=True)

    assert (_outcomes(first), _outcomes(second)) == (["moved"], ["already there"])
    assert second[0].target == target / "night/0001_fox_s1.png"
    assert _files(outbox) == {}
    assert len(_files(target)) == 2


def test_moving_onto_itself_loses_nothing(outbox: Path) -> None:
    """The target is the outbox's own folder of that date, by name or through a link."""
    receipt = _publish(outbox, "2026-11-22/night/0001_fox_s1.png", b"one")
    link = outbox.parent / "link"
    link.symlink_to(outbox / "2026-11-22")

    for target in (outbox / "2026-11-22", link):
        assert _outcomes(collect([receipt], outbox, target, move=True)) == ["already there"]
    assert len(_files(outbox)) == 2


def test_output_without_its_receipt_is_copied_alone(outbox: Path, target: Path) -> None:
    receipt = _publish(outbox, "2026-11-22/night/0001_fox_s1.png", b"one", sidecar=False)

    for expected in ("copied", "already there"):
        assert _outcomes(collect([receipt], outbox, target)) == [expected]
    assert _files(target) == {"night/0001_fox_s1.png": b"one"}


def test_copy_interrupted_between_file_and_receipt_is_completed(outbox: Path, target: Path) -> None:
    receipt = _publish(outbox, "2026-11-22/night/0001_fox_s1.png", b"one")
    collect([receipt], outbox, target)
    (target / "night/0001_fox_s1.json").unlink()

    assert _outcomes(collect([receipt], outbox, target)) == ["already there"]
    assert len(_files(target)) == 2


def test_dangling_link_in_the_target_is_left_alone(outbox: Path, target: Path) -> None:
    receipt = _publish(outbox, "2026-11-22/night/0001_fox_s1.png", b"one")
    (target / "night").mkdir(parents=True)
    (target / "night/0001_fox_s1.png").symlink_to("nowhere")

    assert collect([receipt], outbox, target)[0].target == target / "night/0001_fox_s1-2.png"
    assert not (target / "night/nowhere").exists()


@pytest.mark.parametrize("path", ["../../etc/passwd", "/etc/passwd", "2026-11-22/../../../x.png"])
def test_receipt_that_names_a_file_outside_the_outbox_is_refused(outbox: Path, target: Path, path: str) -> None:
    output = Output(path=path, sha256="0" * 64, bytes=1, width=1, height=1)

    with pytest.raises(SafelightError, match="not inside the outbox"):
        collect([making.receipt(making.image_spec(), (output,))], outbox, target)


def test_target_that_is_a_file_is_the_systems_error(outbox: Path, target: Path) -> None:
    receipt = _publish(outbox, "2026-11-22/night/0001_fox_s1.png", b"one")
    target.write_text("mine")

    with pytest.raises(NotADirectoryError):
        collect([receipt], outbox, target)
    assert target.read_text() == "mine"


@pytest.fixture
def small_disk(installation: Installation) -> Iterator[Path]:
    folder = installation.root / "stick"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_full_target_keeps_what_fits_and_no_half_file(outbox: Path, small_disk: Path) -> None:
    receipts = [_publish(outbox, f"2026-11-22/night/{n:04}_x_s1.png", os.urandom(20_000), f"job-{n}") for n in range(4)]

    with pytest.raises(OSError, match="No space left on device"):
        collect(receipts, outbox, small_disk, move=True)

    whole = {receipt.outputs[0].sha256 for receipt in receipts}
    pictures = [content for name, content in _files(small_disk).items() if name.endswith(".png")]
    assert pictures
    assert all(hashlib.sha256(content).hexdigest() in whole for content in pictures)
    assert not [name for name in _files(small_disk) if name.endswith(".part")]
    kept = [content for name, content in _files(outbox).items() if name.endswith(".png")]
    assert {hashlib.sha256(content).hexdigest() for content in pictures + kept} == whole


COLLECTOR = """
import sys
from pathlib import Path
from safelight.collect import collect
from safelight.receipt import Receipt
print("ready", flush=True)
receipts = [Receipt.model_validate_json(line) for line in sys.stdin]
print(len(collect(receipts, Path(sys.argv[1]), Path(sys.argv[2]))))
"""


def test_collectors_at_once_copy_each_output_once(tmp_path: Path, target: Path) -> None:
    """Two from one outbox, one from another with other files of the same names."""
    outboxes = [tmp_path / "a", tmp_path / "a", tmp_path / "b"]
    env = os.environ | {"PYTHONPATH": str(ROOT / "client")}
    lines = {
        outbox: "".join(
            _publish(
                outbox, f"2026-11-22/night/{n:04}_x_s1.png", outbox.name.encode() * 1000, f"job-{outbox.name}-{n}"
            ).model_dump_json()
            + "\n"
            for n in range(60)
        )
        for outbox in set(outboxes)
    }
    started = [
        subprocess.Popen(
            [sys.executable, "-c", COLLECTOR, str(outbox), str(target)],
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for outbox in outboxes
    ]
    assert [process.stdout.readline() for process in started if process.stdout] == ["ready\n"] * 3
    for process, outbox in zip(started, outboxes, strict=True):
        assert process.stdin is not None
        process.stdin.write(lines[outbox])
        process.stdin.close()
    for process in started:
        assert process.stdout is not None
        assert process.stdout.read() == "60\n"
        process.stdout.close()
        assert process.wait() == 0

    expected = sorted(content for outbox in set(outboxes) for content in _files(outbox).values())
    assert sorted(_files(target).values()) == expected


def test_what_was_collected_whole_is_written_down(installation: Installation, target: Path) -> None:
    outbox = installation.paths.outbox
    whole, gone, changed = (_publish(outbox, f"2026-11-22/night/{n}.png", b"fox", f"job-{n}") for n in range(3))
    (outbox / gone.outputs[0].path).unlink()
    (outbox / changed.outputs[0].path).write_bytes(b"another fox")

    collecting.note(collect([whole, gone, changed], outbox, target), installation.paths, NOW)

    assert installation.ledger.collected() == {whole.id}
    written = json.loads((installation.paths.collected / f"{whole.id}.json").read_text())
    assert written == {"v": 1, "id": whole.id, "collected_at": "2026-11-23T07:00:00+00:00",
                       "to": [str(target / "night/0.png")]}  # fmt: skip


def test_moved_and_collected_again_is_still_collected(installation: Installation, target: Path) -> None:
    receipt = _publish(installation.paths.outbox, "2026-11-22/night/0.png", b"fox")

    for _ in range(2):
        collecting.note(collect([receipt], installation.paths.outbox, target, move=True), installation.paths, NOW)

    assert installation.ledger.collected() == {receipt.id}


@pytest.mark.parametrize("link", [False, True])
def test_what_lies_in_the_outbox_alone_does_not_count_as_collected(
    installation: Installation, target: Path, *, link: bool
) -> None:
    """It would be removed as if there were another copy."""
    outbox = installation.paths.outbox
    receipt = _publish(outbox, "2026-11-22/night/0.png", b"fox")
    folder = outbox / "2026-11-22"
    if link:
        target.symlink_to(folder)
    copied = collect([receipt], outbox, target if link else folder)

    collecting.note(copied, installation.paths, NOW)

    assert _outcomes(copied) == ["already there"]
    assert installation.ledger.collected() == set()


def test_module_needs_no_daemon() -> None:
    """The client is installed alone on other machines."""
    code = "import sys, safelight.collect, safelight.embedded; print(sorted(m for m in sys.modules if 'lightd' in m))"
    env = os.environ | {"PYTHONPATH": str(ROOT / "client")}

    said = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout

    assert said == "[]\n"
    assert Path(collecting.__file__).is_relative_to(ROOT / "client")


# Clips: posters, and folders of frames.


CLIP, FRAMES = "2026-11-22/night/0001_fox_s1.mp4", "2026-11-22/night/0002_fox_s1"


def _publish_with_poster(outbox: Path) -> Receipt:
    receipt = _publish(outbox, CLIP, b"clip")
    poster = Path(CLIP).with_suffix(".jpg")
    (outbox / poster).write_bytes(b"poster")
    said = Poster(path=str(poster), sha256=hashlib.sha256(b"poster").hexdigest(), bytes=6)
    output = receipt.outputs[0].model_copy(update={"poster": said})
    receipt = receipt.model_copy(update={"outputs": (output,)})
    (outbox / CLIP).with_suffix(".json").write_text(receipt.model_dump_json())
    return receipt


def _publish_frames(outbox: Path, job: str = "job-2") -> Receipt:
    folder = outbox / FRAMES
    folder.mkdir(parents=True)
    for number in range(1, 4):
        (folder / f"{number:04}.png").write_bytes(b"frame %d" % number)
    output = Output(path=FRAMES, sha256=content.digest(folder), bytes=content.size_bytes(folder), width=96, height=64)
    receipt = making.receipt(making.clip_spec(id=job, output_format="png"), (output,))
    folder.with_suffix(".json").write_text(receipt.model_dump_json())
    return receipt


@pytest.mark.parametrize("move", [False, True])
def test_poster_comes_with_its_clip(outbox: Path, target: Path, move: bool) -> None:
    receipt = _publish_with_poster(outbox)

    for _ in range(2):
        (copied,) = collect([receipt], outbox, target, move=move)

    assert copied.target == target / "night/0001_fox_s1.mp4"
    assert sorted(_files(target)) == [f"night/0001_fox_s1.{end}" for end in ("jpg", "json", "mp4")]
    assert len(_files(outbox)) == (0 if move else 3)


@pytest.mark.parametrize("move", [False, True])
def test_poster_is_no_result(outbox: Path, target: Path, move: bool) -> None:
    """One that was thrown away is not missed, and a person's picture of that name stays."""
    receipt = _publish_with_poster(outbox)
    (target / "night").mkdir(parents=True)
    (target / "night/0001_fox_s1.jpg").write_bytes(b"mine")

    (copied,) = collect([receipt], outbox, target, move=move)

    assert copied.target == target / "night/0001_fox_s1.mp4"
    assert (target / "night/0001_fox_s1.jpg").read_bytes() == b"mine"
    assert (outbox / CLIP).with_suffix(".jpg").read_bytes() == b"poster", "it lies nowhere else"
    (outbox / CLIP).with_suffix(".jpg").unlink()
    assert _outcomes(collect([receipt], outbox, target, move=move)) == ["already there"]


def test_folder_of_frames_is_copied_whole_with_its_receipt(outbox: Path, target: Path) -> None:
    receipt = _publish_frames(outbox)

    assert _outcomes(collect([receipt], outbox, target)) == ["copied"]
    assert _outcomes(collect([receipt], outbox, target)) == ["already there"]

    names = [f"night/0002_fox_s1/{number:04}.png" for number in range(1, 4)]
    assert sorted(_files(target)) == ["night/0002_fox_s1.json", *names]
    assert content.digest(target / "night/0002_fox_s1") == receipt.outputs[0].sha256
    assert len(_files(outbox)) == 4


def test_other_folder_of_that_name_is_never_overwritten(outbox: Path, target: Path) -> None:
    receipt = _publish_frames(outbox)
    (target / "night/0002_fox_s1").mkdir(parents=True)
    (target / "night/0002_fox_s1/0001.png").write_bytes(b"mine")

    (copied,) = collect([receipt], outbox, target)

    assert copied.target == target / "night/0002_fox_s1-2"
    assert (target / "night/0002_fox_s1/0001.png").read_bytes() == b"mine"


@pytest.mark.parametrize("change", ["another frame", "a frame less", "a frame more"])
def test_folder_that_somebody_changed_is_left_alone(outbox: Path, target: Path, change: str) -> None:
    receipt = _publish_frames(outbox)
    folder = outbox / FRAMES
    if change == "another frame":
        (folder / "0002.png").write_bytes(b"frame X")
    elif change == "a frame less":
        (folder / "0002.png").unlink()
    else:
        (folder / "0004.png").write_bytes(b"frame 4")

    (copied,) = collect([receipt], outbox, target, move=True)

    assert (copied.outcome, copied.target) == ("changed", None)
    assert folder.is_dir()
    assert _files(target) == {}
    assert list((target / "night").iterdir()) == []


@pytest.mark.parametrize("changed", [FRAMES + "/0002.png", CLIP])
def test_what_was_changed_after_it_was_collected_stays_when_it_is_moved(
    outbox: Path, target: Path, changed: str
) -> None:
    receipt = _publish_with_poster(outbox) if changed == CLIP else _publish_frames(outbox)
    collect([receipt], outbox, target)
    (outbox / changed).write_bytes(b"retouched")

    collect([receipt], outbox, target, move=True)

    assert (outbox / changed).read_bytes() == b"retouched", "it lies nowhere else"


def test_moved_folder_leaves_the_outbox_but_for_what_a_person_added(outbox: Path, target: Path) -> None:
    receipt = _publish_frames(outbox)
    collect([receipt], outbox, target)
    (outbox / FRAMES / "masks").mkdir()
    (outbox / FRAMES / "masks/0001.png").write_text("mine")

    collect([receipt], outbox, target, move=True)
    assert list(_files(outbox)) == [f"{FRAMES}/masks/0001.png"]

    shutil.rmtree(outbox / FRAMES / "masks")
    assert _outcomes(collect([receipt], outbox, target, move=True)) == ["already there"]
    assert not (outbox / FRAMES).exists()


def test_folder_that_does_not_fit_leaves_nothing(outbox: Path, small_disk: Path) -> None:
    receipt = _publish_frames(outbox)
    frame = outbox / FRAMES / "0003.png"
    frame.write_bytes(b"x" * 2**20)
    said = {"sha256": content.digest(outbox / FRAMES), "bytes": content.size_bytes(outbox / FRAMES)}
    receipt = receipt.model_copy(update={"outputs": (receipt.outputs[0].model_copy(update=said),)})

    with pytest.raises(OSError, match="No space left"):
        collect([receipt], outbox, small_disk)

    assert [name for name in small_disk.rglob("*") if name.name != "night"] == []


def test_collected_folder_is_noted(outbox: Path, target: Path, installation: Installation) -> None:
    copied = collect([_publish_frames(outbox)], outbox, target)

    collecting.note(copied, installation.paths, NOW)

    assert installation.ledger.collected() == {"job-2"}
