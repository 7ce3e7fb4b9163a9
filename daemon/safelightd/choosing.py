"""Which files of a repository jobs load: settings, vocabularies, and of weights one copy. Knows no network."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import PurePosixPath

from safelight.errors import BadConfig
from safelight.models import ModelFacts
from safelight.published import Published
from safelight.pulled import WantedFile

WEIGHTS = ("diffusion_pytorch_model.safetensors", "model.safetensors")

INDEX = ".safetensors.index.json"

TEXT = (".json", ".model", ".txt")
"""What is needed beside weights: settings and vocabularies. Nothing else, and no pickle, is ever fetched."""

OF_CONTROLNET = ("config.json", "diffusion_pytorch_model*")

Read = Callable[[WantedFile], bytes]


def needed(what: Published, files: Iterable[WantedFile], read: Read) -> list[WantedFile]:
    """Return the files of a repository that jobs load: what the patterns name, and of weights one copy.

    Weights are the shards that an index names, else the one file without a variant in its name.

    Raises:
        BadConfig: the repository is not in the layout of diffusers, or has no safetensors, or what it has is not
            offered.
    """
    patterns = OF_CONTROLNET if what.controlnet else what.facts.files.patterns
    named = {file.name: file for file in files if _matches(file.name, patterns)}
    wanted = {name: file for name, file in named.items() if name.endswith(TEXT) and ".safetensors." not in name}
    if what.index not in wanted:
        raise BadConfig(f"{what.repository} has no {what.index}: it is not in the layout of diffusers.")
    if what.controlnet:
        _check_controlnet(what, read(wanted[what.index]))
        names = _weights("", named, read)
        if not names:
            raise BadConfig(f"{what.repository} has no {WEIGHTS[0]}, and pickles are never fetched.")
    else:
        names = _of_components(what.facts, named, read)
    wanted |= {name: named[name] for name in names}
    if not what.controlnet and (lacking := sorted(set(what.facts.components) - set(map(_component, wanted)))):
        raise BadConfig(f"{what.repository} has no {', '.join(lacking)}. Correct repository = or files.patterns.")
    return [wanted[name] for name in sorted(wanted)]


def _of_components(facts: ModelFacts, named: dict[str, WantedFile], read: Read) -> list[str]:
    found = []
    for component in sorted(set(map(_component, named)) - {"."}):
        if component in facts.component_paths:
            continue  # its weights are elsewhere; its config.json is among the texts
        weights = _weights(component, named, read)
        if component in facts.components and not weights:
            raise BadConfig(f"{facts.repository} has no safetensors in {component}/, and pickles are never fetched.")
        found += weights
    return found


def _component(name: str) -> str:
    return str(PurePosixPath(name).parent)


def _check_controlnet(what: Published, content: bytes) -> None:
    """Refuse gigabytes that no job could use, for what their settings say."""
    try:
        settings = json.loads(content)
        made_for, modes = settings["_class_name"], settings.get("num_mode")
    except (ValueError, LookupError, AttributeError, TypeError) as error:
        raise BadConfig(f"{what.repository}: its config.json is no ControlNet's ({error}).") from error
    if made_for != "FluxControlNetModel":
        raise BadConfig(f"{what.repository} is a {made_for}, not a FluxControlNetModel. Correct repository =.")
    if modes is not None:
        raise BadConfig(f"{what.repository} asks for a mode, which is not offered. Use one without modes.")


def _weights(component: str, named: dict[str, WantedFile], read: Read) -> list[str]:
    folder = PurePosixPath(component)
    for stem in WEIGHTS:
        whole = str(folder / stem)
        index = named.get(str(folder / f"{stem.removesuffix('.safetensors')}{INDEX}"))
        if index:
            try:
                shards = {str(folder / name) for name in json.loads(read(index))["weight_map"].values()}
            except (ValueError, LookupError, AttributeError, TypeError) as error:
                raise BadConfig(f"{index.name}: no index of weights ({error}).") from error
            if lacking := sorted(name for name in shards if not name.endswith(".safetensors") or name not in named):
                raise BadConfig(f"{index.name} names {', '.join(lacking)}, which the repository does not have.")
            return [index.name, *sorted(shards)]
        if whole in named:
            return [whole]
    return []


def _matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a file is one that the patterns mean: `*` stays within a folder, and no name leads out of one."""
    parts = name.split("/")
    if not name.isprintable() or any(part in ("", ".", "..") or part.startswith(".") for part in parts):
        return False
    return any(pattern.count("/") == len(parts) - 1 and fnmatchcase(name, pattern) for pattern in patterns)
