"""What a hub publishes and safelight fetches: a model, or a ControlNet of one. Knows no network."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safelight import models
from safelight.errors import Fault, InvalidJob
from safelight.models import ControlNetFacts, ModelFacts, Models


@dataclass(frozen=True)
class Published:
    """A model, or with `controlnet` that ControlNet of it, and the folder that it is looked for in."""

    facts: ModelFacts
    folder: Path
    controlnet: str = ""

    @property
    def _row(self) -> ModelFacts | ControlNetFacts:
        return self.facts.controlnets[self.controlnet] if self.controlnet else self.facts

    @property
    def repository(self) -> str:
        return self._row.repository

    @property
    def revision(self) -> str:
        """The commit that a pull fetches; else the one that `main` is then."""
        return self._row.revision

    @property
    def licence(self) -> str:
        return self._row.licence

    @property
    def name(self) -> str:
        """What a person calls it."""
        return f"ControlNet {self.controlnet} of {self.facts.key}" if self.controlnet else self.facts.key

    @property
    def command(self) -> str:
        """What fetches it."""
        of = f" --controlnet {self.controlnet}" if self.controlnet else ""
        return f"safelight models pull {self.facts.key}{of}"

    @property
    def table(self) -> str:
        """Where the settings say what it is."""
        of = f".controlnets.{self.controlnet}" if self.controlnet else ""
        return f"models.{self.facts.key}{of}"

    @property
    def index(self) -> str:
        """The file without which a folder is none."""
        return "config.json" if self.controlnet else "model_index.json"

    def lacking(self) -> list[str]:
        """Return what jobs need and its folder does not have."""
        if self.controlnet:
            return models.missing_of_controlnet(self.folder)
        return models.missing_files(self.facts, self.folder)


def of_model(facts: ModelFacts, models_folder: Path) -> Published:
    return Published(facts, models.folder(facts, models_folder))


def of_controlnet(facts: ModelFacts, key: str, models_folder: Path) -> Published:
    return Published(facts, models.controlnet_folder(facts, key, models_folder), key)


def named(table: Models, key: str, controlnet: str | None, models_folder: Path) -> Published:
    """Return what a person asks for.

    Raises:
        InvalidJob: there is no such model, or it has no such ControlNet.
    """
    if key not in table:
        known = f"Known: {', '.join(table.near(key))} (safelight models list)."
        raise InvalidJob([Fault(key, "is not a model", known)])
    facts = table[key]
    if controlnet is None:
        return of_model(facts, models_folder)
    if controlnet not in facts.controlnets:
        known = f"Known: {', '.join(facts.controlnets) or 'none'} (safelight models list)."
        raise InvalidJob([Fault(f"--controlnet {controlnet}", f"is no ControlNet of {key}", known)])
    return of_controlnet(facts, controlnet, models_folder)
