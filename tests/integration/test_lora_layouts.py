"""LoRAs on transformers in single files: what they add there is what they add to diffusers' folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from bench import layouts
from safetensors.torch import load_file

from safelight.errors import InvalidJob
from safelightd.loading import Loader
from safelightd.modelfolder import model_folder
from tests.integration.lora_files import random_lora
from tests.integration.rendering import MODELS, PLACEMENTS, Run, plan_for, spec_for

FLUX = "tiny-flux-dev"
WAN = "tiny-wan-ti2v"
FAMILIES = {FLUX: "flux", WAN: "wan"}


def of_authors(model: str, models_folder: Path) -> layouts.Weights:
    return layouts.OF_AUTHORS[FAMILIES[model]](
        layouts.published(model_folder(MODELS[model], models_folder) / "transformer")
    )


def loaded(model: str, models_folder: Path, file: Path, *loras: Any) -> dict[str, torch.Tensor]:
    facts = MODELS[model]
    paths = {"transformer": str(file)}
    loader = Loader(model_folder(facts, models_folder), plan_for(model), paths, blocks=facts.blocks, loras=loras)
    with loader.component("transformer", "cpu") as module:
        return {name: tensor.clone() for name, tensor in module.named_parameters()}


@pytest.mark.parametrize("changes", PLACEMENTS.values(), ids=PLACEMENTS)
@pytest.mark.parametrize("model", FAMILIES)
def test_a_lora_on_a_single_file_makes_what_it_makes_on_the_folder(
    model: str, changes: dict[str, Any], tiny_models_folder: Path, tmp_path: Path
) -> None:
    lora = random_lora(tmp_path / "style.safetensors", model, tiny_models_folder)
    file = layouts.save(layouts.prefixed(of_authors(model, tiny_models_folder)), tmp_path / "one.safetensors")
    spec, paths = spec_for(model, num_inference_steps=2), {"transformer": str(file)}

    def latents(**given: Any) -> torch.Tensor:
        return Run(spec, tiny_models_folder, changes, **given).latents()

    expected = latents(loras=[lora])
    assert torch.equal(expected, latents(loras=[lora], component_paths=paths))
    assert not torch.equal(expected, latents(component_paths=paths))


@pytest.mark.parametrize("kind", ["8-bit with scales", "Q8_0"])
@pytest.mark.parametrize("model", FAMILIES)
def test_a_lora_is_added_to_what_a_packed_file_stands_for(
    model: str, kind: str, tiny_models_folder: Path, tmp_path: Path
) -> None:
    authors = of_authors(model, tiny_models_folder)
    file = tmp_path / "packed.gguf"
    if kind == "Q8_0":
        layouts.save_gguf(authors, file, gguf.GGMLQuantizationType.Q8_0)
    else:
        file = layouts.save(layouts.scaled(authors, "scale_weight", by_row=True), tmp_path / "packed.safetensors")
    lora = random_lora(tmp_path / "style.safetensors", model, tiny_models_folder, scale=0.7)
    stored = load_file(lora[1])

    plain, changed = (loaded(model, tiny_models_folder, file, *loras) for loras in ((), (lora,)))

    ups = {name: up for name, up in stored.items() if ".lora_B." in name}
    assert len(ups) > 5
    for name, up in ups.items():
        weight = name.removeprefix("transformer.").replace(".lora_B.", ".")
        down = stored[name.replace(".lora_B.", ".lora_A.")]
        added = (0.7 * up.double().flatten(1) @ down.double().flatten(1)).view(plain[weight].shape)
        assert torch.allclose(changed[weight].double(), plain[weight].double() + added, atol=1e-5), weight


def test_a_lora_of_another_model_is_refused_on_a_single_file(tiny_models_folder: Path, tmp_path: Path) -> None:
    file = layouts.save(of_authors(FLUX, tiny_models_folder), tmp_path / "one.safetensors")
    lora = random_lora(tmp_path / "waves.safetensors", WAN, tiny_models_folder)

    with pytest.raises(InvalidJob, match="waves"):
        loaded(FLUX, tiny_models_folder, file, lora)
