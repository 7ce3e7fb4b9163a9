"""What the loader loads, what it refuses, and that it gives everything back."""

from __future__ import annotations

import gc
import json
import os
import pickle
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from safelightd.loading import Loader
from safelightd.modelfolder import model_folder
from safelightd.progress import Cancelled
from safelightd.weights import BadModelFolder
from tests.integration.rendering import MODELS, Run, alive, picture, plan_for, spec_for

KEY = "tiny-flux-schnell"


@pytest.fixture
def whole(tiny_models_folder: Path) -> Path:
    return model_folder(MODELS[KEY], tiny_models_folder)


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    """A model's folder that a test may damage."""
    return Path(shutil.copytree(whole, tmp_path / KEY))


def load(folder: Path, name: str = "transformer", **more: Any) -> None:
    with Loader(folder, plan_for(KEY), **more).component(name, "cpu"):
        pass


def test_a_component_is_in_evaluation_mode_and_the_plans_dtype(whole: Path) -> None:
    loader = Loader(whole, plan_for(KEY, dtype="bfloat16"))

    for name in ("transformer", "text_encoder", "text_encoder_2", "vae"):
        with loader.component(name, "cpu") as module:
            assert not module.training
            assert {parameter.dtype for parameter in module.parameters()} == {torch.bfloat16}


def test_what_wan_keeps_in_float32_stays_so_in_bfloat16(tiny_models_folder: Path) -> None:
    folder = model_folder(MODELS["tiny-wan-ti2v"], tiny_models_folder)

    with Loader(folder, plan_for("tiny-wan-ti2v", dtype="bfloat16")).component("transformer", "cpu") as module:
        assert module.dtype == torch.bfloat16
        assert module.scale_shift_table.dtype == torch.float32
        assert module.condition_embedder.time_embedder.linear_1.weight.dtype == torch.float32
        assert module.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("model", ["tiny-flux-dev", "tiny-wan-i2v-a14b"])
def test_a_job_runs_in_bfloat16(model: str, tiny_models_folder: Path) -> None:
    image = picture() if model == "tiny-wan-i2v-a14b" else None
    more = {"image": "0" * 64, "num_frames": 5, "num_inference_steps": 2} if image else {}
    spec = spec_for(model, **more)

    frames = Run(spec, tiny_models_folder, {"dtype": "bfloat16", "precision": "bf16"}, image=image).frames()

    assert all(frame.std() > 20 for frame in frames)


@pytest.mark.parametrize("end", ["normally", ValueError, Cancelled])
def test_the_weights_are_given_back_even_where_a_name_still_points_at_them(end: Any, whole: Path) -> None:
    kept: list[torch.nn.Module] = []

    def use() -> None:
        with Loader(whole, plan_for(KEY)).component("transformer", "cpu") as module:
            kept.append(module)
            if end != "normally":
                raise end

    if end == "normally":
        use()
    else:
        with pytest.raises(end):
            use()

    assert sum(tensor.numel() for tensor in [*kept[0].parameters(), *kept[0].buffers()]) == 0


def test_an_error_held_by_its_catcher_holds_no_activations(whole: Path) -> None:
    """Its traceback passes through the frames of every layer, with everything those had computed."""
    marker = 977

    def layer(size: int) -> None:
        activations = torch.zeros(size, size)
        raise ValueError(activations.shape)

    def use() -> None:
        with Loader(whole, plan_for(KEY)).component("vae", "cpu"):
            layer(marker)

    with pytest.raises(ValueError, match="977") as caught:
        use()

    held = [value for value in gc.get_objects() if type(value) is torch.Tensor and value.shape[:1] == (marker,)]
    assert caught.value is not None
    assert held == []


def test_a_folder_for_one_component_replaces_that_one(copy: Path, tiny_models_folder: Path, tmp_path: Path) -> None:
    changed = tmp_path / "finetune"
    (copy / "transformer").rename(changed)
    file = changed / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    save_file({name: weight * 1.5 for name, weight in weights.items()}, file, metadata={"format": "pt"})
    paths = {"transformer": str(changed)}

    load(copy, component_paths=paths)
    usual = Run(spec_for(KEY), tiny_models_folder)
    other = Run(spec_for(KEY), tiny_models_folder, component_paths=paths)

    assert not torch.equal(usual.latents(), other.latents())


def test_a_folder_for_a_component_the_model_does_not_have_is_refused(whole: Path) -> None:
    with pytest.raises(BadModelFolder, match="no component transfromer"):
        Loader(whole, plan_for(KEY), {"transfromer": "/somewhere"})


def test_a_folder_that_holds_another_class_is_refused(whole: Path) -> None:
    with pytest.raises(BadModelFolder, match="holds a AutoencoderKL, and the model needs a FluxTransformer2DModel"):
        load(whole, component_paths={"transformer": str(whole / "vae")})


