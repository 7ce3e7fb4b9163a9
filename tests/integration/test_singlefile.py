"""Transformers in single files, in the layouts that other programs use: the bits of diffusers' folder, and jobs.

What is read is compared with weights turned into each layout by hand (bench/layouts.py) and with the reference
decoder of GGUF.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from bench import layouts
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

from safelightd import singlefile, skeleton
from safelightd.loading import Loader
from safelightd.modelfolder import model_folder
from safelightd.weights import BadModelFolder, Reader, Stored
from tests.integration.rendering import MODELS, PLACEMENTS, Run, plan_for, spec_for

FLUX = "tiny-flux-dev"
WAN = "tiny-wan-ti2v"
FAMILIES = [("tiny-flux-schnell", "flux"), (FLUX, "flux"), (WAN, "wan"), ("tiny-wan-i2v-a14b", "wan")]

both = pytest.mark.parametrize(("key", "family"), FAMILIES)


def component(key: str, models_folder: Path) -> Path:
    return model_folder(MODELS[key], models_folder) / "transformer"


def of_authors(key: str, family: str, models_folder: Path) -> layouts.Weights:
    return layouts.OF_AUTHORS[family](layouts.published(component(key, models_folder)))


def read(file: Path) -> layouts.Weights:
    """Return what jobs would read of a file, in float32."""
    made = {name: torch.empty(stored.shape) for name, stored in singlefile.stored_in(file).items()}
    with Reader(torch.device("cpu")) as reader:
        reader.read((stored, made[name]) for name, stored in singlefile.stored_in(file).items())
    return made


def differing(one: layouts.Weights, other: layouts.Weights) -> list[str]:
    return sorted(set(one) ^ set(other)) + [
        name for name in one if name in other and not torch.equal(one[name], other[name])
    ]


@both
def test_every_tensor_has_the_bits_of_the_diffusers_folder(
    key: str, family: str, tiny_models_folder: Path, tmp_path: Path
) -> None:
    own = layouts.published(component(key, tiny_models_folder))
    authors = layouts.OF_AUTHORS[family](own)
    bare = {f"diffusion_model.{name}": tensor for name, tensor in authors.items()}
    files = {"diffusers": own, "authors": authors, "whole checkpoint": layouts.prefixed(authors), "bare prefix": bare}

    wrong = {
        layout: differing(read(layouts.save(weights, tmp_path / f"{layout}.safetensors")), own)
        for layout, weights in files.items()
    }

    assert wrong == {layout: [] for layout in files}


@both
@pytest.mark.parametrize("end", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("by_row", [False, True])
def test_eight_bit_weights_are_multiplied_by_their_scales(
    key: str, family: str, end: str, by_row: bool, tiny_models_folder: Path, tmp_path: Path
) -> None:
    authors = of_authors(key, family, tiny_models_folder)
    scaled = layouts.scaled(authors, end, by_row=by_row)
    file = layouts.save(scaled, tmp_path / "scaled.safetensors")
    meant = layouts.save(layouts.unscaled(scaled, end), tmp_path / "meant.safetensors")

    assert differing(read(file), read(meant)) == []
    assert singlefile.precision_in(file, "") == "fp8_e4m3 scaled"


@both
def test_eight_bit_weights_without_scales_are_what_they_say(
    key: str, family: str, tiny_models_folder: Path, tmp_path: Path
) -> None:
    eight = layouts.in_fp8(of_authors(key, family, tiny_models_folder))
    meant = layouts.save({name: each.float() for name, each in eight.items()}, tmp_path / "meant.safetensors")
    file = layouts.save(eight, tmp_path / "eight.safetensors")

    assert differing(read(file), read(meant)) == []
    assert singlefile.precision_in(file, "") == "fp8_e4m3"


@both
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q5_1", "F16", "BF16"])
def test_gguf_blocks_are_decoded_as_the_reference_does(
    key: str, family: str, kind: str, tiny_models_folder: Path, tmp_path: Path
) -> None:
    authors = of_authors(key, family, tiny_models_folder)
    quantisation = gguf.GGMLQuantizationType[kind]
    meant = layouts.save_gguf(authors, tmp_path / "packed.gguf", quantisation)
    layouts.save(meant, tmp_path / "meant.safetensors")

    assert differing(read(tmp_path / "packed.gguf"), read(tmp_path / "meant.safetensors")) == []
    assert singlefile.precision_in(tmp_path / "packed.gguf", "") == {"F16": "fp16", "BF16": "bf16"}.get(kind, kind)


def test_gguf_without_its_extra_says_what_to_install(
    tiny_models_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = layouts.published(component(FLUX, tiny_models_folder))
    layouts.save_gguf(own, tmp_path / "q8.gguf", gguf.GGMLQuantizationType.Q8_0)
    monkeypatch.setitem(sys.modules, "gguf", None)

    with pytest.raises(BadModelFolder, match=r"pip install 'safelight\[gguf\]'"):
        singlefile.stored_in(tmp_path / "q8.gguf")


def test_pieces_of_a_large_packed_weight_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight is decoded piece by piece; here pieces are one row or one block."""
    monkeypatch.setattr("safelightd.weights.ENCODED_PIECE_BYTES", 1)
    weights = {
        "double_blocks.0.img_attn.qkv.weight": torch.randn(96, 64), "single_blocks.0.linear1.weight": torch.randn(9, 32)
    }  # fmt: skip
    scaled = layouts.scaled(weights, "scale_weight", by_row=True)
    meant = layouts.unscaled(scaled, "scale_weight")
    file = layouts.save(scaled, tmp_path / "f.safetensors")
    found = {entry.name: entry for entry in singlefile.tensorfile.entries(file)}

    made = {}
    for name in weights:
        scale = found[f"{name.removesuffix('.weight')}.scale_weight"]
        encoding = singlefile._encoding(found[name], scale)
        assert encoding is not None
        made[name] = torch.empty(found[name].shape)
        with Reader(torch.device("cpu")) as reader:
            reader.read([(singlefile._encoded(found[name], encoding), made[name])])

    assert differing(made, meant) == []


