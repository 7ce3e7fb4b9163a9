"""Rules of this repository that no other tool checks: reasons beside exceptions, short files, truthful documents."""

from __future__ import annotations

import io
import re
import shlex
import shutil
import subprocess
import tokenize
import tomllib
from pathlib import Path

import click
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from safelight import __version__
from safelight.cli import main

ROOT = Path(__file__).parents[1]

PYTHON_LINES_MAX = 500
TEST_LINES_MAX = 700
"""A test file is a list of cases: it may be longer than what it tests."""

FORBIDDEN = {
    "the address of a package index": re.compile("index" + r"-url|pypi\.org/|/simp" + "le/"),
    "work put off": re.compile("TO" + "DO|FIX" + "ME"),
}

needs_git = pytest.mark.skipif(
    not shutil.which("git") or not (ROOT / ".git").exists(), reason="not a git checkout: its files are unknown"
)


def files(pattern: str = "*") -> list[Path]:
    """Return the files that git has or would add."""
    said = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", pattern],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [path for name in said.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def comments(source: str) -> list[tuple[int, str]]:
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return [(token.start[0], token.string) for token in tokens if token.type == tokenize.COMMENT]


def without_reason(source: str) -> list[int]:
    """Return the lines whose `noqa` or `type: ignore` names no rule, or gives no reason of two words or more."""
    wanted = re.compile(r"(?:noqa: [A-Z]+\d+(?:, ?[A-Z]+\d+)*|type: ignore\[[\w, -]+\])\s*(?:[-#—:]+\s*)?\w\S*\s+\S+")
    found = [(line, text) for line, text in comments(source) if re.search(r"\bnoqa\b|type: ignore", text)]
    return [line for line, text in found if not wanted.search(text)]


@needs_git
def test_every_exception_from_a_rule_has_its_reason_beside_it() -> None:
    lacking = [
        f"{path.relative_to(ROOT)}:{line}" for path in files("*.py") for line in without_reason(path.read_text())
    ]

    assert lacking == []


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("x = 1  # noqa: E501 - a URL cannot be broken", []),
        ("x = 1  # type: ignore[attr-defined]  # it is a generator", []),
        ("x = 1  # noqa", [1]),
        ("x = 1  # noqa: E501", [1]),
        ("x = 1\ny = 2  # type: ignore", [2]),
        ("x = 1  # type: ignore[attr-defined]", [1]),
        ("x = '# noqa'", []),
    ],
)
def test_a_reason_is_recognised(source: str, lines: list[int]) -> None:
    assert without_reason(source) == lines


@needs_git
def test_no_python_file_is_too_long_to_read_at_one_sitting() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in files("*.py")}

    def longest(name: str) -> int:
        return TEST_LINES_MAX if name.startswith("tests/") else PYTHON_LINES_MAX

    assert {name: length for name, length in lengths.items() if length > longest(name)} == {}


@needs_git
@pytest.mark.parametrize("what", FORBIDDEN)
def test_no_file_names(what: str) -> None:
    found = []
    for path in files():
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue  # pictures and clips
        found += [
            f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
            for number, line in enumerate(text.splitlines(), 1)
            if FORBIDDEN[what].search(line)
        ]

    assert found == []


def test_the_version_is_the_same_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    assert project["version"] == __version__


