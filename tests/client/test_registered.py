"""Registrations as files: old ones load for ever, and become rows of the table."""

from __future__ import annotations

from pathlib import Path

from safelight import config, models, registered
from safelight.registered import Registration

DATA = Path(__file__).parents[1] / "data"


def test_an_old_registration_is_a_model_for_ever(tmp_path: Path) -> None:
    folder = tmp_path / "models"
    (folder / "registered").mkdir(parents=True)
    (folder / "registered/flux-dev-fp8.json").write_bytes((DATA / "v1_registration.json").read_bytes())
    (tmp_path / "safelight.toml").write_text(f'[paths]\nmodels = "{folder}"\n')
    found = config.load({"SAFELIGHT_CONFIG": str(tmp_path / "safelight.toml"), "HOME": str(tmp_path)})

    facts = models.load(found)["flux-dev-fp8"]

    assert facts.path == "/data/FLUX.1-dev"
    assert facts.component_paths == {"transformer": "/data/unet/flux1-dev-fp8.safetensors"}
    assert facts.blocks == models.load()["flux-dev"].blocks
    assert facts.repository == "black-forest-labs/FLUX.1-dev"


def test_what_is_written_is_read_back_and_forgotten(tmp_path: Path) -> None:
    written = Registration(key="fox", like="flux-dev", folder="/data/fox")
    registered.write(tmp_path, written)
    before = registered.stamp(tmp_path)

    assert registered.read_all(tmp_path) == ([written], [])
    registered.forget(tmp_path, "fox")
    assert registered.read_all(tmp_path) == ([], [])
    assert registered.stamp(tmp_path) != before
    assert registered.stamp(tmp_path / "nowhere") == 0


def test_a_shipped_model_that_is_registered_is_itself_elsewhere() -> None:
    row = Registration(key="flux-dev", like="flux-dev", folder="/data/dev").row

    assert row == {"path": "/data/dev", "component_paths": {}, "tiny": False}
