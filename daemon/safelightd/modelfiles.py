"""The files of a model's components: what must be there before a library looks for it, and what is never loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safelightd.weights import BadModelFolder

PICKLES = (".bin", ".ckpt", ".pkl", ".pt", ".pth")

VOCABULARIES = ({"tokenizer.json"}, {"vocab.json", "merges.txt"}, {"spiece.model"})
"""The files that a tokenizer reads its words from; one set is enough."""


def gone(place: Path, key: str) -> BadModelFolder:
    """Return what to say of a file or folder that was registered and is not there any more."""
    return BadModelFolder(
        f"{place} is gone: is its disk mounted? Put it back, or forget it (safelight models rm {key}) and register "
        "where it is now (safelight models add)."
    )


def read_json(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file of a model.

    Raises:
        BadModelFolder: it is missing, damaged, or no object.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BadModelFolder(f"{file} is missing. Fetch the model anew.") from error
    except ValueError as error:
        raise BadModelFolder(f"{file}: not JSON ({error}). Fetch the model anew.") from error
    if not isinstance(content, dict):
        raise BadModelFolder(f"{file}: not a JSON object. Fetch the model anew.")
    return content


def check_files(folder: Path, weights: str) -> None:
    """Raise where a file is missing that the component needs, naming all of them; a single file is all of it."""
    if folder.is_file():
        return
    index = folder / f"{weights}.index.json"
    needed = {"config.json", weights}
    if index.is_file():
        shards = read_json(index).get("weight_map", {}).values()
        needed = {"config.json", *shards}
    missing = sorted(name for name in needed if not (folder / name).is_file())
    if not missing:
        return
    pickles = sorted(file.name for file in folder.glob("*") if file.suffix in PICKLES)
    if pickles and weights in missing:
        raise BadModelFolder(
            f"{folder}: the weights are pickled ({', '.join(pickles)}), and a pickle can run any program. "
            f"Convert them to {weights}."
        )
    raise BadModelFolder(f"{folder}: {', '.join(missing)} is missing. Fetch the model anew.")


def check_vocabulary(folder: Path) -> None:
    """Raise where a tokenizer has no words: transformers 5 would go on with every prompt unknown to it."""
    if not any(all((folder / name).is_file() for name in names) for names in VOCABULARIES):
        raise BadModelFolder(f"{folder / 'tokenizer.json'} is missing. Fetch the model anew.")


def check_class(folder: Path, expected: str, library: str) -> None:
    """Raise where a folder given in a component's place holds a component of another class."""
    found = read_json(folder / "config.json").get("_class_name", expected)
    if library == "diffusers" and found != expected:
        raise BadModelFolder(f"{folder}: holds a {found}, and the model needs a {expected}. Name another folder.")
