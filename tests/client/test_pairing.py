"""Which picture a text in the inbox means, and whether jobs have it already."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
from PIL import Image

from safelight import inputs, pairing, promptfile
from safelight.errors import InvalidJob
from safelight.paths import Paths


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    return Paths(*(tmp_path / name for name in ("inbox", "outbox", "state", "models", "run")))


def drop(paths: Paths, path: str, content: bytes = b"a picture") -> None:
    file = paths.inbox / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)


def test_pair_gives_its_picture_to_every_draft_that_names_none() -> None:
    drafts = promptfile.parse(b"a fox\n--prompt 'a cat' --image other.png\n", "summer/cat.txt")

    paired = pairing.paired("summer/cat.txt", [".PNG"], drafts)

    assert [draft.fields["image"] for draft in paired] == ["cat.PNG", "other.png"]


def test_a_picture_that_leads_is_not_started_from_too() -> None:
    written = b'{"prompt": "x", "controlnet": "tiny:cat.png"}\n{"prompt": "y", "controlnet": "tiny:pose.png"}\n'

    paired = pairing.paired("cat.jsonl", [".png"], promptfile.parse(written, "cat.jsonl"))

    assert [draft.fields.get("image") for draft in paired] == [None, "cat.png"]


def test_two_pictures_of_one_name_are_a_fault_and_not_a_guess() -> None:
    drafts = promptfile.parse(b"a fox\n", "cat.txt")

    with pytest.raises(InvalidJob, match=r"cat\.png and cat\.jpg both have its name"):
        pairing.paired("cat.txt", [".png", ".jpg"], drafts)


def test_pictures_named_counts_those_of_axes_and_last_frames() -> None:
    written = (
        b'[{"prompt": "x", "image": "a.png", "last_image": "b.png"}, {"prompt": "y", "matrix": {"image": ["c.png"]}}]'
    )

    assert pairing.pictures_named(promptfile.parse(written, "x.json")) == {"a.png", "b.png", "c.png"}


@pytest.mark.parametrize(
    ("text", "name", "expected"),
    [
        ("cat.txt", "a.png", ["a.png"]),
        ("summer/cat.txt", "refs/a.png", ["summer/refs/a.png"]),
        ("night/summer/day1/cat.txt", "./a.png", ["night/summer/day1/a.png", "night/summer/a.png"]),
        ("cat.txt", "../a.png", []),
        ("cat.txt", "/etc/passwd", []),
    ],
)
def test_picture_lies_beside_its_text_or_in_the_folder_of_its_batch(text: str, name: str, expected: list[str]) -> None:
    assert pairing.picture_paths(text, name) == expected


def test_find_picture_prefers_the_one_beside_the_text(paths: Paths) -> None:
    drop(paths, "summer/a.png")
    assert pairing.find_picture(paths, "summer/day1/cat.txt", "a.png") == "summer/a.png"

    drop(paths, "summer/day1/a.png")
    assert pairing.find_picture(paths, "summer/day1/cat.txt", "a.png") == "summer/day1/a.png"


@pytest.mark.parametrize("name", ["../../state/x.png", "/etc/passwd", "link.png", "missing.png", "loop/a.png"])
def test_find_picture_leads_nowhere_else(paths: Paths, name: str) -> None:
    drop(paths, "summer/a.png")
    (paths.inbox / "summer/link.png").symlink_to(paths.inbox / "summer/a.png")
    (paths.inbox / "summer/loop").symlink_to(paths.inbox / "summer")

    with pytest.raises(InvalidJob):
        pairing.find_picture(paths, "summer/cat.txt", name)


def test_was_used_tells_a_picture_that_jobs_have_from_one_that_came_later(paths: Paths) -> None:
    content = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(content, "PNG")
    picture = content.getvalue()
    drop(paths, "a.png", picture)
    assert not pairing.was_used(paths, "a.png")

    kept = pairing.store_picture(paths, "a.png")
    assert pairing.was_used(paths, "a.png")
    assert (paths.inputs / kept.digest).read_bytes() == picture

    os.utime(paths.inputs / kept.digest, (1, 1))
    assert not pairing.was_used(paths, "a.png")
    assert pairing.store_picture(paths, "a.png") == kept
    assert pairing.was_used(paths, "a.png")
    assert inputs.store(paths.inbox / "a.png", paths.inputs) == kept
