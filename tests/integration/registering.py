"""A person's disk with models in the layouts that people have, and an installation that knows none of them."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from bench import layouts
from click.testing import Result

from safelight import config as settings
from safelight import models, registered
from safelight.models import Models
from safelightd import tiny
from tests.cli_steps import runner
from tests.conftest import Installation

FLUX = "tiny-flux-dev"
WAN = "tiny-wan-t2v-a14b"

REPOSITORY = """
[models.published]
like = "tiny-flux-dev"
tiny = false
repository = "somebody/a-model"
"""


@pytest.fixture
def own(installation: Installation) -> Installation:
    """An installation with an empty models folder."""
    folder = installation.root / "models"
    folder.mkdir()
    source = installation.config.source
    lines = [
        f'models = "{folder}"' if line.startswith("models =") else line for line in source.read_text().splitlines()
    ]
    source.write_text("\n".join(lines))
    config = settings.load(installation.env)
    return replace(installation, config=config, models=models.load(config))


@pytest.fixture
def disk(own: Installation, tiny_models_folder: Path) -> Path:
    """A person's folder: a FLUX and a Wan model in the layout of diffusers."""
    folder = own.root / "disk"
    for key in (FLUX, WAN):
        tiny.build(key, tiny_models_folder / key)
        shutil.copytree(tiny_models_folder / key, folder / key)
    return folder


@pytest.fixture
def one(disk: Path) -> Path:
    """The FLUX transformer as its authors publish it."""
    weights = layouts.flux_of_authors(layouts.published(disk / FLUX / "transformer"))
    return layouts.save(weights, disk / "flux1-fox.safetensors")


def in_cache(disk: Path, key: str, repository: str) -> Path:
    """Put a model where huggingface_hub's cache has it: names are links to blobs; return the cache."""
    cache = disk / "hub"
    at = cache / f"models--{repository.replace('/', '--')}"
    snapshot = at / "snapshots" / ("c0ffee" * 7)[:40]
    (at / "blobs").mkdir(parents=True)
    (at / "refs").mkdir()
    (at / "refs/main").write_text(snapshot.name)
    for file in sorted(file for file in (disk / key).rglob("*") if file.is_file()):
        digest = registered.digest(file, lambda _nbytes: None).sha256
        shutil.copy(file, at / "blobs" / digest)
        link = snapshot / file.relative_to(disk / key)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(at / "blobs" / digest, link.parent))
    return cache


def add(own: Installation, *words: str | Path) -> Result:
    return runner(own)("models", "add", *map(str, words))


def row(own: Installation, key: str) -> dict[str, Any]:
    result = runner(own)("models", "list", "--json")
    assert result.exit_code == 0, result.output
    return next(each for each in json.loads(result.stdout) if each["key"] == key)


def table(own: Installation) -> Models:
    return models.load(own.config)


def refused(own: Installation, *words: str | Path, code: int = 2) -> str:
    before = registered.read_all(own.paths.models)
    result = add(own, *words)
    assert result.exit_code in (1, code), result.output
    assert result.stdout == ""
    assert "Traceback" not in result.output
    assert registered.read_all(own.paths.models) == before
    return result.stderr
