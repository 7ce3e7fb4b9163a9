"""`safelight models add`, `list`, `verify` and `rm` on what people have on disk: real files in each true layout."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from click.testing import Result

from safelight import config as settings
from safelight import durable, models, prepared, register, registered
from safelight.errors import BadConfig, InvalidJob
from safelight.models import Models
from safelight.paths import SYSTEM_CONFIG
from safelightd import holds, pull, tiny
from safelightd.loading import BadModelFolder, model_folder
from safelightd.prepare import prepare
from tests import other_layouts as layouts
from tests.cli_steps import process, runner
from tests.conftest import Installation

FLUX = "tiny-flux-dev"
WAN = "tiny-wan-t2v-a14b"

REPOSITORY = """
[models.published]
like = "tiny-flux-dev"
tiny = false
repository = "somebody/a-model"
"""


@pytest.fixture
def own(installation: Installation) -> Installation:
    """An installation with an empty models folder."""
    folder = installation.root / "models"
    folder.mkdir()
    source = installation.config.source
    lines = [
        f'models = "{folder}"' if line.startswith("models =") else line for line in source.read_text().splitlines()
    ]
    source.write_text("\n".join(lines))
    config = settings.load(installation.env)
    return replace(installation, config=config, models=models.load(config))


@pytest.fixture
def disk(own: Installation, tiny_models_folder: Path) -> Path:
    """A person's folder: a FLUX and a Wan model in the layout of diffusers."""
    folder = own.root / "disk"
    for key in (FLUX, WAN):
        tiny.build(key, tiny_models_folder / key)
        shutil.copytree(tiny_models_folder / key, folder / key)
    return folder


@pytest.fixture
def one(disk: Path) -> Path:
    """The FLUX transformer as its authors publish it."""
    weights = layouts.flux_of_authors(layouts.published(disk / FLUX / "transformer"))
    return layouts.save(weights, disk / "flux1-fox.safetensors")


def in_cache(disk: Path, key: str, repository: str) -> Path:
    """Put a model where huggingface_hub's cache has it: names are links to blobs; return the cache."""
    cache = disk / "hub"
    at = cache / f"models--{repository.replace('/', '--')}"
    snapshot = at / "snapshots" / ("c0ffee" * 7)[:40]
    (at / "blobs").mkdir(parents=True)
    (at / "refs").mkdir()
    (at / "refs/main").write_text(snapshot.name)
    for file in sorted(file for file in (disk / key).rglob("*") if file.is_file()):
        digest = registered._digest(file, lambda _nbytes: None).sha256
        shutil.copy(file, at / "blobs" / digest)
        link = snapshot / file.relative_to(disk / key)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(at / "blobs" / digest, link.parent))
    return cache


def add(own: Installation, *words: str | Path) -> Result:
    return runner(own)("models", "add", *map(str, words))


def row(own: Installation, key: str) -> dict[str, Any]:
    result = runner(own)("models", "list", "--json")
    assert result.exit_code == 0, result.output
    return next(each for each in json.loads(result.stdout) if each["key"] == key)


def table(own: Installation) -> Models:
    return models.load(own.config)


# what can be registered


def test_a_diffusers_folder_is_registered_where_it_lies(own: Installation, disk: Path) -> None:
    before = sorted(str(file) for file in disk.rglob("*"))

    result = add(own, disk / FLUX, "--as", "fox")

    assert (result.exit_code, result.stdout) == (0, "fox\n"), result.output
    assert sorted(str(file) for file in disk.rglob("*")) == before
    assert [file.name for file in own.paths.models.rglob("*") if file.is_file()] == ["fox.json"]
    facts = table(own)["fox"]
    assert model_folder(facts, own.paths.models) == disk / FLUX
    found = row(own, "fox")
    assert (found["here"], found["missing"], found["stored"], found["registered"]) == ("present", [], "fp32", True)
    assert found["serves"] == ["text-to-image"]
    assert found["stored_bytes"] == sum(file.stat().st_size for file in (disk / FLUX).rglob("*.safetensors"))


