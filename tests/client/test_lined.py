"""YAML and JSON whose mappings and lists know their lines."""

from __future__ import annotations

import json
from itertools import count
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from safelight.faults import Faults
from safelight.lined import Lined, Listed, read_json, read_yaml

TREES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.integers() | st.text(st.sampled_from('a"[]{}:,\\\n '), max_size=6),
    lambda inner: (
        st.lists(inner.filter(lambda item: not isinstance(item, list)), max_size=3)
        | st.dictionaries(st.text(max_size=2), inner, max_size=3)
    ),
    max_leaves=12,
)
"""Without lists right in lists: no value of a job is one, and their lines are not noted."""


def _named(tree: Any, names: Any) -> Any:
    """Return the tree with a name of its own for each key and each item, to be found in the text."""
    if isinstance(tree, dict):
        return {f"<{next(names)}>": _named(value, names) for value in tree.values()}
    if isinstance(tree, list):
        return [value if isinstance(value := _named(each, names), dict | list) else f"<{next(names)}>" for each in tree]
    return tree


def _lines(tree: Any, of: dict[str, int]) -> dict[str, int]:
    """Collect the lines of all keys and of all named items that a reader noted."""
    if isinstance(tree, Lined):
        of.update(tree.lines)
        for value in tree.values():
            _lines(value, of)
    elif isinstance(tree, Listed):
        for value, line in zip(tree, tree.lines, strict=True):
            if isinstance(value, str):
                of[value] = line
            elif isinstance(value, Lined):
                assert line == value.line
            _lines(value, of)
    return of


@given(TREES, st.integers(0, 2), st.sampled_from([", ", ",", "\n,", ",\n\n "]), st.sampled_from([": ", ":\n "]))
def test_every_key_and_item_is_on_the_line_where_it_stands(tree: Any, indent: int, comma: str, colon: str) -> None:
    text = json.dumps(_named(tree, count()), indent=indent, separators=(comma, colon))
    stands = {
        line[at : line.index(">", at) + 1]: number
        for number, line in enumerate(text.split("\n"), start=7)
        for at in range(len(line))
        if line[at] == "<"
    }
    faults = Faults("n.json")
    read = read_json(text, faults, first_line=7)

    assert not faults.found
    assert read == json.loads(text)
    assert _lines(read, {}) == stands


@given(TREES)
def test_yaml_notes_the_lines_that_json_notes(tree: Any) -> None:
    """JSON is YAML."""
    text = json.dumps(_named(tree, count()), indent=1)
    faults = Faults("n")

    assert _lines(read_json(text, faults), {}) == _lines(read_yaml(text, faults), {})
    assert not faults.found


def test_a_key_that_is_there_very_often_is_one_fault() -> None:
    faults = Faults("here")
    read_json("{" + '"a":1,' * 5_000 + '"b":2,"b":3}', faults)

    assert [fault.problem for fault in faults.found] == ["'a' is written twice", "'b' is written twice"]
