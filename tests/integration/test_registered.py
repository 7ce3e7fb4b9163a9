"""What is registered, afterwards: told, verified, prepared, moved away, and forgotten."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from bench import layouts
from click.testing import Result

from safelight import config as settings
from safelight import durable, prepared, published, pulled, registered
from safelight.errors import BadConfig
from safelightd import holds, pull
from safelightd.claim import claimed
from safelightd.modelfolder import model_folder
from safelightd.prepare import prepare
from safelightd.weights import BadModelFolder
from tests.cli_steps import process, runner
from tests.conftest import Installation
from tests.integration import registering
from tests.integration.registering import FLUX, REPOSITORY, WAN, add, in_cache, row, table

own, disk, one = registering.own, registering.disk, registering.one


def test_a_place_that_moves_away_is_told_and_refused(own: Installation, disk: Path, one: Path) -> None:
    add(own, disk / FLUX, "--as", "folder")
    add(own, one, "--as", "file", "--with", disk / FLUX)
    add(own, one.rename(disk / "other.safetensors"), "--as", "third", "--with", disk / FLUX)
    (disk / FLUX).rename(disk / "moved")

    assert (row(own, "folder")["here"], row(own, "folder")["missing"]) == ("gone", [str(disk / FLUX)])
    assert row(own, "file")["missing"] == [str(disk / FLUX), str(one)]
    with pytest.raises(BadModelFolder, match=r"is gone: is its disk mounted\?.*safelight models rm folder"):
        model_folder(table(own)["folder"], own.paths.models)
    verified = runner(own)("models", "verify", "folder")
    assert verified.exit_code == 1
    assert "No such file" in verified.stdout
    assert runner(own)("doctor").exit_code in (0, 3, 4)
    assert "models" not in holds.read(own.config, user_hold=None, gpu=None)  # what lay beside it is there: it was moved


def test_a_pull_writes_nothing_to_where_a_registered_folder_was(own: Installation, disk: Path) -> None:
    own.config.source.write_text(own.config.source.read_text() + REPOSITORY)
    own = replace(own, config=settings.load(own.env))
    add(own, disk / FLUX, "--as", "fox", "--like", "published")
    disk.rename(own.root / "unmounted")

    said = runner(own)("models", "list").stdout
    what = published.of_model(table(own)["fox"], own.paths.models)
    with pytest.raises(BadConfig, match="is registered and gone"):
        pull.pull(own.config, what, force=False, say=print, ask=lambda: True, tell=lambda *_told: None)

    assert "gone:" in said
    assert not disk.exists()


def test_doctor_knows_what_is_gone_and_what_lies_in_the_hubs_cache(own: Installation, disk: Path) -> None:
    add(own, disk / FLUX, "--as", "fox")
    disk.rename(own.root / "moved")
    source = own.config.source
    source.write_text(source.read_text().replace('image_model = "tiny-flux-schnell"', 'image_model = "flux-schnell"'))
    cached = own.root / ".cache/huggingface/hub/models--black-forest-labs--FLUX.1-schnell"
    (cached / "snapshots").mkdir(parents=True)

    said = runner(own)("doctor").stdout

    assert f"fox is gone: {disk / FLUX}" in said
    assert "safelight models rm fox" in said
    assert f"safelight models add {cached}" in said
    assert f"in the hub's cache: safelight models add {cached}" in runner(own)("models", "list").stdout


def test_an_unmounted_disk_holds_the_queue(own: Installation, disk: Path) -> None:
    add(own, disk / FLUX, "--as", "fox")
    disk.rename(own.root / "unmounted")
    disk.mkdir()

    held = holds.read(own.config, user_hold=None, gpu=None)
    disk.rmdir()
    (own.root / "unmounted").rename(disk)

    assert "is its disk mounted?" in held["models"]
    assert "safelight models rm fox" in held["models"]
    assert "models" not in holds.read(own.config, user_hold=None, gpu=None)


def test_a_damaged_registration_hides_no_other_model(own: Installation, disk: Path) -> None:
    add(own, disk / FLUX, "--as", "fox")
    folder = own.paths.models / "registered"
    (folder / "torn.json").write_text('{"v": 1, "key": "torn"')
    (folder / "other.json").write_text((folder / "fox.json").read_text())
    gone = registered.Registration(key="orphan", like="no-such-model", folder="/nowhere")
    durable.write(folder / "orphan.json", gone.model_dump_json().encode())

    listed = runner(own)("models", "list")

    assert listed.exit_code == 0
    assert "fox" in listed.stdout
    assert "torn.json: damaged" in listed.stderr
    assert "other.json: is that of fox" in listed.stderr
    assert "orphan: is registered, and like = 'no-such-model' names no model" in listed.stderr
    assert "orphan" not in table(own)
    assert runner(own)("models", "rm", "orphan").exit_code == 0
    assert runner(own)("models", "rm", "torn").exit_code == 0


def test_a_table_is_read_again_when_something_was_registered(own: Installation, disk: Path) -> None:
    before = table(own)
    add(own, disk / FLUX, "--as", "fox")
    between = before.current()
    runner(own)("models", "rm", "fox")

    assert "fox" not in before
    assert "fox" in between
    assert between.current() is not between
    assert "fox" not in between.current()
    assert (again := between.current()).current() is again


def test_verify_reads_all_once_and_then_compares(own: Installation, disk: Path, one: Path) -> None:
    add(own, one, "--as", "fox", "--with", disk / FLUX)

    first = runner(own)("models", "verify", "fox")
    second = runner(own)("models", "verify", "fox")
    with one.open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        stream.write(bytes([stream.read(1)[0] ^ 1]) if stream.seek(-1, os.SEEK_END) else b"")
    third = runner(own)("models", "verify")

    assert "files were read for the first time" in first.stdout
    assert second.stdout == "fox is as it was\n"
    assert third.exit_code == 1
    assert f"{one}: its bytes are not those that it had" in third.stdout


def test_digests_can_be_made_at_once_and_the_hubs_are_its_names(own: Installation, disk: Path) -> None:
    made = add(own, disk / FLUX, "--as", "fox", "--digests")
    cache = in_cache(disk, WAN, "somebody/a-model") / "models--somebody--a-model"
    add(own, cache, "--as", "wan")
    link = next(cache.glob("snapshots/*/vae/*.safetensors"))
    with link.open("r+b") as stream:
        stream.seek(2_000)
        stream.write(b"fox")

    damaged = runner(own)("models", "verify", "wan")

    assert made.exit_code == 0
    assert "for the first time" in made.stdout
    assert runner(own)("models", "verify", "fox").stdout == "fox is as it was\n"
    assert damaged.exit_code == 1
    assert f"{link}: its bytes" in damaged.stdout


def test_digests_go_on_where_they_were_stopped(own: Installation, disk: Path) -> None:
    add(own, disk / FLUX, "--as", "fox")
    registration = registered.read(own.paths.models, "fox")
    assert registration
    files = registered.files_of(registration)

    def stop(file: Path, _done: int, _of: int) -> None:
        if file == files[5]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        registered.verify(own.paths.models, registration, stop)
    new, wrong = registered.verify(own.paths.models, registration, lambda *_told: None)

    assert (new, wrong) == (len(files) - 5, [])


def test_rm_forgets_what_was_registered_and_touches_nothing_else(own: Installation, disk: Path, one: Path) -> None:
    add(own, one, "--as", "fox", "--with", disk / FLUX)
    prepare(own.config, table(own)["fox"], "bf16", ["transformer"], force=False, say=lambda _line: None)
    assert [*prepared.folders(own.paths.models)] == [prepared.folder(own.paths.models, "fox", "bf16", "transformer")]
    before = sorted(str(file) for file in disk.rglob("*"))

    asked = runner(own)("models", "rm", "fox")
    gone = runner(own)("models", "rm", "fox", "--yes")

    assert asked.exit_code == 2
    assert "Add --yes" in asked.stderr
    assert (gone.exit_code, gone.stdout) == (0, "fox is forgotten\n")
    assert "fox" not in table(own)
    assert [*prepared.folders(own.paths.models)] == []
    assert sorted(str(file) for file in disk.rglob("*")) == before


def test_rm_deletes_a_persons_files_only_where_they_are_named(own: Installation, disk: Path, one: Path) -> None:
    add(own, one, "--as", "fox", "--with", disk / FLUX)
    add(own, disk / FLUX, "--as", "whole")

    rm: Callable[..., Result] = lambda *words: runner(own)("models", "rm", *map(str, words))  # noqa: E731 - four times
    rest = rm("fox", "--delete", disk / FLUX, "--yes")
    shared = rm("whole", "--delete", disk / FLUX, "--yes")
    named = rm("fox", "--delete", one, "--yes")

    assert "is no file of fox" in rest.stderr
    assert "fox reads it, too" in shared.stderr
    assert (named.exit_code, one.exists(), (disk / FLUX).exists()) == (0, False, True)
    assert rm("whole", "--delete", disk / FLUX, "--yes").exit_code == 0
    assert not (disk / FLUX).exists()


def test_rm_refuses_what_is_not_its_to_remove(own: Installation, disk: Path) -> None:
    own.config.source.write_text(
        own.config.source.read_text() + '\n[models.mine]\nlike = "tiny-flux-dev"\ntiny = false\n'
    )
    own = replace(own, config=settings.load(own.env))
    shutil.copytree(disk / FLUX, own.paths.models / "mine")
    cache = in_cache(disk, FLUX, "somebody/a-model") / "models--somebody--a-model"
    add(own, cache, "--as", "cached")

    assert "by hand" in runner(own)("models", "rm", "mine", "--yes").stderr
    assert "is not a model" in runner(own)("models", "rm", "no-such", "--yes").stderr
    assert "is not a model" in runner(own)("models", "rm", "../disk", "--yes").stderr
    assert "hf cache rm" in runner(own)("models", "rm", "cached", "--delete", table(own)["cached"].path, "--yes").stderr
    assert (own.paths.models / "mine/model_index.json").exists()


def test_rm_leaves_what_is_being_written(own: Installation, disk: Path) -> None:
    add(own, disk / FLUX, "--as", "fox")
    hidden = pulled.hidden(own.paths.models / "fox")

    with claimed(hidden, "pulling"):
        held = runner(own)("models", "rm", "fox", "--yes")
    free = runner(own)("models", "rm", "fox", "--yes")

    assert held.exit_code == 2
    assert f"{hidden}: is being written" in held.stderr
    assert (free.exit_code, hidden.exists()) == (0, False)


def test_what_is_registered_can_be_prepared_and_is_made_anew_when_its_file_changes(
    own: Installation, disk: Path, one: Path
) -> None:
    add(own, one, "--as", "fox", "--with", disk / FLUX)
    facts = table(own)["fox"]

    ready = prepare(own.config, facts, "nf4", [], force=False, say=lambda _line: None)
    plain = prepare(own.config, table(own)["fox"], "bf16", ["transformer"], force=False, say=lambda _line: None)
    usable = [manifest.name for manifest in prepared.usable(own.paths.models, table(own))]
    weights = {name: each * 2 for name, each in layouts.load_file(one).items()}
    layouts.save(weights, one)

    assert ready == ["fox/nf4/transformer"]
    assert plain == ["fox/bf16/transformer"]
    assert sorted(usable) == ["fox/bf16/transformer", "fox/nf4/transformer"]
    assert prepared.usable(own.paths.models, table(own)) == []
    folder = prepared.folder(own.paths.models, "fox", "bf16", "transformer")
    assert layouts.published(folder).keys() == layouts.published(disk / FLUX / "transformer").keys()


def test_the_program_registers_and_lists_without_torch(own: Installation, disk: Path, one: Path) -> None:
    running = process(own, "models", "add", str(one), "--with", str(disk / FLUX))
    out, err = running.communicate(timeout=300)

    assert (running.returncode, out) == (0, "flux1-fox\n"), err
    code = "import sys; from safelight import inventory, register; sys.exit('torch' in sys.modules)"
    env = {**own.env, "PYTHONPATH": "client"}
    assert subprocess.run([sys.executable, "-c", code], env=env, check=False).returncode == 0


def test_the_program_prepares_what_is_registered_in_the_models_folder_it_is_told(
    own: Installation, disk: Path, one: Path
) -> None:
    """A client may reach a daemon with another models folder than its own settings name."""
    add(own, one, "--as", "fox", "--with", disk / FLUX)
    elsewhere = own.root / "elsewhere.toml"
    elsewhere.write_text(own.config.source.read_text().replace(str(own.paths.models), str(own.root / "none")))
    words = ["prepare", "fox", "--precision", "fp8-weight-only", "--models", str(own.paths.models)]
    env = {**own.env, "PYTHONPATH": "client:daemon", "SAFELIGHT_CONFIG": str(elsewhere)}

    done = subprocess.run(
        [sys.executable, "-m", "safelightd.cli", *words],
        env=env,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )

    assert (done.returncode, done.stdout) == (0, "fox/fp8-weight-only/transformer\n"), done.stderr
