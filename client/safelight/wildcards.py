"""Prompt templates: the texts that `{a|b}`, `{2$$a|b|c}`, `{0.5::a|2::b}` and `__name__` stand for.

The language is that of dynamicprompts, which the tests hold this against; what it does silently is a fault here: an
unknown wildcard, a brace that is never closed, a choice without alternatives, more picks than there are. Variables
and sampling marks are not taken. Everything outside braces and `__name__` is text and passes through unchanged; `\\{`,
`\\}`, `\\|` and `\\__name__` are the characters themselves. Knows no jobs and no seeds.
"""

from __future__ import annotations

import difflib
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from itertools import accumulate, permutations, product
from math import factorial
from pathlib import Path
from random import Random

from safelight.errors import Fault, InvalidJob
from safelight.faults import Faults
from safelight.jobspec import PROMPT_CHARACTERS_MAX

COUNT_CEILING = 10**12
"""Counting texts stops here: no night is that long."""

DEPTH_MAX = 50
"""Braces in braces, wildcards in wildcards."""

FILE_BYTES_MAX = 10 << 20
"""Of one wildcard file: a hundred thousand lines."""

FAULTS_MAX = 100
"""Reported of one wildcard file: enough to see what is wrong with it."""

_SPECIAL = re.compile(r"[{}\\]|__")
_NAME = r"(?=[^\s_])[\w\-./*?\[\]~!@()= ]{1,200}?"
_TOKEN = re.compile(rf"\\(?P<escaped>[{{}}|]|__{_NAME}__)|__(?P<name>{_NAME})__|(?P<mark>[{{}}|])")
_PICKS = re.compile(
    r"\s*(?:(?P<low>\d{1,6})?-(?P<high>\d{1,6})?|(?P<exact>\d{1,6}))\$\$(?:(?P<separator>[^${}]+)\$\$)?"
)
_WEIGHT = re.compile(r"\s*(\d{1,9}(?:\.\d{0,9})?|\.\d{1,9})::")
_UNKNOWN = re.compile(r"\$\{\s*[^\W\d][\w-]*\s*(?:\}|\?=|=|:(?!:))|(?<!\\)\{[~!@]|%\{[^{}]*\$\$")
"""What dynamicprompts has besides: variables, sampling marks and wraps."""


@dataclass(frozen=True, eq=False)
class Choice:
    """Between `low` and `high` different ones of `options`, joined."""

    options: tuple[Template, ...]
    weights: tuple[float, ...]
    low: int = 1
    high: int = 1
    separator: str = ","

    @cached_property
    def count(self) -> int:
        """How many texts this stands for, in every order, at most COUNT_CEILING."""
        if factorial(min(self.high, 20)) > COUNT_CEILING:
            return COUNT_CEILING
        # ways[k]: choices of k options, each with one of its texts; k! orders of each
        ways = [1] + [0] * self.high
        for option in self.options:
            for k in range(self.high, 0, -1):
                ways[k] += ways[k - 1] * option.count
        return min(sum(ways[k] * factorial(k) for k in range(self.low, self.high + 1)), COUNT_CEILING)

    @cached_property
    def size(self) -> int:
        largest = sorted((option.size for option in self.options), reverse=True)[: self.high]
        return sum(largest) + len(self.separator) * self.high + 1

    @cached_property
    def depth(self) -> int:
        return 1 + max((option.depth for option in self.options), default=0)

    @cached_property
    def _heaped(self) -> list[float]:
        return list(accumulate(self.weights))

    def draw(self, rng: Random) -> str:
        if self.high == 1 == self.low:
            return rng.choices(self.options, cum_weights=self._heaped)[0].draw(rng)
        picks = rng.randint(self.low, self.high)
        # The first to ring of exponential clocks: the same as drawing by weight without putting back.
        rings = [rng.expovariate(weight) for weight in self.weights]
        first = sorted(range(len(rings)), key=rings.__getitem__)[:picks]
        return self.separator.join(self.options[place].draw(rng) for place in first)

    def every(self) -> Iterator[str]:
        for picks in range(self.low, self.high + 1):
            for picked in permutations(self.options, picks):
                for texts in product(*(list(option.every()) for option in picked)):
                    yield self.separator.join(texts)


@dataclass(frozen=True, eq=False)
class Template:
    """Text with choices in it."""

    parts: tuple[str | Choice, ...]

    @cached_property
    def count(self) -> int:
        """How many texts this stands for, at most COUNT_CEILING; equal ones count each."""
        count = 1
        for part in self.parts:
            if isinstance(part, Choice):
                count = min(count * part.count, COUNT_CEILING)
        return count

    @cached_property
    def size(self) -> int:
        """An upper bound of the characters of one text and the parts it is made of: of the work of drawing it."""
        return sum((len(part) if isinstance(part, str) else part.size) + 1 for part in self.parts)

    @cached_property
    def depth(self) -> int:
        return max((part.depth for part in self.parts if isinstance(part, Choice)), default=0)

    def draw(self, rng: Random) -> str:
        """Return one of the texts, by weight."""
        return "".join(part if isinstance(part, str) else part.draw(rng) for part in self.parts)

    def every(self) -> Iterator[str]:
        """Yield all the texts, the last choice changing fastest; weights play no part."""
        pools = [[part] if isinstance(part, str) else list(part.every()) for part in self.parts]
        for texts in product(*pools):
            yield "".join(texts)