class Harm:
    """Unpickled, it leaves a file: what a weight file from anywhere could do."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.file}",)


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "model.pt", "flux.ckpt"])
def test_pickled_weights_are_refused_unread(name: str, copy: Path, tmp_path: Path) -> None:
    harmed = tmp_path / "harmed"
    (copy / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    (copy / "transformer" / name).write_bytes(pickle.dumps(Harm(harmed)))

    with pytest.raises(BadModelFolder, match=f"the weights are pickled .{name}., and a pickle can run any program"):
        load(copy)

    assert not harmed.exists()


def test_a_pickle_under_the_name_of_safetensors_is_refused_unread(copy: Path, tmp_path: Path) -> None:
    harmed = tmp_path / "harmed"
    (copy / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(pickle.dumps(Harm(harmed)))

    with pytest.raises(BadModelFolder, match="cannot be loaded"):
        load(copy)

    assert not harmed.exists()


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (["diffusers", "DiffusionPipeline"], "transformer is a diffusers.DiffusionPipeline, which is never loaded"),
        (["evil_module", "FluxTransformer2DModel"], "which is never loaded"),
        ([None, None], "no component transformer"),
        (None, "no component transformer"),
    ],
)
def test_an_index_that_names_an_unknown_class_is_refused(index: Any, message: str, copy: Path) -> None:
    file = copy / "model_index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"transformer": index}))

    with pytest.raises(BadModelFolder, match=message):
        load(copy)


@pytest.mark.parametrize(
    ("gone", "name"),
    [
        ("transformer/config.json", "transformer"),
        ("transformer/diffusion_pytorch_model.safetensors", "transformer"),
        ("text_encoder_2/model.safetensors", "text_encoder_2"),
        ("vae/config.json", "vae"),
    ],
)
def test_a_missing_file_is_named(gone: str, name: str, copy: Path) -> None:
    (copy / gone).unlink()

    with pytest.raises(BadModelFolder, match=Path(gone).name):
        load(copy, name)


def test_a_missing_shard_is_named(copy: Path) -> None:
    folder = copy / "transformer"
    (folder / "diffusion_pytorch_model.safetensors").rename(folder / "part-1.safetensors")
    shards = {"weight_map": {"a": "part-1.safetensors", "b": "part-2.safetensors", "c": "part-3.safetensors"}}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(shards))

    with pytest.raises(BadModelFolder, match=r"transformer: part-2.safetensors, part-3.safetensors is missing"):
        load(copy)


def test_shards_load_as_one(copy: Path, whole: Path) -> None:
    folder = copy / "transformer"
    file = folder / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    names = sorted(weights)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for part, held in parts.items():
        save_file({name: weights[name].clone() for name in held}, folder / part, metadata={"format": "pt"})
    placed = {name: part for part, held in parts.items() for name in held}
    (folder / f"{file.name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    file.unlink()

    with Loader(copy, plan_for(KEY)).component("transformer", "cpu") as module:
        assert all(torch.equal(weights[name], weight) for name, weight in module.state_dict().items())


@pytest.mark.parametrize("name", ["transformer", "text_encoder"])
def test_a_truncated_download_is_refused(name: str, copy: Path) -> None:
    file = next((copy / name).glob("*.safetensors"))
    os.truncate(file, file.stat().st_size // 2)

    with pytest.raises(BadModelFolder, match=f"{name}: cannot be loaded"):
        load(copy, name)


@pytest.mark.parametrize("name", ["transformer", "text_encoder", "text_encoder_2", "vae"])
def test_weights_that_lack_one_tensor_are_refused(name: str, copy: Path) -> None:
    """Both libraries would warn and go on with random numbers in its place."""
    file = next((copy / name).glob("*.safetensors"))
    weights = load_file(file)
    lost = next(name for name in weights if name.endswith("weight") and "shared" not in name and "embed" not in name)
    del weights[lost]
    save_file(weights, file, metadata={"format": "pt"})

    with pytest.raises(BadModelFolder, match="1 weights are missing"):
        load(copy, name)


@pytest.mark.parametrize("name", ["transformer", "text_encoder"])
def test_weights_of_another_size_are_refused(name: str, copy: Path) -> None:
    file = next((copy / name).glob("*.safetensors"))
    weights = load_file(file)
    largest = max(weights, key=lambda name: weights[name].numel())
    weights[largest] = weights[largest][:-1].clone()
    save_file(weights, file, metadata={"format": "pt"})

    with pytest.raises(BadModelFolder, match=name):
        load(copy, name)


@pytest.mark.parametrize("content", ["", "{", "[]", '"text"'])
def test_an_index_that_is_no_index_is_refused(content: str, copy: Path) -> None:
    (copy / "model_index.json").write_text(content)

    with pytest.raises(BadModelFolder, match=r"model_index\.json: not"):
        Loader(copy, plan_for(KEY))


@pytest.mark.parametrize("folder", ["tokenizer", "tokenizer_2"])
def test_a_missing_or_empty_tokenizer_is_refused(folder: str, copy: Path) -> None:
    shutil.rmtree(copy / folder)
    loader = Loader(copy, plan_for(KEY))

    with pytest.raises(BadModelFolder, match=f"{folder}/tokenizer.json is missing"):
        loader.tokenizer(folder)
    (copy / folder).mkdir()
    with pytest.raises(BadModelFolder, match=f"{folder}/tokenizer.json is missing"):
        loader.tokenizer(folder)


def test_a_model_that_is_not_there_says_how_to_fetch_it(tmp_path: Path) -> None:
    with pytest.raises(BadModelFolder, match=r"Put the diffusers folder of black-forest-labs/FLUX.1-schnell there"):
        model_folder(MODELS["flux-schnell"], tmp_path)


def test_loading_asks_no_network_and_draws_no_bar(
    whole: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def refuse(*arguments: Any) -> None:
        raise AssertionError(f"the network was asked: {arguments}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)

    Run(spec_for(KEY), whole.parent).frames()

    assert "%|" not in capfd.readouterr().err


def test_nothing_is_left_of_a_component_that_failed_to_load(copy: Path) -> None:
    before = alive()
    file = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    os.truncate(file, file.stat().st_size - 64)

    with pytest.raises(BadModelFolder):
        load(copy)

    assert alive() == before


def test_a_tiny_model_is_built_where_it_is_missing(tmp_path: Path) -> None:
    folder = model_folder(MODELS["tiny-wan-ti2v"], tmp_path)

    assert tmp_path / "tiny-wan-ti2v" == folder
    assert (folder / "model_index.json").is_file()
