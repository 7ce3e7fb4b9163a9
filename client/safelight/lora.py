"""A LoRA as a job names it: in a list, in a word such as `style:0.8`, or in a prompt as `<lora:style:0.8>`. Pure.

A LoRA is a small file of weights that are added to a model's own. Knows no file and no tensor.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

SUFFIX = ".safetensors"

Expert = Literal["both", "high", "low"]
"""Of Wan A14B: which of its two transformers, the one for high noise or the one for low."""

_TAG = re.compile(r"\s*<lora:([^<>]*)>")
"""With the space before it, so that none is left over in the middle of a sentence."""


class Lora(BaseModel):
    """One LoRA of a job."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str = ""
    """Of a file in the folder `loras` of the models folder, or of one that comes with safelight; without .safetensors.
    May lie in folders below it."""
    path: str = ""
    """Or as the job called a file of its own, of which state/inputs has a copy."""
    scale: float = 1.0
    expert: Expert = "both"
    sha256: str = Field(default="", pattern=r"^([0-9a-f]{64})?$")
    """Of the file. "": the host that runs the job finds it by its name."""
    size_bytes: int = 0
    """Of the file; 0 where nobody has looked yet."""

    @property
    def label(self) -> str:
        """What a person calls it."""
        return self.name or self.path

    @property
    def tag(self) -> str:
        """The form in a prompt that other programs read, too."""
        expert = "" if self.expert == "both" else f":{self.expert}"
        return f"<lora:{self.name or PurePosixPath(self.path).stem}:{self.scale:g}{expert}>"


def same(one: Sequence[Lora], other: Sequence[Lora]) -> bool:
    """Whether two jobs' LoRAs change the weights alike, as far as is known of files that nobody has looked at yet."""
    return _identity(one, other) == _identity(other, one)


def _identity(loras: Sequence[Lora], beside: Sequence[Lora]) -> list[tuple[str, float, str]]:
    by_name = not all(lora.sha256 for lora in (*loras, *beside))
    return [(lora.label if by_name else lora.sha256, lora.scale, lora.expert) for lora in loras]


def read(value: object) -> tuple[Lora, ...]:
    """Return the LoRAs that a value of a prompt file names.

    Args:
        value: text, `style:0.8, grain`, or a list of such texts and of mappings with `name` or `path`, `scale`,
            `expert`.

    Raises:
        ValueError: it is none of these; the message says what is wrong.
    """
    if isinstance(value, str):
        return tuple(word(part) for part in value.split(",") if part.strip())
    if isinstance(value, list | tuple):
        return tuple(_one(part) for part in value)
    if isinstance(value, Lora | Mapping):
        return (_one(value),)
    raise ValueError("write a list of names")


def _one(value: object) -> Lora:
    if isinstance(value, str):
        return word(value)
    if isinstance(value, Lora):
        return _checked(value)
    if not isinstance(value, Mapping):
        raise ValueError("write a name, or name: and scale:")
    if unknown := [str(key) for key in value if key not in ("name", "path", "scale", "expert")]:
        raise ValueError(f"it has no {', '.join(unknown)}; name or path, scale and expert are known")
    name, path = (value.get(key) or "" for key in ("name", "path"))
    if not isinstance(name, str | int) or not isinstance(path, str) or bool(name) == bool(path):
        raise ValueError("write either name: or path:")
    if path:
        return _checked(Lora(path=path, scale=_scale(value.get("scale", 1.0)), expert=_expert(value.get("expert"))))
    return _checked(Lora(name=str(name), scale=_scale(value.get("scale", 1.0)), expert=_expert(value.get("expert"))))


def word(text: str) -> Lora:
    """Return the LoRA that `NAME[:SCALE[:EXPERT]]` means. What ends in .safetensors is a file's path, not a name.

    Raises:
        ValueError: it cannot be read; the message says why.
    """
    label, *more = (part.strip() for part in text.split(":"))
    if len(more) > 2:
        raise ValueError(f"{text.strip()!r} has too many colons; write NAME:SCALE")
    if not label:
        raise ValueError(f"{text.strip()!r} has no name; write NAME:SCALE")
    scale = _scale(more[0]) if more and more[0] else 1.0
    expert = _expert(more[1]) if len(more) > 1 else "both"
    if label.lower().endswith(SUFFIX):
        return _checked(Lora(path=label, scale=scale, expert=expert))
    return _checked(Lora(name=label, scale=scale, expert=expert))


def take_tags(text: str) -> tuple[str, tuple[Lora, ...]]:
    """Return a prompt without its `<lora:name:scale>`, and the LoRAs they name, in their order.

    Raises:
        ValueError: a tag cannot be read; the message says why.
    """
    found = tuple(_of_tag(match[1]) for match in _TAG.finditer(text))
    return (_TAG.sub("", text).strip(), found) if found else (text, ())


def _of_tag(inside: str) -> Lora:
    if "=" in inside or re.fullmatch(r"[^:]*:[^:]*:\s*[-+.\d]+\s*", inside):
        raise ValueError(f"<lora:{inside}> scales text encoder and model apart, which is not offered; write one scale")
    lora = word(inside)
    if lora.path:
        raise ValueError(f"<lora:{inside}> names a file; write its name without {SUFFIX}, or use loras: with path:")
    return lora


def _checked(lora: Lora) -> Lora:
    """Refuse what could mean a file outside of its folder, or break what it is printed into."""
    label = lora.label
    label.encode()  # half a surrogate pair is no text
    if not label.isprintable() or label != label.strip() or any(mark in label for mark in "<>,:\\"):
        raise ValueError(f"{label!r} cannot be a LoRA's name")
    if lora.name and (label.startswith(("/", "~", ".")) or ".." in PurePosixPath(label).parts):
        raise ValueError(f"{label!r} leads out of the folder of LoRAs")
    return lora


def _scale(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"scale {value!r} is not a number")
    try:
        scale = float(value)
    except ValueError:
        raise ValueError(f"scale {value!r} is not a number") from None
    if not math.isfinite(scale):
        raise ValueError(f"scale {value!r} is not a number")
    return scale


def _expert(value: object) -> Expert:
    if value is None:
        return "both"
    for known in get_args(Expert):
        if value == known:
            return known  # type: ignore[no-any-return]  # get_args tells nothing of what it returns
    raise ValueError(f"expert {value!r} is not both, high or low")
