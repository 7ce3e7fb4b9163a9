"""Digests under a real systemd: a registration wakes the service, in its sandbox, and a member may forget the model."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import pytest

from safelight.service import Kind
from tests.systemd.booted import Daemon, Machine, until
from tests.systemd.conftest import KINDS


def row(daemon: Daemon, key: str) -> dict[str, Any]:
    rows = json.loads(daemon.safelight("models", "list", "--json"))
    return next(each for each in rows if each["key"] == key)


def has_all(daemon: Daemon, key: str) -> bool:
    at = row(daemon, key)
    return at["digests_done_bytes"] == at["digests_total_bytes"] and daemon.show("digests", "ActiveState") == "inactive"


@pytest.mark.parametrize("kind", KINDS)
def test_every_registration_has_its_digests_made(machine: Machine, kind: Kind) -> None:
    daemon = Daemon(machine, kind)
    daemon.install()
    assert until(lambda: daemon.active("redis", "inbox", "worker@0"), 60), machine.journal()
    assert until(lambda: daemon.systemctl("is-active", "safelight-digests.path").returncode == 0, 20)
    assert daemon.show("digests", "Result") == "success", machine.journal()
    for key in ("fox", "owl", "hen"):
        copy = f"umask 022; cp -r {daemon.checkout}/daemon/safelightd/demo_models/demo-flux /srv/{key}"
        assert machine.root("sh", "-c", copy).returncode == 0
        daemon.safelight("models", "add", f"/srv/{key}", "--as", key)
        assert until(partial(has_all, daemon, key), 30), machine.journal()

    assert daemon.safelight("models", "verify", "fox") == "fox is as it was\n"
    assert (daemon.show("digests", "Result"), daemon.show("digests", "Nice")) == ("success", "19"), machine.journal()
    daemon.safelight("models", "rm", "fox")
    assert not list((daemon.paths.models / "registered").glob("fox.*"))

    assert daemon.systemctl("stop", "safelight.target").returncode == 0
    assert until(lambda: daemon.systemctl("is-active", "safelight-digests.path").returncode != 0, 20)
