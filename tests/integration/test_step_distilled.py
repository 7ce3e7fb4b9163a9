"""LoRAs that take steps and guidance away: a pair of files for the two experts of Wan A14B, four steps, no guidance."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import save_file

from safelight.lora import Lora
from safelightd.loading import Loader
from safelightd.modelfolder import model_folder
from safelightd.precision import format_of
from tests.client.test_plan import gpu, job, plan_of
from tests.conftest import Installation
from tests.daemon.test_worker import specs_of
from tests.integration.lora_files import rescaled, step_distilled, weights_of
from tests.integration.rendering import MODELS, Run, plan_for, spec_for
from tests.integration.warm_engine import receipts

MODEL = "tiny-wan-t2v-a14b"
AUTHORS: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 1.0, "guidance_scale_2": 1.0, "flow_shift": 5.0}
EXPERTS = {"high": "transformer", "low": "transformer_2"}

Pair = dict[str, tuple[tuple[Lora, Path], dict[str, torch.Tensor]]]


def written(folder: Path, models_folder: Path) -> Pair:
    """Return the pair by expert: what the loader takes, and what it adds to which weight."""
    pair: Pair = {}
    for seed, (expert, component) in enumerate(EXPERTS.items()):
        file = folder / f"{expert}_noise_model.safetensors"
        lora, added = step_distilled(file, MODEL, models_folder, component, seed=seed)
        pair[expert] = rescaled(lora, 1.0, expert), added
    return pair


@pytest.fixture
def pair(tiny_models_folder: Path, tmp_path: Path) -> Pair:
    return written(tmp_path / "lightning", tiny_models_folder)


def fused(expert: str, pair: Pair, models_folder: Path) -> dict[str, torch.Tensor]:
    """Return what an expert's weights ought to be in a plan of bfloat16: added to in more digits, rounded once."""
    made = {}
    for name, weight in weights_of(MODEL, models_folder, EXPERTS[expert]).items():
        kept = any(part in name for part in WanTransformer3DModel._keep_in_fp32_modules)
        dtype = torch.float32 if kept else torch.bfloat16
        made[name] = (weight.to(dtype).double() + pair[expert][1].get(name, torch.zeros(()))).to(dtype)
    return made


