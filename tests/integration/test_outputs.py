"""From frames to the outbox: names, crashes at every step, full disks, two publishers at once."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from safelight import config as settings
from safelight import content
from safelight.config import Config
from safelight.errors import SafelightError
from safelight.jobspec import JobSpec
from safelight.ledger import Ledger
from safelight.paths import Paths
from safelight.receipt import Output, Receipt
from safelightd import formats, outputs, verify
from safelightd.progress import Cancelled
from tests.conftest import Installation
from tests.integration import making

ROOT = Path(__file__).parents[2]
NAME = "2026-11-22/night/0001_a-red-fox_s7"


@pytest.fixture
def config(installation: Installation) -> Config:
    return installation.config


def _write(spec: JobSpec, config: Config) -> Path:
    return outputs.write(spec, making.PLAN, making.frames(spec), config)


def _publish(spec: JobSpec, config: Config, file: Path | None = None) -> Receipt:
    paths = config.paths
    file = file or _write(spec, config)
    return outputs.publish(lambda out: making.receipt(spec, out), file, spec, Ledger(paths), paths)


def _files(folder: Path) -> list[str]:
    """Every file and link below, as relative paths."""
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if not file.is_dir() or file.is_symlink())


def _assert_published(receipt: Receipt, paths: Paths) -> None:
    """The output, its digest, its poster, the sidecar and the ledger agree, and nothing else is left of the job."""
    (output,) = receipt.outputs
    file = paths.outbox / output.path
    assert content.is_there_as(file, output.sha256, output.bytes)
    if poster := output.poster:
        assert poster.path == str(Path(output.path).with_suffix(".jpg"))
        assert content.is_there_as(paths.outbox / poster.path, poster.sha256, poster.bytes)
    assert Receipt.model_validate_json(file.with_suffix(".json").read_bytes()) == receipt
    ledger = Ledger(paths)
    assert ledger.receipt(receipt.id) == receipt
    assert ledger.intended(receipt.id) is None
    assert not (paths.unfinished / receipt.id).exists()


def test_picture_is_published_with_its_receipt_beside_it(config: Config) -> None:
    spec = making.image_spec()

    receipt = _publish(spec, config)

    _assert_published(receipt, config.paths)
    assert _files(config.paths.outbox) == [f"{NAME}.json", f"{NAME}.png", "latest"]
    assert receipt.outputs[0].model_dump(exclude={"sha256", "bytes"}, exclude_none=True) == {
        "path": f"{NAME}.png",
        "width": 64,
        "height": 48,
    }
    with Image.open(config.paths.outbox / "latest/night/0001_a-red-fox_s7.png") as picture:
        assert (np.asarray(picture) == making.noise(spec)).all()


def test_clip_is_published_with_its_length_and_rate(config: Config) -> None:
    spec = making.clip_spec()
    file = _write(spec, config)
    verify.output(file, spec)

    receipt = _publish(spec, config, file)

    _assert_published(receipt, config.paths)
    assert _files(config.paths.outbox) == [f"{NAME}.jpg", f"{NAME}.json", f"{NAME}.mp4", "latest"]
    assert (receipt.outputs[0].num_frames, receipt.outputs[0].fps) == (9, 24)
    assert receipt.outputs[0].interpolated_by is None


def test_sidecar_is_indented_for_people(config: Config) -> None:
    receipt = _publish(making.image_spec(prompt="火"), config)

    text = (config.paths.outbox / receipt.outputs[0].path).with_suffix(".json").read_text()
    assert text.startswith('{\n  "v": 1,\n  "id":')
    assert '"prompt": "火"' in text
    assert json.loads(text)["state"] == "done"


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("A Red  Fox, in the snow!", "a-red-fox-in-the-snow"),
        ("Café Ünïcode", "cafe-unicode"),
        ("赤い狐", "untitled"),
        ("---", "untitled"),
        ("../../etc/passwd", "etc-passwd"),
        ("word " * 40, "word-word-word-word-word-word-word-word"),
        ("x" * 100, "x" * 40),
    ],
)
def test_slug_is_short_and_plain(prompt: str, expected: str) -> None:
    assert outputs.slug(prompt) == expected


def test_date_is_the_local_one_of_the_submission(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job of late Sunday evening that runs on Monday lies with Sunday's."""
    import time

    monkeypatch.setenv("TZ", "America/New_York")
    time.tzset()
    try:
        receipt = _publish(making.image_spec(submitted_at="2026-11-23T03:30:00+00:00"), config)
    finally:
        monkeypatch.undo()
        time.tzset()

    assert receipt.outputs[0].path.startswith("2026-11-22/")


