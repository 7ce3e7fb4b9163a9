"""The demo model draws what it is told, through the code that runs FLUX: what random weights cannot show."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bench.drawings import analyser
from bench.drawings.training import verdict
from bench.drawings.world import COLOURS, SHAPES, Scene, World, texts
from PIL import Image

from safelight import digests, jobspec
from safelightd import demo_models
from safelightd.loading import Loader
from safelightd.modelfolder import model_folder
from tests.conftest import Installation
from tests.daemon.test_worker import specs_of
from tests.integration.rendering import MODELS, Run, parameters_of, plan_for, spec_for
from tests.integration.warm_engine import engine

BYTES_MAX = 12_000_000
RED_CIRCLE = "a red circle on a white background"


@pytest.fixture(params=demo_models.KEYS)
def key(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def drawn(
    tiny_models_folder: Path, prompt: str, plan: dict[str, Any] | None = None, *, picture: Any = None, **fields: Any
) -> Any:
    run = Run(spec_for("demo-flux", prompt=prompt, **fields), tiny_models_folder, plan or {}, image=picture)
    return np.asarray(run.frames()[0])


def asked(count: int) -> list[tuple[Scene, str]]:
    world = World("cpu", 31)
    scenes = world.scenes(count, "held out")
    return list(zip(scenes.each(), texts(world.captions(scenes, plain=True)), strict=True))


def right(tiny_models_folder: Path, count: int, plan: dict[str, Any] | None = None) -> int:
    answers = [
        verdict(scene, drawn(tiny_models_folder, prompt, plan, seed=i))
        for i, (scene, prompt) in enumerate(asked(count))
    ]
    return sum(answer["all"] for answer in answers)


def things(picture: Any) -> set[tuple[str, str]]:
    found = analyser.read(picture).things
    return {(list(COLOURS)[thing.colour], SHAPES[thing.shape] if thing.shape >= 0 else "blot") for thing in found}


def test_a_demo_model_is_a_diffusers_folder_of_its_table_row(key: str, tiny_models_folder: Path) -> None:
    facts = MODELS[key]
    folder = model_folder(facts, tiny_models_folder)

    assert facts.components == parameters_of(key, folder)
    assert facts.pipeline == json.loads((folder / "model_index.json").read_text())["_class_name"]
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) <= BYTES_MAX
    assert (folder / "MODEL_CARD.md").is_file()
    assert not [file for file in folder.rglob("*") if file.suffix in (".bin", ".pt", ".pkl", ".ckpt")]


def test_every_shipped_file_has_its_digest(key: str) -> None:
    shipped = Path(demo_models.__file__).parent / key
    listed = {line.partition("  ")[2] for line in (shipped / digests.NAME).read_text().splitlines()}

    there = {str(file.relative_to(shipped)) for file in shipped.rglob("*") if file.is_file()}

    assert listed == there - {digests.NAME, "MODEL_CARD.md"}


def test_every_word_of_the_vocabulary_is_one_token_of_each_tokenizer(tiny_models_folder: Path) -> None:
    facts = MODELS["demo-flux"]
    loader = Loader(model_folder(facts, tiny_models_folder), plan_for("demo-flux"))
    clip, t5 = loader.tokenizer("tokenizer"), loader.tokenizer("tokenizer_2")

    for word in facts.vocabulary.split():
        assert len(clip(word).input_ids) == 3, word
        assert len(t5(word).input_ids) == 2, word
        assert t5.unk_token_id not in t5(word).input_ids, word


@pytest.mark.parametrize("damage", ["other bytes", "missing"])
def test_a_damaged_demo_model_is_refused_by_name_and_comes_back(damage: str, tmp_path: Path) -> None:
    folder = model_folder(MODELS["demo-flux"], tmp_path)
    weights = folder / "vae/diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.unlink()
    if damage == "other bytes":
        weights.write_bytes(content)

    with pytest.raises(
        demo_models.DamagedDemoModel, match=r"vae/diffusion_pytorch_model\.safetensors is not as shipped"
    ):
        model_folder(MODELS["demo-flux"], tmp_path)
    for file in sorted(folder.rglob("*"), reverse=True):
        file.rmdir() if file.is_dir() else file.unlink()
    folder.rmdir()

    assert (model_folder(MODELS["demo-flux"], tmp_path) / "model_index.json").is_file()


def test_a_stranger_s_prompt_is_drawn_right(tiny_models_folder: Path) -> None:
    picture = drawn(tiny_models_folder, "a red circle left of a blue square, white background.")

    found = analyser.read(picture)
    by_colour = {list(COLOURS)[thing.colour]: thing for thing in found.things}
    assert list(COLOURS)[found.background] == "white"
    assert things(picture) == {("red", "circle"), ("blue", "square")}
    assert by_colour["red"].x < by_colour["blue"].x - 30


def test_held_out_prompts_are_drawn_right(tiny_models_folder: Path) -> None:
    """99.8 of 100 on the day it was trained: that two of twenty go wrong by chance has odds of one in a thousand."""
    assert right(tiny_models_folder, 20) >= 19


@pytest.mark.parametrize(
    "plan",
    [
        {"dtype": "bfloat16", "precision": "bf16"},
        {"dtype": "bfloat16", "precision": "nf4"},
        {"dtype": "bfloat16", "precision": "int8-weight-only"},
        {"dtype": "bfloat16", "precision": "bf16", "text_encoder_precision": "nf4"},
        {"offload": "partial", "streamed": {"transformer": (0, 2, 4, 6)}, "streamed_from": "file"},
    ],
    ids=["bf16", "nf4", "int8", "text encoder in nf4", "half of it streamed"],
)
def test_another_plan_draws_the_same_things(plan: dict[str, Any], tiny_models_folder: Path) -> None:
    """Few: a CPU without instructions for bfloat16 convolves in it 20 times as long as in float32."""
    assert right(tiny_models_folder, 3, plan) >= 2


@pytest.mark.parametrize(
    "plan",
    [
        {"offload": "leaf"},
        {"offload": "partial", "streamed": {"transformer": (0, 2, 4, 6)}},
        {"offload": "partial", "streamed": {"transformer": tuple(range(9))}, "streamed_from": "file"},
    ],
    ids=["leaf", "half of it streamed", "all of it streamed from the file"],
)
def test_a_plan_that_moves_weights_draws_the_very_same_picture(plan: dict[str, Any], tiny_models_folder: Path) -> None:
    resident, moved = (drawn(tiny_models_folder, RED_CIRCLE, each, seed=5) for each in (None, plan))

    assert things(resident) == {("red", "circle")}
    assert np.array_equal(resident, moved)


def test_strips_draw_the_picture_within_rounding(tiny_models_folder: Path) -> None:
    prompt = "a small yellow star right of a large blue square on a green background"
    whole, in_strips = (
        drawn(tiny_models_folder, prompt, plan, seed=5).astype(int) for plan in (None, {"vae_strip_rows": 32})
    )

    assert things(whole) == {("yellow", "star"), ("blue", "square")}
    assert np.abs(in_strips - whole).max() <= 1


def test_a_warm_engine_draws_each_prompt_as_it_is_told_and_again_from_what_it_keeps_of_it(
    installation: Installation,
) -> None:
    prompts = [RED_CIRCLE, "a blue star on a white background"]
    run = engine(installation)

    shown = [run(spec) for spec in specs_of(installation, prompts * 2, model="demo-flux", seed=9)]

    assert [things(picture) for picture in shown] == [{("red", "circle")}, {("blue", "star")}] * 2
    assert np.array_equal(shown[0], shown[2])
    assert np.array_equal(shown[1], shown[3])


def test_a_little_strength_keeps_the_picture_and_much_of_it_follows_the_prompt(tiny_models_folder: Path) -> None:
    start = drawn(tiny_models_folder, "a large green square on a white background", seed=1)

    kept, changed = (
        drawn(
            tiny_models_folder, "a large red circle on a black background", seed=2, image="0" * 64,
            strength=strength, picture=Image.fromarray(start),
        )
        for strength in (0.25, 1.0)
    )  # fmt: skip

    assert things(kept) == {("green", "square")}
    assert things(changed) == {("red", "circle")}


def test_the_seed_decides_where_the_prompt_does_not(tiny_models_folder: Path) -> None:
    first, again, other = (drawn(tiny_models_folder, RED_CIRCLE, seed=seed) for seed in (1, 1, 2))

    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert things(first) == things(other) == {("red", "circle")}


def test_a_negative_prompt_removes_what_it_names(tiny_models_folder: Path) -> None:
    """Of eight colours one circle in eight is red: ten of 48 were on the day it was trained, and none with it."""
    prompt, seeds = "a circle on a white background", range(32)
    guided = {"negative_prompt": RED_CIRCLE, "true_cfg_scale": 3.0}

    without = [("red", "circle") in things(drawn(tiny_models_folder, prompt, seed=seed)) for seed in seeds]
    with_it = [("red", "circle") in things(drawn(tiny_models_folder, prompt, seed=seed, **guided)) for seed in seeds]

    assert sum(without) >= 4
    assert sum(with_it) <= 1


def test_words_that_it_never_saw_are_refused_with_those_it_knows() -> None:
    faults = jobspec.check(
        {"model": "demo-flux", "prompt": "A red cat, left of the Moon", "seed": 1},
        MODELS, "test", image_model="tiny-flux-schnell", video_model="tiny-wan-ti2v",
    )  # fmt: skip

    assert isinstance(faults, list)
    assert [fault.problem for fault in faults] == ["demo-flux does not know 'A', 'cat', 'Moon' of prompt"]
    assert "circle, corner, cyan" in faults[0].remedy
