"""What a person may write of a cache."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from safelight import caches, jobspec, models, promptfile
from safelight.caches import Cache
from safelight.jobspec import JobSpec

TABLE = models.load()


def checked(cache: object, **more: object) -> Any:
    written = {"prompt": "a fox", "seed": 1, "cache": cache, **more}
    return jobspec.check(written, TABLE, "n.txt:1", image_model="flux-dev", video_model="wan-ti2v-5b")


@pytest.mark.parametrize(
    ("written", "kind", "given"),
    [
        ("first-block", "first-block", {}),
        ("first-block:threshold=0.08", "first-block", {"threshold": 0.08}),
        ({"kind": "first-block", "threshold": 0}, "first-block", {"threshold": 0.0}),
        (
            " taylorseer : cache_interval = 3, disable_cache_before_step=4,max_order=2",
            "taylorseer",
            {"cache_interval": 3, "disable_cache_before_step": 4, "max_order": 2},
        ),
        ({"kind": "taylorseer", "disable_cache_after_step": 40}, "taylorseer", {"disable_cache_after_step": 40}),
    ],
)
def test_a_cache_is_read_from_text_and_from_a_mapping_and_lives_in_the_spec(
    written: object, kind: str, given: dict[str, object]
) -> None:
    spec = checked(written)

    assert isinstance(spec, JobSpec), spec
    assert spec.cache == Cache.model_validate({"kind": kind, **given})
    assert spec.cache.given == given
    assert JobSpec.model_validate(json.loads(spec.model_dump_json())) == spec
    assert checked(spec.cache) == spec


@pytest.mark.parametrize(
    "written",
    [
        "fbcache", "first-block:0.08", "first-block:threshold=x", "first-block:cache_interval=3",
        "taylorseer:threshold=1", {"kind": "first-block", "threshold": 1.5}, {"threshold": 0.1},
        {"kind": "taylorseer", "cache_interval": 1}, {"kind": "first-block", "speed": 2}, ["first-block"], True, 0.08,
    ],
)  # fmt: skip
def test_what_is_no_cache_is_one_fault_that_says_what_would_be(written: object) -> None:
    found = checked(written)

    assert [fault.problem.split(" is not ")[1] for fault in found] == [caches.EXPECTED]


def test_a_cache_means_nothing_to_wans_own_program() -> None:
    found = checked("first-block", model="wan-ti2v-5b", backend="wan-cli")

    assert "cache would be ignored by Wan's own program" in [fault.problem for fault in found]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("n.yaml", "prompt: a fox\ncache: {kind: first-block, threshold: 0.08}\n"),
        ("n.json", '{"prompt": "a fox", "cache": {"kind": "first-block", "threshold": 0.08}}'),
        ("n.csv", "prompt,cache\na fox,first-block:threshold=0.08\n"),
        ("n.txt", "--prompt 'a fox' --cache first-block:threshold=0.08\n"),
        ("n.txt", "--prompt 'a fox' --cache=first-block:threshold=0.08\n"),
    ],
)
def test_every_kind_of_file_can_ask_for_a_cache(name: str, content: str) -> None:
    (draft,) = promptfile.parse(content.encode(), name)

    assert caches.read(draft.fields["cache"]) == Cache(kind="first-block", threshold=0.08)


def test_a_cache_has_the_arguments_of_its_kind_alone() -> None:
    with pytest.raises(ValidationError, match="first-block has no max_order"):
        Cache(kind="first-block", max_order=1)
