"""A machine of its own for a test, with a real systemd as PID 1 (machine.sh), and a set of units on it.

Needs root, because it makes namespaces; what cannot be booted here is skipped by name.
"""

from __future__ import annotations

import itertools
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from safelight import queueserver
from safelight.jobqueue import JobQueue
from safelight.ledger import Ledger
from safelight.paths import Paths
from safelight.service import Kind

PERSON = 1990
TOOLS = ("unshare", "nsenter", "setpriv", "pivot_root", "ip", "dbus-daemon", "systemctl")
SYSTEMD = Path("/lib/systemd/systemd")
CHECKOUT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent

SETTINGS = """\
[worker]
device = "cpu"
[defaults]
image_model = "tiny-flux-schnell"
[inbox]
settle_s = 0.2
[policy]
on_battery = "run"
min_free_disk_gib = 0
"""

LONG_S = 50
"""What the step of a `long` job takes."""

EVERYBODYS = Path("/opt/safelight")
"""An installation that system units can see: this checkout and this Python may lie in a home folder."""

INSTALL_FOR_EVERYBODY = f"""\
set -eu
mkdir -p /opt/python {EVERYBODYS}/checkout
mount --bind {shlex.quote(sys.base_prefix)} /opt/python
mount --bind {shlex.quote(str(CHECKOUT))} {EVERYBODYS}/checkout
echo /opt/python/lib > /etc/ld.so.conf.d/000-python.conf && ldconfig  # its own libpython, not another of that name
/opt/python/bin/python{sys.version_info.major}.{sys.version_info.minor} -m venv --without-pip {EVERYBODYS}
mount --bind {shlex.quote(str(Path(pytest.__file__).parents[1]))} {EVERYBODYS}/lib/python*/site-packages
printf '%s\\n' {EVERYBODYS}/checkout/client {EVERYBODYS}/checkout/daemon > \
  {EVERYBODYS}/lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages/everybodys.pth
for name in safelight safelightd; do
  sed '1s|.*|#!{EVERYBODYS}/bin/python|' {shlex.quote(str(BIN))}/$name > {EVERYBODYS}/bin/$name
  chmod 755 {EVERYBODYS}/bin/$name
done
"""

_numbers = itertools.count()


BUSY_TIMES = 4
"""What a wait may take longer where other tests have the CPU; one that succeeds is no longer for it."""


def until(condition: Callable[[], object], timeout_s: float) -> bool:
    """Ask until it is so; systemd has no way to tell a process outside.

    Args:
        timeout_s: on a machine that has nothing else to do.
    """
    deadline = time.monotonic() + BUSY_TIMES * timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


@dataclass(frozen=True)
class Machine:
    """A booted systemd, and one person on it who is allowed to linger."""

    init: int

    def root(self, *words: str) -> subprocess.CompletedProcess[str]:
        return self._inside(words, {"HOME": "/root"})

    def person(self, *words: str) -> subprocess.CompletedProcess[str]:
        runtime = f"/run/user/{PERSON}"
        env = {"HOME": "/home/ann", "USER": "ann", "XDG_RUNTIME_DIR": runtime}
        return self._inside(("setpriv", f"--reuid={PERSON}", f"--regid={PERSON}", "--init-groups", *words), env)

    def _inside(self, words: tuple[str, ...], env: dict[str, str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*self.enter(), *words],
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
            env={"PATH": f"{BIN}:/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8", **env},
        )

    def enter(self) -> list[str]:
        """Return the words with which a command becomes root's on this machine."""
        return ["nsenter", "-t", str(self.init), "--mount", "--uts", "--ipc", "--net", "--pid", "--root", "--wd"]

    def path(self, inside: str | Path) -> Path:
        """Return what a path on the machine is called outside; without the links in it."""
        return Path(f"/proc/{self.init}/root") / str(inside).lstrip("/")

    def outside(self, pid: int) -> int:
        """Return the number that a process of the machine has outside."""
        for status in Path("/proc").glob("[0-9]*/status"):
            try:
                numbers = next(line.split()[1:] for line in status.read_text().splitlines() if line[:6] == "NSpid:")
                same = Path(f"/proc/{numbers[0]}/ns/pid").stat() == Path(f"/proc/{self.init}/ns/pid").stat()
            except OSError:
                continue
            if len(numbers) > 1 and int(numbers[-1]) == pid and same:
                return int(numbers[0])
        raise AssertionError(f"no process {pid}")

    def journal(self, lines: int = 80) -> str:
        return self.root("journalctl", "--no-pager", "--output=cat", f"--lines={lines}").stdout