def test_the_changelog_tells_what_is_new() -> None:
    headings = re.findall(r"^## \[?([^\]\s]+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)

    assert headings
    assert headings[0].lower() in {"unreleased", __version__}


def test_every_dependency_has_a_tested_version() -> None:
    """`make` installs with constraints.txt: a dependency that it lacks would differ from day to day."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    groups = [project["project"]["dependencies"], *project["project"]["optional-dependencies"].values()]
    named = [Requirement(line) for group in [*groups, *project["dependency-groups"].values()] for line in group]
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line[:1] != "#"]
    pinned = dict(line.split("==") for line in lines)
    versions = {canonicalize_name(name): version for name, version in pinned.items()}

    assert [str(need) for need in named if canonicalize_name(need.name) not in versions] == []
    assert [str(need) for need in named if versions[canonicalize_name(need.name)] not in need.specifier] == []
    assert [version for version in versions.values() if "+" in version] == []


def commands(markdown: str) -> list[list[str]]:
    """Return the words after `safelight` of each line of the fenced blocks."""
    blocks = re.findall(r"^```(?:sh|bash|console)?\n(.*?)^```", markdown, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    found = [re.search(r"(?:^|[$;|&(]\s*)safelight\s+(.*)", line) for line in lines]
    return [shlex.split(match[1], comments=True) for match in found if match]


def faults(words: list[str]) -> list[str]:
    """Return what of one documented command line the program does not know."""
    command: click.Command = main
    context = click.Context(main)
    rest = list(words)
    while isinstance(command, click.Group):
        if not rest:
            return ["no command"]
        name = rest.pop(0)
        found = command.get_command(context, name)
        if found is None:
            return [f"no command {name}"]
        command, context = found, click.Context(found, info_name=name, parent=context)
    known = {option for parameter in command.params for option in [*parameter.opts, *parameter.secondary_opts]}
    named = {word.split("=")[0] for word in rest if word.startswith("--")}
    return [f"no option {option}" for option in sorted(named - known - {"--help"})]


def test_every_command_of_the_readme_exists() -> None:
    documented = commands((ROOT / "README.md").read_text())

    assert len(documented) >= 5
    assert {shlex.join(words): found for words in documented if (found := faults(words))} == {}


def test_a_command_that_does_not_exist_would_be_noticed() -> None:
    markdown = "```sh\n$ safelight paint cat  # no\nsafelight add 'a cat' --colour\nsafelight service mend\n```\n"

    found = [faults(words) for words in commands(markdown)]

    assert found == [["no command paint"], ["no option --colour"], ["no command mend"]]


def test_every_target_of_the_readme_is_in_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^make (\w+)", (ROOT / "README.md").read_text(), re.MULTILINE))

    assert {"demo", "test"} <= targets
    assert [target for target in sorted(targets) if not re.search(rf"^{target}:", makefile, re.MULTILINE)] == []


def test_every_link_between_documents_leads_somewhere() -> None:
    pages = [ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")]
    link = re.compile(r"\]\((?!https?:|#|mailto:)([^)#\s]+)")

    links = [(page, target) for page in pages for target in link.findall(page.read_text())]

    assert links
    assert [f"{page.name}: {target}" for page, target in links if not (page.parent / target).exists()] == []


@needs_git
def test_every_bench_that_a_page_or_a_docstring_calls_is_a_script() -> None:
    called = {
        (str(path.relative_to(ROOT)), name)
        for path in [*files("*.md"), *files("*.py")]
        for name in re.findall(r"python -m bench\.(\w+)", path.read_text(encoding="utf-8"))
    }
    scripts = {path.stem for path in (ROOT / "bench").glob("*.py") if "__main__" in path.read_text(encoding="utf-8")}

    assert scripts
    assert [call for call in sorted(called) if call[1] not in scripts] == []


PROMISED = re.compile(r"`(tests/[\w/]+\.py)::(test_\w+)`")


def test_every_promise_names_a_test_that_is_there() -> None:
    page = (ROOT / "docs/reliability.md").read_text(encoding="utf-8")
    promised = PROMISED.findall(page)
    missing = [
        f"{file}::{name}"
        for file, name in promised
        if not (ROOT / file).is_file() or f"def {name}(" not in (ROOT / file).read_text(encoding="utf-8")
    ]
    rows = [line for line in page.splitlines() if line.startswith("|") and not line.startswith(("| promise", "|---"))]

    assert missing == []
    assert [row for row in rows if not PROMISED.search(row)] == []
    assert len(promised) >= 30
