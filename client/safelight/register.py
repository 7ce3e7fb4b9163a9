"""From a path on a person's disk to registrations: what lies there, which model it is, and where the rest comes from.

Reads headers and settings; reads no weight, copies nothing, and opens nothing that is pickled.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safelight import layout, models, registered, tensorfile
from safelight.config import Config
from safelight.errors import Fault, InvalidJob, SafelightError
from safelight.layout import TRANSFORMERS, Layout
from safelight.models import KEY, ModelFacts, Models
from safelight.paths import SYSTEM_CONFIG
from safelight.registered import Registration

NATIVE = ("Wan2.2_VAE.pth", "Wan2.1_VAE.pth")
"""Say that a folder is for Wan's own program; its text encoder and VAE are pickles."""

LOW_NOISE = re.compile(r"low[-_ ]?noise", re.IGNORECASE)

LARGE = "transformer"

HOMES = ("/home/", "/root/", "/run/user/")
"""What ProtectHome hides (systemd.exec(5))."""


@dataclass(frozen=True)
class Asked:
    """What a person wants registered."""

    path: Path
    key: str | None = None
    like: str | None = None
    folder: Path | None = None
    """Where the components come from that a single file does not hold."""
    components: Mapping[str, Path] = field(default_factory=dict)


@dataclass(frozen=True)
class Found:
    """What lies at a path: a folder in the layout of diffusers, or weights in the place of its transformer."""

    place: Path
    parameters: int
    family: layout.Family
    experts: int = 0
    """0 where it does not say."""
    is_folder: bool = False


def registrations(asked: Asked, config: Config, table: Models) -> tuple[list[Registration], list[str]]:
    """Return what to register, and what else lies there and why not: of a whole cache, every model that is known.

    Raises:
        InvalidJob: it cannot be registered; what is wrong, and what to do.
        SafelightError: a file is damaged.
    """
    path = Path(os.path.abspath(asked.path.expanduser()))  # noqa: PTH100 - resolve would follow the cache's links
    if config.source == SYSTEM_CONFIG and str(path).startswith(HOMES):
        remedy = f"Move it below {config.paths.models}, or anywhere else outside of home folders."
        raise _fault(path, "lies in a home folder, which the system's daemon cannot see (ProtectHome)", remedy)
    try:
        caches = sorted(path.glob("models--*/snapshots")) if path.is_dir() else []
        if caches and asked.key is None and asked.like is None:
            return _of_cache(path, config, table)
        return [_registration(asked, snapshot(path), config, table)], []
    except OSError as error:
        raise _fault(path, f"cannot be read ({error.strerror})", "Make it readable for this user.") from error


def snapshot(path: Path) -> Path:
    """Return the folder of the commit that `main` is of a model in the hub's cache; any other path as it is.

    Raises:
        InvalidJob: the cache has no whole commit.
    """
    if not (path / "snapshots").is_dir():
        return path
    main = path / "refs/main"
    commit = main.read_text(encoding="utf-8").strip() if main.is_file() else ""
    if commit and (path / "snapshots" / commit).is_dir():
        return path / "snapshots" / commit
    there = sorted(each for each in (path / "snapshots").iterdir() if each.is_dir())
    if len(there) != 1:
        raise _fault(path, f"has {len(there)} commits and no main", "Name the folder of one, below snapshots/.")
    return there[0]


def _of_cache(path: Path, config: Config, table: Models) -> tuple[list[Registration], list[str]]:
    """Return what the hub's cache has of the models in the table, and why it is not more."""
    found, others = [], []
    for facts in table.values():
        place = path / f"models--{facts.repository.replace('/', '--')}"
        if facts.tiny or not facts.repository or not place.is_dir():
            continue
        try:
            found.append(_registration(Asked(place, key=facts.key), snapshot(place), config, table))
        except SafelightError as error:
            others.append(str(error))
    if not found and not others:
        known = ", ".join(facts.repository for facts in table.values() if facts.repository and not facts.tiny)
        raise _fault(path, "is a cache of the hub without a model of the table", f"Known: {known}.")
    return found, others


