"""The table of model facts: what a model is, what it takes, and what its authors advise. Knows no weights."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from safelight.config import Config, shipped
from safelight.errors import BadConfig


class Defaults(BaseModel):
    """What a job gets that does not say otherwise."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float | None = None
    guidance_scale_2: float | None = None
    negative_prompt: str | None = None
    num_frames: int | None = None
    fps: int | None = None
    flow_shift: float | None = None


class Files(BaseModel):
    """What a download needs, as patterns below the repository."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    patterns: tuple[str, ...] = ()


class ModelFacts(BaseModel):
    """One row of the table. Sizes in pixels, components in parameters; models.toml gives the sources."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: str
    kind: Literal["image", "video"]
    family: Literal["flux", "wan"]
    repository: str
    pipeline: str
    licence: str
    gated: bool
    guidance: Literal["none", "embedded", "cfg"]
    true_cfg: bool
    image: Literal["never", "optional", "required"] = "never"
    last_image: bool = False
    max_sequence_length: int
    size_multiple: int
    size_min: int
    size_max: int
    pixels_max: int
    steps_min: int
    steps_max: int
    vae_scale: int
    latent_channels: int
    frames_multiple: int = 0
    frames_min: int = 0
    frames_max: int = 0
    expand_timesteps: bool = False
    experts: int = 1
    boundary_ratio: float | None = None
    tiny: bool = False
    defaults: Defaults
    components: dict[str, int]
    component_paths: dict[str, str] = Field(default_factory=dict)
    files: Files = Files()
    path: str = ""

    def tokens(self, width: int, height: int, num_frames: int | None) -> int:
        """Return how many latent tokens the transformer sees: what time and activations grow with."""
        patches = (width // (self.vae_scale * 2)) * (height // (self.vae_scale * 2))
        return patches * ((num_frames - 1) // self.frames_multiple + 1 if num_frames else 1)

    def frames_near(self, num_frames: int) -> int:
        """Return the legal frame count (4n + 1) nearest to `num_frames`."""
        nearest = round((num_frames - 1) / self.frames_multiple) * self.frames_multiple + 1
        return min(max(nearest, self.frames_min), self.frames_max)

    def side_near(self, side: int) -> int:
        """Return the legal width or height nearest to `side`."""
        nearest = round(side / self.size_multiple) * self.size_multiple
        return min(max(nearest, self.size_min), self.size_max)


class Models:
    """All models that a job may name."""

    def __init__(self, facts: Mapping[str, ModelFacts]) -> None:
        self._facts = dict(facts)

    def __getitem__(self, key: str) -> ModelFacts:
        return self._facts[key]

    def __contains__(self, key: object) -> bool:
        return key in self._facts

    def keys(self) -> list[str]:
        return list(self._facts)

    def values(self) -> list[ModelFacts]:
        return list(self._facts.values())

    def near(self, key: str) -> list[str]:
        """Return the known keys that look most like `key`."""
        return difflib.get_close_matches(key, self._facts, n=3, cutoff=0.3) or list(self._facts)[:3]


@cache
def _shipped_rows() -> dict[str, dict[str, Any]]:
    return tomllib.loads(shipped("models.toml").read_text(encoding="utf-8"))


def load(config: Config | None = None) -> Models:
    """Return the shipped table with the user's own models from the settings file.

    A row with `like` starts from that row and changes what it writes.

    Raises:
        BadConfig: a row is incomplete or says something unknown; the key and the field are named.
    """
    rows = dict(_shipped_rows())
    own = config.settings.models if config else {}
    source = config.source if config else Path("models.toml")
    rows.update(own)
    facts: dict[str, ModelFacts] = {}
    for key in rows:
        try:
            merged = _merge(key, rows, ())
            facts[key] = ModelFacts.model_validate({"key": key, **merged})
        except ValidationError as error:
            where = "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())
            raise BadConfig(f"{source}: [models.{key}] {where}.") from error
        except LookupError as error:
            raise BadConfig(f"{source}: [models.{key}] {error.args[0]}") from error
    return Models(facts)


def _merge(key: str, rows: Mapping[str, Mapping[str, Any]], seen: tuple[str, ...]) -> dict[str, Any]:
    row = dict(rows[key])
    if isinstance(paths := row.get("components"), Mapping) and any(isinstance(v, str) for v in paths.values()):
        # In a user's row `components.transformer = "/path"` names a folder; the counts come from `like`.
        row["component_paths"] = {name: value for name, value in paths.items() if isinstance(value, str)}
        row["components"] = {name: value for name, value in paths.items() if not isinstance(value, str)}
    base = row.pop("like", None)
    if base is None:
        return row
    if base not in rows:
        raise LookupError(f'like = "{base}" names no model. Known: {", ".join(rows)}.')
    if base in seen or base == key:
        raise LookupError(f'like = "{base}" leads back to itself.')
    merged = _merge(base, rows, (*seen, key))
    for name, value in row.items():
        old = merged.get(name)
        merged[name] = {**old, **value} if isinstance(old, dict) and isinstance(value, dict) else value
    # What a model is like is not where it lives: a new key has a folder of its own.
    if "path" not in row:
        merged.pop("path", None)
    return merged


def folder(facts: ModelFacts, models: Path) -> Path:
    """Return where a model's diffusers folder is: its configured path, else its key below the models folder."""
    return Path(facts.path).expanduser() if facts.path else models / facts.key


def is_there(facts: ModelFacts, models: Path) -> bool:
    """Whether the model can be loaded: a tiny one is built on first use, any other needs its index."""
    return facts.tiny or (folder(facts, models) / "model_index.json").is_file()
