"""LoRAs: what they add, in every precision and placement, and which files are refused."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from safelight.errors import InvalidJob
from safelight.lora import Lora
from safelightd import compiling
from safelightd import lora as lora_files
from safelightd.fusing import AT_ONCE, Change, fuse
from safelightd.loading import Loader
from safelightd.modelfolder import model_folder
from safelightd.pinnedset import PinnedSet
from safelightd.precision import format_of
from safelightd.weights import BadModelFolder
from tests.integration.lora_files import factors, peft, random_lora, rescaled, weights_of, write
from tests.integration.rendering import MODELS, Run, plan_for, spec_for
from tests.integration.test_streaming import HELD

FLUX = "tiny-flux-dev"
WAN = "tiny-wan-ti2v"
EXPERTS = "tiny-wan-t2v-a14b"
CPU = torch.device("cpu")
BF16 = {"dtype": "bfloat16", "precision": "bf16"}


@pytest.fixture
def lora(tiny_models_folder: Path, tmp_path: Path) -> tuple[Lora, Path]:
    return random_lora(tmp_path / "style.safetensors", FLUX, tiny_models_folder)


@pytest.fixture
def other(tiny_models_folder: Path, tmp_path: Path) -> tuple[Lora, Path]:
    return random_lora(tmp_path / "grain.safetensors", FLUX, tiny_models_folder, seed=2)


def latents(folder: Path, *loras: tuple[Lora, Path], model: str = FLUX, **plan: Any) -> torch.Tensor:
    return Run(spec_for(model), folder, plan_changes=plan, loras=loras).latents()


def loaded(
    folder: Path, *loras: tuple[Lora, Path], component: str = "transformer", model: str = FLUX, **plan: Any
) -> dict[str, torch.Tensor]:
    facts = MODELS[model]
    loader = Loader(model_folder(facts, folder), plan_for(model, **plan), blocks=facts.blocks, loras=loras)
    with loader.component(component, "cpu") as module:
        return {name: tensor.clone() for name, tensor in module.named_parameters()}


def changed_weights(
    folder: Path, *loras: tuple[Lora, Path], model: str = FLUX, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """What the weights ought to be, in float64; before anything is added they have `dtype`."""
    weights = {name: weight.to(dtype).double() for name, weight in weights_of(model, folder).items()}
    for lora, file in loras:
        stored = {name: tensor.double() for name, tensor in _stored(file).items()}
        for name, up in stored.items():
            if ".lora_B." in name:
                down = stored[name.replace(".lora_B.", ".lora_A.")]
                weight = name.removeprefix("transformer.").replace(".lora_B.", ".")
                added = lora.scale * up.flatten(1) @ down.flatten(1)
                weights[weight] = weights[weight] + added.view(weights[weight].shape)
    return weights


def _stored(file: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(file)


def test_a_lora_changes_the_picture_and_one_of_scale_0_changes_no_bit(
    lora: tuple[Lora, Path], tiny_models_folder: Path
) -> None:
    plain = latents(tiny_models_folder)

    assert torch.equal(plain, latents(tiny_models_folder, rescaled(lora, 0.0)))
    assert (plain - latents(tiny_models_folder, lora)).abs().mean() > 0.05


@pytest.mark.parametrize("model", [FLUX, WAN])
def test_the_weights_are_the_models_own_and_what_each_lora_adds(
    model: str, tiny_models_folder: Path, tmp_path: Path
) -> None:
    """Linear and convolution, repeated and not, two at once, one of them backwards."""
    loras = [
        random_lora(tmp_path / f"{seed}.safetensors", model, tiny_models_folder, seed=seed, scale=scale)
        for seed, scale in ((1, 0.8), (2, -1.5))
    ]
    expected = changed_weights(tiny_models_folder, *loras, model=model)

    found = loaded(tiny_models_folder, *loras, model=model)

    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.allclose(found[name].double(), weight, atol=1e-5), name
    assert (
        sum(
            not torch.equal(found[name], weight.float())
            for name, weight in weights_of(model, tiny_models_folder).items()
        )
        > 8
    )


def test_in_half_precision_the_sum_is_rounded_once(
    lora: tuple[Lora, Path], other: tuple[Lora, Path], tiny_models_folder: Path
) -> None:
    exact = changed_weights(tiny_models_folder, lora, other, dtype=torch.bfloat16)

    found = loaded(tiny_models_folder, lora, other, **BF16)

    name = "transformer_blocks.0.attn.to_q.weight"
    assert (found[name] == exact[name].to(torch.bfloat16)).float().mean() > 0.99  # float32 sums tip the last bit of few


def test_a_weight_that_is_changed_in_pieces_is_changed_as_a_whole() -> None:
    source = torch.Generator().manual_seed(1)
    wide = 1024
    weight, up, down = (
        torch.randn(shape, generator=source)
        for shape in ((2 * AT_ONCE // wide + 3, wide), (2 * AT_ONCE // wide + 3, 2), (2, wide))
    )
    expected = weight.double() + 0.5 * up.double() @ down.double()

    fuse(weight, [Change(0.5, up, down)], CPU)

    assert torch.allclose(weight.double(), expected, atol=1e-5)


@pytest.mark.parametrize("precision", HELD[1:])
def test_in_fewer_bits_a_lora_is_added_before_the_weights_are_rounded(
    precision: Any, lora: tuple[Lora, Path], tiny_models_folder: Path
) -> None:
    exact = loaded(tiny_models_folder, lora, **BF16)
    held = format_of(precision)
    assert held is not None
    name = "transformer_blocks.1.attn.to_out.0"
    expected = held.quantise(exact[f"{name}.weight"])
    facts, plan = MODELS[FLUX], plan_for(FLUX, dtype="bfloat16", precision=precision)
    loader = Loader(model_folder(facts, tiny_models_folder), plan, blocks=facts.blocks, loras=[lora])

    with loader.component("transformer", "cpu") as module:
        source = torch.Generator().manual_seed(3)
        seen = torch.randn(5, 64, generator=source).to(torch.bfloat16)
        found = module.get_submodule(name)(seen)
        linear = torch.nn.Linear(64, 64, device="meta")
        linear.bias = torch.nn.Parameter(exact[f"{name}.bias"], requires_grad=False)
        assert torch.equal(found, held.attach(linear, expected, torch.bfloat16).eval()(seen))


@pytest.mark.parametrize("precision", HELD)
def test_every_precision_takes_a_lora_and_streams_it_with_the_bits_of_resident_blocks(
    precision: str, lora: tuple[Lora, Path], tiny_models_folder: Path
) -> None:
    plan: dict[str, Any] = {"dtype": "bfloat16", "precision": precision}
    plain = latents(tiny_models_folder, **plan)
    resident = latents(tiny_models_folder, lora, **plan)

    assert (plain.float() - resident.float()).abs().mean() > 0.05
    if precision not in ("int8-bnb", "fp8-quanto"):
        streamed = {"transformer": (0, 1, 3)}
        assert torch.equal(resident, latents(tiny_models_folder, lora, **plan, offload="partial", streamed=streamed))


def test_blocks_that_are_read_at_every_step_are_changed_at_every_step(
    lora: tuple[Lora, Path], tiny_models_folder: Path
) -> None:
    resident = latents(tiny_models_folder, lora)
    streamed = {"transformer": (0, 1, 2, 3)}

    assert torch.equal(
        resident, latents(tiny_models_folder, lora, offload="partial", streamed=streamed, streamed_from="file")
    )


def test_a_model_that_its_library_loads_is_changed_too(lora: tuple[Lora, Path], tiny_models_folder: Path) -> None:
    resident = latents(tiny_models_folder, lora)

    assert torch.equal(resident, latents(tiny_models_folder, lora, offload="leaf"))


def test_a_warm_engine_changes_loras_without_compiling_again(
    lora: tuple[Lora, Path], other: tuple[Lora, Path], tiny_models_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def count(graph: torch.fx.GraphModule, _inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        seen.append(1)
        return graph

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=count))
    for loras in ((), (lora,), (other,), (lora, other), (rescaled(lora, 0.3),), ()):
        assert torch.equal(latents(tiny_models_folder, *loras, compiled=True), latents(tiny_models_folder, *loras))
    torch._dynamo.reset()

    assert len(seen) == 2  # double and single blocks
    assert compiling.RECOMPILES_MAX > 2


def test_pinned_blocks_are_filled_anew_for_another_lora_in_the_same_memory(
    lora: tuple[Lora, Path], other: tuple[Lora, Path], tiny_models_folder: Path
) -> None:
    pinned = PinnedSet(limit_bytes=1 << 40)
    plan: dict[str, Any] = {"offload": "partial", "streamed": {"transformer": (0, 1, 2, 3)}}
    addresses, held = set(), []
    for loras in ((lora,), (other,), (rescaled(lora, 0.5),), (), (lora,)):
        run = Run(spec_for(FLUX), tiny_models_folder, plan_changes=plan, loras=loras, pinned=pinned)

        assert torch.equal(run.latents(), latents(tiny_models_folder, *loras))
        assert pinned._memory is not None
        assert pinned.held is not None
        addresses.add(pinned._memory.bytes.data_ptr())
        held.append(pinned.held.loras)

    assert len(addresses) == 1
    assert held[0] == held[4] == ((lora[0].sha256, 1.0, "both"),)


@pytest.mark.parametrize(("expert", "changed"), [("both", (1, 1)), ("high", (1, 0)), ("low", (0, 1))])
def test_a_lora_changes_the_expert_that_it_is_for(
    expert: str, changed: tuple[int, int], tiny_models_folder: Path, tmp_path: Path
) -> None:
    lora = rescaled(random_lora(tmp_path / "w.safetensors", EXPERTS, tiny_models_folder), 1.0, expert)
    name = "blocks.0.attn1.to_q.weight"

    found = [
        int(not torch.equal(
            loaded(tiny_models_folder, lora, component=component, model=EXPERTS)[name],
            weights_of(EXPERTS, tiny_models_folder, component)[name],
        ))
        for component in ("transformer", "transformer_2")
    ]  # fmt: skip

    assert tuple(found) == changed


# -- layouts -------------------------------------------------------------------------------------------------------


def flux_factors(folder: Path, *modules: str) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    weights = weights_of(FLUX, folder)
    return factors({module: weights[f"{module}.weight"].shape for module in modules}, seed=5)


def as_kohya(
    made: dict[str, tuple[torch.Tensor, torch.Tensor]], names: dict[str, str], alpha: float
) -> dict[str, torch.Tensor]:
    return {
        key: tensor
        for module, name in names.items()
        for key, tensor in (
            (f"{name}.lora_up.weight", made[module][0]),
            (f"{name}.lora_down.weight", made[module][1]),
            (f"{name}.alpha", torch.tensor(alpha)),
        )
    }


KOHYA = {
    "transformer_blocks.0.attn.to_out.0": "lora_unet_double_blocks_0_img_attn_proj",
    "transformer_blocks.1.ff.net.0.proj": "lora_unet_double_blocks_1_img_mlp_0",
    "single_transformer_blocks.1.proj_out": "lora_unet_single_blocks_1_linear2",
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kohyas_layout_and_its_alpha_are_read(dtype: torch.dtype, tiny_models_folder: Path, tmp_path: Path) -> None:
    made = {
        name: (up.to(dtype), down.to(dtype)) for name, (up, down) in flux_factors(tiny_models_folder, *KOHYA).items()
    }
    ours = write(tmp_path / "ours.safetensors", peft(made), scale=3 / 4)
    kohya = write(tmp_path / "kohya.safetensors", as_kohya(made, KOHYA, alpha=3.0))

    expected, found = (loaded(tiny_models_folder, lora) for lora in (ours, kohya))

    for name in expected:
        assert torch.allclose(expected[name], found[name], atol=1e-6), name


@pytest.mark.parametrize("letters", [("lora_B", "lora_A"), ("lora_up", "lora_down")])
def test_comfyuis_names_are_read(letters: tuple[str, str], tiny_models_folder: Path, tmp_path: Path) -> None:
    names = {
        "transformer_blocks.0.attn.to_out.0": "double_blocks.0.img_attn.proj",
        "single_transformer_blocks.1.proj_out": "single_blocks.1.linear2",
    }
    made = flux_factors(tiny_models_folder, *names)
    tensors = {
        f"diffusion_model.{names[module]}.{letter}.weight": factor
        for module, pair in made.items()
        for letter, factor in zip(letters, pair, strict=True)
    }
    lora = write(tmp_path / "comfy.safetensors", tensors, scale=0.5)
    weights = weights_of(FLUX, tiny_models_folder)

    found = loaded(tiny_models_folder, lora)

    for module, (up, down) in made.items():
        assert torch.allclose(found[f"{module}.weight"], weights[f"{module}.weight"] + 0.5 * up @ down, atol=1e-5)


def test_kohyas_joined_projections_are_parted_as_the_full_size_model_has_them() -> None:
    """The converter knows FLUX's true widths: queries, keys, values and the MLP of a single block in one."""
    widths = (3072, 3072, 3072, 12288)
    up = torch.arange(sum(widths), dtype=torch.float32).view(-1, 1)
    name = "lora_unet_single_blocks_0_linear1"
    tensors = {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": torch.ones(1, 3072)}
    converted = lora_files._converted(Lora(name="x"), tensors, "FluxTransformer2DModel")

    parts = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
    found = [converted[f"transformer.single_transformer_blocks.0.{part}.lora_B.weight"] for part in parts]
    assert tuple(part.shape[0] for part in found) == widths
    assert torch.equal(torch.cat(found), up)


def test_the_scale_that_diffusers_writes_into_the_file_is_heeded(tiny_models_folder: Path, tmp_path: Path) -> None:
    modules = ("transformer_blocks.0.attn.to_q", "transformer_blocks.1.attn.to_q")
    made = flux_factors(tiny_models_folder, *modules)
    told = {
        "transformer.r": 4,
        "transformer.lora_alpha": 8,
        "transformer.alpha_pattern": {"transformer_blocks.1.attn.to_q": 2},
    }
    lora = write(tmp_path / "l.safetensors", peft(made), metadata={"lora_adapter_metadata": json.dumps(told)})
    weights = weights_of(FLUX, tiny_models_folder)

    found = loaded(tiny_models_folder, lora)

    for module, scale in zip(modules, (2.0, 0.5), strict=True):
        up, down = made[module]
        assert torch.allclose(found[f"{module}.weight"], weights[f"{module}.weight"] + scale * up @ down, atol=1e-5)


CLIP = ("encoder.layers.0.self_attn.q_proj", "encoder.layers.1.mlp.fc1")


@pytest.mark.parametrize("layout", ["peft", "kohya"])
def test_what_a_lora_changes_of_clip_is_changed_and_noticed(
    layout: str, tiny_models_folder: Path, tmp_path: Path
) -> None:
    weights = weights_of(FLUX, tiny_models_folder, "text_encoder")
    made = factors({name: weights[f"{name}.weight"].shape for name in CLIP}, seed=6)
    if layout == "peft":
        tensors = peft(made, "text_encoder.text_model")
    else:
        names = {name: f"lora_te1_text_model_{name.replace('.', '_')}" for name in CLIP}
        unet = flux_factors(tiny_models_folder, *KOHYA)
        tensors = as_kohya(made, names, alpha=4.0) | as_kohya(unet, KOHYA, alpha=4.0)
    lora = write(tmp_path / "l.safetensors", tensors, scale=0.5)

    found = loaded(tiny_models_folder, lora, component="text_encoder")
    embedded = Run(spec_for(FLUX), tiny_models_folder, loras=[lora])
    plain = Run(spec_for(FLUX), tiny_models_folder)

    for name in CLIP:
        up, down = made[name]
        assert torch.allclose(found[f"{name}.weight"], weights[f"{name}.weight"] + 0.5 * up @ down, atol=1e-5)
    assert embedded.loader.changes_text_encoders
    assert not plain.loader.changes_text_encoders
    assert not torch.equal(embedded.encode().pooled_prompt_embeds, plain.encode().pooled_prompt_embeds)


WAN_NAMES = {
    "blocks.0.attn1.to_q": "blocks.0.self_attn.q",
    "blocks.1.attn2.to_out.0": "blocks.1.cross_attn.o",
    "blocks.0.ffn.net.2": "blocks.0.ffn.2",
}


def test_wans_own_layout_is_read_with_its_differences_of_norms_and_biases(
    tiny_models_folder: Path, tmp_path: Path
) -> None:
    weights = weights_of(WAN, tiny_models_folder)
    made = factors({name: weights[f"{name}.weight"].shape for name in WAN_NAMES}, seed=7)
    differences = {
        "blocks.0.attn2.norm_k.weight": "blocks.0.cross_attn.norm_k.diff",
        "blocks.1.norm2.bias": "blocks.1.norm3.diff_b",
        "blocks.0.attn1.to_q.bias": "blocks.0.self_attn.q.diff_b",
        "proj_out.weight": "head.head.diff",
    }
    tensors = {f"diffusion_model.{key}": torch.full_like(weights[name], 0.5) for name, key in differences.items()}
    tensors |= {"diffusion_model.blocks.1.self_attn.norm_q.diff": torch.zeros(64)}
    tensors |= {f"diffusion_model.{key}": tensor for key, tensor in as_kohya(made, WAN_NAMES, alpha=2.0).items()}
    lora = write(tmp_path / "l.safetensors", tensors, scale=0.8)

    found = loaded(tiny_models_folder, lora, model=WAN)

    for name in WAN_NAMES:
        up, down = made[name]
        assert torch.allclose(found[f"{name}.weight"], weights[f"{name}.weight"] + 0.4 * up @ down, atol=1e-5)
    for name in differences:
        assert torch.allclose(found[name], weights[name] + 0.4, atol=1e-5), name


# -- what is refused -----------------------------------------------------------------------------------------------


def refused(folder: Path, lora: tuple[Lora, Path], model: str = FLUX) -> str:
    facts = MODELS[model]
    with pytest.raises(InvalidJob) as caught:
        Loader(model_folder(facts, folder), plan_for(model), blocks=facts.blocks, loras=[lora])
    return str(caught.value)


def test_keys_that_the_model_has_no_place_for_are_counted_and_the_first_named(
    tiny_models_folder: Path, tmp_path: Path
) -> None:
    made = factors({f"transformer_blocks.{i}.attn.to_q": (64, 64) for i in range(12)}, seed=8)
    message = refused(tiny_models_folder, write(tmp_path / "deep.safetensors", peft(made)))

    assert "LoRA deep: 10 keys do not match the model: transformer.transformer_blocks.2.attn.to_q.weight" in message
    assert "and 5 more" in message
    assert "transformer_blocks.1." not in message


def test_a_lora_of_a_wider_model_says_both_widths(tiny_models_folder: Path, tmp_path: Path) -> None:
    made = factors({"transformer_blocks.0.attn.to_q": (128, 64)}, seed=8)

    message = refused(tiny_models_folder, write(tmp_path / "wide.safetensors", peft(made)))

    assert "transformer_blocks.0.attn.to_q.weight (128x64, the model's is 64x64)" in message


def test_a_lora_of_the_other_family_is_refused(
    lora: tuple[Lora, Path], tiny_models_folder: Path, tmp_path: Path
) -> None:
    wan = random_lora(tmp_path / "w.safetensors", WAN, tiny_models_folder)

    assert "keys do not match the model: transformer.blocks.0.attn1.to" in refused(tiny_models_folder, wan)
    assert "keys do not match the model: transformer.context_embedder" in refused(tiny_models_folder, lora, WAN)


def test_where_the_published_weights_are_gone_a_lora_says_that_it_needs_them(
    lora: tuple[Lora, Path], tiny_models_folder: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(model_folder(MODELS[FLUX], tiny_models_folder), tmp_path / "model"))
    (folder / "transformer/diffusion_pytorch_model.safetensors").unlink()

    with pytest.raises(BadModelFolder, match=r"is missing\. .* A LoRA is added to the published weights"):
        Loader(folder, plan_for(FLUX), blocks=MODELS[FLUX].blocks, loras=[lora])


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        ({"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": torch.ones(4, 64)}, "without its other half"),
        ({"transformer.transformer_blocks.0.attn.to_q.dora_scale": torch.ones(64)}, "cannot be applied"),
        ({"lora_unet_double_blocks_0_img_attn_proj.hada_w1_a": torch.ones(4, 4)}, "cannot be applied"),
        ({"lora_unet_nothing_known.lora_down.weight": torch.ones(4, 64),
          "lora_unet_nothing_known.lora_up.weight": torch.ones(64, 4)}, "layout is unknown"),
        ({"lora_te2_encoder_block_0.lora_down.weight": torch.ones(4, 64),
          "lora_te2_encoder_block_0.lora_up.weight": torch.ones(64, 4)}, "1 key does not match the model: lora_te2_"),
        ({"weight": torch.ones(4, 4)}, "does not match"),
    ],
)  # fmt: skip
def test_nothing_in_a_file_is_left_out_silently(
    tensors: dict[str, torch.Tensor], told: str, tiny_models_folder: Path, tmp_path: Path
) -> None:
    assert told in refused(tiny_models_folder, write(tmp_path / "odd.safetensors", tensors))
