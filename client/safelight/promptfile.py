"""Prompt files: bytes in, drafts of jobs out. Pure; knows formats, no model, no wildcard, no picture."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePath
from typing import TypeVar

from safelight.draft import (
    BLANK,
    CELLS,
    Draft,
    known,
    make_draft,
    read_options,
    split_words,
)
from safelight.errors import FAULTS_MAX, Fault, InvalidJob
from safelight.faults import Faults, shown
from safelight.lined import Lined, Listed, read_json, read_yaml

TEXT_BYTES_MAX = 1 << 20
"""1 MiB of .txt or .md: 10,000 prompts of a hundred characters."""

TABLE_BYTES_MAX = 10 << 20
"""10 MiB of .csv, .json, .jsonl or .yaml: the same with every setting written out. 1 MB of YAML, 10,000 jobs, is read
in 0.4 s (libyaml, 2 cores, 2026-11-22)."""

JOBS_MAX = 100_000
"""Of one file; [inbox] max_jobs_per_file is the limit that a person sets."""

T = TypeVar("T")

_UTF_16_BOMS = (b"\xff\xfe", b"\xfe\xff")


def parse_file(path: Path) -> list[Draft]:
    """Return the drafts of a file on disk.

    Raises:
        InvalidJob: it cannot be read, or is no prompt file; every fault is listed.
    """
    try:
        with path.open("rb") as file:
            content = file.read(TABLE_BYTES_MAX + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        problem = getattr(error, "strerror", None) or str(error)
        raise InvalidJob([Fault(str(path), problem, "Name a prompt file that can be read.")]) from error
    return parse(content, str(path))


class InvalidPromptFile(InvalidJob):
    """A prompt file cannot be read as a whole; `drafts` are what could be read, for their own faults to be found."""

    def __init__(self, faults: Sequence[Fault], drafts: Sequence[Draft] = ()) -> None:
        super().__init__(faults)
        self.drafts = tuple(drafts)


def parse(content: bytes, name: str) -> list[Draft]:
    """Return the drafts of a prompt file, in its order.

    Args:
        name: what messages show; its suffix decides the format.

    Raises:
        InvalidPromptFile: every fault of how the file is written.
    """
    faults = Faults(name)
    drafts: list[Draft] = []
    suffix = PurePath(name).suffix.lower()
    if suffix not in _READERS:
        faults.add(f"{suffix or 'a name without a suffix'} is no prompt file", f"Known: {', '.join(SUFFIXES)}.")
        raise InvalidPromptFile(faults.found)
    text = _decoded(content, TEXT_BYTES_MAX if suffix in (".txt", ".md") else TABLE_BYTES_MAX, faults)
    if text is not None:
        drafts = _READERS[suffix](text, faults)
    if not drafts and not faults.found:
        faults.add("there is no prompt in it", "Write what the picture should show.")
    if faults.found:
        raise InvalidPromptFile(faults.found, drafts)
    return drafts


def _decoded(content: bytes, bytes_max: int, faults: Faults) -> str | None:
    """Return UTF-8 text with plain newlines and no byte order mark."""
    if len(content) > bytes_max:
        faults.add(f"it is larger than {bytes_max >> 20} MiB", "Split it into several files.")
    elif content.startswith(_UTF_16_BOMS):
        faults.add("it is UTF-16 text", "Save it as UTF-8.")
    elif b"\x00" in content:
        faults.add(f"byte {content.index(0)} is NUL, so it is no text", "Save it as UTF-8.")
    else:
        try:
            return content.decode().removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
        except UnicodeDecodeError as error:
            faults.add(f"byte {error.start} is not UTF-8", "Save it as UTF-8.")
    return None


def _until_enough(items: Iterable[T], drafts: list[Draft], faults: Faults) -> Iterator[T]:
    """Yield the items of a file, up to more jobs than a file may hold or more faults than a person would read."""
    for item in items:
        if len(drafts) >= JOBS_MAX:
            faults.add(f"it holds more than {JOBS_MAX:,} jobs", "Split it into several files.")
            return
        if len(faults.found) >= FAULTS_MAX:
            faults.add(f"it has more than {FAULTS_MAX:,} faults and was not read further", "Correct these first.")
            return
        yield item


def _read_txt(text: str, faults: Faults) -> list[Draft]:
    """One job a line; lines that start with `--` are options; front matter gives every line its defaults.

    A prompt in the front matter is that of option lines without one, or of the only job where there is no line.
    """
    front, body, first_line = _front_matter(text, faults)
    defaults = make_draft(front, faults.at_line(front.line))
    drafts: list[Draft] = []
    for number, line in _until_enough(enumerate(body.split("\n"), start=first_line), drafts, faults):
        written, place = line.strip(), faults.at_line(number)
        if not written or written.startswith("#"):
            continue
        job = read_options(split_words(written, place), place) if written.startswith("--") else {"prompt": written}
        drafts.append(make_draft(job, place, defaults))
    if not defaults.fields.get("prompt") and "prompt" not in defaults.matrix:
        return drafts
    if twice := next((draft.where for draft in drafts if "prompt" in draft.places.own), ""):
        problem = f"there is a prompt in the front matter, and another at {twice}"
        faults.at(defaults.places.own["prompt"]).add(problem, "Write both as lines below it, or keep one.")
    return drafts or [defaults]


def _read_md(text: str, faults: Faults) -> list[Draft]:
    """One job: the body is its prompt, the front matter the rest."""
    front, body, first_line = _front_matter(text, faults)
    prompt = body.strip()
    if prompt and front.get("prompt") is not None:
        faults.at_line(front.lines["prompt"]).add(
            "the prompt is written twice, in the front matter and below it", "Keep one of them."
        )
    elif prompt:
        front["prompt"] = prompt
        front.lines["prompt"] = first_line + body[: body.index(prompt)].count("\n")
    return [make_draft(front, faults)] if front else []


def _front_matter(text: str, faults: Faults) -> tuple[Lined, str, int]:
    """Return the front matter's mapping, the body, and the line that the body starts on."""
    if not text.lstrip("\n").startswith("---"):
        return Lined(), text, 1
    from frontmatter.default_handlers import YAMLHandler

    handler = YAMLHandler()
    if not handler.detect(text.lstrip("\n")):
        return Lined(), text, 1
    try:
        front, body = handler.split(text)
    except ValueError:
        faults.add("the front matter is never closed", "End it with a line ---.")
        return Lined(), "", 1
    mapping = read_yaml(front, faults, first_line=1 + text[: text.index(front)].count("\n"))
    if not isinstance(mapping, Lined | None):
        faults.add("the front matter is no list of settings", "Write name: value lines.")
        mapping = None
    return mapping or Lined(), body, 1 + text[: len(text) - len(body)].count("\n")