def _registration(asked: Asked, path: Path, config: Config, table: Models) -> Registration:
    found = _look(path)
    facts = _like(found, asked, table)
    _check_place(path, facts, config)
    if found.is_folder:
        key = _free_key(asked.key or facts.key, path, config, table)
        lacks = models.missing_files(facts.model_copy(update={"component_paths": {}}), path)
        if lacks:
            shown = ", ".join(lacks[:3]) + (f" and {len(lacks) - 3} more" if len(lacks) > 3 else "")
            raise _fault(path, f"lacks {shown}", "Fetch it again where it came from, whole.")
        return Registration(key=key, like=_origin(facts, config), folder=str(path))
    key = _free_key(asked.key or _slug(path), path, config, table)
    components = {LARGE: path, **{name: place.expanduser().absolute() for name, place in asked.components.items()}}
    _check_components(components, facts)
    return Registration(
        key=key,
        like=_origin(facts, config),
        folder=_rest(asked, facts, config),
        components={name: str(place) for name, place in components.items()},
    )


def _origin(facts: ModelFacts, config: Config) -> str:
    """Return the key whose facts these are; not a registered one's, which may be forgotten."""
    base = registered.read(config.paths.models, facts.key)
    return base.like if base else facts.key


def _look(path: Path) -> Found:
    """Return what lies at a path.

    Raises:
        InvalidJob: nothing that can be registered does.
    """
    if not path.exists():
        problem = "is a broken link" if path.is_symlink() else "does not exist"
        raise _fault(path, problem, "Name a folder in the layout of diffusers, or a .safetensors or .gguf file.")
    if path.is_file():
        return _look_at_file(path)
    if (path / "model_index.json").is_file():
        return _look_at_folder(path)
    if any((path / name).exists() for name in NATIVE):
        remedy = "Register the folder of its -Diffusers repository, or its transformer's .safetensors alone."
        raise _fault(path, "is for Wan's own program: text encoder and VAE are pickles, which are never opened", remedy)
    if (path / "config.json").is_file() and any(path.glob("*.safetensors")):
        return _look_at_component(path)
    if left := sorted(file.name for file in path.iterdir() if file.suffix in tensorfile.PICKLES):
        raise _pickle(path / left[0])
    raise _fault(path, "has no model_index.json", "Name a folder in the layout of diffusers, or one of its files.")


def _look_at_file(path: Path) -> Found:
    found = _layout_of(path)
    return Found(path, found.parameters, found.family)


def _layout_of(path: Path) -> Layout:
    suffix = path.suffix.lower()
    if suffix in tensorfile.PICKLES:
        raise _pickle(path)
    if path.suffix not in tensorfile.SUFFIXES:
        raise _fault(path, "is no file of weights", f"Use one whose name ends with {' or '.join(tensorfile.SUFFIXES)}.")
    return layout.recognise(tensorfile.entries(path), path)


def _look_at_folder(path: Path) -> Found:
    index = _read_object(path / "model_index.json")
    classes = {name: value[1] for name, value in index.items() if isinstance(value, list) and len(value) == 2}
    family = next((family for family, kind in TRANSFORMERS.items() if classes.get(LARGE) == kind), None)
    if family is None:
        problem = f"is a {index.get('_class_name', 'model of unknown class')}"
        raise _fault(path, problem, "FLUX.1 and Wan 2.2 can be registered.")
    return Found(path, _parameters(path / LARGE), family, 2 if classes.get(f"{LARGE}_2") else 1, is_folder=True)


def _look_at_component(path: Path) -> Found:
    kind = _read_object(path / "config.json").get("_class_name")
    family = next((family for family, known in TRANSFORMERS.items() if kind == known), None)
    if family is None:
        raise _fault(path, f"holds a component of the class {kind}", f"Use {', '.join(TRANSFORMERS.values())}.")
    return Found(path, _parameters(path), family)


