"""The table of model facts, and a user's own rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safelight import config, models
from safelight.config import Config, Settings
from safelight.errors import BadConfig
from safelight.models import Models

SHIPPED = models.load()


def with_rows(rows: dict[str, dict[str, Any]], installation_root: Path) -> Models:
    base = config.load({"HOME": str(installation_root), "XDG_CONFIG_HOME": str(installation_root)})
    return models.load(Config(Settings(models=rows), Path("safelight.toml"), base.paths))


@pytest.mark.parametrize("key", SHIPPED.keys())
def test_shipped_defaults_are_legal(key: str) -> None:
    facts = SHIPPED[key]
    defaults = facts.defaults

    assert (defaults.width, defaults.height) == (facts.side_near(defaults.width), facts.side_near(defaults.height))
    assert defaults.width * defaults.height <= facts.pixels_max
    assert facts.steps_min <= defaults.num_inference_steps <= facts.steps_max
    assert defaults.num_frames is None or facts.frames_near(defaults.num_frames) == defaults.num_frames


@pytest.mark.parametrize(
    ("key", "size", "num_frames", "tokens"),
    [
        ("wan-ti2v-5b", (1280, 704), 121, 27_280),
        ("wan-ti2v-5b", (832, 480), 81, 8_190),
        ("wan-t2v-a14b", (832, 480), 81, 32_760),
        ("flux-dev", (1024, 1024), None, 4_096),
    ],
)
def test_tokens_are_those_of_the_transformer(
    key: str, size: tuple[int, int], num_frames: int | None, tokens: int
) -> None:
    assert SHIPPED[key].tokens(*size, num_frames) == tokens


@given(st.integers(-1000, 1000))
def test_nearest_frame_count_is_legal(frames: int) -> None:
    facts = SHIPPED["wan-ti2v-5b"]
    nearest = facts.frames_near(frames)

    assert nearest % 4 == 1
    assert facts.frames_min <= nearest <= facts.frames_max


def test_own_row_starts_from_what_it_is_like(tmp_path: Path) -> None:
    row = {"like": "flux-dev", "path": "/data/x", "defaults": {"num_inference_steps": 20}}
    facts = with_rows({"my-flux": row}, tmp_path)["my-flux"]

    assert facts.defaults.num_inference_steps == 20
    assert (
        facts.model_copy(update={"key": "flux-dev", "path": "", "defaults": SHIPPED["flux-dev"].defaults})
        == (SHIPPED["flux-dev"])
    )


def test_own_row_of_a_shipped_key_changes_that_model(tmp_path: Path) -> None:
    table = with_rows({"flux-dev": {"path": "/data/x", "components": {"transformer": "/data/t"}}}, tmp_path)

    assert table["flux-dev"].path == "/data/x"
    assert table["flux-dev"].component_paths == {"transformer": "/data/t"}
    assert table["flux-dev"].components == SHIPPED["flux-dev"].components


def test_folders_are_not_inherited(tmp_path: Path) -> None:
    rows = {
        "mine": {"like": "flux-dev", "path": "/data/x", "components": {"transformer": "/data/t"}},
        "other": {"like": "mine"},
    }
    other = with_rows(rows, tmp_path)["other"]

    assert (other.path, other.component_paths) == ("", {})
    assert models.folder(other, Path("/models")) == Path("/models/other")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"x": {"like": "flux-dv"}}, "[models.x] like = 'flux-dv' names no model"),
        ({"x": {"like": ["flux-dev"]}}, "[models.x] like = ['flux-dev'] names no model"),
        ({"x": {"like": "y"}, "y": {"like": "x"}}, "leads back to itself"),
        ({"x": {"path": "/data"}}, 'name the model it resembles, like = "KEY"'),
        ({"x": {"like": "flux-dev", "steps_mx": 4}}, "steps_mx: no such field (did you mean steps_max?)"),
        ({"x": {"like": "flux-dev", "key": "y"}}, "the key is the name in brackets"),
        ({"x/../y": {"like": "flux-dev"}}, "cannot be a key"),
        ({"x": {"like": "flux-dev", "kind": "video"}}, "the family flux makes no videos"),
        ({"x": {"like": "flux-dev", "size_multiple": 0}}, "size_multiple"),
        ({"x": {"like": "flux-dev", "size_max": 1000}}, "size_min and size_max must be multiples of 16"),
        ({"x": {"like": "wan-ti2v-5b", "frames_multiple": 0}}, "a video model needs frames_multiple"),
        ({"x": {"like": "flux-dev", "defaults": {"width": 1000}}}, "defaults.width 1000 is not legal for it. Use 992"),
    ],
)
def test_wrong_row_is_refused_naming_the_key(rows: dict[str, dict[str, Any]], message: str, tmp_path: Path) -> None:
    with pytest.raises(BadConfig) as caught:
        with_rows(rows, tmp_path)

    assert message in str(caught.value)
    assert str(caught.value).startswith("safelight.toml: [models.")
