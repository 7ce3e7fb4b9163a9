"""YAML and JSON as plain nested values whose mappings know their line. Knows no job.

Built from the parsers' events, never from their constructors: no tag is obeyed and no alias expanded. A YAML scalar
stays the text that was written (`on`, `010` and `1.50` mean what they look like), so the reader of a field decides.
"""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from safelight.errors import FAULTS_MAX
from safelight.faults import Faults, shown

DEPTH_MAX = 10
"""A prompt file needs five: document, jobs, job, matrix, values."""

_Loader: type = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_NULLS = ("", "~", "null", "Null", "NULL")
_JSON_MARKS = re.compile(r'"(?:[^"\\]|\\.)*"|[][{}:,\n]|[^][{}:,"\s]+')
_QUOTE = "Put text that holds ': ', ' #' or starts with one of [ { * & ! % @ ` in quotes."


class Lined(dict[str, Any]):
    """A mapping that knows its lines."""

    line: int = 0
    """That it starts on."""
    lines: dict[str, int]
    """Those of its keys."""

    def __init__(self, pairs: Iterable[tuple[str, Any]] = ()) -> None:
        super().__init__(pairs)
        self.lines = {}


class Listed(list[Any]):
    """A list that knows the lines that its items start on."""

    lines: Sequence[int] = ()


class _Refused(Exception):
    """The text is sound YAML, and says something that a prompt file may not."""

    def __init__(self, line: int, problem: str, remedy: str) -> None:
        super().__init__(problem)
        self.line, self.problem, self.remedy = line, problem, remedy


def read_yaml(text: str, faults: Faults, *, first_line: int = 1) -> Any:
    """Return the one document in `text`: None, text, lists and `Lined`.

    Args:
        faults: takes what is wrong; its place is the file.
        first_line: the line of the file that `text` starts on.
    """
    try:
        return _YamlReader(yaml.parse(text, Loader=_Loader), faults, first_line).document()
    except _Refused as error:
        faults.at_line(error.line).add(error.problem, error.remedy)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = faults.at_line(mark.line + first_line) if mark else faults
        place.add(f"not YAML: {error.problem or error.context}", _QUOTE)
    except yaml.YAMLError as error:
        faults.add(f"not YAML: {' '.join(str(error).split())}", "Remove what is not text.")
    return None


class _YamlReader:
    """Builds values from YAML events, one pass, downward."""

    def __init__(self, events: Iterator[yaml.Event], faults: Faults, first_line: int) -> None:
        self._events, self._faults, self._first_line = events, faults, first_line

    def document(self) -> Any:
        next(self._events)  # the start of the stream
        event = next(self._events)
        if isinstance(event, yaml.StreamEndEvent):
            return None
        value = self._value(next(self._events), 0)
        next(self._events)  # the end of the document
        event = next(self._events)
        if not isinstance(event, yaml.StreamEndEvent):
            raise _Refused(self._line(event), "a second document starts here", "Write one document a file.")
        return value

    def _line(self, event: yaml.Event) -> int:
        assert event.start_mark is not None  # the parser marks every event
        return int(event.start_mark.line) + self._first_line

    def _value(self, event: yaml.Event, depth: int) -> Any:
        if isinstance(event, yaml.AliasEvent):
            remedy = "Write the value out, or use defaults."
            raise _Refused(self._line(event), f"the alias {shown(f'*{event.anchor}')} is not taken", remedy)
        if (tag := getattr(event, "tag", None)) not in (None, "!"):
            raise _Refused(self._line(event), f"the tag {shown(tag)} is not taken", "Leave it out.")
        if isinstance(event, yaml.ScalarEvent):
            plain = event.style in (None, "")
            return None if plain and event.value in _NULLS else event.value
        if depth >= DEPTH_MAX:
            raise _Refused(self._line(event), f"nested more than {DEPTH_MAX} deep", "A job is a flat mapping.")
        if isinstance(event, yaml.SequenceStartEvent):
            return self._sequence(depth)
        return self._mapping(event, depth)

    def _until(self, end: type[yaml.Event]) -> Iterator[yaml.Event]:
        while not isinstance(event := next(self._events), end):
            yield event

    def _sequence(self, depth: int) -> Listed:
        sequence, lines = Listed(), []
        for event in self._until(yaml.SequenceEndEvent):
            lines.append(self._line(event))
            sequence.append(self._value(event, depth + 1))
        sequence.lines = lines
        return sequence

    def _mapping(self, start: yaml.Event, depth: int) -> Lined:
        mapping = Lined()
        mapping.line = self._line(start)
        for event in self._until(yaml.MappingEndEvent):
            if not isinstance(event, yaml.ScalarEvent):
                raise _Refused(self._line(event), "a key is not a word", _QUOTE)
            if event.value in mapping:
                problem = f"{shown(event.value)} is written twice"
                self._faults.at_line(self._line(event)).add(problem, "Keep one of them.")
            mapping.lines[event.value] = self._line(event)
            mapping[event.value] = self._value(next(self._events), depth + 1)
        return mapping