def _parameters(component: Path) -> int:
    """Return how many a folder of weights has.

    Raises:
        InvalidJob: they are quantised, which safelight does itself. SafelightError: a file is damaged.
    """
    config = component / "config.json"
    if config.is_file() and "quantization_config" in _read_object(config):
        raise _fault(component, "is quantised already", "Register the unquantised weights; safelight quantises them.")
    files = [file for file in sorted(component.glob("*.safetensors")) if file.exists()]
    return sum(entry.parameters for file in files for entry in tensorfile.entries(file))


def _like(found: Found, asked: Asked, table: Models) -> ModelFacts:
    """Return the model of the table that has these weights' size, or the one that was named, if it has.

    Raises:
        InvalidJob: there is none, or several.
    """
    named = asked.like or (asked.key if asked.key in table and found.is_folder else None)
    if named is not None:
        if named not in table:
            known = f"Known: {', '.join(table.near(named))} (safelight models list)."
            raise _fault(Path(f"--like {named}"), "is not a model", known)
        facts = table[named]
        # Of a folder that lacks files the sum says nothing; what it lacks is said in its place.
        whole = not found.is_folder or not models.missing_files(facts, found.place)
        if facts.family != found.family or (whole and facts.components.get(LARGE) != found.parameters):
            raise _fault(found.place, f"holds {_words(found)}, and {named} has {_count(facts)}", _remedy(found, table))
        return facts
    fit = [facts for facts in table.values() if _fits(found, facts)]
    if not fit:
        raise _fault(found.place, f"holds {_words(found)}, and no model of the table does", _remedy(found, table))
    published = [facts for facts in fit if _repository(found.place) == facts.repository]
    shipped = [facts for facts in fit if facts.key in models.shipped_keys()]
    best = published or [facts for facts in shipped if not facts.tiny] or shipped or fit
    if len(best) > 1:
        raise _fault(found.place, f"may be {', '.join(facts.key for facts in best)}", "Say which: --like KEY.")
    return best[0]


def _repository(place: Path) -> str | None:
    """Return the repository that a folder of the hub's cache is of."""
    names = [part.removeprefix("models--") for part in place.parts if part.startswith("models--")]
    return names[-1].replace("--", "/", 1) if names else None


def is_placed(facts: ModelFacts) -> bool:
    """Whether a row of the table says where its own files are."""
    return bool(facts.path or facts.component_paths)


def _fits(found: Found, facts: ModelFacts) -> bool:
    same = (facts.family, facts.components.get(LARGE)) == (found.family, found.parameters)
    return same and (not found.experts or found.experts == facts.experts)


def _words(found: Found) -> str:
    name = {"flux": "FLUX", "wan": "Wan"}[found.family]
    return f"a {name} transformer of {found.parameters:,} parameters"


def _count(facts: ModelFacts) -> str:
    name = {"flux": "FLUX", "wan": "Wan"}[facts.family]
    return f"a {name} transformer of {facts.components.get(LARGE, 0):,}"


def _remedy(found: Found, table: Models) -> str:
    same = [facts for facts in table.values() if facts.family == found.family and not facts.tiny]
    known = ", ".join(f"{facts.key} {facts.components.get(LARGE, 0):,}" for facts in same)
    return f"Known: {known}."


def _check_components(components: Mapping[str, Path], facts: ModelFacts) -> None:
    """Raise InvalidJob unless these are transformers of the model, all of them; every fault is listed."""
    faults = []
    own = [name for name in facts.components if name.startswith(LARGE)]
    for name, place in components.items():
        if name not in own:
            faults.append(Fault(f"--component {name}", f"is no transformer of {facts.key}", f"Use {', '.join(own)}."))
            continue
        found = _look(place)
        if found.is_folder or (found.family, found.parameters) != (facts.family, facts.components[name]):
            faults.append(Fault(str(place), f"holds {_words(found)}, not {facts.key}'s {name}", "Name another file."))
        if len(own) > 1 and name == LARGE and LOW_NOISE.search(place.name):
            remedy = f"Give the high-noise expert as PATH, this one as --component {LARGE}_2=PATH."
            faults.append(Fault(str(place), f"is called low noise, and {name} is the high-noise expert", remedy))
    faults += [
        Fault(
            f"{facts.key}: {name}", "is its second expert, for low noise, and is not given", f"--component {name}=PATH"
        )
        for name in own
        if name not in components
    ]
    if faults:
        raise InvalidJob(faults)


