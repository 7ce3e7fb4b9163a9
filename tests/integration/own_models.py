"""An installation that is changed: other words in its settings, a models folder of its own."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from safelight import config as settings
from safelight import models
from safelightd import tiny
from tests.conftest import Installation


def changed(installation: Installation, before: str, after: str) -> Installation:
    """The installation with other words in its settings."""
    source = installation.config.source
    source.write_text(source.read_text().replace(before, after))
    config = settings.load(installation.env)
    return replace(installation, config=config, models=models.load(config))


def with_own_models(installation: Installation, tiny_models_folder: Path, *keys: str) -> Installation:
    """The installation with a models folder of its own, in which these tiny models are already built."""
    folder = installation.root / "models"
    for key in keys:
        tiny.build(key, tiny_models_folder / key)
        shutil.copytree(tiny_models_folder / key, folder / key)
    return changed(installation, str(tiny_models_folder), str(folder))