def test_every_known_model_of_the_hubs_cache_is_registered(own: Installation, disk: Path) -> None:
    source = own.config.source
    source.write_text(source.read_text() + REPOSITORY)
    own = replace(own, config=settings.load(own.env))
    cache = in_cache(disk, FLUX, "somebody/a-model")

    every = add(own, cache)
    one = add(own, cache / "models--somebody--a-model", "--as", "fox")

    assert (every.exit_code, every.stdout) == (0, "published\n"), every.output
    assert "is registered as published" in one.stderr
    assert table(own)["published"].path.endswith(("c0ffee" * 7)[:40])
    assert row(own, "published")["here"] == "present"
    assert runner(own)("models", "verify", "published").stdout == "published is as it was\n"


def test_a_cache_is_searched_for_the_models_of_the_table(own: Installation, disk: Path) -> None:
    """No tiny model has a repository: a broken link stands for a model that is known and not whole."""
    cache = in_cache(disk, FLUX, "black-forest-labs/FLUX.1-dev")

    result = add(own, cache)

    assert result.exit_code == 1
    assert "models--black-forest-labs--FLUX.1-dev" in result.stderr
    assert "flux-dev has a FLUX transformer of 11,901,408,320" in result.stderr
    assert "is a cache of the hub without a model" in add(own, empty_cache(disk)).stderr


def empty_cache(disk: Path) -> Path:
    (disk / "other/models--a--b/snapshots").mkdir(parents=True)
    return disk / "other"


def test_a_single_file_takes_the_rest_from_the_folder_that_is_named(own: Installation, disk: Path, one: Path) -> None:
    result = add(own, one, "--with", disk / FLUX)

    assert (result.exit_code, result.stdout) == (0, "flux1-fox\n"), result.output
    facts = table(own)["flux1-fox"]
    assert facts.component_paths == {"transformer": str(one)}
    assert facts.path == str(disk / FLUX)
    found = row(own, "flux1-fox")
    assert (found["here"], found["stored"], found["missing"]) == ("present", "fp32", [])


def test_a_single_file_takes_the_rest_from_what_it_is_like(own: Installation, disk: Path, one: Path) -> None:
    assert add(own, disk / FLUX, "--as", "base").exit_code == 0

    assert add(own, one, "--like", "base").exit_code == 0

    assert table(own)["flux1-fox"].path == str(disk / FLUX)
    assert row(own, "flux1-fox")["here"] == "present"


def test_a_second_file_of_a_model_that_is_registered_is_like_it(own: Installation, disk: Path, one: Path) -> None:
    """Its size is that of three rows of the table then, and only one of them is a model of its own."""
    other = Path(shutil.copy(one, disk / "flux1-hare.safetensors"))
    add(own, disk / FLUX, "--as", "folder")
    add(own, one, "--with", disk / FLUX)

    assert add(own, other, "--with", disk / FLUX).stdout == "flux1-hare\n"

    assert [each.like for each in registered.read_all(own.paths.models)[0]] == [FLUX] * 3


def test_a_single_file_alone_says_what_it_lacks_and_how_to_get_it(own: Installation, one: Path) -> None:
    result = add(own, one, "--as", "fox")

    assert (result.exit_code, result.stdout) == (0, "fox\n"), result.output
    found = row(own, "fox")
    assert (found["here"], found["present"]) == ("incomplete", False)
    assert found["missing"] == ["all but its transformer (safelight models pull fox fetches it)"]
    assert "incomplete: lacks all but its transformer" in runner(own)("models", "list").stdout


@pytest.mark.parametrize(("kind", "stored"), [("Q8_0", "Q8_0"), ("Q4_0", "Q4_0"), ("F16", "fp16")])
def test_a_gguf_file_is_registered(kind: str, stored: str, own: Installation, disk: Path) -> None:
    authors = layouts.flux_of_authors(layouts.published(disk / FLUX / "transformer"))
    layouts.save_gguf(authors, disk / "fox.gguf", gguf.GGMLQuantizationType[kind])

    assert add(own, disk / "fox.gguf", "--with", disk / FLUX).exit_code == 0

    assert (row(own, "fox")["here"], row(own, "fox")["stored"]) == ("present", stored)


def test_an_8_bit_file_of_another_program_is_registered(own: Installation, disk: Path) -> None:
    authors = layouts.flux_of_authors(layouts.published(disk / FLUX / "transformer"))
    file = layouts.save(layouts.prefixed(layouts.scaled(authors, "scale_weight")), disk / "Fox (fp8).safetensors")

    result = add(own, file, "--with", disk / FLUX)

    assert result.stdout == "fox-fp8\n", result.output
    assert row(own, "fox-fp8")["stored"] == "fp8_e4m3 scaled"


