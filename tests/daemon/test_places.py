"""Disks that go away: what was seen there before is missed, whatever named it, and no job is burnt meanwhile."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from safelight import config as settings
from safelight import lorafiles, models
from safelight.jobqueue import JobQueue
from safelight.lora import Lora
from safelightd import holds, lora, tiny
from safelightd.failure import failure
from safelightd.link import ENGINE
from tests.conftest import Installation
from tests.daemon.test_engine_failure import ON_CPU, watch_of
from tests.daemon.test_worker import PROGRAM, Running, eventually, specs_of
from tests.integration.own_models import changed, with_own_models


class Disk:
    """A folder that stands for a disk's mount point."""

    def __init__(self, at: Path) -> None:
        self.at = at
        self._away = at.with_name("unmounted")

    def unmount(self) -> None:
        self.at.rename(self._away)
        self.at.mkdir()

    def mount(self) -> None:
        self.at.rmdir()
        self._away.rename(self.at)


@pytest.fixture
def disk(installation: Installation) -> Disk:
    (installation.root / "mnt").mkdir()
    return Disk(installation.root / "mnt")


def saying(installation: Installation, words: str) -> Installation:
    """The installation with more words in its settings."""
    source = installation.config.source
    source.write_text(f"{source.read_text()}\n{words}\n")
    config = settings.load(installation.env)
    return replace(installation, config=config, models=models.load(config))


def held(installation: Installation, name: str = "models") -> str:
    return holds.read(installation.config, user_hold=None, gpu=None).get(name, "")


NAMED = {
    "[models.own] path": '[models.own]\nlike = "flux-dev"\npath = "{place}"',
    "[models.own] components.transformer": '[models.own]\nlike = "flux-dev"\ncomponents.transformer = "{place}"',
    "[models.own] controlnets.edges.path": '[models.own]\nlike = "flux-dev"\n[models.own.controlnets.edges]\n'
    'path = "{place}"\nparameters = 1\nblocks = []',
    "[models.wan-ti2v-5b] native": '[models.wan-ti2v-5b]\nnative = "{place}"',
    "[wan_cli] checkout": '[wan_cli]\ncheckout = "{place}"',
}


@pytest.mark.parametrize("named", NAMED)
@pytest.mark.parametrize("below", ["", "folder/weights", "folder/weights.safetensors"])
def test_a_place_of_the_settings_is_missed_while_its_disk_is_not_mounted(
    installation: Installation, disk: Disk, named: str, below: str
) -> None:
    own = saying(installation, NAMED[named].format(place=disk.at / below))

    assert held(own) == ""

    place = disk.at / below
    if place.suffix:
        place.parent.mkdir()
        place.touch()
    else:
        place.mkdir(parents=True, exist_ok=True)
        (place / "config.json").touch()

    assert held(own) == ""

    disk.unmount()
    said = held(own)
    disk.mount()

    assert f"{place} is gone, which {named} names; is its disk mounted?" in said
    assert held(own) == ""


def test_what_a_person_moves_away_is_no_hold(installation: Installation, disk: Disk) -> None:
    """What else is on the disk says that it is mounted: the jobs of that model say what is wrong."""
    place = disk.at / "flux"
    place.mkdir()
    (place / "model_index.json").touch()
    (disk.at / "other").touch()
    own = saying(installation, NAMED["[models.own] path"].format(place=place))
    held(own)
    place.rename(disk.at / "elsewhere")

    assert held(own) == ""


def test_what_the_settings_do_not_name_any_more_is_not_missed(installation: Installation, disk: Disk) -> None:
    (disk.at / "model_index.json").touch()
    own = saying(installation, NAMED["[models.own] path"].format(place=disk.at))
    held(own)
    disk.unmount()

    assert held(own)
    assert held(installation) == ""


