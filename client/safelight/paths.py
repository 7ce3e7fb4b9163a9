"""Where things live: the folders of one installation, from systemd's variables, then XDG, then the home folder."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safelight.errors import BadConfig

SOCKET_PATH_BYTES_MAX = 107
"""sun_path holds 108 bytes with its closing NUL (unix(7))."""

SYSTEM_CONFIG = Path("/etc/safelight/safelight.toml")
SYSTEM_RUNTIME = Path("/run/safelight")


@dataclass(frozen=True)
class Paths:
    """The folders of one installation, absolute. Nothing here is created by looking at it."""

    inbox: Path
    outbox: Path
    state: Path
    models: Path
    runtime: Path

    @property
    def jobs(self) -> Path:
        """The accepted specs: one .jsonl file a submission."""
        return self.state / "jobs"

    @property
    def outbox_seen(self) -> Path:
        """What remembers that the outbox has held something: an unmounted disk's is empty."""
        return self.state / "outbox.seen"

    @property
    def attempts(self) -> Path:
        """One file a job that has been started: attempts, crashes, uncounted returns."""
        return self.state / "attempts"

    @property
    def receipts(self) -> Path:
        """One file a job that has ended."""
        return self.state / "receipts"

    @property
    def publishing(self) -> Path:
        """One file a job whose outputs are being renamed into the outbox: the receipt to be."""
        return self.state / "publishing"

    @property
    def collected(self) -> Path:
        """One file a job whose outputs a person has copied."""
        return self.state / "collected"

    @property
    def removing(self) -> Path:
        """One file a job whose outputs are being removed from the outbox."""
        return self.state / "removing"

    @property
    def removed(self) -> Path:
        """One file a job whose outputs were removed from the outbox."""
        return self.state / "removed"

    @property
    def forgotten(self) -> Path:
        """The submissions whose records were removed, a line each: their jobs must not run again."""
        return self.state / "forgotten.txt"

    @property
    def inputs(self) -> Path:
        """Input images by their sha256."""
        return self.state / "inputs"

    @property
    def user_hold(self) -> Path:
        """Exists while the user has paused the queue."""
        return self.state / "paused.json"

    @property
    def wildcards(self) -> Path:
        """`__name__` in a prompt draws from `name.txt` below this folder."""
        return self.inbox.parent / "wildcards"

    @property
    def claimed(self) -> Path:
        """Files the inbox has taken and is working on; below the inbox, so that a rename claims."""
        return self.inbox / ".safelight" / "claimed"

    @property
    def accepted(self) -> Path:
        """What was taken, each beside its ticket; by date."""
        return self.inbox / "accepted"

    @property
    def rejected(self) -> Path:
        """Visible on purpose: this is where a person finds out what was wrong."""
        return self.inbox / "rejected"

    @property
    def unfinished(self) -> Path:
        """Outputs on their way; the same file system as the outbox, so that a rename publishes."""
        return self.outbox / ".unfinished"

    @property
    def digests(self) -> Path:
        """How far the daemon is with the digests of registered models."""
        return self.state / "digests.json"

    @property
    def embeddings(self) -> Path:
        """What prompts were encoded to."""
        return self.state / "embeddings"

    @property
    def checkpoints(self) -> Path:
        """One file a clip that is being denoised, or was when it was stopped."""
        return self.state / "checkpoints"

    @property
    def previews(self) -> Path:
        """What the running job looks like so far, and what was learned about looking at latents."""
        return self.state / "previews"

    @property
    def redis(self) -> Path:
        """The embedded server's data."""
        return self.state / "redis"

    @property
    def socket(self) -> Path:
        """The embedded server's unix socket.

        Raises:
            BadConfig: the path is too long for a unix socket.
        """
        path = self.runtime / "redis" / "redis.sock"
        if len(os.fsencode(path)) > SOCKET_PATH_BYTES_MAX:
            raise BadConfig(
                f"{path}: too long for a unix socket (at most {SOCKET_PATH_BYTES_MAX} bytes). "
                "Set XDG_RUNTIME_DIR or [paths] state to a shorter folder."
            )
        return path


def _first(value: str) -> Path:
    """systemd separates several directories by colons; ours is the first."""
    return Path(value.split(":", 1)[0])


def config_home(env: Mapping[str, str]) -> Path:
    if directory := env.get("CONFIGURATION_DIRECTORY"):
        return _first(directory)
    return Path(env.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "safelight"


def state_home(env: Mapping[str, str]) -> Path:
    if directory := env.get("STATE_DIRECTORY"):
        return _first(directory)
    return Path(env.get("XDG_STATE_HOME") or Path.home() / ".local/state") / "safelight"


def data_home(env: Mapping[str, str]) -> Path:
    return Path(env.get("XDG_DATA_HOME") or Path.home() / ".local/share") / "safelight"


def runtime_home(env: Mapping[str, str], state: Path) -> Path:
    """Return the folder that holds the sockets of all our processes.

    systemd gives each unit a RuntimeDirectory of its own below it (safelight/redis, safelight/inbox ...): two
    units that share one lose it when either stops. Without systemd and without XDG_RUNTIME_DIR (cron, containers)
    it is a folder of the state.
    """
    if directory := env.get("RUNTIME_DIRECTORY"):
        own = _first(directory)
        return own.parent if own.parent.name == "safelight" else own
    if directory := env.get("XDG_RUNTIME_DIR"):
        return Path(directory) / "safelight"
    return state / "run"
