"""The user's units under a real systemd: installed with one command, fed, killed, stopped and removed.

Needs root, because it boots a systemd of its own in namespaces (machine.sh); skipped by name where that cannot be.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

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


@dataclass(frozen=True)
class Machine:
    """A booted systemd, and one person on it who is allowed to linger."""

    init: int

    def root(self, *words: str) -> subprocess.CompletedProcess[str]:
        return self._inside(words, {"HOME": "/root"})

    def person(self, *words: str) -> subprocess.CompletedProcess[str]:
        runtime = f"/run/user/{PERSON}"
        env = {"HOME": "/home/ann", "USER": "ann", "XDG_RUNTIME_DIR": runtime}
        return self._inside(("setpriv", f"--reuid={PERSON}", f"--regid={PERSON}", "--clear-groups", *words), env)

    def _inside(self, words: tuple[str, ...], env: dict[str, str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["nsenter", "-t", str(self.init), "--mount", "--uts", "--ipc", "--net", "--pid", "--root", "--wd", *words],
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
            env={"PATH": f"{BIN}:/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8", **env},
        )


def until(condition: Callable[[], bool], timeout_s: float) -> bool:
    """Ask until it is so; systemd has no way to tell a process outside."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


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


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    if missing := what_is_missing():
        pytest.skip(f"no systemd can be booted here: {missing} is missing")
    hierarchy = cgroup2()
    assert hierarchy is not None
    cgroup = hierarchy / f"safelight-test-{os.getpid()}"
    try:
        cgroup.mkdir()
    except OSError as error:
        pytest.skip(f"no systemd can be booted here: {error}")
    log = tmp_path / "log"
    paths = [str(CHECKOUT), str(BIN), str(Path(sys.executable).resolve().parents[1])]
    script = Path(__file__).with_name("machine.sh")
    with log.open("w") as output:
        outer = subprocess.Popen(["bash", script, tmp_path, cgroup, *paths], stdout=output, stderr=subprocess.STDOUT)
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


def test_a_night_under_a_real_systemd(machine: Machine) -> None:
    """Install, drop a prompt, kill the worker, drop another, uninstall: both pictures are there, nothing runs."""
    said = machine.root("systemctl", "start", f"user@{PERSON}.service")
    assert said.returncode == 0, said.stderr
    write = "mkdir -p ~/.config/safelight && cat > ~/.config/safelight/safelight.toml <<'END'\n" + SETTINGS + "END"
    assert machine.person("sh", "-c", write).returncode == 0

    installed = machine.person("safelight", "service", "install", "--user", "--gpu", "0")

    assert installed.returncode == 0, installed.stderr
    assert "enable-linger" not in installed.stdout
    assert until(lambda: _active(machine, "redis", "inbox", "worker@0"), 60), _journal(machine)
    drop = "mkdir -p ~/safelight/inbox && echo 'a red fox' > ~/safelight/inbox/fox.txt"
    assert machine.person("sh", "-c", drop).returncode == 0
    assert until(lambda: _receipts(machine) == 1, 90), _journal(machine)

    machine.person("systemctl", "--user", "kill", "--kill-whom=main", "--signal=KILL", "safelight-worker@0")
    added = machine.person("safelight", "add", "a blue whale")
    waited = machine.person("safelight", "wait", added.stdout.strip(), "--timeout", "90")

    assert waited.returncode == 0, waited.stderr + _journal(machine)
    assert _show(machine, "worker@0", "NRestarts") == "1"
    assert _show(machine, "redis", "NRestarts") == "0"

    listed = machine.person("safelight", "list", "--json")
    assert [job["state"] for job in json.loads(listed.stdout)] == ["done", "done"]

    removed = machine.person("safelight", "service", "uninstall", "--user")

    assert removed.returncode == 0, removed.stderr
    left = machine.person("systemctl", "--user", "list-units", "--plain", "--no-legend", "safelight*")
    assert left.stdout.strip() == ""
    pictures = machine.person("sh", "-c", "find ~/safelight/outbox -name '*.png' | wc -l")
    assert pictures.stdout.strip() == "2"


def _show(machine: Machine, name: str, key: str) -> str:
    said = machine.person("systemctl", "--user", "show", "--value", f"--property={key}", f"safelight-{name}.service")
    return said.stdout.strip()


def _active(machine: Machine, *names: str) -> bool:
    return all(_show(machine, name, "ActiveState") == "active" for name in names)


def _receipts(machine: Machine) -> int:
    return len(machine.person("sh", "-c", "ls ~/.local/state/safelight/receipts").stdout.split())


def _journal(machine: Machine) -> str:
    return machine.root("journalctl", "--no-pager", "--output=cat", "--lines=60").stdout