@pytest.mark.parametrize("link", ["loras", "loras/mine", "flux-dev", "controlnets/edges"])
def test_so_is_what_a_link_in_the_models_folder_leads_to(
    installation: Installation, tiny_models_folder: Path, disk: Disk, link: str
) -> None:
    own = changed(installation, str(tiny_models_folder), str(installation.root / "models"))
    (disk.at / "there").mkdir()
    (disk.at / "there" / "a.safetensors").touch()
    leads = own.paths.models / link
    leads.parent.mkdir(parents=True)
    leads.symlink_to(disk.at / "there")

    assert held(own) == ""

    disk.unmount()

    assert f"the link {leads}" in held(own)


def test_a_lora_that_the_disk_cannot_read_is_the_machines_fault(
    installation: Installation, tiny_models_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is a stand-in: what the system says of a broken one, no test can have it say."""
    own = with_own_models(installation, tiny_models_folder, "tiny-flux-schnell")
    file = lorafiles.folder(own.paths.models) / "mine.safetensors"
    file.parent.mkdir()
    shutil.copy(next(iter(lorafiles.shipped_names().values())), file)
    (spec,) = specs_of(own, ["a fox"])
    spec = spec.model_copy(update={"loras": (lorafiles.find(Lora(name="mine"), own.paths.models),)})

    def broken(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(file))

    monkeypatch.setattr("hashlib.file_digest", broken)
    os.utime(file, (1, 1))  # else its digest is known
    with pytest.raises(Exception, match="Input/output error") as raised:
        lora.files(spec, own.paths)

    assert failure(raised.value, watch_of(ON_CPU, "load"))["kind"] == "machine"


@pytest.fixture
def on_a_disk(installation: Installation, tiny_models_folder: Path, queue: JobQueue) -> Iterator[Running]:
    """A worker whose models folder is a disk, and has been seen to hold one."""
    own = changed(installation, str(tiny_models_folder), str(installation.root / "models"))
    (own.paths.models / "flux-dev").mkdir(parents=True)
    (own.paths.models / "flux-dev" / "model_index.json").touch()
    running = Running(own, queue)
    running.ready()
    eventually((own.paths.state / "models.seen").exists)
    yield running
    running.kill()


@pytest.mark.parametrize("how", ["unmount", "unmount-crash"])
def test_a_job_under_way_when_its_weights_go_is_not_burnt_and_runs_when_they_are_back(
    on_a_disk: Running, how: str
) -> None:
    paths = on_a_disk.installation.paths
    taken, waiting = on_a_disk.submit(f"{how} ok", "ok")
    eventually(lambda: any("is its disk mounted?" in row.holds.get("models", "") for row in on_a_disk.queue.workers()))

    assert [on_a_disk.state(job) for job in (taken, waiting)] == ["queued", "queued"]
    attempts = on_a_disk.installation.ledger.attempts(taken.id)
    assert (attempts.crashes, attempts.returns) == (0, 1)

    paths.models.rmdir()
    paths.models.with_name("unmounted").rename(paths.models)
    on_a_disk.all_in([taken, waiting], "done")


def test_a_model_on_an_unmounted_disk_holds_its_jobs_which_run_when_it_is_back(
    installation: Installation, queue: JobQueue, tiny_models_folder: Path, disk: Disk
) -> None:
    tiny.build("tiny-flux-schnell", tiny_models_folder / "tiny-flux-schnell")
    shutil.copytree(tiny_models_folder / "tiny-flux-schnell", disk.at / "flux")
    row = f'[models.flux-own]\nlike = "tiny-flux-schnell"\ntiny = false\npath = "{disk.at}/flux"'
    own = saying(installation, row)
    running = Running(own, queue, [*PROGRAM, *ENGINE])
    try:
        running.ready()
        eventually((own.paths.state / "places.seen").exists)
        disk.unmount()
        jobs = running.submit("a", "b", model="flux-own")
        eventually(lambda: any("[models.flux-own] path" in row.holds.get("models", "") for row in queue.workers()))

        assert [running.state(job) for job in jobs] == ["queued", "queued"]

        disk.mount()
        running.all_in(jobs, "done")
    finally:
        running.kill()
