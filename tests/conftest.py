"""What many tests need: an installation of its own in a temporary folder, and a real queue server."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import hypothesis
import pytest

from safelight import config as settings
from safelight import ledger, models, queueserver
from safelight.config import Config
from safelight.jobqueue import JobQueue
from safelight.ledger import Ledger
from safelight.models import Models

for name, derandomize in (("same", True), ("search", False)):
    hypothesis.settings.register_profile(
        name,
        derandomize=derandomize,
        deadline=None,  # how long an example takes says what else runs on this machine
        suppress_health_check=[hypothesis.HealthCheck.too_slow],  # for the same reason
    )
# Every run tries the same examples, so that one which fails says that the code has changed.
# HYPOTHESIS_PROFILE=search looks for others.
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))


@dataclass(frozen=True)
class Installation:
    """One safelight in a folder of its own, with tiny models on the CPU."""

    root: Path
    env: dict[str, str]
    config: Config
    models: Models
    ledger: Ledger

    @property
    def paths(self) -> settings._paths.Paths:
        return self.config.paths


SETTINGS = """\
[paths]
inbox = "{root}/inbox"
outbox = "{root}/outbox"
state = "{root}/state"
models = "{models}"
[worker]
device = "cpu"
[defaults]
image_model = "tiny-flux-schnell"
video_model = "tiny-wan-ti2v"
[inbox]
settle_s = 0.2
[policy]
min_free_disk_gib = 0
"""


MEMORY_BYTES_MIN = 4 << 30
"""Free in /dev/shm, where containers have 64 MiB unless they ask for more; one test prepares a model of 215 MB."""


@pytest.fixture(scope="session")
def tiny_models_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for the tiny models of the whole run: they are built once."""
    return tmp_path_factory.mktemp("models")


def roomy_in_memory() -> str:
    """Return a folder in memory, or /tmp where little fits into that.

    Each step of a job is synced to disk: of the 8 s that a test took which kills a job at every one of them, 6 were
    spent waiting for the disk (a virtual one, 2026-11-26).
    """
    memory = "/dev/shm"
    there = os.access(memory, os.W_OK) and shutil.disk_usage(memory).free >= MEMORY_BYTES_MIN
    return memory if there else "/tmp"


@pytest.fixture
def installation(tiny_models_folder: Path) -> Iterator[Installation]:
    """An installation that no other meets; its path is short because unix sockets need that."""
    root = Path(tempfile.mkdtemp(prefix="sl-", dir=roomy_in_memory()))
    file = root / "safelight.toml"
    file.write_text(SETTINGS.format(root=root, models=tiny_models_folder))
    env = {name: value for name, value in os.environ.items() if not name.startswith(("XDG_", "SAFELIGHT_"))}
    env |= {"SAFELIGHT_CONFIG": str(file), "XDG_RUNTIME_DIR": str(root / "run"), "HOME": str(root)}
    env |= {"DBUS_SYSTEM_BUS_ADDRESS": f"unix:path={root}/no-bus"}  # a test does not keep this machine awake
    config = settings.load(env)
    yield Installation(root, env, config, models.load(config), ledger.Ledger(config.paths))
    shutil.rmtree(root, ignore_errors=True)


@pytest.fixture
def queue(installation: Installation) -> Iterator[JobQueue]:
    """A real server with the flags of the real one, and the queue on it."""
    from safelightd import redis_server

    paths = installation.paths
    paths.redis.mkdir(parents=True)
    paths.socket.parent.mkdir(parents=True)
    server = subprocess.Popen(
        redis_server.command(redis_server.find_binary(), paths.socket, paths.redis), stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 20
    while not paths.socket.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    connection = queueserver.connect(installation.config.url)
    yield JobQueue(connection)
    connection.close()
    server.kill()
    server.wait()
