"""What the README tells people to type works, in its order."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from PIL import Image

from tests.conftest import Installation
from tests.e2e.test_chaos import Daemon

REPOSITORY = Path(__file__).parents[2]

SETTINGS = """\
[paths]
models = "{models}"
[worker]
device = "cpu"
[defaults]
image_model = "tiny-flux-schnell"
[policy]
min_free_disk_gib = 0
"""


def block(heading: str, page: str = "README.md") -> str:
    """Return the commands below a heading of a page, the README by default."""
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    found = re.search(rf"^## {heading}\n.*?```sh\n(.*?)```", text, re.DOTALL | re.MULTILINE)
    assert found, heading
    return found[1]


def inline(start: str) -> str:
    """Return the command of the README's prose that begins so."""
    (found,) = re.findall(rf"`({re.escape(start)}[^`]*)`", (REPOSITORY / "README.md").read_text(encoding="utf-8"))
    return str(found)


def shell(script: str, env: dict[str, str], folder: Path) -> str:
    """Run commands as a person's shell would, ending with the first that fails; return what they printed."""
    done = subprocess.run(
        ["bash", "-e", "-c", script], env=env, cwd=folder, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def env(installation: Installation) -> dict[str, str]:
    """A person's environment: the programs on PATH, the inbox where the README says it is."""
    models = installation.paths.models
    (installation.root / "safelight.toml").write_text(SETTINGS.format(models=models))
    home = {"HOME": str(installation.root), "XDG_STATE_HOME": str(installation.root / "state")}
    return installation.env | home | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def test_the_readmes_evening_and_morning_do_what_it_says(installation: Installation, env: dict[str, str]) -> None:
    root = installation.root
    (root / "safelight/inbox").mkdir(parents=True)
    (root / "night.txt").write_text("a lighthouse\n")
    daemon = Daemon(installation, env)
    try:
        shell("until safelight status; do :; done", env, root)
        said = shell(block("An evening"), env, root)
        jobs = re.findall(r"^\d{8}-\d{6}-\w{7}-\d{5}$", said, re.MULTILINE)
        shell(f"safelight wait {' '.join(jobs)} --timeout 100", env, root)
        again = shell(block("In the morning"), env, root)
        listed = shell("safelight models list && safelight doctor", env, root)
    finally:
        assert daemon.stop() == 0

    assert len(jobs) == 6
    assert len(list((root / "pictures/single").glob("0*_a-red-fox-in-the-snow_s*.png"))) == 4
    assert re.search(r"^\d{8}-\d{6}-\w{7}-\d{5}$", again, re.MULTILINE)
    assert "flux-schnell" in listed


def test_the_demo_models_draw_in_a_fresh_home_without_a_gpu(installation: Installation, env: dict[str, str]) -> None:
    home = installation.root / "home"
    home.mkdir()
    fresh = {name: value for name, value in env.items() if name not in ("SAFELIGHT_CONFIG", "XDG_STATE_HOME")}
    fresh |= {"HOME": str(home)}
    shell(inline("mkdir -p ~/.config/safelight"), fresh, home)
    daemon = Daemon(installation, fresh)
    try:
        shell("until safelight status; do :; done", fresh, home)
        jobs = [shell(inline(f"safelight add --model {model}"), fresh, home) for model in ("demo-flux", "demo-wan")]
        shell(f"safelight wait {' '.join(map(str.strip, jobs))} --timeout 100", fresh, home)
    finally:
        assert daemon.stop() == 0

    drawn = [file.suffix for file in (home / "safelight/outbox").rglob("0*") if file.suffix in (".png", ".mp4")]
    assert sorted(drawn) == [".mp4", ".png"]


def test_demo_shows_ten_verified_outputs_and_leaves_no_process(installation: Installation) -> None:
    folder = installation.root / "demo"
    command = [sys.executable, "-m", "safelight.cli", "demo", "--to", str(folder)]
    done = subprocess.run(command, env=installation.env, capture_output=True, text=True, timeout=200, check=False)

    assert done.returncode == 0, done.stderr
    sheet = folder / "contact-sheet.png"
    assert done.stdout.splitlines()[-1] == str(sheet)
    with Image.open(sheet) as opened:
        assert opened.width > 4 * 192
    outputs = [file.suffix for file in (folder / "outbox").rglob("*") if file.suffix in (".png", ".mp4")]
    assert sorted(outputs) == [".mp4"] * 3 + [".png"] * 7
    assert [each.info["cmdline"] for each in psutil.process_iter(["cmdline"]) if _mentions(each, folder)] == []


def _mentions(process: psutil.Process, folder: Path) -> bool:
    return any(str(folder) in word for word in process.info["cmdline"] or ())