def test_four_steps_are_four_forwards_two_of_each_expert_with_its_own_lora(
    pair: Pair, tiny_models_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "blocks.1.ffn.net.2.weight"
    forward = WanTransformer3DModel.forward
    seen: list[tuple[int, torch.Tensor]] = []

    def counted(self: Any, hidden_states: torch.Tensor, timestep: torch.Tensor, *given: Any, **named: Any) -> Any:
        seen.append((int(timestep), self.get_parameter(name).clone()))
        return forward(self, hidden_states, timestep, *given, **named)

    monkeypatch.setattr(WanTransformer3DModel, "forward", counted)
    run = Run(spec_for(MODEL, **AUTHORS), tiny_models_folder, loras=[lora for lora, _ in pair.values()])
    latents = run.latents()

    assert torch.isfinite(latents).all()
    assert [timestep for timestep, _ in seen] == [999, 937, 833, 625]
    for (_, weight), expert in zip(seen, ("high", "high", "low", "low"), strict=True):
        own = weights_of(MODEL, tiny_models_folder, EXPERTS[expert])[name]
        assert torch.allclose(weight.double(), own.double() + pair[expert][1][name], atol=1e-5)
        assert not torch.allclose(weight, own, atol=1e-2)


@pytest.mark.parametrize("expert", EXPERTS)
def test_in_8_bit_each_expert_is_what_was_added_to_and_then_rounded_never_the_other_way_round(
    expert: str, pair: Pair, tiny_models_folder: Path
) -> None:
    facts, held = MODELS[MODEL], format_of("int8-weight-only")
    assert held is not None
    plan = plan_for(MODEL, dtype="bfloat16", precision="int8-weight-only")
    loras = [lora for lora, _ in pair.values()]
    loader = Loader(model_folder(facts, tiny_models_folder), plan, blocks=facts.blocks, loras=loras)
    expected = fused(expert, pair, tiny_models_folder)
    plain = weights_of(MODEL, tiny_models_folder, EXPERTS[expert])

    with loader.component(EXPERTS[expert], "cpu") as module:
        for name, added in pair[expert][1].items():
            found = module.get_parameter(name)
            if added.ndim == 1:
                assert torch.equal(found, expected[name]), name
                continue
            for part, values in held.quantise(expected[name]).items():
                # Sums in float32 tip the last bit of few weights.
                assert (getattr(found, part) == values).float().mean() > 0.99, (name, part)
            late = _dequantised(held.quantise(plain[name].bfloat16())) + added
            assert (found.dequantize().double() - late).abs().max() > 1e-3, name


def _dequantised(parts: Any) -> torch.Tensor:
    return parts["qdata"].double() * parts["scale"].double().view(-1, 1)


def test_a_clip_in_8_bit_is_that_of_experts_that_had_it_in_their_files(
    pair: Pair, tiny_models_folder: Path, tmp_path: Path
) -> None:
    plan = {"dtype": "bfloat16", "precision": "int8-weight-only"}
    folder = model_folder(MODELS[MODEL], tiny_models_folder)
    paths = {}
    for expert, component in EXPERTS.items():
        (tmp_path / component).mkdir()
        (tmp_path / component / "config.json").write_bytes((folder / component / "config.json").read_bytes())
        file = tmp_path / component / "diffusion_pytorch_model.safetensors"
        save_file(fused(expert, pair, tiny_models_folder), file, metadata={"format": "pt"})
        paths[component] = str(tmp_path / component)

    def latents(**more: Any) -> torch.Tensor:
        return Run(spec_for(MODEL, **AUTHORS), tiny_models_folder, plan, **more).latents()

    expected, made = latents(component_paths=paths), latents(loras=[lora for lora, _ in pair.values()])

    assert (made - expected).abs().mean() < 0.02 * (latents() - expected).abs().mean()


@pytest.mark.parametrize("key", ["wan-t2v-a14b", "wan-i2v-a14b"])
def test_the_plan_counts_a_forward_a_step_and_no_prepared_weights(key: str) -> None:
    components = ("transformer", "transformer_2")
    card = gpu(24, prepared=tuple(f"{key}/fp8-weight-only/{component}" for component in components))
    loras = ("lightning/high_noise_model:1:high", "lightning/low_noise_model:1:low")
    asked: dict[str, Any] = {"model": key, "precision": "fp8-weight-only", "compile": "off"}
    asked |= {"image": "0" * 64} if "i2v" in key else {}

    guided = plan_of(job(**asked, num_inference_steps=4), card)
    distilled = plan_of(job(**asked, **AUTHORS, loras=loras), card)

    assert guided.seconds_per_step is not None
    assert distilled.seconds_per_step == pytest.approx(guided.seconds_per_step / 2, rel=1e-3)
    assert (guided.prepared, distilled.prepared) == (components, ())
    assert (guided.loras, distilled.loras) == (0, 2)


@pytest.fixture
def named(installation: Installation) -> Iterator[Pair]:
    """The pair where an installation finds it by name."""
    folder = installation.paths.models / "loras"
    yield written(folder / "lightning", installation.paths.models)
    shutil.rmtree(folder)


def test_the_receipt_names_both_files_by_digest_and_for_which_expert_each_was(
    installation: Installation, named: Pair
) -> None:
    (spec,) = specs_of(
        installation, ["a fox"], model=MODEL, **AUTHORS, num_frames=5,
        loras="lightning/high_noise_model:1:high, lightning/low_noise_model:1:low",
    )  # fmt: skip

    receipt = receipts(installation)(spec)

    of_files = {expert: lora for expert, ((lora, _), _) in named.items()}
    assert [(lora.expert, lora.sha256, lora.size_bytes) for lora in receipt.spec.loras] == [
        (expert, of_files[expert].sha256, of_files[expert].size_bytes) for expert in EXPERTS
    ]
    assert receipt.plan is not None
    assert receipt.plan.loras == 2
