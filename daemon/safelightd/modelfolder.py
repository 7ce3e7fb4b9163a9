"""Where a model's or a ControlNet's folder is, or what to do so that there is one."""

from __future__ import annotations

from pathlib import Path

from safelight import models, published
from safelight.models import ModelFacts
from safelightd import modelfiles, tiny
from safelightd.weights import BadModelFolder


def model_folder(facts: ModelFacts, models_folder: Path) -> Path:
    """Return the diffusers folder of a model; a tiny one is built first where it is missing.

    Raises:
        BadModelFolder: there is none.
    """
    folder = models.folder(facts, models_folder)
    if facts.tiny:
        tiny.build(facts.key, folder)
    if facts.path and not folder.exists():
        raise modelfiles.gone(folder, facts.key)
    if not (folder / "model_index.json").is_file():
        what = facts.repository or facts.key
        raise BadModelFolder(
            f"{folder / 'model_index.json'} is missing. {_fetching(facts)}Put the diffusers folder of {what} there, "
            f"or name yours as [models.{facts.key}] path in the settings."
        )
    return folder


def controlnet_folder(facts: ModelFacts, key: str, models_folder: Path) -> Path:
    """Return the folder of a model's ControlNet; a tiny one is built first where it is missing.

    Raises:
        BadModelFolder: there is none.
    """
    if key not in facts.controlnets:
        raise BadModelFolder(f"{facts.key} has no ControlNet {key} any more. Put it back into the settings.")
    folder = models.controlnet_folder(facts, key, models_folder)
    if facts.tiny:
        tiny.build_controlnet(folder)
    if not (folder / "config.json").is_file():
        what = published.of_controlnet(facts, key, models_folder)
        fetching = f"{what.command} fetches it. " if what.repository else ""
        where = f"or name yours as [{what.table}] path in the settings"
        raise BadModelFolder(
            f"{folder / 'config.json'} is missing. {fetching}Put the files of {what.repository or key} there, {where}."
        )
    return folder


def _fetching(facts: ModelFacts) -> str:
    return f"safelight models pull {facts.key} fetches it. " if facts.repository else ""