class Wildcards:
    """The wildcard files of one folder: `name.txt` is `__name__`, `sub/name.txt` is `__sub/name__`.

    One text a line, `#` comments; a line may hold choices and wildcards itself. `*` and `?` in a name match any
    characters. Links inside the folder are not followed. Files are listed and read once, when first needed.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._templates: dict[str, Template] = {}
        self._files: dict[str, tuple[dict[str, Template], list[Fault]]] = {}
        self._choices: dict[str, Choice] = {}
        self._unknown: dict[str, str] = {}
        self.nested: list[str] = []
        """What is being read: names of files, and "{" for each open brace."""

    def compile(self, text: str, where: str) -> Template:
        """Return the template that `text` is.

        Raises:
            InvalidJob: a brace or a wildcard in it, or in the wildcard files it names, cannot mean anything.
        """
        if not _SPECIAL.search(text):
            return Template((text,))
        if text not in self._templates:
            faults = Faults(where)
            template = self._read(text, faults)
            if faults.found:
                raise InvalidJob(faults.found)
            self._templates[text] = template
        return self._templates[text]

    def _read(self, text: str, faults: Faults) -> Template:
        """Return the template, or with a fault the text itself."""
        before = len(faults.found)
        template = _Reader(text, self, faults).template()
        if len(faults.found) == before and template.depth + len(self.nested) > DEPTH_MAX:
            faults.add(f"its choices are nested more than {DEPTH_MAX} deep", "Write them flatter.")
        elif len(faults.found) == before and template.size > 2 * PROMPT_CHARACTERS_MAX:
            problem = f"its choices can become longer than {PROMPT_CHARACTERS_MAX} characters"
            faults.add(problem, "Pick fewer of them, or shorten the wildcards.")
        return template if len(faults.found) == before else Template((text,))

    @cached_property
    def names(self) -> list[str]:
        """The names that there are files for, sorted."""
        names = []
        for folder, _, files in os.walk(self._folder, followlinks=False):
            below = Path(folder).relative_to(self._folder)
            names += [(below / file).with_suffix("").as_posix() for file in files if file.endswith(".txt")]
        return sorted(name for name in names if not name.startswith("."))

    def choice(self, name: str, faults: Faults) -> Choice:
        """Return the choice among the texts behind `__name__`, each once; an empty one and a fault without any."""
        if name in self._choices:
            return self._choices[name]
        files = [known for known in self.names if known == name or (_is_glob(name) and fnmatchcase(known, name))]
        if not files:
            if name not in self._unknown:
                self._unknown[name] = f"{self._near(name)} Write \\__{name}__ for the text itself."
            faults.add(f"there is no wildcard __{name}__", self._unknown[name])
            return Choice((), ())
        found: dict[str, Template] = {}
        for file in files:
            found |= self._file(file, faults)
        sound = all(file in self._files and not self._files[file][1] for file in files)
        if sound and not found:
            faults.add(f"the wildcard __{name}__ has no values", f"Write some into {self._folder / files[0]}.txt.")
        choice = Choice(tuple(found.values()), (1.0,) * len(found))
        if sound and found:
            self._choices[name] = choice
        return choice

    def _near(self, name: str) -> str:
        if not self.names:
            return f"There is no .txt file below {self._folder}."
        match = difflib.get_close_matches(name, self.names, n=3, cutoff=0.5)
        if match:
            return f"Did you mean {' or '.join(f'__{near}__' for near in match)}?"
        return f"Known: {', '.join(f'__{known}__' for known in self.names[:10])}."

    def _file(self, name: str, faults: Faults) -> dict[str, Template]:
        """Return one file's texts, each with its template."""
        if name in self.nested:
            inside = [each for each in self.nested[self.nested.index(name) :] if each != "{"]
            loop = " -> ".join(f"__{each}__" for each in [*inside, name])
            faults.add(f"a wildcard contains itself: {loop}", "Remove it from one of them.")
            return {}
        if len(self.nested) >= DEPTH_MAX:
            faults.add(f"its choices are nested more than {DEPTH_MAX} deep", "Write them flatter.")
            return {}
        if name not in self._files:
            self.nested.append(name)
            path = self._folder / f"{name}.txt"
            found = Faults(str(path))
            texts: dict[str, Template] = {}
            for number, line in enumerate(_lines(path, found), start=1):
                text = line.strip()
                if len(found.found) < FAULTS_MAX and text and text not in texts and not text.startswith("#"):
                    texts[text] = self._read(text, found.at(f"{path}:{number}"))
            self._files[name] = texts, found.found
            self.nested.pop()
        texts, those = self._files[name]
        faults.found[:] = dict.fromkeys([*faults.found, *those])
        return texts


