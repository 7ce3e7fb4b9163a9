"""The table of model facts: what a model is, what it takes, and what its authors advise. Knows no weights."""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from safelight import registered
from safelight.config import Config, Place, shipped
from safelight.errors import BadConfig
from safelight.registered import Registration
from safelight.tensorfile import SUFFIXES

KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}")
"""A key is a folder's name and a word on a command line."""

_WORD = re.compile(r"[^\s.,]+")

PLACES = ("path", "component_paths", "native")
"""The fields of a row that say where its files are."""


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


class Blocks(BaseModel):
    """Repeated blocks of a component that are alike. In parameters, of one block."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    """The ModuleList that holds them."""
    count: int
    parameters: int
    linear: int
    """Of them, in the weights of Linear layers: what is quantised."""
    linear_rows: int
    """Output features of those layers together: what is scaled by row."""
    per_token: int
    """Of `linear`, those that every token passes through; the others see one vector a step, or the prompt alone."""
    width: int
    """Of a token."""
    spared: int = 0
    """Of `linear`, T5's `wo`: bitsandbytes leaves it in 16 bit, and float16 plans hold it in 32."""


class ControlNetFacts(BaseModel):
    """A ControlNet that fits a model. In parameters."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    repository: str = ""
    revision: str = ""
    """The commit that a pull fetches; else the one that `main` is then."""
    licence: str = ""
    parameters: int
    blocks: tuple[Blocks, ...]
    path: Place = ""
    """Its folder, where it is not `controlnets/KEY` below the models."""


class Files(BaseModel):
    """What a download needs, as patterns below the repository."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    patterns: tuple[str, ...] = ()


class OwnSize(BaseModel):
    """A size that Wan's own program makes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    width: int
    height: int
    argument: str
    """What `--size` is then told: of a clip made of a picture it is an area, and the shape is the picture's."""
    device_bytes: int
    """What the program was seen to hold of the GPU."""