def test_name_that_another_job_has_is_numbered(config: Config) -> None:
    receipts = [_publish(making.image_spec(id=f"job-{number}"), config) for number in range(3)]

    assert [receipt.outputs[0].path for receipt in receipts] == [f"{NAME}.png", f"{NAME}-2.png", f"{NAME}-3.png"]
    for receipt in receipts:
        _assert_published(receipt, config.paths)


def test_name_whose_receipt_another_format_has_is_numbered(config: Config) -> None:
    """A .png and a .webp of one name would share one .json."""
    _publish(making.image_spec(id="job-1"), config)

    receipt = _publish(making.image_spec(id="job-2", output_format="webp"), config)

    assert receipt.outputs[0].path == f"{NAME}-2.webp"
    _assert_published(receipt, config.paths)


def test_latest_moves_forward_only(config: Config) -> None:
    link = config.paths.outbox / "latest"
    for number, (day, expected) in enumerate([(22, 22), (24, 24), (23, 24)]):
        _publish(making.image_spec(id=f"job-{number}", submitted_at=f"2026-11-{day}T12:00:00+00:00"), config)
        assert str(link.readlink()) == f"2026-11-{expected}"


def test_latest_that_points_nowhere_is_pointed_again(config: Config) -> None:
    _publish(making.image_spec(id="job-1", submitted_at="2026-11-24T12:00:00+00:00"), config)
    shutil.rmtree(config.paths.outbox / "2026-11-24")

    _publish(making.image_spec(id="job-2"), config)

    assert str((config.paths.outbox / "latest").readlink()) == "2026-11-22"


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_latest_of_the_persons_own_stays(config: Config, kind: str) -> None:
    own = config.paths.outbox / "latest"
    own.parent.mkdir(parents=True)
    if kind == "folder":
        own.mkdir()
    elif kind == "file":
        own.write_text("mine")
    else:
        own.symlink_to("favourites")

    _assert_published(_publish(making.image_spec(), config), config.paths)

    assert own.is_symlink() == (kind == "link")
    assert not own.is_symlink() or str(own.readlink()) == "favourites"


# What write refuses, and what it leaves.


@pytest.mark.parametrize(
    ("count", "message"), [(0, "There are 0 frames, 9"), (8, "There are 8 frames, 9"), (10, "more than the 9")]
)
def test_wrong_number_of_frames_is_refused_and_leaves_nothing(config: Config, count: int, message: str) -> None:
    spec = making.clip_spec()

    with pytest.raises(verify.Refused, match=message):
        outputs.write(spec, making.PLAN, making.moving(spec, count), config)

    assert _files(config.paths.outbox) == []


def test_nan_in_the_middle_of_a_clip_is_refused_and_leaves_nothing(config: Config) -> None:
    spec = making.clip_spec()

    def frames() -> Iterator[np.ndarray]:
        for number, frame in enumerate(making.moving(spec)):
            values = frame / np.float32(255)
            if number == 5:
                values[3, 3] = np.nan
            yield values

    with pytest.raises(verify.Refused, match="NaN"):
        outputs.write(spec, making.PLAN, frames(), config)

    assert _files(config.paths.outbox) == []


def test_cancelled_job_leaves_no_file(config: Config) -> None:
    spec = making.clip_spec()

    def frames() -> Iterator[np.ndarray]:
        yield from making.moving(spec, 4)
        raise Cancelled

    with pytest.raises(Cancelled):
        outputs.write(spec, making.PLAN, frames(), config)

    assert _files(config.paths.outbox) == []


