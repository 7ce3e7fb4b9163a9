"""The settings file: what it says, what it may say, and what a wrong one is answered with."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from safelight import config, models
from safelight.config import Settings
from safelight.errors import BadConfig


def uncommented(text: str) -> str:
    """Return the sample with every setting in force; prose comments stay."""
    return re.sub(r"^# (?=\[|[a-z_.]+ = )", "", text, flags=re.MULTILINE)


@pytest.fixture
def sample() -> str:
    return uncommented(config.shipped("safelight.toml").read_text(encoding="utf-8"))


def load(tmp_path: Path, text: str) -> config.Config:
    file = tmp_path / "safelight.toml"
    file.write_text(text, encoding="utf-8")
    return config.load({"HOME": str(tmp_path), "SAFELIGHT_CONFIG": str(file)})


def refusal(tmp_path: Path, text: str) -> list[str]:
    with pytest.raises(BadConfig) as caught:
        models.load(load(tmp_path, text))
    return str(caught.value).replace(f"{tmp_path}/", "").splitlines()


def test_sample_with_everything_uncommented_equals_the_defaults(sample: str, tmp_path: Path) -> None:
    settings = load(tmp_path, sample).settings

    assert settings.model_copy(update={"models": {}}) == Settings()


def test_sample_lists_every_setting(sample: str) -> None:
    def keys(table: dict[str, object], prefix: str = "") -> set[str]:
        found: set[str] = set()
        for name, value in table.items():
            found |= keys(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name}
        return found

    written = {key for key in keys(tomllib.loads(sample)) if not key.startswith("models.")}

    assert written == set(config.known_keys()) - {"models"}


def test_sample_model_row_makes_a_model(sample: str, tmp_path: Path) -> None:
    facts = models.load(load(tmp_path, sample))["my-flux"]

    assert facts.path == "/data/my-flux"
    assert facts.component_paths == {"transformer": "/data/my-flux-transformer"}


@pytest.mark.parametrize(
    ("text", "near"),
    [
        ("[worker]\ndevise = 'cpu'", "worker.devise: no such setting. Did you mean worker.device?"),
        (
            "[worker.deadline_s]\nlod = 1",
            "worker.deadline_s.lod: no such setting. Did you mean worker.deadline_s.load?",
        ),
        ("[inbox]\non_battery = 'run'", "inbox.on_battery: no such setting. Did you mean policy.on_battery?"),
        ("[wroker]", "wroker: no such setting. Did you mean worker?"),
    ],
)
def test_unknown_key_names_the_nearest(text: str, near: str, tmp_path: Path) -> None:
    assert refusal(tmp_path, text) == [f"safelight.toml: {near}"]


def test_all_faults_of_a_file_are_told_at_once(tmp_path: Path) -> None:
    text = "[worker]\ndevice = 'tpu'\nvram_gib = 'lots'\n[policy]\nwindow = '25:00-1'\n[queue]\nkeep_days = 0\n"

    keys = [line.split(": ")[1].split(" ")[0] for line in refusal(tmp_path, text)]

    assert sorted(keys) == ["policy.window", "queue.keep_days", "worker.device", "worker.vram_gib"]


@pytest.mark.parametrize(
    "text",
    [
        "[policy]\nwindow = '08:00-08:00'",
        "[policy]\nthermal_ceiling_c = 'hot'",
        "[policy]\ngpu_busy_gib = -1",
        "[worker]\nvram_gib = -1",
        "[worker]\nvram_gib = inf",
        "[worker]\nram_gib = true",
        "[worker]\nidle_exit_s = nan",
        "[worker.deadline_s]\nload = inf",
        "[queue]\nkeep_days = '14'",
        "[paths]\ninbox = ''",
        "[paths]\nstate = '~no-such-user-here/x'",
        '[paths]\noutbox = "a\\u0000b"',
        "[paths\n",
        "worker = 3",
    ],
)
def test_value_without_a_meaning_is_refused_naming_the_file(text: str, tmp_path: Path) -> None:
    assert all(line.startswith("safelight.toml: ") for line in refusal(tmp_path, text))


@pytest.mark.parametrize(("content", "byte"), [("[inbox]".encode("utf-16"), 0), ("# caf\xe9".encode("latin-1"), 5)])
def test_file_that_is_not_utf_8_is_refused_with_the_byte(content: bytes, byte: int, tmp_path: Path) -> None:
    file = tmp_path / "safelight.toml"
    file.write_bytes(content)

    with pytest.raises(BadConfig, match=rf"safelight\.toml: byte {byte} is not UTF-8\. Save it as UTF-8\.$"):
        config.load({"HOME": str(tmp_path), "SAFELIGHT_CONFIG": str(file)})


def test_file_that_was_named_must_exist(tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match=r"gone\.toml: there is no such settings file"):
        config.load({"HOME": str(tmp_path), "SAFELIGHT_CONFIG": str(tmp_path / "gone.toml")})


def test_default_file_need_not_exist(tmp_path: Path) -> None:
    settings = config.load({"HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path)}).settings

    assert settings == Settings()


def test_relative_folders_are_relative_to_the_file(tmp_path: Path) -> None:
    paths = load(tmp_path, "[paths]\ninbox = 'in'\nstate = 'state'\n").paths

    assert (paths.inbox, paths.state) == (tmp_path / "in", tmp_path / "state")
