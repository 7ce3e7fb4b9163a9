"""The LoRA that comes with safelight: that one acts, that its scale does, and that it can be switched on and off."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bench.drawings import analyser
from bench.drawings.world import World, texts
from bench.outlines import one_shape
from safetensors.torch import load_file

from safelight import lorafiles
from safelight.errors import InvalidJob
from safelight.jobqueue import JobQueue
from safelight.lora import Lora
from tests.cli_steps import ids_of, runner
from tests.conftest import Installation
from tests.daemon.test_worker import specs_of
from tests.integration.rendering import Run, spec_for
from tests.integration.warm_engine import engine

NAME = "outlines"
BYTES_MAX = 1_000_000
RED_CIRCLE = "a large red circle on a white background"


def shipped(models_folder: Path, scale: float = 1.0) -> tuple[Lora, Path]:
    lora = lorafiles.find(Lora(name=NAME, scale=scale), models_folder)
    return lora, lorafiles.file_of(lora, models_folder, models_folder)


def drawn(
    models_folder: Path, prompt: str, scale: float | None, plan: dict[str, Any] | None = None, **more: Any
) -> Any:
    loras = [] if scale is None else [shipped(models_folder, scale)]
    return np.asarray(
        Run(spec_for("demo-flux", prompt=prompt, **more), models_folder, plan or {}, loras=loras).frames()[0]
    )


def right(models_folder: Path, count: int, plan: dict[str, Any] | None = None) -> int:
    """Return how many of held-out prompts of one shape come out as asked for, as outlines."""
    world = World("cpu", 41)
    scenes = one_shape(world, count)
    prompts = texts(world.captions(scenes, plain=True))
    shown = [drawn(models_folder, prompt, 1.0, plan, seed=i) for i, prompt in enumerate(prompts)]
    answers = [
        analyser.verdict(scene, analyser.read(picture), outline=True)
        for scene, picture in zip(scenes.each(), shown, strict=True)
    ]
    return sum(answer["colour"] and answer["shape"] for answer in answers)


def hollow(picture: Any) -> list[bool]:
    return [thing.is_outline for thing in analyser.read(picture).things]


def test_the_shipped_lora_is_small_and_of_attention_and_feed_forward_alone() -> None:
    file = lorafiles.shipped_names()[NAME]
    modules = {name.rpartition(".lora_")[0] for name in load_file(file)}

    assert file.stat().st_size <= BYTES_MAX
    assert file.with_suffix(".md").is_file()
    assert {name.split(".")[0] for name in modules} == {"transformer"}
    assert not [name for name in modules if ".norm" in name or "blocks." not in name]


def test_held_out_shapes_are_drawn_as_outlines(tiny_models_folder: Path) -> None:
    """92 of 100 on the day it was trained: that six of twenty go wrong by chance has odds of one in two hundred."""
    assert right(tiny_models_folder, 20) >= 15


@pytest.mark.parametrize(
    "plan",
    [
        {"dtype": "bfloat16", "precision": "nf4"},
        {"offload": "partial", "streamed": {"transformer": (0, 2, 4, 6)}, "streamed_from": "file"},
    ],
    ids=["nf4", "half of it streamed"],
)
def test_another_plan_draws_outlines_too(plan: dict[str, Any], tiny_models_folder: Path) -> None:
    assert right(tiny_models_folder, 3, plan) >= 2


def test_scale_0_is_no_lora_and_half_of_it_lies_between(tiny_models_folder: Path) -> None:
    none, zero, half, whole = (
        drawn(tiny_models_folder, RED_CIRCLE, scale, seed=3).astype(int) for scale in (None, 0.0, 0.5, 1.0)
    )
    away = [float(np.abs(picture - none).mean()) for picture in (zero, half, whole)]

    assert away[0] == 0
    assert 0 < 2 * away[1] < 3 * away[2]
    assert np.abs(whole - half).mean() < away[2]
    assert (hollow(none), hollow(whole)) == ([False], [True])


def test_a_seed_gives_the_same_shape_at_the_same_place_with_it_and_without(tiny_models_folder: Path) -> None:
    for seed in range(4):
        (filled,), (line,) = (
            analyser.read(drawn(tiny_models_folder, RED_CIRCLE, scale, seed=seed)).things for scale in (None, 1.0)
        )

        assert (line.colour, line.shape) == (filled.colour, filled.shape)
        assert abs(line.x - filled.x) + abs(line.y - filled.y) < 6


def test_a_warm_engine_switches_it_on_and_off_and_on(installation: Installation) -> None:
    specs, run = specs_of(installation, [RED_CIRCLE] * 5, model="demo-flux"), engine(installation)
    shown = []
    for spec, scale in zip(specs, (None, 1.0, None, 1.0, 0.5), strict=True):
        loras = () if scale is None else (Lora(name=NAME, scale=scale),)
        shown.append(run(spec.model_copy(update={"seed": specs[0].seed, "loras": loras})))

    assert np.array_equal(shown[0], shown[2])
    assert np.array_equal(shown[1], shown[3])
    assert not np.array_equal(shown[1], shown[4])
    assert [hollow(picture) for picture in shown[:4]] == [[False], [True]] * 2


def test_a_tag_in_a_prompt_of_the_vocabulary_is_all_that_a_fresh_installation_needs(
    installation: Installation, queue: JobQueue
) -> None:
    (job,) = ids_of(runner(installation)("add", f"{RED_CIRCLE} <lora:{NAME}>", "--model", "demo-flux", "--seed", "3"))

    spec = queue.spec(job)

    assert spec is not None
    assert [(lora.name, lora.scale, len(lora.sha256)) for lora in spec.loras] == [(NAME, 1.0, 64)]
    assert spec.prompt == RED_CIRCLE
    assert hollow(engine(installation)(spec)) == [True]


def test_a_file_names_it_as_it_names_others(installation: Installation, queue: JobQueue) -> None:
    file = installation.root / "n.yaml"
    file.write_text(f"- model: demo-flux\n  prompt: {RED_CIRCLE}\n  loras: [{{name: {NAME}, scale: 0.8}}]\n")
    (job,) = ids_of(runner(installation)("batch", str(file)))

    spec = queue.spec(job)

    assert spec is not None
    assert spec.loras == (lorafiles.find(Lora(name=NAME, scale=0.8), installation.paths.models),)


def test_it_is_refused_for_another_model_and_what_does_not_fit_is_named(tiny_models_folder: Path) -> None:
    with pytest.raises(InvalidJob, match=rf"LoRA {NAME}: \d+ keys do not match the model"):
        Run(spec_for("tiny-flux-schnell"), tiny_models_folder, loras=[shipped(tiny_models_folder)])