def test_discard_removes_what_was_written_and_may_be_repeated(config: Config) -> None:
    spec = making.image_spec()
    _write(spec, config)

    outputs.discard(spec.id, config.paths)
    outputs.discard(spec.id, config.paths)

    assert _files(config.paths.outbox) == []


@pytest.mark.parametrize("job", ["..", "../../state", "", ".", "a/b"])
def test_discard_of_what_is_no_id_touches_nothing(config: Config, job: str) -> None:
    kept = config.paths.outbox / "2026-11-22" / "kept.png"
    kept.parent.mkdir(parents=True)
    kept.write_text("x")
    config.paths.unfinished.mkdir()

    outputs.discard(job, config.paths)

    assert kept.exists()
    assert config.paths.unfinished.exists()


@pytest.mark.parametrize("fields", [{"id": "../x"}, {"id": ""}, {"batch": "../../x"}, {"batch": ".hidden"}])
def test_spec_that_would_leave_the_outbox_is_refused(config: Config, fields: dict[str, str]) -> None:
    spec = making.image_spec(**fields)

    with pytest.raises(SafelightError, match=r"not the id of a job|cannot be a folder name"):
        _write(spec, config)

    assert not config.paths.outbox.exists()


def test_second_attempt_replaces_what_a_killed_one_left(config: Config) -> None:
    spec = making.image_spec()
    left = _write(spec, config)
    left.write_bytes(b"half")
    (left.parent / "more.part").write_bytes(b"half")

    _assert_published(_publish(spec, config), config.paths)


# Crashes.


PUBLISHED = {
    "picture": [f"{NAME}.png"],
    "clip": [f"{NAME}.jpg", f"{NAME}.mp4"],
    "frames": [f"{NAME}/{number:04}.png" for number in range(1, 6)],
}


