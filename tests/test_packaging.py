"""The wheel as a person would install it: what is in it, and how it behaves without the daemon's dependencies."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from safelight import __version__

CHECKOUT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel with the back end of this environment: no network."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        cwd=CHECKOUT,
        check=True,
        capture_output=True,
        timeout=300,
    )
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def client_only(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel and what the plain client depends on, linked from this one: no torch, no rq."""
    folder = tmp_path_factory.mktemp("client")
    venv.create(folder, with_pip=False, symlinks=True)
    packages = next(folder.glob("lib/python*/site-packages"))
    for top in _top_levels(_closure("safelight")):
        if not (packages / top.name).exists():
            (packages / top.name).symlink_to(top)
    python = folder / "bin/python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", "--quiet"]
    subprocess.run([*pip, str(wheel)], check=True, timeout=300)
    return folder / "bin"


@pytest.fixture
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home folder with a short path, which the queue server's socket in it needs."""
    return tmp_path_factory.mktemp("home")


def _closure(name: str) -> set[str]:
    """Return what a plain install of a distribution brings, without itself."""
    found: set[str] = set()
    waiting = [name]
    while waiting:
        for line in metadata.requires(waiting.pop()) or []:
            requirement = Requirement(line)
            wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
            if wanted and requirement.name not in found:
                found.add(requirement.name)
                waiting.append(requirement.name)
    return found


def _top_levels(names: set[str]) -> set[Path]:
    """Return the files and folders of site-packages that belong to these distributions."""
    tops = set()
    for name in names:
        found = metadata.distribution(name)
        for file in found.files or []:
            if file.parts[0] not in {"..", "__pycache__"}:
                tops.add(Path(os.fspath(found.locate_file(file.parts[0]))))
    return tops


SAMPLES = CHECKOUT / "config/samples"
DEMO = CHECKOUT / "daemon/safelightd/demo_models"


def run(program: Path, *words: str, home: Path) -> subprocess.CompletedProcess[str]:
    env = {"PATH": "/usr/bin:/bin", "HOME": str(home), "LC_ALL": "C.UTF-8"}
    return subprocess.run([str(program), *words], capture_output=True, text=True, check=False, timeout=300, env=env)


def test_the_wheel_carries_everything_that_is_not_python(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())

    shipped = {"safelight/shipped/models.toml", "safelight/shipped/safelight.toml", "safelight/py.typed"}
    units = {f"safelight/shipped/{path.relative_to(CHECKOUT)}" for path in (CHECKOUT / "systemd").rglob("*.*")}
    scripts = {f"safelight/lua/{path.name}" for path in (CHECKOUT / "client/safelight/lua").glob("*.lua")}
    demo = {f"safelightd/demo_models/{path.relative_to(DEMO)}" for path in DEMO.rglob("*.*") if path.suffix != ".pyc"}
    loras = {f"safelight/shipped/loras/{path.name}" for path in (CHECKOUT / "config/loras").iterdir()}
    assert "safelight/shipped/loras/outlines.safetensors" in loras
    samples = {f"safelight/shipped/{path.relative_to(CHECKOUT / 'config')}" for path in SAMPLES.rglob("*.*")}
    expected = shipped | units | scripts | demo | loras | samples | {"safelightd/py.typed"}
    assert "safelightd/demo_models/demo-flux/transformer/diffusion_pytorch_model.safetensors" in names
    assert len(units) >= 11
    assert scripts
    assert "safelight/shipped/samples/wildcards/season.txt" in samples
    assert expected - names == set()


def test_the_wheel_carries_nothing_else(wheel: Path) -> None:
    roots = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}

    assert roots == {"safelight", "safelightd", f"safelight-{__version__}.dist-info"}


@pytest.mark.parametrize("words", [("--help",), ("--version",), ("models", "list"), ("add", "--help")])
def test_a_client_without_the_daemon_works(client_only: Path, home: Path, words: tuple[str, ...]) -> None:
    done = run(client_only / "safelight", *words, home=home)

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("safelightd", ("redis",)),
        ("safelightd", ("worker", "--gpu", "0")),
        ("safelight", ("up",)),
        ("safelight", ("service", "install")),
    ],
)
def test_a_client_without_the_daemon_says_how_to_get_it(
    client_only: Path, home: Path, program: str, words: tuple[str, ...]
) -> None:
    done = run(client_only / program, *words, home=home)

    assert done.returncode == 3
    assert "safelight[daemon]" in done.stderr
    assert "Traceback" not in done.stderr
