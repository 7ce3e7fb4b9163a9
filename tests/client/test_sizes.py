"""The size of a job that has a picture and writes none: legal, of its shape, and no dearer than the default."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from safelight import models
from safelight.jobspec import JobSpec, check
from safelight.models import ModelFacts
from safelight.sizes import Size, of_picture

TABLE = models.load()
DIGEST = "0" * 64
FROM_PICTURES = [facts for facts in TABLE.values() if facts.image != "never"]
FACTS = st.sampled_from(FROM_PICTURES)
SIDES = st.integers(1, 8000)


def job(picture: tuple[int, int] | None, **written: object) -> JobSpec:
    fields: dict[str, object] = {"prompt": "a red circle", "seed": 1, "image": DIGEST, **written}
    size = Size(*picture) if picture else None
    made = check(fields, TABLE, "n.txt:1", image_model="flux-schnell", video_model="wan-ti2v-5b", picture=size)
    assert isinstance(made, JobSpec), made
    return made


def sized(picture: tuple[int, int] | None, **written: object) -> tuple[int, int]:
    made = job(picture, **written)
    return made.width, made.height


def pixels(facts: ModelFacts) -> int:
    return facts.defaults.width * facts.defaults.height


def stretched(size: tuple[int, int], picture: Size) -> float:
    """How much more one side of a picture is stretched than the other."""
    return math.exp(abs(math.log(size[0] / size[1] / (picture.width / picture.height)))) - 1


@pytest.mark.parametrize(
    ("picture", "model", "size"),
    [
        ((3024, 4032), "wan-ti2v-5b", (800, 1088)),
        ((1080, 1920), "wan-ti2v-5b", (704, 1280)),
        ((1920, 1080), "wan-ti2v-5b", (1280, 704)),
        ((1024, 1024), "wan-ti2v-5b", (928, 928)),
        ((3024, 4032), "wan-i2v-a14b", (544, 720)),
        ((1920, 1080), "wan-i2v-a14b", (832, 480)),
        ((4032, 3024), "flux-dev", (1168, 880)),
        ((1500, 1000), "flux-schnell", (1248, 832)),
        ((6000, 1000), "flux-schnell", (2048, 336)),
        ((1, 4000), "flux-schnell", (256, 2048)),
        ((1, 4000), "wan-ti2v-5b", (256, 1280)),
        ((8000, 1), "wan-i2v-a14b", (1280, 256)),
        ((640, 480), "demo-wan", (128, 128)),
    ],
)
def test_a_job_that_writes_no_size_gets_one_of_its_pictures_shape(
    picture: tuple[int, int], model: str, size: tuple[int, int]
) -> None:
    assert sized(picture, model=model) == size


@pytest.mark.parametrize("facts", FROM_PICTURES, ids=lambda facts: facts.key)
@pytest.mark.parametrize("times", [1, 3])
def test_a_picture_of_the_defaults_shape_gives_the_default(facts: ModelFacts, times: int) -> None:
    default = facts.defaults.width, facts.defaults.height

    assert sized((default[0] * times, default[1] * times), model=facts.key) == default


@given(FACTS, SIDES, SIDES)
@example(TABLE["wan-ti2v-5b"], 1, 4000)
def test_of_any_picture_the_size_is_legal_and_no_dearer_than_the_default(
    facts: ModelFacts, width: int, height: int
) -> None:
    made = job((width, height), model=facts.key)

    assert made.width * made.height <= pixels(facts)
    assert (made.width, made.height) == of_picture(Size(width, height), facts)


@given(FACTS, SIDES, SIDES)
def test_no_picture_is_stretched_more_than_by_the_rule_of_diffusers_own_example(
    facts: ModelFacts, width: int, height: int
) -> None:
    picture, each = Size(width, height), facts.size_multiple
    by_rule = (
        int(math.sqrt(pixels(facts) * width / height)) // each * each,
        int(math.sqrt(pixels(facts) * height / width)) // each * each,
    )
    if not all(facts.size_min <= side <= facts.size_max for side in by_rule):
        return  # the example minds no limits

    assert stretched(of_picture(picture, facts), picture) <= stretched(by_rule, picture) + 1e-9


@given(st.integers(1, 4000), st.integers(1, 4000))
def test_a_picture_on_its_side_gives_the_size_on_its_side(width: int, height: int) -> None:
    facts = TABLE["flux-dev"]

    assert of_picture(Size(width, height), facts) == of_picture(Size(height, width), facts)[::-1]


@given(st.integers(1, 9), st.integers(0, 6), st.integers(0, 20), st.integers(0, 20), st.integers(0, 20), SIDES, SIDES)
def test_a_model_of_ones_own_may_have_any_limits(
    multiple: int, low: int, more: int, wide: int, high: int, width: int, height: int
) -> None:
    least, most = multiple * (low + 1), multiple * (low + 1 + more)
    default = Size(*(min(least + multiple * steps, most) for steps in (wide, high)))
    defaults = TABLE["flux-dev"].defaults.model_copy(update=default._asdict())
    changed: dict[str, Any] = {"size_multiple": multiple, "size_min": least, "size_max": most, "defaults": defaults}
    facts = TABLE["flux-dev"].model_copy(update=changed)

    size = of_picture(Size(width, height), facts)

    assert all(least <= side <= most and not side % multiple for side in size)
    assert size.width * size.height <= default.width * default.height
    assert of_picture(default, facts) == default


@pytest.mark.parametrize("written", [{"width": 832}, {"height": "480"}, {"width": 832, "height": 480}])
def test_a_size_that_is_written_stays_as_it_is(written: dict[str, object]) -> None:
    portrait = (1080, 1920)

    assert sized(portrait, **written) == sized(None, **written)


def test_without_a_picture_the_size_is_the_default() -> None:
    assert sized(None, model="wan-ti2v-5b") == (1280, 704)


@pytest.mark.parametrize(
    ("picture", "model", "size"),
    [
        ((1080, 1920), "wan-ti2v-5b", (704, 1280)),
        ((4032, 3024), "wan-ti2v-5b", (1280, 704)),
        ((1080, 1920), "wan-i2v-a14b", (480, 832)),
        ((1920, 1080), "wan-i2v-a14b", (832, 464)),
    ],
)
def test_of_wans_own_program_it_is_one_of_the_sizes_that_it_knows(
    picture: tuple[int, int], model: str, size: tuple[int, int]
) -> None:
    assert sized(picture, model=model, backend="wan-cli") == size