def with_file(key: str, models_folder: Path, file: Path, **changes: Any) -> np.ndarray[Any, Any]:
    more = {"num_frames": 5} if MODELS[key].kind == "video" else {}
    spec = spec_for(key, **more, num_inference_steps=2)
    paths = {"transformer": str(file)} if file.exists() else {}
    return np.stack(Run(spec, models_folder, changes, component_paths=paths).frames())


@pytest.mark.parametrize("changes", PLACEMENTS.values(), ids=PLACEMENTS)
@pytest.mark.parametrize(("key", "family"), [(FLUX, "flux"), (WAN, "wan")])
def test_a_job_of_a_single_file_makes_the_picture_of_the_folder(
    key: str, family: str, changes: dict[str, Any], tiny_models_folder: Path, tmp_path: Path
) -> None:
    own = layouts.published(component(key, tiny_models_folder))
    file = layouts.save(layouts.OF_AUTHORS[family](own), tmp_path / "one.safetensors")

    expected = with_file(key, tiny_models_folder, tmp_path / "none", **changes)
    actual = with_file(key, tiny_models_folder, file, **changes)

    assert np.array_equal(expected, actual)


def test_both_experts_may_be_single_files(tiny_models_folder: Path, tmp_path: Path) -> None:
    key = "tiny-wan-t2v-a14b"
    folder = model_folder(MODELS[key], tiny_models_folder)
    paths = {}
    for name in ("transformer", "transformer_2"):
        weights = layouts.wan_of_authors(layouts.published(folder / name))
        paths[name] = str(layouts.save(layouts.prefixed(weights), tmp_path / f"{name}.safetensors"))
    spec = spec_for(key, num_frames=5, num_inference_steps=4)

    expected = np.stack(Run(spec, tiny_models_folder).frames())
    actual = np.stack(Run(spec, tiny_models_folder, component_paths=paths).frames())

    assert np.array_equal(expected, actual)


def test_a_job_of_a_gguf_file_makes_a_picture_near_that_of_the_folder(tiny_models_folder: Path, tmp_path: Path) -> None:
    own = layouts.published(component(FLUX, tiny_models_folder))
    layouts.save_gguf(layouts.flux_of_authors(own), tmp_path / "q8.gguf", gguf.GGMLQuantizationType.Q8_0)

    expected = with_file(FLUX, tiny_models_folder, tmp_path / "none").astype(int)
    actual = with_file(FLUX, tiny_models_folder, tmp_path / "q8.gguf").astype(int)

    assert 0 < np.abs(expected - actual).mean() < 4


