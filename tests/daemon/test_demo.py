"""Where `safelight demo` puts itself, and how it ends before its end: the real program."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from safelightd import demo
from tests.conftest import Installation
from tests.daemon.test_worker import eventually


def start(installation: Installation, folder: Path | str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "safelight.cli", "demo", "--to", str(folder)],
        env=installation.env | {"PYTHONPATH": ":".join(sys.path), "PYTHONUNBUFFERED": "1"},
        cwd=installation.root,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def refusal(installation: Installation, folder: Path | str) -> str:
    """Return the one line that a demo says which will not begin."""
    process = start(installation, folder)
    said, problem = process.communicate(timeout=300)

    assert process.returncode == 2
    assert said == ""
    assert problem.count("\n") == 1, problem
    return problem.rstrip()


def interrupted(installation: Installation, folder: Path) -> str:
    """Press Ctrl-C as soon as the demo's daemon is at work; return what it said."""
    log = folder / "daemon.log"
    log.unlink(missing_ok=True)
    process = start(installation, folder)
    try:
        eventually(lambda: log.is_file() and "inbox.ready" in log.read_text())
        process.send_signal(signal.SIGINT)
        said, problem = process.communicate(timeout=300)
    finally:
        process.kill()
        process.wait()

    assert process.returncode == 130, problem
    assert "The demo did not finish" not in problem
    assert "Traceback" not in problem
    return said


@pytest.mark.parametrize("name", ["safelight.toml", "letter.txt"])
def test_a_folder_with_something_else_in_it_is_refused_and_left_alone(installation: Installation, name: str) -> None:
    own = installation.root / "own"
    own.mkdir()
    (own / name).write_text('[worker]\ndevice = "cuda"\n')

    assert refusal(installation, "own") == (
        f"{own}: there is something in it that is not of an earlier demo. "
        "Name a new folder: safelight demo --to FOLDER."
    )
    assert [file.name for file in own.iterdir()] == [name]
    assert (own / name).read_text() == '[worker]\ndevice = "cuda"\n'


def test_a_file_or_a_place_that_cannot_be_written_is_named_with_what_to_do(installation: Installation) -> None:
    file = installation.root / "file"
    file.touch()

    assert refusal(installation, file) == (
        f"{file}: the demo cannot be put there (File exists). Name a new folder: safelight demo --to FOLDER."
    )
    assert refusal(installation, "/proc/demo").startswith("/proc/demo: the demo cannot be put there (No such file")


def test_ctrl_c_ends_with_130_and_the_same_folder_begins_anew_with_its_settings(installation: Installation) -> None:
    folder = installation.root / "demo"
    folder.mkdir()
    first = interrupted(installation, folder)
    settings = folder / "safelight.toml"
    written = settings.read_text()
    settings.write_text(f"{written}# mine\n")
    again = interrupted(installation, folder)

    assert first.endswith(f"Stopped. The same command begins anew; {folder} can be deleted.\n")
    assert first == again
    assert written == demo.SETTINGS
    assert settings.read_text() == f"{written}# mine\n"
