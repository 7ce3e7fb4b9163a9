"""A night of each set under a real systemd, with the real engine and tiny models: installed with one command, fed
and removed."""

from __future__ import annotations

import json

import pytest

from safelight.service import Kind
from tests.systemd.booted import Daemon, Machine, until
from tests.systemd.conftest import KINDS

SERVICES = ("redis", "inbox", "worker@0")


@pytest.mark.parametrize("kind", KINDS)
def test_a_night_under_a_real_systemd(machine: Machine, kind: Kind) -> None:
    """Install, drop a prompt, add another, uninstall: both pictures are there, nothing runs."""
    daemon = Daemon(machine, kind)
    installed = daemon.install()

    assert "enable-linger" not in installed.stdout
    assert until(lambda: daemon.active(*SERVICES), 60), machine.journal()
    mains = [daemon.main(name) for name in SERVICES]
    drop = f"umask 077; echo 'a red fox' > {daemon.inside(daemon.paths.inbox)}/fox.txt"
    assert machine.person("sh", "-c", drop).returncode == 0
    assert until(lambda: len(receipts(daemon)) == 1, 90), machine.journal()
    added = daemon.safelight("add", "a blue whale")
    daemon.safelight("wait", added.strip(), "--timeout", "90")

    assert [daemon.main(name) for name in SERVICES] == mains
    assert [job["state"] for job in json.loads(daemon.safelight("list", "--json"))] == ["done", "done"]

    removed = daemon.as_owner(str(daemon.bin / "safelight"), "service", "uninstall", f"--{kind}")

    assert removed.returncode == 0, removed.stderr
    left = daemon.systemctl("list-units", "--plain", "--no-legend", "safelight*")
    assert left.stdout.strip() == ""
    pictures = machine.person("find", str(daemon.inside(daemon.paths.outbox)), "-name", "*.png")
    assert len(pictures.stdout.split()) == 2


def receipts(daemon: Daemon) -> list[str]:
    folder = daemon.paths.receipts
    return [path.name for path in folder.iterdir()] if folder.exists() else []