def test_a_loader_says_as_what_weights_are_stored(tiny_models_folder: Path, tmp_path: Path) -> None:
    whole = model_folder(MODELS[FLUX], tiny_models_folder)
    packed = tmp_path / "q4.gguf"
    layouts.save_gguf(layouts.published(whole / "transformer"), packed, gguf.GGMLQuantizationType.Q4_0)

    def said(**paths: str) -> dict[str, str]:
        return Loader(whole, plan_for(FLUX), paths, blocks=MODELS[FLUX].blocks).stored_precisions()

    assert said() == {"transformer": "fp32", "text_encoder_2": "fp32"}
    assert said(transformer=str(packed)) == {"transformer": "Q4_0", "text_encoder_2": "fp32"}


def test_a_file_of_another_model_is_refused_by_the_names_of_its_tensors(
    tiny_models_folder: Path, tmp_path: Path
) -> None:
    own = layouts.published(component(FLUX, tiny_models_folder))
    authors = layouts.flux_of_authors(own)
    fewer = {name: each for name, each in authors.items() if not name.startswith("double_blocks.1.")}
    more = {**authors, "controlnet_blocks.0.weight": torch.ones(2)}
    cut = {name: each for name, each in authors.items() if name != "double_blocks.0.img_mlp.2.bias"}
    schnell = {name: each for name, each in authors.items() if not name.startswith("guidance_in")}

    assert "lacks" in refusal(FLUX, layouts.save(fewer, tmp_path / "fewer.safetensors"), tiny_models_folder)
    assert "controlnet_blocks.0" in refusal(FLUX, layouts.save(more, tmp_path / "m.safetensors"), tiny_models_folder)
    assert "double_blocks.0.img_mlp.2.bias" in refusal(
        FLUX, layouts.save(cut, tmp_path / "cut.safetensors"), tiny_models_folder
    )
    assert "guidance_embedder" in refusal(FLUX, layouts.save(schnell, tmp_path / "s.safetensors"), tiny_models_folder)
    assert "holds no transformer" in refusal(
        FLUX, layouts.save({"a": torch.ones(2)}, tmp_path / "a.safetensors"), tiny_models_folder
    )
    wan = layouts.published(component(WAN, tiny_models_folder))
    assert "lacks" in refusal(FLUX, layouts.save(wan, tmp_path / "wan.safetensors"), tiny_models_folder)


def refusal(key: str, file: Path, models_folder: Path) -> str:
    with pytest.raises(BadModelFolder) as raised:
        with_file(key, models_folder, file)
    assert str(file) in str(raised.value)
    return str(raised.value)


def test_a_file_that_goes_away_is_refused_with_what_to_do(tiny_models_folder: Path, tmp_path: Path) -> None:
    whole = model_folder(MODELS[FLUX], tiny_models_folder)
    loader = Loader(whole, plan_for(FLUX), {"transformer": str(tmp_path / "gone.gguf")}, blocks=MODELS[FLUX].blocks)

    gone = pytest.raises(BadModelFolder, match=rf"gone\.gguf is gone: .*safelight models rm {FLUX}")
    with gone, loader.component("transformer", "cpu"):
        pass


def test_full_size_names_and_shapes_are_those_of_the_modules(tmp_path: Path) -> None:
    """The real FLUX.1-dev and Wan 5B, as files that are all hole: headers and shapes are true, weights are zeros."""
    for family, kind, config in (
        ("flux", FluxTransformer2DModel, {"guidance_embeds": True}),
        ("wan", WanTransformer3DModel, {"num_attention_heads": 24, "in_channels": 48, "out_channels": 48,
                                        "ffn_dim": 14336, "num_layers": 30}),
    ):  # fmt: skip
        folder = tmp_path / family
        folder.mkdir()
        with torch.device("meta"):
            kind(**config).save_config(folder)
        module = skeleton.build(kind, folder, "diffusers")
        authors = layouts.OF_AUTHORS[family](dict(module.state_dict()))
        file = layouts.sparse(authors, folder / "whole.safetensors")

        stored = singlefile.weights_of(module, file, "")

        shapes = {name: tuple(each.shape) for name, each in module.state_dict().items()}
        assert {name: each.shape for name, each in stored.items()} == shapes
        assert sum(map(nbytes, stored.values())) == sum(2 * each.numel() for each in module.state_dict().values())
        shutil.rmtree(folder)


def nbytes(stored: Stored) -> int:
    return stored.nbytes + sum(map(nbytes, stored.then))