def read_json(text: str, faults: Faults, *, first_line: int = 1) -> Any:
    """Return the value in `text`, its objects as `Lined`, the lists in them and a list alone as `Listed`.

    `faults` takes what is wrong.
    """
    brackets = _brackets(text, first_line)

    def build(pairs: list[tuple[str, Any]]) -> Lined:
        bracket = next(brackets)
        mapping = Lined((key, bracket.listed(value)) for key, value in pairs)
        mapping.line = bracket.line
        twice = set[str]()
        for (key, _), line in zip(pairs, bracket.lines, strict=True):
            if key in mapping.lines and key not in twice and len(twice) < FAULTS_MAX:
                twice.add(key)
                faults.at_line(line).add(f"{shown(key)} is written twice", "Keep one of them.")
            mapping.lines[key] = line
        return mapping

    try:
        value = json.loads(text, object_pairs_hook=build, parse_constant=_refuse_constant)
        return next(brackets).listed(value) if isinstance(value, list) else value
    except json.JSONDecodeError as error:
        place = faults.at_line(error.lineno + first_line - 1)
        place.add(f"not JSON: {error.msg} at column {error.colno}", "Correct it there.")
    except RecursionError:
        faults.add("nested far too deep", "A job is a flat object.")
    except ValueError as error:  # a number of thousands of digits, or a constant that JSON has not
        faults.add(f"not JSON: {error}", "Write a number that a setting can have.")
    return None


def _refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant} is no number")


@dataclass
class _Bracket:
    """What stands between two brackets of a JSON text, or around all of them."""

    line: int
    opened_by: str
    lines: list[int] = field(default_factory=list)
    """Of the keys of an object, or of the items of a list."""
    inner: deque[list[int]] = field(default_factory=deque)
    """The lines of the lists right in it, in their order."""

    def listed(self, value: Any) -> Any:
        """Return the next list right in it with its lines, anything else as it is."""
        if isinstance(value, list):
            value = Listed(value)
            value.lines = self.inner.popleft()
        return value


def _brackets(text: str, first_line: int) -> Iterator[_Bracket]:
    """Yield each object in the order of the closing braces, that of the parser's hook; in the end the whole."""
    line = first_line
    key_line = line
    around = [_Bracket(line, "")]
    for mark in _JSON_MARKS.finditer(text):
        inside = around[-1]
        match mark[0]:
            case "\n":
                line += 1
            case ",":
                pass
            case ":":
                inside.lines.append(key_line)
            case "]":
                around.pop()
                around[-1].inner.append(inside.lines)
            case "}":
                yield around.pop()
            case other:
                key_line = line
                if inside.opened_by == "[":
                    inside.lines.append(line)
                if other in ("[", "{"):
                    around.append(_Bracket(line, other))
    yield around[0]