def _is_glob(name: str) -> bool:
    return any(mark in name for mark in "*?[")


def _lines(path: Path, faults: Faults) -> list[str]:
    """Return the lines of a plain file of UTF-8; anything else is a fault."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if stat.S_ISREG(status.st_mode) and status.st_size <= FILE_BYTES_MAX:
                return file.read(FILE_BYTES_MAX).decode("utf-8-sig").splitlines()
            faults.add(f"it is no plain file of at most {FILE_BYTES_MAX >> 20} MiB", "Replace it, or remove it.")
    except OSError as error:
        faults.add(f"it cannot be read: {error.strerror}", "Links are not followed. Put the file itself there.")
    except UnicodeDecodeError as error:
        faults.add(f"byte {error.start} is not UTF-8", "Save it as UTF-8.")
    return []


class _Reader:
    """Reads one template, left to right."""

    def __init__(self, text: str, wildcards: Wildcards, faults: Faults) -> None:
        self._text, self._wildcards, self._faults = text, wildcards, faults
        self._place = 0
        self._gave_up = False

    def template(self) -> Template:
        if unknown := _UNKNOWN.search(self._text):
            problem = f"{unknown[0]!r} at column {unknown.start() + 1} is a part of dynamicprompts that is not taken"
            self._faults.add(problem, "Leave it out, or write \\{ for the brace itself.")
            return Template((self._text,))
        return self._parts(0)[0]

    def _parts(self, depth: int) -> tuple[Template, str]:
        """Return what comes up to the end of the text, or inside braces up to "|" or "}", and which of them it was."""
        parts: list[str | Choice] = []
        while token := _TOKEN.search(self._text, self._place):
            parts.append(self._text[self._place : token.start()])
            self._place = token.end()
            if token["escaped"]:
                parts.append(token["escaped"])
            elif token["name"]:
                parts.append(self._wildcards.choice(token["name"], self._faults))
            elif token["mark"] == "{":
                parts.append(self._choice(token.start(), depth + 1))
            elif depth:
                return _joined(parts), token["mark"]
            elif token["mark"] == "|":
                parts.append("|")
            else:
                problem = f"the brace }} at column {self._place} closes nothing"
                self._faults.add(problem, "Write \\} for the brace itself.")
        parts.append(self._text[self._place :])
        self._place = len(self._text)
        return _joined(parts), ""

    def _choice(self, start: int, depth: int) -> Choice:
        if len(self._wildcards.nested) >= DEPTH_MAX:
            self._faults.add(f"its choices are nested more than {DEPTH_MAX} deep", "Write them flatter.")
            self._place, self._gave_up = len(self._text), True
            return Choice((), ())
        picks = _PICKS.match(self._text, self._place)
        self._place = picks.end() if picks else self._place
        self._wildcards.nested.append("{")
        options, weights, end = [], [], "|"
        while end == "|":
            weight = _WEIGHT.match(self._text, self._place)
            self._place = weight.end() if weight else self._place
            option, end = self._parts(depth)
            options.append(option)
            weights.append(float(weight[1]) if weight else 1.0)
        self._wildcards.nested.pop()
        if not end:
            if depth == 1 and not self._gave_up:
                remedy = "Close it, or write \\{ for the brace itself."
                self._faults.add(f"the brace {{ at column {start + 1} is never closed", remedy)
            return Choice((), ())
        return self._checked(f"the brace {{ at column {start + 1}", picks, options, weights)

    def _checked(
        self, brace: str, picks: re.Match[str] | None, options: list[Template], weights: list[float]
    ) -> Choice:
        """Return the choice between `options`; what is wrong with it goes to the faults."""
        if not picks and len(options) == 1:
            remedy = "Separate options by |, or write \\{ for the brace itself."
            self._faults.add(f"{brace} offers no choice", remedy)
        if 0 in weights:
            self._faults.add(f"{brace} has an option of weight 0", "Leave the option out.")
        if picks:
            return self._picked(brace, picks, options, weights)
        return Choice(tuple(options), tuple(weights))

    def _picked(self, brace: str, picks: re.Match[str], options: list[Template], weights: list[float]) -> Choice:
        if len(options) == 1 and len(options[0].parts) == 1 and isinstance(wildcard := options[0].parts[0], Choice):
            # {2$$__colours__} picks among the values, not between the one wildcard.
            options, weights = list(wildcard.options), [1.0] * len(wildcard.options)
        low = int(picks["exact"] or picks["low"] or 1)
        high = int(picks["exact"] or picks["high"] or max(len(options), low))
        if not low <= high <= len(options):
            problem = f"{brace} asks for {low if low == high else f'{low} to {high}'} of {len(options)} options"
            self._faults.add(problem, "Ask for no more than there are.")
        return Choice(tuple(options), tuple(weights), low, high, picks["separator"] or ",")


def _joined(parts: list[str | Choice]) -> Template:
    return Template(tuple(part for part in parts if part))