def _rest(asked: Asked, facts: ModelFacts, config: Config) -> str:
    """Return the folder that has what a single file does not: the one named, else the one of what it is like."""
    if asked.folder is not None:
        folder = snapshot(asked.folder.expanduser().absolute())
        if not (folder / "model_index.json").is_file():
            raise _fault(folder, "has no model_index.json", "Name a folder in the layout of diffusers.")
        if _look_at_index(folder) != facts.family:
            raise _fault(folder, f"is of another kind than {facts.key}", "Name a folder of the same model.")
        return str(folder)
    folder = models.folder(facts, config.paths.models)
    return str(folder) if (folder / "model_index.json").is_file() else ""


def _look_at_index(folder: Path) -> str | None:
    kind = _read_object(folder / "model_index.json").get(LARGE)
    return next(
        (family for family, known in TRANSFORMERS.items() if isinstance(kind, list) and kind[1:] == [known]), None
    )


def _check_place(path: Path, facts: ModelFacts, config: Config) -> None:
    """Raise InvalidJob for what lies where safelight itself keeps things."""
    folder = config.paths.models
    if not path.is_relative_to(folder):
        return
    inside = path.relative_to(folder).parts
    if path == models.folder(facts, folder):
        raise _fault(path, f"is where {facts.key} belongs, and is found there by itself", "There is nothing to do.")
    if not inside or inside[0] in ("prepared", "fused", registered.FOLDER) or inside[0].startswith("."):
        raise _fault(path, "is where safelight keeps its own files", "Name a model's folder or file.")


def _free_key(key: str, path: Path, config: Config, table: Models) -> str:
    """Return a key that names nothing else yet.

    Raises:
        InvalidJob: it does, or cannot be one.
    """
    other = "Choose another with --as KEY."
    if not KEY.fullmatch(key):
        raise _fault(Path(key), "cannot be a key", "Use letters, digits, . _ and -, with --as KEY.")
    every, _ = registered.read_all(config.paths.models)
    same = next((found for found in every if path in found.own), None)
    if same is not None:
        raise _fault(path, f"is registered as {same.key}", f"Forget that first: safelight models rm {same.key}.")
    if registered.file_of(config.paths.models, key).exists():
        raise _fault(Path(key), "is registered already", f"safelight models rm {key} forgets it. {other}")
    if key in table and is_placed(table[key]):
        raise _fault(Path(key), f"has its place in your settings, {config.source}", other)
    if key in table and (table[key].tiny or models.is_there(table[key], config.paths.models)):
        raise _fault(Path(key), "is a model that is there already", other)
    if path != config.paths.models / key and os.path.lexists(config.paths.models / key):
        raise _fault(config.paths.models / key, "is in the way: a model of that name would lie there", other)
    return key


def _slug(path: Path) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem if path.is_file() else path.name).strip("-._")[:80].lower()


def _pickle(path: Path) -> InvalidJob:
    remedy = "Use the model's .safetensors file, or convert it where a program may run."
    return _fault(path, "is a pickle, and a pickle can run any program: it is never opened", remedy)


def _read_object(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _fault(file, f"is not JSON ({error})", "Fetch it again.") from error
    if not isinstance(content, dict):
        raise _fault(file, "is no JSON object", "Fetch it again.")
    return content


def _fault(where: Path, problem: str, remedy: str) -> InvalidJob:
    return InvalidJob([Fault(str(where), problem, remedy)])