@dataclass(frozen=True)
class Daemon:
    """One set of units on a machine, and the person who uses it."""

    machine: Machine
    kind: Kind

    @property
    def paths(self) -> Paths:
        """Its folders, as they are called outside."""
        home = Path("/home/ann")
        if self.kind == "system":
            base = Path("/var/lib/safelight")
            inside = Paths(base / "inbox", base / "outbox", base / "state", base / "models", Path("/run/safelight"))
        else:
            inside = Paths(
                home / "safelight/inbox",
                home / "safelight/outbox",
                home / ".local/state/safelight",
                home / ".local/share/safelight/models",
                Path(f"/run/user/{PERSON}/safelight"),
            )
        names = ("inbox", "outbox", "state", "models", "runtime")
        return replace(inside, **{name: self.machine.path(getattr(inside, name)) for name in names})

    def inside(self, path: Path) -> Path:
        """Return what one of `paths` is called on the machine."""
        return Path("/") / path.relative_to(self.machine.path("/"))

    @property
    def ledger(self) -> Ledger:
        return Ledger(self.paths)

    @property
    def bin(self) -> Path:
        return BIN if self.kind == "user" else EVERYBODYS / "bin"

    @property
    def checkout(self) -> Path:
        """This checkout, where the units see it."""
        return CHECKOUT if self.kind == "user" else EVERYBODYS / "checkout"

    def install(
        self, settings: str = SETTINGS, gpu: str = "0", *, member: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Install with one command, as a person or root does; make the person a member of the system's group."""
        if self.kind == "user":
            said = self.machine.root("systemctl", "start", f"user@{PERSON}.service")
            assert said.returncode == 0, said.stderr
        else:
            said = self.machine.root("sh", "-c", INSTALL_FOR_EVERYBODY)
            assert said.returncode == 0, said.stderr
        self.set_settings(settings)
        words = (str(self.bin / "safelight"), "service", "install", f"--{self.kind}", "--gpu", gpu)
        installed = self.as_owner(*words)
        assert installed.returncode == 0, installed.stderr
        if self.kind == "system" and member:
            added = self.machine.root("usermod", "-aG", "safelight", "ann")
            assert added.returncode == 0, added.stderr
        return installed

    def set_settings(self, text: str) -> None:
        if self.kind == "user":
            write = 'mkdir -p ~/.config/safelight && printf %s "$0" > ~/.config/safelight/safelight.toml'
            assert self.machine.person("sh", "-c", write, text).returncode == 0
            return
        base = "/var/lib/safelight"
        folders = "\n".join(f'{name} = "{base}/{name}"' for name in ("inbox", "outbox", "state", "models"))
        write = 'mkdir -p /etc/safelight && printf %s "$0" > /etc/safelight/safelight.toml'
        assert self.machine.root("sh", "-c", write, f"[paths]\n{folders}\n{text}").returncode == 0

    def as_owner(self, *words: str) -> subprocess.CompletedProcess[str]:
        return self.machine.person(*words) if self.kind == "user" else self.machine.root(*words)

    def safelight(self, *words: str) -> str:
        """Run a command as the person, who is the owner of the user set and a member for the system set."""
        said = self.machine.person(str(self.bin / "safelight"), *words)
        assert said.returncode == 0, said.stdout + said.stderr + self.machine.journal()
        return said.stdout

    def submit(self, *prompts: str) -> list[str]:
        """Queue prompts in this order; return their jobs."""
        write = 'umask 022; printf "%s\\n" "$@" > ~/prompts.txt'
        assert self.machine.person("sh", "-c", write, "sh", *prompts).returncode == 0
        return self.safelight("batch", "/home/ann/prompts.txt").split()

    def states(self, jobs: list[str]) -> list[str | None]:
        with self.queue() as queue:
            return [queue.state(job) for job in jobs]

    @contextmanager
    def queue(self) -> Iterator[JobQueue]:
        """The queue as it is, over the server's socket."""
        server = queueserver.connect(f"unix://{self.paths.socket}")
        try:
            yield JobQueue(server)
        finally:
            server.close()

    def runs(self) -> list[str]:
        """Return what scripted engines began and did."""
        log = self.paths.outbox / "runs.log"
        return log.read_text().splitlines() if log.exists() else []

    def started(self, job: str) -> bool:
        """Wait until an engine has begun a job."""
        return until(lambda: f"start {job}" in self.runs(), 40)

    def done(self, jobs: list[str]) -> bool:
        """Wait until every job has its receipt; a server that is away meanwhile is no matter."""
        return until(lambda: all((self.paths.receipts / f"{job}.json").exists() for job in jobs), 90)

    def script(self, more: str) -> None:
        """Give the worker the scripted engine, and all three units something more."""
        python, tests = self.bin / "python", self.checkout / "tests"
        worker = f"{python} {tests}/daemon/worker_process.py {python} {tests}/systemd/patient_engine.py {LONG_S}"
        self.drop_in("worker@", f"[Service]\nExecStart=\nExecStart={worker}\n", "engine")
        for unit in ("redis", "inbox", "worker@"):
            self.drop_in(unit, more, "more")

    def systemctl(self, *words: str) -> subprocess.CompletedProcess[str]:
        return self.as_owner("systemctl", *(["--user"] if self.kind == "user" else []), *words)

    def show(self, name: str, key: str) -> str:
        """Return a property of one of our services: `redis`, `inbox`, `worker@0`."""
        return self.systemctl("show", "--value", f"--property={key}", f"safelight-{name}.service").stdout.strip()

    def main(self, name: str) -> int:
        return int(self.show(name, "MainPID"))

    def active(self, *names: str) -> bool:
        return all(self.show(name, "ActiveState") == "active" for name in names)

    def drop_in(self, name: str, text: str, to: str = "test") -> None:
        """Change a unit, without starting it again; "" takes the change back."""
        folder = self.machine.path(f"/etc/systemd/{self.kind}/safelight-{name}.service.d")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{to}.conf").write_text(text)
        self.systemctl("daemon-reload")


def cgroup2() -> Path | None:
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    return next((Path(mount[1]) for mount in mounts if mount[2] == "cgroup2"), None)


def what_is_missing() -> str:
    if os.geteuid() != 0:
        return "root"
    if not SYSTEMD.exists():
        return str(SYSTEMD)
    if missing := [tool for tool in TOOLS if not shutil.which(tool)]:
        return ", ".join(missing)
    return "" if cgroup2() else "a cgroup2 hierarchy"


@contextmanager
def boot(folder: Path) -> Iterator[Machine]:
    """Boot a machine, its files in memory mounted at `folder`; when it is left nothing of it remains."""
    if missing := what_is_missing():
        pytest.skip(f"no systemd can be booted here: {missing} is missing")
    hierarchy = cgroup2()
    assert hierarchy is not None
    cgroup = hierarchy / f"safelight-test-{os.getpid()}-{next(_numbers)}"
    try:
        cgroup.mkdir()
    except OSError as error:
        pytest.skip(f"no systemd can be booted here: {error}")
    log = folder / "log"
    paths = [str(CHECKOUT), str(BIN), str(Path(sys.executable).resolve().parents[1])]
    script = Path(__file__).with_name("machine.sh")
    with log.open("w") as output:
        outer = subprocess.Popen(["bash", script, folder, cgroup, *paths], stdout=output, stderr=subprocess.STDOUT)
    try:
        children = Path(f"/proc/{outer.pid}/task/{outer.pid}/children")
        until(lambda: outer.poll() is not None or _command(children) == "systemd", 20)
        if outer.poll() is not None:
            pytest.skip(f"no systemd can be booted here: {log.read_text().strip()[-200:]}")
        booted = Machine(int(children.read_text()))
        assert until(lambda: booted.root("systemctl", "is-active", "basic.target").returncode == 0, 30)
        yield booted
    finally:
        outer.kill()
        outer.wait()
        _remove_cgroups(cgroup)


def _command(children: Path) -> str:
    """Return the name of the only child, "" while there is none."""
    try:
        return Path(f"/proc/{children.read_text().strip()}/comm").read_text().strip()
    except OSError:
        return ""


def _remove_cgroups(cgroup: Path) -> None:
    assert until(lambda: "populated 0" in (cgroup / "cgroup.events").read_text(), 10)
    for folder, _, _ in os.walk(cgroup, topdown=False):
        Path(folder).rmdir()