@pytest.mark.parametrize("how", ["renameat2", "link"])
@pytest.mark.parametrize("what", PUBLISHED)
def test_job_killed_at_any_step_is_published_once(installation: Installation, how: str, what: str) -> None:
    """After each kill: before the intention nothing is visible and the job runs again; after it `finish` completes."""
    program = [sys.executable, str(ROOT / "tests/integration/crash_publisher.py"), str(installation.root), how, what]
    env = installation.env | {"PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in ("client", "daemon", "."))}
    done = subprocess.run(program, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    rounds = int(done.stdout)
    spec = making.published(what)
    whole = sorted([*PUBLISHED[what], f"{NAME}.json", "latest"])
    seen = {"rendered again": 0, "completed": 0, "complete": 0}
    for number in range(1, rounds + 1):
        folder = installation.root / str(number)
        paths = replace(installation.paths, outbox=folder / "outbox", state=folder / "state")
        visible = [name for name in _files(paths.outbox) if not name.startswith(".unfinished")]
        assert set(visible) <= set(whole)
        assert f"{NAME}.json" not in visible or set(PUBLISHED[what]) <= set(visible), "a receipt without its file"
        if what == "frames":
            assert len(set(PUBLISHED[what]) & set(visible)) in (0, 5), "half a folder"
        if (file := paths.outbox / f"{NAME}{formats.suffix(spec)}").exists():
            verify.output(file, spec)

        receipt = _recover(spec, replace(installation.config, paths=paths), visible, seen)

        _assert_published(receipt, paths)
        assert _files(paths.outbox) == whole, f"after round {number}"
    assert min(seen.values()) > 0, seen


def _recover(spec: JobSpec, config: Config, visible: list[str], seen: dict[str, int]) -> Receipt:
    """Do what the worker does with a job whose engine died: answer, finish, or run again."""
    ledger = Ledger(config.paths)
    if receipt := ledger.receipt(spec.id):
        seen["complete"] += 1
        return receipt
    if receipt := outputs.finish(spec.id, ledger, config.paths):
        seen["completed"] += 1
        return receipt
    assert visible == []
    seen["rendered again"] += 1
    return _publish(spec, config)


def _intend(spec: JobSpec, config: Config) -> Receipt:
    """Leave a job as an engine leaves it that dies right after the intention."""
    file = _write(spec, config)
    content = file.read_bytes()
    output = Output(
        path=f"{NAME}{file.suffix}",
        sha256=hashlib.sha256(content).hexdigest(),
        bytes=len(content),
        width=spec.width,
        height=spec.height,
    )
    receipt = making.receipt(spec, (output,))
    (config.paths.outbox / NAME).parent.mkdir(parents=True)
    Ledger(config.paths).intend(receipt)
    return receipt


def test_finish_of_a_job_that_intended_nothing_is_none(config: Config) -> None:
    assert outputs.finish("job-1", Ledger(config.paths), config.paths) is None


def test_finished_job_is_neither_discarded_nor_rendered_again(config: Config) -> None:
    """A cancel that comes after the intention finds a finished job."""
    spec = making.image_spec()
    receipt = _intend(spec, config)

    outputs.discard(spec.id, config.paths)
    with pytest.raises(SafelightError, match="waits to be published"):
        _write(spec, config)

    assert outputs.finish(spec.id, Ledger(config.paths), config.paths) == receipt
    _assert_published(receipt, config.paths)


@pytest.mark.parametrize("taken", ["png", "json"])
def test_name_taken_after_the_intention_is_chosen_anew(config: Config, taken: str) -> None:
    spec = making.image_spec()
    _intend(spec, config)
    other = config.paths.outbox / f"{NAME}.{taken}"
    other.write_bytes(b"another's")

    receipt = outputs.finish(spec.id, Ledger(config.paths), config.paths)

    assert receipt is not None
    assert receipt.outputs[0].path == f"{NAME}-2.png"
    _assert_published(receipt, config.paths)
    assert other.read_bytes() == b"another's"
    assert len(_files(config.paths.outbox)) == 4


def test_same_bytes_of_another_job_are_not_taken_for_our_file(config: Config) -> None:
    """Without metadata two jobs of one seed make the same bytes; the crashed one must not adopt the other's file."""
    output = config.settings.output.model_copy(update={"metadata": False})
    plain = replace(config, settings=config.settings.model_copy(update={"output": output}))
    first, second = making.image_spec(id="job-1"), making.image_spec(id="job-2")
    _intend(first, plain)
    other = _publish(second, plain)

    receipt = outputs.finish(first.id, Ledger(config.paths), config.paths)

    assert receipt is not None
    assert (other.outputs[0].path, receipt.outputs[0].path) == (f"{NAME}.png", f"{NAME}-2.png")
    _assert_published(other, config.paths)
    _assert_published(receipt, config.paths)


@pytest.mark.parametrize("instead", [None, b"edited"])
def test_lost_output_is_an_error_that_names_it(config: Config, instead: bytes | None) -> None:
    spec = making.image_spec()
    receipt = _intend(spec, config)
    shutil.rmtree(config.paths.unfinished)
    if instead:
        (config.paths.outbox / receipt.outputs[0].path).write_bytes(instead)

    with pytest.raises(outputs.OutputLost, match=rf"{NAME}.png: was rendered, but is not there"):
        outputs.finish(spec.id, Ledger(config.paths), config.paths)

    assert Ledger(config.paths).intended(spec.id) == receipt


def test_many_publishers_of_one_name_each_get_their_own(config: Config) -> None:
    """Workers of several GPUs share the outbox."""
    specs = [making.image_spec(id=f"job-{number:02}") for number in range(12)]
    files = [_write(spec, config) for spec in specs]
    receipts: list[Receipt] = []
    start = threading.Barrier(len(specs))

    def publish(spec: JobSpec, file: Path) -> None:
        start.wait()
        receipts.append(_publish(spec, config, file))

    threads = [threading.Thread(target=publish, args=pair) for pair in zip(specs, files, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len({receipt.outputs[0].path for receipt in receipts}) == len(specs)
    for receipt in receipts:
        _assert_published(receipt, config.paths)


# Disks.


@pytest.mark.parametrize("make", [making.image_spec, making.clip_spec])
def test_file_that_the_disk_refuses_leaves_nothing(config: Config, make: Callable[[], JobSpec]) -> None:
    spec = make()

    with making.file_size_limit(1024), pytest.raises(OSError, match="File too large"):
        _write(spec, config)

    assert _files(config.paths.outbox) == []


@pytest.fixture
def small_disk(installation: Installation) -> Iterator[Path]:
    """A file system of 256 KiB for the outbox."""
    folder = installation.root / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root; RLIMIT_FSIZE is tested instead")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_disk_that_fills_at_any_moment_loses_nothing(installation: Installation, small_disk: Path) -> None:
    """4 KiB more is free each time. Either nothing is left, or the job is finished once there is space."""
    ends = {"nothing": 0, "waits": 0, "done": 0}
    filler = small_disk / "filler"
    for number in range(12):
        paths = replace(installation.paths, outbox=small_disk / str(number), state=installation.root / str(number))
        config = replace(installation.config, paths=paths)
        paths.outbox.mkdir()
        _leave_free(filler, 4096 * number)
        spec = making.image_spec()
        refused = None
        try:
            _publish(spec, config)
        except OSError as error:
            refused = error.errno
        assert refused in (None, errno.ENOSPC)
        filler.unlink()
        visible = [name for name in _files(paths.outbox) if not name.startswith(".")]
        if receipt := Ledger(paths).receipt(spec.id):
            ends["done"] += 1
        elif receipt := outputs.finish(spec.id, Ledger(paths), paths):
            ends["waits"] += 1
        else:
            ends["nothing"] += 1
            assert visible == _files(paths.outbox) == []
            continue
        _assert_published(receipt, paths)
        shutil.rmtree(paths.outbox)
    assert ends["nothing"] > 0
    assert ends["done"] > 0


def _leave_free(filler: Path, free_bytes: int) -> None:
    disk = os.statvfs(filler.parent)
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, disk.f_bavail * disk.f_frsize - free_bytes))


def test_clip_that_fills_the_disk_leaves_nothing(installation: Installation, small_disk: Path) -> None:
    config = replace(installation.config, paths=replace(installation.paths, outbox=small_disk / "outbox"))
    spec = making.clip_spec(width=256, height=256, num_frames=33)

    with pytest.raises(OSError, match="No space left on device"):
        outputs.write(spec, making.PLAN, (making.noise(spec, seed) for seed in range(33)), config)

    assert _files(config.paths.outbox) == []
    assert _files(small_disk) == []


@pytest.mark.parametrize("outbox", ["/proc/safelight/outbox", "file/outbox", "file"])
def test_outbox_that_cannot_be_written_is_said_clearly(installation: Installation, outbox: str) -> None:
    """It is the machine's fault and told apart from a job's: the queue is held and no job is burnt."""
    (installation.root / "file").write_text("")
    paths = replace(installation.paths, outbox=installation.root / outbox)
    config = replace(installation.config, paths=paths)

    with pytest.raises(
        outputs.OutboxUnwritable, match=r"outputs cannot be written below .*/(outbox|file) \(.*paths\] outbox"
    ):
        _write(making.image_spec(), config)


def test_outbox_that_turns_read_only_before_publishing_loses_nothing(
    installation: Installation, small_disk: Path
) -> None:
    paths = replace(installation.paths, outbox=small_disk / "outbox")
    config = replace(installation.config, paths=paths)
    spec = making.image_spec()
    receipt = _intend(spec, config)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)

    with pytest.raises(outputs.OutboxUnwritable, match="Read-only file system"):
        outputs.finish(spec.id, Ledger(paths), paths)
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)

    assert outputs.finish(spec.id, Ledger(paths), paths) == receipt
    _assert_published(receipt, paths)


def test_daemon_files_of_outputs_do_not_import_torch() -> None:
    """They are used by the worker, too, which forks."""
    code = "import sys; from safelightd import outputs, metadata, verify, video; print('torch' in sys.modules)"
    env = os.environ | {"PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in ("client", "daemon"))}

    said = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout

    assert said == "False\n"


def test_settings_without_metadata_reach_the_file(installation: Installation) -> None:
    installation.config.source.write_text(installation.config.source.read_text() + "[output]\nmetadata = false\n")
    config = settings.load(installation.env)

    file = _write(making.image_spec(prompt="unmistakable"), config)

    assert b"unmistakable" not in file.read_bytes()
