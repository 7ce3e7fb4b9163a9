"""`safelight models add`: what can be registered, and what cannot, of real files in each true layout."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from bench import layouts

from safelight import config as settings
from safelight import register, registered
from safelight.errors import InvalidJob
from safelight.paths import SYSTEM_CONFIG
from safelightd.modelfolder import model_folder
from tests.cli_steps import runner
from tests.conftest import Installation
from tests.integration import registering
from tests.integration.registering import FLUX, REPOSITORY, WAN, add, in_cache, refused, row, table

own, disk, one = registering.own, registering.disk, registering.one


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