def _read_csv(text: str, faults: Faults) -> list[Draft]:
    """One job a row; the first row names the columns; an empty cell is the default."""
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    drafts: list[Draft] = []
    columns: list[str] = []
    line = 1
    try:
        for row in _until_enough(rows, drafts, faults):
            first_line, line = line, rows.line_num + 1
            cells = [cell.strip() for cell in row]
            if not any(cells):
                continue
            place = faults.at_line(first_line)
            if not columns:
                columns = _columns(cells, place)
                continue
            if any(cells[len(columns) :]):
                remedy = "Put text that holds a comma in double quotes."
                place.add(f"{len(cells)} cells below {len(columns)} columns", remedy)
            job = {column: cell for column, cell in zip(columns, cells, strict=False) if cell and column in CELLS}
            drafts.append(make_draft(job, place))
    except csv.Error as error:
        place = faults.at_line(rows.line_num)
        place.add(f"not CSV: {error}", "Close every quote, and double one that is text.")
    return drafts


def _columns(cells: list[str], faults: Faults) -> list[str]:
    if len(cells) == 1 and re.search(r"[;\t]", cells[0]):
        faults.add("the columns are not separated by commas", "Save it with commas.")
        return cells
    for number, column in _until_enough(enumerate(cells), [], faults):
        if column not in CELLS:
            faults.add(f"unknown column {shown(column)}", known(column, CELLS))
        elif column in cells[:number]:
            faults.add(f"the column {column} is there twice", "Keep one of them.")
    return cells


def _read_jsonl(text: str, faults: Faults) -> list[Draft]:
    """One object a line, one job each."""
    drafts: list[Draft] = []
    for number, line in _until_enough(enumerate(text.split("\n"), start=1), drafts, faults):
        if not line.strip():
            continue
        before = len(faults.found)
        job = read_json(line, faults, first_line=number)
        place = faults.at_line(number)
        if isinstance(job, Lined):
            drafts.append(make_draft(job, place))
        elif len(faults.found) == before:
            place.add("not an object", 'Write {"prompt": "..."} on each line.')
    return drafts


def _read_json(text: str, faults: Faults) -> list[Draft]:
    return _document(read_json(text, faults), faults) if text.strip() else []


def _read_yaml(text: str, faults: Faults) -> list[Draft]:
    return _document(read_yaml(text, faults), faults)


def _document(tree: object, faults: Faults) -> list[Draft]:
    """Read `defaults` and `jobs`, or a plain list of jobs, or a single job."""
    if tree is None:
        return []
    defaults, jobs, place = BLANK, tree, faults
    if isinstance(tree, Lined) and ("jobs" in tree or "defaults" in tree):
        defaults, jobs = _defaults(tree, faults), tree.get("jobs") or []
        place = faults.at_line(tree.lines.get("jobs", tree.line))
    elif isinstance(tree, Lined):
        return [make_draft(tree, faults.at_line(tree.line))]
    if not isinstance(jobs, list):
        place.add("there is no list of jobs", "Write jobs: and a list, each with a prompt.")
        return []
    drafts: list[Draft] = []
    lines = jobs.lines if isinstance(jobs, Listed) else ()
    for job, line in _until_enough(zip(jobs, lines, strict=True), drafts, faults):
        if isinstance(job, Lined):
            drafts.append(make_draft(job, faults.at_line(line), defaults))
        else:
            faults.at_line(line).add("this job is not a mapping", "Write prompt: and its text.")
    return drafts


def _defaults(tree: Lined, faults: Faults) -> Draft:
    for key in tree:
        if key not in ("defaults", "jobs"):
            faults.at_line(tree.lines[key]).add(f"unknown key {shown(key)} beside jobs", "Move it into defaults.")
    written = tree.get("defaults")
    if written is None:
        return BLANK
    if not isinstance(written, Lined):
        faults.at_line(tree.lines["defaults"]).add("defaults is not a mapping", "Write name: value below it.")
        return BLANK
    return make_draft(written, faults.at_line(written.line))


_READERS = {
    ".txt": _read_txt,
    ".md": _read_md,
    ".yaml": _read_yaml,
    ".yml": _read_yaml,
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
}

SUFFIXES: tuple[str, ...] = tuple(_READERS)
"""What the name of a prompt file ends with."""
