"""A throw-away installation for a benchmark: its own folders, settings and server, gone afterwards."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from safelight import config as settings
from safelight import jobqueue, queueserver
from safelight.config import Config
from safelight.errors import QueueUnreachable

SETTINGS = """\
[paths]
inbox = "inbox"
outbox = "outbox"
state = "state"
models = "models"
[worker]
device = "{device}"
[defaults]
image_model = "tiny-flux-schnell"
video_model = "tiny-wan-ti2v"
[policy]
min_free_disk_gib = 0
"""


@dataclass(frozen=True)
class Scratch:
    """Where it lives, and the environment in which every program finds it."""

    root: Path
    env: dict[str, str]
    config: Config

    def start(self, *words: str) -> subprocess.Popen[bytes]:
        """Start one of the daemon's processes."""
        return subprocess.Popen([sys.executable, "-m", "safelightd.cli", *words], env=self.env)

    def client(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run one client command to its end."""
        command = [sys.executable, "-m", "safelight.cli", *words]
        return subprocess.run(command, env=self.env, check=check, capture_output=True, text=True)

    def connect(self, server: subprocess.Popen[bytes] | None = None) -> jobqueue.JobQueue:
        """Return the queue once its server answers; a server given that has ended never will."""
        while server is None or server.poll() is None:
            try:
                return jobqueue.JobQueue(queueserver.connect(self.config.url, retries=0))
            except QueueUnreachable:
                time.sleep(0.02)
        raise SystemExit(f"The queue server ended with exit code {server.returncode}.")


@contextmanager
def scratch(device: str = "cpu", more: str = "") -> Iterator[Scratch]:
    """Make an installation and remove it again; processes started in it are the caller's to stop."""
    root = Path(tempfile.mkdtemp(prefix="slb-"))
    (root / "safelight.toml").write_text(SETTINGS.format(device=device) + more, encoding="utf-8")
    own = {"SAFELIGHT_CONFIG": str(root / "safelight.toml"), "XDG_RUNTIME_DIR": str(root / "run")}
    env = {**os.environ, **own}
    try:
        yield Scratch(root, env, settings.load(env))
    finally:
        shutil.rmtree(root, ignore_errors=True)