class OwnProgram(BaseModel):
    """What Wan's own program (backend wan-cli) makes of a model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    task: str
    fps: int
    text_encoder_device: Literal["cpu", "gpu"]
    """As its authors run it on one GPU."""
    guidance: tuple[float, float] | None = None
    """Of its two experts, high noise and low, where nobody says one for both."""
    sizes: tuple[OwnSize, ...]


class ModelFacts(BaseModel):
    """One row of the table. Sizes in pixels, components in parameters; models.toml gives the sources."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: str
    kind: Literal["image", "video"]
    family: Literal["flux", "wan"]
    repository: str
    revision: str = ""
    """The commit that a pull fetches; else the one that `main` is then."""
    pipeline: str
    licence: str
    gated: bool
    guidance: Literal["none", "embedded", "cfg"]
    true_cfg: bool
    image: Literal["never", "optional", "required"] = "never"
    last_image: bool = False
    max_sequence_length: int
    size_multiple: int = Field(ge=1)
    size_min: int = Field(ge=1)
    size_max: int
    pixels_max: int
    steps_min: int = Field(ge=1)
    steps_max: int
    vae_scale: int = Field(ge=1)
    latent_channels: int
    frames_multiple: int = 0
    frames_min: int = 0
    frames_max: int = 0
    expand_timesteps: bool = False
    experts: int = 1
    boundary_ratio: float | None = None
    tiny: bool = False
    vocabulary: str = ""
    """The words that prompts may have, with a space between two; "": any."""
    defaults: Defaults
    components: dict[str, int]
    component_paths: dict[str, str] = Field(default_factory=dict)
    blocks: dict[str, tuple[Blocks, ...]] = Field(default_factory=dict)
    """By component, in the order they run in. A component without any is loaded whole."""
    controlnets: dict[str, ControlNetFacts] = Field(default_factory=dict)
    files: Files = Files()
    path: str = ""
    wan_cli: OwnProgram | None = None
    native: Place = ""
    """The folder of the checkpoints that Wan's own program reads; they are not in the layout of diffusers."""

    @model_validator(mode="after")
    def _check(self) -> ModelFacts:
        """Refuse a row that would make every job of this model fail, or none be checked."""
        if (self.family, self.kind) not in (("flux", "image"), ("wan", "video")):
            raise ValueError(f"the family {self.family} makes no {self.kind}s")
        if self.kind == "video" and not (self.frames_multiple and self.defaults.num_frames and self.defaults.fps):
            raise ValueError("a video model needs frames_multiple, defaults.num_frames and defaults.fps")
        for name, blocks in self.blocks.items():
            if sum(block.parameters * block.count for block in blocks) > self.components.get(name, 0):
                raise ValueError(f"blocks.{name} have more parameters than components.{name} says")
        if self.native and self.wan_cli is None:
            raise ValueError("native names checkpoints for Wan's own program, which does not run this model")
        if not self.blocks.get("transformer"):
            raise ValueError("blocks.transformer is missing: the planner counts with them")
        if self.size_min % self.size_multiple or self.size_max % self.size_multiple:
            raise ValueError(f"size_min and size_max must be multiples of {self.size_multiple}")
        for name, side in (("width", self.defaults.width), ("height", self.defaults.height)):
            if side != self.side_near(side):
                raise ValueError(f"defaults.{name} {side} is not legal for it. Use {self.side_near(side)}")
        return self

    @property
    def decodes_in_strips(self) -> bool:
        """Whether its VAE can work in strips.

        Of Wan there are none to encode with. The 5B encodes one picture, 0.8 GiB beside the 3.5 of a decode in strips
        at 1280x704; A14B encodes a clip, 2.8 beside 2.0 at 832x480, which the planner does not count apart (counted on
        meta tensors, diffusers 0.42.1).
        """
        return self.family == "flux" or self.image == "never" or self.expand_timesteps

    def unknown_words(self, text: str) -> list[str]:
        """Return the words of a prompt that are not in the vocabulary, each once, in their order."""
        known = set(self.vocabulary.split())
        words = _WORD.findall(text) if known else []
        return [word for word in dict.fromkeys(words) if word not in known]

    def tokens(self, width: int, height: int, num_frames: int | None) -> int:
        """Return how many latent tokens the transformer sees: what time and activations grow with."""
        patches = (width // (self.vae_scale * 2)) * (height // (self.vae_scale * 2))
        return patches * ((num_frames - 1) // self.frames_multiple + 1 if num_frames else 1)

    def frames_near(self, num_frames: int) -> int:
        """Return the legal frame count (4n + 1) nearest to `num_frames`."""
        within = min(max(num_frames, self.frames_min), self.frames_max)
        return round((within - 1) / self.frames_multiple) * self.frames_multiple + 1

    def side_near(self, side: int) -> int:
        """Return the legal width or height nearest to `side`."""
        within = min(max(side, self.size_min), self.size_max)
        return round(within / self.size_multiple) * self.size_multiple


class Models:
    """All models that a job may name."""

    def __init__(
        self, facts: Mapping[str, ModelFacts], config: Config | None = None, stamp: int = 0, faults: Sequence[str] = ()
    ) -> None:
        self._facts = dict(facts)
        self._config = config
        self._stamp = stamp
        self.faults = tuple(faults)
        """What is wrong with registrations, which are left out."""

    def current(self) -> Models:
        """Return the table as it is now: itself, unless a model was registered or forgotten since."""
        if self._config is None or registered.stamp(self._config.paths.models) == self._stamp:
            return self
        return load(self._config)

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


def shipped_keys() -> frozenset[str]:
    """Return the keys of the shipped table."""
    return frozenset(_shipped_rows())


def load(config: Config | None = None) -> Models:
    """Return the shipped table with the user's own models from the settings file, and those that are registered.

    A row with `like` starts from that row and changes what it writes; so does one that has a shipped key, and where a
    model is registered it lies there. A registration that cannot be used is left out, and is one of the `faults`.

    Raises:
        BadConfig: a row is incomplete or says something unknown; the key and the field are named.
    """
    source = config.source if config else Path("models.toml")
    rows = dict(_shipped_rows())
    stamp = registered.stamp(config.paths.models) if config else 0
    registrations, faults = registered.read_all(config.paths.models) if config else ([], [])
    for key, row in (config.settings.models if config else {}).items():
        # A row of a shipped key changes that row; any other is new.
        own = _with_component_paths(row)
        rows[key] = _over(rows[key], own) if key in rows and "like" not in row else own
    with_registered = rows | {
        registration.key: _over(rows.get(registration.key, {}), registration.row) for registration in registrations
    }
    for registration in registrations:
        if problem := _unusable(registration, with_registered):
            faults.append(problem)
        else:
            rows[registration.key] = with_registered[registration.key]
    facts: dict[str, ModelFacts] = {}
    for key in rows:
        try:
            facts[key] = ModelFacts.model_validate({**_merge(key, rows, ()), "key": key})
        except ValidationError as error:
            problems = "; ".join(_explain(fault) for fault in error.errors())
            raise BadConfig(f"{source}: [models.{key}] {problems}.") from error
        except LookupError as error:
            raise BadConfig(f"{source}: [models.{key}] {error.args[0]}") from error
    return Models(facts, config, stamp, faults)


def _unusable(registration: Registration, rows: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Return what is wrong with a registered row; None where it is a model."""
    key = registration.key
    try:
        ModelFacts.model_validate({**_merge(key, rows, ()), "key": key})
    except (LookupError, ValidationError) as error:
        problem = str(error.args[0]) if isinstance(error, LookupError) else "is no model any more."
        return f"{key}: is registered, and {problem} Forget it: safelight models rm {key}"
    return None


def _explain(fault: Mapping[str, Any]) -> str:
    where = ".".join(map(str, fault["loc"]))
    if fault["type"] == "missing":
        return f'{where} is missing: name the model it resembles, like = "KEY"'
    if fault["type"] == "extra_forbidden":
        near = difflib.get_close_matches(where, ModelFacts.model_fields, n=1, cutoff=0.5)
        return f"{where}: no such field" + (f" (did you mean {near[0]}?)" if near else "")
    return f"{where}: {fault['msg']}".removeprefix(": Value error, ")


def _merge(key: str, rows: Mapping[str, Mapping[str, Any]], seen: tuple[str, ...]) -> dict[str, Any]:
    """Return a row with what it is like filled in."""
    if not KEY.fullmatch(key):
        raise LookupError("cannot be a key. Use letters, digits, . _ and -.")
    row = dict(rows[key])
    if "key" in row:
        raise LookupError("key = is not a field: the key is the name in brackets.")
    base = row.pop("like", None)
    if base is None:
        return row
    if not isinstance(base, str) or base not in rows:
        raise LookupError(f"like = {base!r} names no model. Known: {', '.join(rows)}.")
    if base in seen or base == key:
        raise LookupError(f'like = "{base}" leads back to itself.')
    inherited = _merge(base, rows, (*seen, key))
    if row.get("tiny"):
        inherited.pop("controlnets", None)  # they are of the full width
    merged = _over(inherited, row)
    # What a model is like is not where it lives: a new key has folders of its own, another repository other commits.
    own = (*PLACES, "revision") if "repository" in row else PLACES
    return {name: value for name, value in merged.items() if name in row or name not in own}


def _with_component_paths(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a user's row with `components.transformer = "/path"` as a folder; the counts come from `like`."""
    components = row.get("components")
    if not isinstance(components, Mapping) or not any(isinstance(value, str) for value in components.values()):
        return dict(row)
    paths = {name: value for name, value in components.items() if isinstance(value, str)}
    counts = {name: value for name, value in components.items() if name not in paths}
    return {**row, "components": counts, "component_paths": paths}


def _over(base: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` with what `row` writes; tables within are merged the same way."""
    merged = dict(base)
    for name, value in row.items():
        old = merged.get(name)
        merged[name] = {**old, **value} if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def folder(facts: ModelFacts, models: Path) -> Path:
    """Return where a model's diffusers folder is: its configured path, else its key below the models folder."""
    return Path(facts.path).expanduser() if facts.path else models / facts.key


def controlnet_folder(facts: ModelFacts, key: str, models: Path) -> Path:
    """Return where a ControlNet of a model is: its configured path, else its key below `controlnets`."""
    own = facts.controlnets[key].path
    return Path(own).expanduser() if own else models / "controlnets" / key


def is_there(facts: ModelFacts, models: Path) -> bool:
    """Whether the model can be loaded: a tiny one is built on first use, any other needs its index."""
    return facts.tiny or (folder(facts, models) / "model_index.json").is_file()


def missing_files(facts: ModelFacts, folder: Path) -> list[str]:
    """Return what jobs need and the model does not have: components, weights, and shards that its own indices name."""
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        named = [name for name, value in index.items() if isinstance(value, list) and value[:1] != [None]]
    except (OSError, ValueError, AttributeError):
        return ["a readable model_index.json"]
    missing: list[str] = []
    for component in named:
        place = Path(facts.component_paths.get(component, folder / component)).expanduser()
        if place.suffix in SUFFIXES:
            needed = [(str(place), place), (f"{component}/config.json", folder / component / "config.json")]
            missing += [name for name, file in needed if not file.is_file()]
            continue
        try:
            missing += _missing_of(component, place, has_weights=component in facts.components)
        except OSError as error:
            missing.append(f"{component}/ ({error.strerror})")
    return list(dict.fromkeys(missing))


def missing_of_controlnet(folder: Path) -> list[str]:
    """Return what jobs need and the folder of a ControlNet does not have."""
    lacks = [] if (folder / "config.json").is_file() else ["config.json"]
    try:
        missing = [name.removeprefix("./") for name in _missing_of(".", folder, has_weights=True)]
    except OSError as error:
        return [f"a readable folder ({error.strerror})"]
    return lacks + [name for name in missing if name]


def _missing_of(component: str, place: Path, *, has_weights: bool) -> Iterator[str]:
    """Yield what a component's folder lacks."""
    files = list(place.iterdir()) if place.is_dir() else []
    if not files:
        yield f"{component}/"
        return
    yield from (f"{component}/{file.name} (a broken link)" for file in sorted(files) if not file.exists())
    indices = sorted(file for file in files if file.name.endswith(".safetensors.index.json"))
    for shards in indices:
        for name in _shards(shards):
            if not (place / name).exists() and not (place / name).is_symlink():
                yield f"{component}/{name}"
    if has_weights and not indices and not any(file.suffix == ".safetensors" for file in files):
        yield f"{component}/*.safetensors"


def _shards(index: Path) -> list[str]:
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, LookupError, AttributeError, TypeError):
        return [f"a readable {index.name}"]
