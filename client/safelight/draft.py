"""One job as a person wrote it: from a mapping in a file, or from options on a line. Knows no format, no model.

Data uses diffusers' own names (jobspec.FIELDS) plus CONTROLS; the short names of ALIASES are for options only.
"""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, Literal

from safelight.errors import InvalidJob
from safelight.faults import ALIKE, NOWHERE, Faults, Places, near, shown
from safelight.jobspec import FIELDS
from safelight.lined import Lined

CONTROLS = ("count", "matrix", "expand", "wildcard_seed")
"""What a person may write beside the fields of a job: how many jobs to make of it."""

CELLS = (*FIELDS, "count", "expand", "wildcard_seed")
"""What fits a cell or an option: all but the matrix, which options spell as sweeps."""

ALIASES: dict[str, str] = {
    "steps": "num_inference_steps",
    "negative": "negative_prompt",
    "guidance": "guidance_scale",
    "distilled_cfg": "guidance_scale",
    "distilled_cfg_scale": "guidance_scale",
    "guidance_2": "guidance_scale_2",
    "cfg": "true_cfg_scale",
    "cfg_scale": "true_cfg_scale",
    "frames": "num_frames",
    "video_frames": "num_frames",
    "frame_num": "num_frames",
    "shift": "flow_shift",
    "init_img": "image",
    "init_image": "image",
    "end_img": "last_image",
    "end_image": "last_image",
    "lora": "loras",
    "format": "output_format",
    "n": "count",
    "n_iter": "count",
    "batch_count": "count",
}
"""Short names and those of other programs, with `_` for `-`: option lines and the command line accept them."""

SWEEP_VALUES_MAX = 10_000

KEYS_MAX = 100
"""Of one mapping: three times as many as there are."""

LINE_CHARACTERS_MAX = 100_000
"""Of an option line: room for three prompts. shlex takes time by the square of a word."""

_OPTIONS = (*CELLS, "size", "sweep")
_JOINED = {"prompt": " ", "prompt_2": " ", "negative_prompt": " ", "seed": ",", "tags": ",", "loras": ","}
"""Options that take every word up to the next option, and what joins the words."""

_REPEATED = ("loras",)
"""Options that may be there several times, each adding to the others."""

_SIZE = re.compile(r"(\d+)[xX×*](\d+)")
_NUMBER = re.compile(r"[+-]?\d{1,12}(\.\d{1,6})?")


@dataclass(frozen=True)
class Draft:
    """One job as written, before wildcards, sweeps, count and the model's defaults."""

    fields: dict[str, object]
    """Names of jobspec.FIELDS; pictures are still names; the seed may be absent or several."""
    where: str
    """"night.txt:12"."""
    count: int = 1
    matrix: dict[str, tuple[object, ...]] = field(default_factory=dict)
    """Sweep axes: each combination of their values is a job."""
    expand: Literal["random", "all"] = "random"
    """Draw one text of a template, or make a job of every text that it stands for."""
    wildcard_seed: int | None = None
    places: Places = field(default=NOWHERE, compare=False)
    """Where each of its values is written."""


BLANK = Draft(fields={}, where="")


def make_draft(written: Mapping[str, Any], faults: Faults, under: Draft = BLANK) -> Draft:
    """Return the draft of one job over its file's defaults; None, as an empty cell, means the default.

    A job's own value replaces a default axis of that name, and a job's own axis a default value.
    """
    if len(written) > KEYS_MAX:
        faults.add(f"it has {len(written):,} keys", f"At most {KEYS_MAX}.")
        return under
    matrix_written = written.get("matrix")
    axes = _places(matrix_written, faults) if isinstance(matrix_written, Mapping) else {}
    places = Places(own={**axes, **_places(written, faults)}, inherited=under.places.own)
    faults = faults.knowing(places)
    for name in written:
        if name not in FIELDS and name not in CONTROLS:
            faults.of(name).add(f"unknown key {shown(name)}", known(name, (*FIELDS, *CONTROLS)))
    own = {name: value for name, value in written.items() if name in FIELDS and value is not None}
    matrix = _matrix(matrix_written, faults.knowing(Places(own=axes)), faults.of("matrix"))
    for name in matrix:
        if name in own:
            faults.of(name).add(f"{name} is written twice, once as an axis of matrix", "Keep one of them.")
    count = _whole(written, "count", faults)
    wildcard_seed = _whole(written, "wildcard_seed", faults)
    return Draft(
        fields={**{name: value for name, value in under.fields.items() if name not in matrix}, **own},
        where=faults.where,
        count=under.count if count is None else count,
        matrix={**{name: values for name, values in under.matrix.items() if name not in own}, **matrix},
        expand=_expand(written.get("expand"), faults) or under.expand,
        wildcard_seed=under.wildcard_seed if wildcard_seed is None else wildcard_seed,
        places=places,
    )