def test_a_transformers_folder_alone_is_registered(own: Installation, disk: Path) -> None:
    assert add(own, disk / FLUX / "transformer", "--with", disk / FLUX, "--as", "fox").exit_code == 0

    assert row(own, "fox")["here"] == "present"


def test_two_experts_are_both_needed_and_each_in_its_place(own: Installation, disk: Path) -> None:
    files = {}
    for name, component in (("high_noise", "transformer"), ("low_noise", "transformer_2")):
        weights = layouts.wan_of_authors(layouts.published(disk / WAN / component))
        files[name] = layouts.save(weights, disk / f"wan_{name}.safetensors")
    rest = ("--with", disk / WAN, "--as", "wan")

    alone = add(own, files["high_noise"], *rest)
    swapped = add(own, files["low_noise"], "--component", f"transformer_2={files['high_noise']}", *rest)
    right = add(own, files["high_noise"], "--component", f"transformer_2={files['low_noise']}", *rest)

    assert alone.exit_code == 2
    assert "transformer_2: is its second expert, for low noise, and is not given" in alone.stderr
    assert "is called low noise, and transformer is the high-noise expert" in swapped.stderr
    assert right.exit_code == 0, right.output
    assert row(own, "wan")["here"] == "present"
    assert row(own, "wan")["serves"] == ["text-to-video"]


# what cannot


def refused(own: Installation, *words: str | Path, code: int = 2) -> str:
    before = registered.read_all(own.paths.models)
    result = add(own, *words)
    assert result.exit_code in (1, code), result.output
    assert result.stdout == ""
    assert "Traceback" not in result.output
    assert registered.read_all(own.paths.models) == before
    return result.stderr


@pytest.mark.parametrize("suffix", [".ckpt", ".bin", ".pt", ".pth", ".pkl"])
def test_a_pickle_is_never_opened(suffix: str, own: Installation, disk: Path) -> None:
    os.mkfifo(disk / f"pipe{suffix}")  # opening it would wait for ever
    (disk / f"weights{suffix}").write_bytes(b"never read")

    assert "is a pickle, and a pickle can run any program" in refused(own, disk / f"weights{suffix}")
    assert refused(own, disk / f"pipe{suffix}")


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch /tmp/safelight-bomb",)


@pytest.mark.parametrize("name", ["fox.safetensors", "fox.gguf"])
def test_a_pickle_under_another_name_is_known_by_its_bytes(name: str, own: Installation, disk: Path) -> None:
    Path("/tmp/safelight-bomb").unlink(missing_ok=True)
    (disk / name).write_bytes(pickle.dumps(Bomb()) + b"\0" * 100)
    plain = refused(own, disk / name)
    with zipfile.ZipFile(disk / name, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Bomb()))
    zipped = refused(own, disk / name)

    assert "is a pickle, whatever its name says" in plain
    assert "is a pickle, whatever its name says" in zipped
    assert not Path("/tmp/safelight-bomb").exists()


@pytest.mark.parametrize("keep", [0, 4, 8, 100, 0.5, 0.999])
@pytest.mark.parametrize("name", ["flux1-fox.safetensors", "fox.gguf"])
def test_a_cut_file_is_refused(keep: float, name: str, own: Installation, disk: Path, one: Path) -> None:
    layouts.save_gguf(layouts.published(disk / FLUX / "transformer"), disk / "fox.gguf", gguf.GGMLQuantizationType.Q8_0)
    whole = (disk / name).stat().st_size
    os.truncate(disk / name, int(keep * whole) if keep < 1 else int(keep))

    said = refused(own, disk / name)

    assert "Fetch it anew" in said


