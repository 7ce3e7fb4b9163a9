"""The demo video model moves what it is told, from text and from a picture, through the code that runs Wan."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bench.drawings.drawing import clips
from bench.drawings.training import as_bytes, clip_verdict, decibels
from bench.drawings.world import Scene, World, texts
from PIL import Image

from safelightd.loading import Loader
from safelightd.modelfolder import model_folder
from tests.integration.rendering import MODELS, Run, plan_for, spec_for

FIRST_FRAME_DB = 25.0


def filmed(tiny_models_folder: Path, prompt: str, picture: Any = None, plan: dict[str, Any] | None = None) -> Any:
    """Return the frames (17, 128, 128, 3) of a job."""
    image = None if picture is None else Image.fromarray(picture)
    given = {} if image is None else {"image": f"sha256:{hashlib.sha256(picture.tobytes()).hexdigest()}"}
    run = Run(spec_for("demo-wan", prompt=prompt, seed=3, **given), tiny_models_folder, plan or {}, image=image)
    return np.stack([np.asarray(frame) for frame in run.frames()])


def asked(count: int) -> tuple[list[Scene], list[str], list[Any]]:
    """Return held-out scenes, their captions, and the first frame of a true clip of each."""
    world = World("cpu", 37)
    scenes = world.scenes(count, "held out", clip=True)
    first = clips(scenes, 17, torch.Generator().manual_seed(37))[:, :, 0]
    return scenes.each(), texts(world.captions(scenes, plain=True, clip=True)), list(as_bytes(first))


@pytest.fixture(scope="module")
def animated(tiny_models_folder: Path) -> list[tuple[Scene, Any, Any]]:
    """Six held-out scenes, each with its picture and the clip that came of it."""
    return [
        (scene, picture, filmed(tiny_models_folder, prompt, picture))
        for scene, prompt, picture in zip(*asked(6), strict=True)
    ]


def test_a_clip_from_a_picture_starts_with_it(animated: list[tuple[Scene, Any, Any]]) -> None:
    for scene, picture, clip in animated:
        assert decibels(clip[0], picture) >= FIRST_FRAME_DB, scene


def test_a_picture_moves_as_the_prompt_says(animated: list[tuple[Scene, Any, Any]]) -> None:
    """100 of 100 on the day it was trained; 100 with the shape right as well."""
    verdicts = [clip_verdict(scene, list(clip)) for scene, _, clip in animated]

    assert sum(verdict["motion"] for verdict in verdicts) >= 5
    assert sum(verdict["asked"] for verdict in verdicts) >= 5


def test_text_alone_reaches_shape_colour_background_and_motion(tiny_models_folder: Path) -> None:
    """99 of 100 and more on the day it was trained, and in 97 the shape."""
    scenes, prompts, _ = asked(6)
    verdicts = [
        clip_verdict(scene, list(filmed(tiny_models_folder, prompt)))
        for scene, prompt in zip(scenes, prompts, strict=True)
    ]

    for attribute in ("background", "colour", "motion", "shape"):
        assert sum(verdict[attribute] for verdict in verdicts) >= 5, attribute


def test_a_quantised_plan_animates_the_same(animated: list[tuple[Scene, Any, Any]], tiny_models_folder: Path) -> None:
    scene, picture, clip = animated[0]
    _, prompts, _ = asked(6)

    other = filmed(tiny_models_folder, prompts[0], picture, {"dtype": "bfloat16", "precision": "int8-weight-only"})

    assert np.array_equal(other, clip) is False
    assert np.abs(other.astype(int) - clip.astype(int)).mean() < 12, scene
    assert clip_verdict(scene, list(other))["asked"]


@pytest.mark.parametrize(
    "plan",
    [
        {"offload": "partial", "streamed": {"transformer": (0, 2, 4)}},
        {"offload": "partial", "streamed": {"transformer": tuple(range(6))}, "streamed_from": "file"},
        {"offload": "partial", "streamed": {"text_encoder": (0,)}, "streamed_from": "file"},
    ],
    ids=["half of it streamed", "all of it streamed from the file", "the text encoder streamed"],
)
def test_a_plan_that_moves_weights_films_the_very_same_clip(
    plan: dict[str, Any], animated: list[tuple[Scene, Any, Any]], tiny_models_folder: Path
) -> None:
    _, picture, clip = animated[0]
    _, prompts, _ = asked(6)

    assert np.array_equal(filmed(tiny_models_folder, prompts[0], picture, plan), clip)


def test_tiles_that_hold_the_whole_clip_change_no_pixel(
    animated: list[tuple[Scene, Any, Any]], tiny_models_folder: Path
) -> None:
    """256 is the smallest that the planner takes of Wan's."""
    _, picture, clip = animated[0]
    _, prompts, _ = asked(6)
    tiled = filmed(tiny_models_folder, prompts[0], picture, {"vae_tiling": True, "vae_tile_pixels": 256})

    assert np.array_equal(tiled, clip)


def test_every_word_of_its_vocabulary_is_one_token(tiny_models_folder: Path) -> None:
    facts = MODELS["demo-wan"]
    tokenizer = Loader(model_folder(facts, tiny_models_folder), plan_for("demo-wan")).tokenizer("tokenizer")

    for word in facts.vocabulary.split():
        assert len(tokenizer(word).input_ids) == 2, word
        assert tokenizer.unk_token_id not in tokenizer(word).input_ids, word
