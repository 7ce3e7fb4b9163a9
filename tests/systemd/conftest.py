"""The two sets as a person would get them, in folders that systemd's own tools can read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from safelight import config as settings
from safelight import service
from safelight.config import Config
from tests.systemd.booted import Machine, boot

GPU = "GPU-a6d5b0c1-1234-4321-aaaa-0123456789ab"
KINDS: tuple[service.Kind, ...] = ("user", "system")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A person's home folder, without systemd's manager for that person."""
    for name in [name for name in os.environ if name.startswith(("XDG_", "SAFELIGHT_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    (tmp_path / "run").mkdir()
    return tmp_path / "home"


@pytest.fixture
def config(home: Path) -> Config:
    """The settings of a person who has written none."""
    return settings.load()


def config_of(kind: service.Kind, config: Config) -> Config:
    return config if kind == "user" else service.system_config(Path("/nowhere"))


def written(kind: service.Kind, config: Config, folder: Path, program: Path) -> list[Path]:
    """Render one set into `folder` and return its units."""
    folder.mkdir()
    for name, text in service.render(kind, program=program, config=config_of(kind, config), gpu=GPU).items():
        (folder / name).write_text(text)
    return sorted(path for path in folder.iterdir() if path.suffix in {".service", ".target", ".path"})


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    with boot(tmp_path) as booted:
        yield booted
