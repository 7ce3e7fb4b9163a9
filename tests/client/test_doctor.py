"""What `doctor` says of an installation's own files."""

from __future__ import annotations

import grp
import json
import os
from pathlib import Path

import pytest

from safelight import doctor, prepared, units
from safelight.prepared import Manifest, Source, SourceFile, StoredFile
from tests.cli_steps import Safelight, runner
from tests.conftest import Installation

GROUP = grp.getgrgid(os.getegid()).gr_name


@pytest.fixture
def safelight(installation: Installation) -> Safelight:
    return runner(installation)


def looks(safelight: Safelight, name: str) -> list[dict[str, str]]:
    return [found for found in json.loads(safelight("doctor", "--json").stdout) if found["name"] == name]


# -- the inbox of a group ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "look"), [(0o2770, "ok"), (0o2775, "ok"), (0o770, "fail"), (0o2750, "fail")])
def test_a_shared_inbox_keeps_what_is_dropped_in_its_group(tmp_path: Path, mode: int, look: str) -> None:
    tmp_path.chmod(mode)

    found = doctor.shared_inbox(tmp_path, GROUP)

    assert found.look == look
    assert look == "ok" or "chmod 2770" in found.remedy


def test_an_inbox_of_another_group_and_a_group_that_is_not_there_are_named(tmp_path: Path) -> None:
    other = next(entry.gr_name for entry in grp.getgrall() if entry.gr_gid != tmp_path.stat().st_gid)

    assert f"not of the group {other}" in doctor.shared_inbox(tmp_path, other).says
    assert "no group" in doctor.shared_inbox(tmp_path, "no-such-group").says


def test_an_inbox_that_is_open_to_everybody_is_named(safelight: Safelight, installation: Installation) -> None:
    installation.paths.inbox.mkdir()
    installation.paths.inbox.chmod(0o777)

    (found,) = looks(safelight, "sharing")

    assert found["look"] == "warn"
    assert found["remedy"] == f"chmod o-w {installation.paths.inbox}"


# -- the ledger --------------------------------------------------------------------------------------------------


def test_accepted_jobs_that_nobody_can_read_are_named(safelight: Safelight, installation: Installation) -> None:
    installation.paths.jobs.mkdir(parents=True)
    assert looks(safelight, "ledger") == []
    half, folder = (installation.paths.jobs / f"20261122-20300{n}-0041a2b.jsonl" for n in (1, 2))
    half.write_text("half a li")
    folder.mkdir()

    found = looks(safelight, "ledger")

    assert [row["look"] for row in found] == ["fail", "fail"]
    assert found[0]["says"].startswith(f"{half}:1: not a job")
    assert found[1]["says"] == f"{folder}: cannot be read: Is a directory"
    assert found[1]["remedy"] == "Move the file aside to go on without it."


# -- the queue ---------------------------------------------------------------------------------------------------


def test_a_queue_that_does_not_answer_is_named_once_with_what_starts_it(
    safelight: Safelight, installation: Installation
) -> None:
    (found,) = looks(safelight, "queue")

    assert found["says"].endswith("redis.sock does not answer.")
    assert found["remedy"] == units.remedy({"XDG_CONFIG_HOME": str(installation.root / ".config")})


def test_what_starts_the_daemon_is_the_units_where_they_are_installed_and_up_where_none_are(tmp_path: Path) -> None:
    system = tmp_path / "system"
    env = {"XDG_CONFIG_HOME": str(tmp_path)}
    none = units.remedy(env, system)
    for folder in (system, tmp_path / "systemd/user"):
        folder.mkdir(parents=True)
    (system / "safelight.target").touch()
    everybodys = units.remedy(env, system)
    (tmp_path / "systemd/user/safelight.target").touch()

    assert none == "Start it: safelight up, or safelight service install for units that do."
    assert everybodys == "Start it: sudo systemctl start safelight.target"
    assert units.remedy(env, system) == "Start it: systemctl --user start safelight.target"


