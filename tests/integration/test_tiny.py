"""The tiny models: built whole or not at all, the same everywhere, and what the table says they are."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from safelightd import tiny
from safelightd.loading import Loader
from safelightd.modelfolder import model_folder
from tests.integration.rendering import MODELS, parameters_of, plan_for

BYTES_MAX = 4_000_000


@pytest.fixture(params=tiny.KEYS)
def key(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def contents(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def test_a_tiny_model_is_a_diffusers_folder_of_its_table_row(key: str, tiny_models_folder: Path) -> None:
    facts = MODELS[key]
    folder = model_folder(facts, tiny_models_folder)
    loader = Loader(folder, plan_for(key))

    assert facts.components == parameters_of(key, folder)
    assert facts.pipeline == json.loads((folder / "model_index.json").read_text())["_class_name"]
    assert facts.boundary_ratio == loader.option("boundary_ratio")
    assert facts.expand_timesteps == bool(loader.option("expand_timesteps"))
    assert facts.latent_channels == loader.config("vae").get("z_dim", loader.config("vae").get("latent_channels"))
    assert sum(file.stat().st_size for file in folder.rglob("*")) <= BYTES_MAX
    assert not list(folder.rglob("*.bin"))


def test_building_twice_gives_the_same_bytes_and_moves_no_random_stream(
    key: str, tiny_models_folder: Path, tmp_path: Path
) -> None:
    first = model_folder(MODELS[key], tiny_models_folder)
    stream = torch.random.get_rng_state()

    tiny.build(key, tmp_path / "again")

    assert contents(first) == contents(tmp_path / "again")
    assert torch.equal(stream, torch.random.get_rng_state())


def test_the_weights_are_those_of_every_other_machine(tiny_models_folder: Path) -> None:
    """A digest from another day: a changed model changes every picture that tests and demos expect."""
    folder = model_folder(MODELS["tiny-flux-schnell"], tiny_models_folder)

    digest = hashlib.sha256((folder / "transformer/diffusion_pytorch_model.safetensors").read_bytes()).hexdigest()

    assert digest == "bc39db07ad320016cc6ddf1e56ad58c652b84d79fb1611796a24ab3826378120"


def test_two_experts_differ(tiny_models_folder: Path) -> None:
    files = contents(model_folder(MODELS["tiny-wan-t2v-a14b"], tiny_models_folder))

    weights = "diffusion_pytorch_model.safetensors"
    assert files[f"transformer/{weights}"] != files[f"transformer_2/{weights}"]


def test_processes_that_build_at_once_all_succeed(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from safelightd import tiny; from safelightd.tiny import wan;"
        "print('ready', flush=True); sys.stdin.readline(); tiny.build('tiny-wan-ti2v', Path(sys.argv[1]))"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", program, str(tmp_path / "model")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        assert other.stdout.readline() == "ready\n"
        other.stdin.write("go\n")
        other.stdin.flush()
        tiny.build("tiny-wan-ti2v", tmp_path / "model")

    assert other.returncode == 0
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / "model_index.json").is_file()


def test_threads_that_build_at_once_all_succeed(tmp_path: Path) -> None:
    threads = [threading.Thread(target=tiny.build, args=("tiny-wan-ti2v", tmp_path / "model")) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_what_is_there_is_left_alone(tmp_path: Path) -> None:
    tiny.build("tiny-wan-ti2v", tmp_path / "model")
    stamp = (tmp_path / "model/model_index.json").stat().st_mtime_ns

    tiny.build("tiny-wan-ti2v", tmp_path / "model")

    assert stamp == (tmp_path / "model/model_index.json").stat().st_mtime_ns


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_something_else_in_the_way_is_not_overwritten(kind: str, tmp_path: Path) -> None:
    target = tmp_path / "model"
    if kind == "folder":
        target.mkdir()
        (target / "letter.txt").write_text("mine")
    else:
        target.write_text("mine")

    with pytest.raises(tiny.NotATinyModel, match="in the way"):
        tiny.build("tiny-wan-ti2v", target)

    assert (target / "letter.txt" if kind == "folder" else target).read_text() == "mine"
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_an_unknown_key_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(tiny.NotATinyModel, match="tiny-flux-schnell"):
        tiny.build("tiny-flux-pro", tmp_path / "model")

    assert list(tmp_path.iterdir()) == []


def test_a_new_model_has_the_modes_of_its_parent_folder(tmp_path: Path) -> None:
    """A shared models folder stays readable by its group."""
    (tmp_path / "plain").mkdir()

    tiny.build("tiny-wan-ti2v", tmp_path / "model")

    assert (tmp_path / "plain").stat().st_mode == (tmp_path / "model").stat().st_mode