def _places(written: Mapping[str, Any], faults: Faults) -> dict[str, str]:
    """Return where each key of a mapping is written: on its line, else where the mapping is."""
    if isinstance(written, Lined):
        return {name: faults.at_line(line).where for name, line in written.lines.items()}
    return dict.fromkeys(written, faults.where)


def known(name: str, legal: Sequence[str]) -> str:
    """Return which of the `legal` names the unknown one may have meant, also by its alias."""
    aliases = {alias: canonical for alias, canonical in ALIASES.items() if canonical in legal}
    match = difflib.get_close_matches(name.replace("-", "_").lower(), [*legal, *aliases], n=1, cutoff=ALIKE)
    return f"Did you mean {aliases.get(match[0], match[0])}?" if match else f"Known: {', '.join(legal)}."


def _whole(written: Mapping[str, Any], name: str, faults: Faults) -> int | None:
    value = written.get(name)
    if value is None:
        return None
    read, expected = FIELDS["seed"]
    try:
        return int(read(value))
    except ValueError:
        faults.of(name).add(f"{name} {shown(value)} is not {expected}", "Write a number.")
    return None


def _expand(written: object, faults: Faults) -> Literal["random", "all"] | None:
    if written == "random" or written == "all":
        return written
    if written is not None:
        faults.of("expand").add(f"expand {shown(written)} is not random or all", "Use one of them.")
    return None


def _matrix(written: object, faults: Faults, whole: Faults) -> dict[str, tuple[object, ...]]:
    """Read `{axis: [value, ...]}`; an axis may also be the text of a sweep ("2, 3, .., 6").

    Args:
        faults: knows where each axis is written; `whole`, where the matrix is.
    """
    if written is None:
        return {}
    if not isinstance(written, Mapping):
        whole.add("matrix is not a mapping", "Write each axis with its list of values.")
        return {}
    if len(written) > KEYS_MAX:
        whole.add(f"matrix has {len(written):,} axes", f"At most {KEYS_MAX}.")
        return {}
    matrix: dict[str, tuple[object, ...]] = {}
    for name, values in written.items():
        if name not in FIELDS:
            faults.of(name).add(f"unknown axis {shown(name)} in matrix", known(name, tuple(FIELDS)))
        elif isinstance(values, str):
            matrix[name] = _values(values, faults.of(name))
        elif not isinstance(values, list | tuple) or not values:
            faults.of(name).add(f"the axis {name} has no list of values", "Write a list.")
        elif not all(isinstance(value, str | int | float) for value in values):
            faults.of(name).add(f"a value of the axis {name} is not text or a number", "Write plain values.")
        else:
            matrix[name] = tuple(values)
    return matrix


# Options


def parse_options(words: Sequence[str], where: str) -> Draft:
    """Return the draft of an option line: `--prompt 'a red fox' --steps 20 --n_iter 2`.

    Raises:
        InvalidJob: an unknown option, one without its value, or one that is there twice; every fault is listed.
    """
    faults = Faults(where)
    draft = make_draft(read_options(words, faults), faults)
    if faults.found:
        raise InvalidJob(faults.found)
    return draft


def split_words(line: str, faults: Faults) -> list[str]:
    """Return the words of an option line as a shell reads them; nothing is expanded."""
    if len(line) > LINE_CHARACTERS_MAX:
        faults.add(f"the options are {len(line):,} characters long", f"At most {LINE_CHARACTERS_MAX:,}.")
        return []
    try:
        return shlex.split(line)
    except ValueError as error:
        remedy = "Put text that holds an apostrophe in double quotes, and close every quote."
        faults.add(f"the options cannot be read: {str(error).lower()}", remedy)
    return []


def read_options(words: Sequence[str], faults: Faults) -> dict[str, Any]:
    """Return what options say, under the names of data; unquoted words after a prompt belong to it, as in A1111."""
    written: dict[str, Any] = {}
    position = 0
    while position < len(words):
        option, equals, first = words[position].partition("=")
        position += 1
        values = [first] if equals else []
        while position < len(words) and not words[position].startswith("--"):
            values.append(words[position])
            position += 1
        if not option.startswith("--"):
            faults.add(f"{shown(option)} belongs to no option", 'Write --prompt "..." first.')
        else:
            _read_option(option, values, written, faults)
    return written