def test_damaged_headers_are_refused(own: Installation, disk: Path) -> None:
    header = json.dumps({"a": {"dtype": "F16", "shape": [3], "data_offsets": [0, 1]}}).encode()
    for text in (b"{" * 5_000, b"[1, 2]", b'{"a": 1}', b'"a"', header, b"\xff" * 40):
        (disk / "f.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"\0")
        assert "Fetch it anew" in refused(own, disk / "f.safetensors")
    for text in (b"GGUF" + b"\xff" * 60, b"GGUF\3\0\0\0" + b"\xff" * 16, b"GGUF\1\0\0\0", b"ggml" + b"\0" * 60):
        (disk / "f.gguf").write_bytes(text)
        assert "Fetch" in refused(own, disk / "f.gguf")


def test_other_models_are_told_by_their_tensors(own: Installation, disk: Path, one: Path) -> None:
    def said(*names: str, **words: str) -> str:
        weights = {name: torch.ones(2, 2) for name in names}
        more = [word for key, value in words.items() for word in (f"--{key}", value)]
        return refused(own, layouts.save(weights, disk / "other.safetensors"), *more)

    assert "a Stable Diffusion XL model" in said("conditioner.embedders.0.x", "model.diffusion_model.input_blocks.0.w")
    assert "a Stable Diffusion model" in said("model.diffusion_model.input_blocks.0.0.weight")
    assert "a lora" in said("lora_unet_double_blocks_0.lora_up.weight")
    assert "a VAE" in said("decoder.up.0.block.0.conv1.weight")
    assert "a text encoder" in said("encoder.block.0.layer.0.SelfAttention.q.weight", "shared.weight")
    assert "no transformer that is known (1 tensors, fox the first)" in said("fox")

    wan = layouts.save(layouts.wan_of_authors(layouts.published(disk / WAN / "transformer")), disk / "wan.safetensors")
    assert "holds a Wan transformer" in refused(own, wan, "--like", FLUX, "--as", "fox")
    assert "and flux-dev has a FLUX transformer of 11,901,408,320" in refused(own, one, "--like", "flux-dev")
    assert "is not a model" in refused(own, one, "--like", "flux-dve")
    assert "is of another kind" in refused(own, one, "--with", disk / WAN)


def test_a_folder_of_another_kind_is_refused(own: Installation, disk: Path) -> None:
    (disk / "sdxl").mkdir()
    index = {"_class_name": "StableDiffusionXLPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}
    (disk / "sdxl/model_index.json").write_text(json.dumps(index))
    (disk / "native").mkdir()
    (disk / "native/Wan2.2_VAE.pth").write_bytes(b"")
    (disk / "pickles").mkdir()
    (disk / "pickles/model.ckpt").write_bytes(b"")
    (disk / "nothing").mkdir()

    assert "is a StableDiffusionXLPipeline" in refused(own, disk / "sdxl")
    assert "pickles, which are never opened" in refused(own, disk / "native")
    assert "is a pickle" in refused(own, disk / "pickles")
    assert "has no model_index.json" in refused(own, disk / "nothing")
    assert "does not exist" in refused(own, disk / "nowhere")
    assert "holds a component of the class AutoencoderKL" in refused(own, disk / FLUX / "vae")


def test_weights_that_are_quantised_in_their_folder_are_refused(own: Installation, disk: Path) -> None:
    config = disk / FLUX / "transformer/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "quantization_config": {"load_in_4bit": True}}))

    assert "is quantised already" in refused(own, disk / FLUX, "--as", "fox")


def test_a_cache_with_a_broken_link_is_refused_naming_the_file(own: Installation, disk: Path) -> None:
    cache = in_cache(disk, FLUX, "somebody/a-model") / "models--somebody--a-model"
    link = next(cache.glob("snapshots/*/text_encoder_2/model.safetensors"))
    link.resolve().unlink()

    said = refused(own, cache, "--as", "fox")

    assert "lacks text_encoder_2/model.safetensors (a broken link)" in said
    link.unlink()
    assert "lacks text_encoder_2/*.safetensors" in refused(own, cache, "--as", "fox")
    (cache / "refs/main").unlink()
    (cache / "snapshots/other").mkdir()
    assert "has 2 commits and no main" in refused(own, cache, "--as", "fox")


def test_a_folder_whose_index_names_a_missing_shard_is_refused(own: Installation, disk: Path) -> None:
    transformer = disk / FLUX / "transformer"
    whole = transformer / "diffusion_pytorch_model.safetensors"
    whole.rename(transformer / "diffusion_pytorch_model-00001-of-00002.safetensors")
    shards = {"a": "diffusion_pytorch_model-00001-of-00002.safetensors",
              "b": "diffusion_pytorch_model-00002-of-00002.safetensors"}  # fmt: skip
    (transformer / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))

    assert "lacks transformer/diffusion_pytorch_model-00002-of-00002.safetensors" in refused(
        own, disk / FLUX, "--as", "fox"
    )


def test_a_key_names_one_model(own: Installation, disk: Path, one: Path) -> None:
    own.config.source.write_text(
        own.config.source.read_text() + '\n[models.written]\nlike = "flux-dev"\npath = "/nowhere"\n'
    )
    assert add(own, disk / FLUX, "--as", "fox").exit_code == 0

    assert "is registered already" in refused(own, one, "--as", "fox", "--with", disk / FLUX)
    assert "is registered as fox" in refused(own, disk / FLUX, "--as", "fox-2")
    assert "has its place in your settings" in refused(own, one, "--as", "written")
    assert "is a model that is there already" in refused(own, one, "--as", FLUX)
    assert "cannot be a key" in refused(own, one, "--as", "../fox")
    (own.paths.models / "taken").mkdir()
    assert "is in the way" in refused(own, one, "--as", "taken")


def test_what_lies_in_the_models_folder_is_found_by_itself(own: Installation, disk: Path) -> None:
    shutil.copytree(disk / FLUX, own.paths.models / FLUX)
    (own.paths.models / "prepared").mkdir()
    shutil.copytree(disk / FLUX, own.paths.models / "prepared/x")
    shutil.copytree(disk / FLUX, own.paths.models / "mine")

    assert "is found there by itself" in refused(own, own.paths.models / FLUX)
    assert "safelight keeps its own files" in refused(own, own.paths.models / "prepared/x", "--as", "fox")
    assert add(own, own.paths.models / "mine", "--as", "mine").exit_code == 0
    assert row(own, "mine")["here"] == "present"


def test_what_the_systems_daemon_cannot_see_is_refused(own: Installation) -> None:
    systems = replace(own.config, source=SYSTEM_CONFIG)

    with pytest.raises(InvalidJob, match=r"home folder, which the system's daemon cannot see \(ProtectHome\)"):
        register.registrations(register.Asked(Path("/home/ann/flux1-dev.safetensors")), systems, own.models)


def test_a_models_folder_that_is_in_the_way_is_a_sentence(own: Installation, disk: Path) -> None:
    (own.paths.models / "registered").write_text("a file where a folder belongs")

    said = refused(own, disk / FLUX, "--as", "fox", code=3)

    assert f"Make {own.paths.models} writable for this user" in said


def test_what_is_like_a_registered_model_outlives_it(own: Installation, disk: Path, one: Path) -> None:
    add(own, disk / FLUX, "--as", "base")
    add(own, one, "--as", "fox", "--like", "base")

    assert runner(own)("models", "rm", "base").exit_code == 0

    assert row(own, "fox")["here"] == "present"


def test_an_unreadable_folder_is_a_sentence(own: Installation, disk: Path) -> None:
    """A loop of links is unreadable for everybody, root included."""
    transformer = disk / FLUX / "transformer"
    shutil.rmtree(transformer)
    transformer.symlink_to("transformer")

    assert "lacks transformer/" in refused(own, disk / FLUX, "--as", "fox", "--like", FLUX)
    (disk / "loop").symlink_to("loop")
    assert "is a broken link" in refused(own, disk / "loop") or "cannot be read" in refused(own, disk / "loop")


# afterwards


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
    facts = table(own)["fox"]
    with pytest.raises(BadConfig, match="is registered and gone"):
        pull.pull(own.config, facts, force=False, say=print, ask=lambda: True, tell=lambda *_told: None)

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
    assert prepared.prepared(own.paths.models) == ("fox/bf16/transformer",)
    before = sorted(str(file) for file in disk.rglob("*"))

    asked = runner(own)("models", "rm", "fox")
    gone = runner(own)("models", "rm", "fox", "--yes")

    assert asked.exit_code == 2
    assert "Add --yes" in asked.stderr
    assert (gone.exit_code, gone.stdout) == (0, "fox is forgotten\n")
    assert "fox" not in table(own)
    assert prepared.prepared(own.paths.models) == ()
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
    out, err = running.communicate(timeout=60)

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