def test_a_server_of_ones_own_that_does_not_answer_is_not_to_be_started_by_our_units(
    safelight: Safelight, installation: Installation
) -> None:
    with installation.config.source.open("a", encoding="utf-8") as file:
        file.write(f'[queue]\nurl = "unix://{installation.root}/mine.sock"\n')

    (found,) = looks(safelight, "queue")

    assert "mine.sock does not answer" in found["says"]
    assert found["remedy"] == "Start that server, or correct [queue] url."


# -- prepared weights --------------------------------------------------------------------------------------------


def _prepare(models_folder: Path) -> Path:
    """A prepared folder whose published weights are there as well."""
    published = models_folder / "flux-schnell/transformer"
    published.mkdir(parents=True)
    (published / "weights.safetensors").write_bytes(b"published")
    found = prepared.folder(models_folder, "flux-schnell", "nf4", "transformer")
    found.mkdir(parents=True)
    (found / "weights.safetensors").write_bytes(b"quantised")
    file = prepared.source(published).files[0]
    manifest = Manifest(
        key="flux-schnell",
        precision="nf4",
        component="transformer",
        dtype="bfloat16",
        source=Source(folder=str(published), files=(SourceFile.model_validate(file.model_dump()),)),
        files=(StoredFile(name="weights.safetensors", size_bytes=9, sha256="0" * 64),),
    )
    (found / prepared.MANIFEST).write_text(manifest.model_dump_json())
    return found


@pytest.fixture
def prepared_folder(installation: Installation, tmp_path: Path) -> Path:
    written = installation.config.source.read_text()
    installation.config.source.write_text(written.replace(str(installation.paths.models), str(tmp_path)))
    return _prepare(tmp_path)


def test_prepared_weights_of_their_sizes_are_well(safelight: Safelight, prepared_folder: Path) -> None:
    (found,) = looks(safelight, "prepared")

    assert prepared_folder.is_dir()
    assert found["look"] == "ok"
    assert "models verify" in found["says"]


def test_prepared_weights_of_another_size_are_named_with_the_command_that_mends_them(
    safelight: Safelight, prepared_folder: Path
) -> None:
    (prepared_folder / "weights.safetensors").write_bytes(b"cut")

    (found,) = looks(safelight, "prepared")

    assert found["look"] == "fail"
    assert "3 bytes long and was 9" in found["says"]
    assert "safelight models prepare flux-schnell --precision nf4" in found["remedy"]


def test_prepared_weights_of_other_weights_than_are_there_now_are_named(
    safelight: Safelight, prepared_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "flux-schnell/transformer/weights.safetensors").write_bytes(b"newly published")

    (found,) = looks(safelight, "prepared")

    assert (found["look"], prepared_folder.is_dir()) == ("warn", True)
    assert "other weights" in found["says"]


@pytest.mark.parametrize("manifest", ["", "{}", None])
def test_a_manifest_that_cannot_be_read_is_named(
    safelight: Safelight, prepared_folder: Path, manifest: str | None
) -> None:
    if manifest is None:
        (prepared_folder / "weights.safetensors").unlink()
    else:
        (prepared_folder / prepared.MANIFEST).write_text(manifest)

    assert looks(safelight, "prepared")[0]["look"] == "fail"


# -- room --------------------------------------------------------------------------------------------------------


def test_pictures_and_clips_are_reckoned_by_their_size() -> None:
    picture = {"width": 1024, "height": 1024, "num_frames": None}
    clip = {"width": 1280, "height": 704, "num_frames": 121}

    assert doctor.output_bytes(picture) == pytest.approx(3.1e6, rel=0.05)
    assert doctor.output_bytes(clip) == pytest.approx(33e6, rel=0.05)


# -- the device --------------------------------------------------------------------------------------------------


@pytest.mark.skipif(doctor.NVIDIA.exists(), reason="this machine has an NVIDIA driver")
def test_a_machine_without_a_gpu_is_told_the_setting_and_the_file_for_its_cpu(
    safelight: Safelight, installation: Installation
) -> None:
    settings = installation.config.source
    settings.write_text(settings.read_text().replace('device = "cpu"', 'device = "cuda"'))

    (found,) = looks(safelight, "device")

    assert found["look"] == "fail"
    assert found["remedy"] == (
        "Install or load the NVIDIA driver. On a machine without a GPU: "
        f'write [worker] device = "cpu" into {settings} and start the daemon again.'
    )