def _read_option(option: str, values: list[str], written: dict[str, Any], faults: Faults) -> None:
    """Add one option's value to `written`."""
    name = option.removeprefix("--").replace("-", "_")
    name = ALIASES.get(name, name)
    if not name:
        faults.add(f"{option} alone is no option", "Leave it out, or write a name behind it.")
        return
    if name not in _OPTIONS:
        options = [f"--{legal.replace('_', '-')}" for legal in (*_OPTIONS, *ALIASES)]
        faults.add(f"unknown option {shown(option)}", near(option.replace("_", "-"), options))
        return
    if not values:
        faults.add(f"{option} has no value", f"Write {option} VALUE.")
        return
    if len(values) > 1 and name not in _JOINED:
        faults.add(f"{option} takes one value, not {shown(' '.join(values))}", "Put it in quotes, or keep one.")
        return
    value = _JOINED.get(name, "").join(values)
    if name == "sweep":
        _read_sweep(value, written.setdefault("matrix", {}), faults)
        return
    for found, its_value in _read_size(value, faults) if name == "size" else [(name, value)]:
        if found in written and found not in _REPEATED:
            faults.add(f"{found} is written twice, the second time by {option}", "Keep one of them.")
        written[found] = f"{written[found]},{its_value}" if found in written and found in _REPEATED else its_value


def _read_size(text: str, faults: Faults) -> list[tuple[str, str]]:
    if match := _SIZE.fullmatch(text):
        return [("width", match[1]), ("height", match[2])]
    faults.add(f"size {shown(text)} is not WIDTHxHEIGHT", "Write it as 1280x704.")
    return []


# Sweeps


def sweep(text: str) -> tuple[str, tuple[object, ...]]:
    """Return an axis and its values: `steps=20,30,40`, or `guidance=2, 3, .., 6` for 2, 3, 4, 5 and 6.

    Raises:
        InvalidJob: the axis is unknown, or its values cannot be read.
    """
    faults = Faults("--sweep")
    matrix: dict[str, tuple[object, ...]] = {}
    _read_sweep(text, matrix, faults)
    if faults.found:
        raise InvalidJob(faults.found)
    return matrix.popitem()


def _read_sweep(text: str, matrix: dict[str, tuple[object, ...]], faults: Faults) -> None:
    """Add the axis that `text` names to `matrix`."""
    written, equals, values = text.partition("=")
    name = written.strip().replace("-", "_")
    name = ALIASES.get(name, name)
    if not equals:
        faults.add(f"the sweep {shown(text)} has no values", "Write it as steps=20,30,40.")
    elif name not in FIELDS:
        faults.add(f"unknown axis {shown(written.strip())} in a sweep", near(name, [*FIELDS, *ALIASES]))
    elif name in matrix:
        faults.add(f"{name} is swept twice", "Keep one of them.")
    else:
        matrix[name] = _values(values, faults)


def _values(text: str, faults: Faults) -> tuple[object, ...]:
    """Return the values between the commas; `..` goes on in the step of the two numbers before it."""
    words = [word.strip() for word in text.split(",")]
    values: list[object] = []
    for place, word in enumerate(words):
        if not word:
            faults.add(f"there is an empty value in {shown(text)}", "Remove the spare comma.")
        elif word in ("..", "..."):
            values += _between(words[max(place - 2, 0) : place + 2], faults)
        else:
            values.append(word)
    return tuple(values)


def _between(around: list[str], faults: Faults) -> list[str]:
    """Return the numbers that `..` stands for in [first, second, "..", last], without those three."""
    if len(around) < 4 or not all(_NUMBER.fullmatch(around[place]) for place in (0, 1, 3)):
        faults.add(
            f"{shown(', '.join(around))} is no range", "Write two numbers before .. and one after it: 2, 3, .., 6."
        )
        return []
    first, second, last = (Decimal(around[place]) for place in (0, 1, 3))
    steps = (last - second) / (second - first) if second != first else Decimal(-1)
    if steps < 1 or steps != int(steps):
        faults.add(
            f"{shown(', '.join(around))} does not arrive at {last}", f"Start again from {last}, or end elsewhere."
        )
        return []
    if steps > SWEEP_VALUES_MAX:
        faults.add(f"{shown(', '.join(around))} makes {steps} values", f"At most {SWEEP_VALUES_MAX}.")
        return []
    return [str(second + (second - first) * number) for number in range(1, int(steps))]
