"""Inhibitors and the word of sleep, over a real bus with a small logind on it."""

from __future__ import annotations

import os
import select
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from safelightd.logind import Denied, Logind
from tests.daemon.login1 import Bus, Login1, Serve, eventually, forged_sleep, serving

pytestmark = pytest.mark.skipif(not shutil.which("dbus-daemon"), reason="dbus-daemon is not installed")


@pytest.fixture
def bus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bus]:
    bus = Bus(tmp_path)
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", bus.address)
    yield bus
    bus.kill()


@pytest.fixture
def serve(bus: Bus) -> Iterator[Serve]:
    with serving(bus) as start:
        yield start


@pytest.fixture
def logind(serve: Serve) -> Iterator[tuple[Logind, Login1]]:
    login1 = serve(denied=("idle:block",))
    logind = Logind()
    yield logind, login1
    logind.close()


def wait_and_hear(logind: Logind) -> list[bool]:
    assert select.select([logind.descriptor], [], [], 5)[0]
    return logind.sleeps()


def test_an_inhibitor_lasts_until_its_descriptor_is_closed(logind: tuple[Logind, Login1]) -> None:
    ours, login1 = logind
    descriptor = ours.inhibit("sleep", "block", "a job is running")

    assert login1.held() == ["sleep:block"]
    assert not os.get_inheritable(descriptor)

    os.close(descriptor)

    assert login1.held() == []


def test_what_polkit_refuses_is_denied_and_the_connection_lives_on(logind: tuple[Logind, Login1]) -> None:
    ours, login1 = logind
    with pytest.raises(Denied):
        ours.inhibit("idle", "block", "a job is running")
    os.close(ours.inhibit("sleep", "delay", "puts its job back"))

    assert login1.held() == []


def test_the_delay_is_what_logind_is_configured_for(serve: Serve) -> None:
    serve(delay_max_s=12.5)
    logind = Logind()

    assert logind.delay_max_s == 12.5

    logind.close()


def test_each_sleep_is_heard_once_and_in_order(logind: tuple[Logind, Login1]) -> None:
    ours, login1 = logind

    assert ours.sleeps() == []

    login1.prepare_for_sleep(True)
    login1.prepare_for_sleep(False)
    heard = wait_and_hear(ours)
    while len(heard) < 2:
        heard += wait_and_hear(ours)

    assert heard == [True, False]
    assert ours.sleeps() == []


def test_a_sleep_that_is_announced_while_an_answer_is_awaited_is_not_lost(logind: tuple[Logind, Login1]) -> None:
    ours, login1 = logind
    login1.prepare_for_sleep(True)
    os.close(ours.inhibit("sleep", "delay", "puts its job back"))

    assert ours.sleeps() == [True]


def test_a_sleep_that_somebody_else_announces_is_not_believed(logind: tuple[Logind, Login1], bus: Bus) -> None:
    ours, login1 = logind
    forged_sleep(bus.address, ours._bus.unique_name)
    login1.prepare_for_sleep(False)

    eventually(lambda: ours.sleeps() == [False])


def test_a_bus_without_a_logind_is_refused_at_once(bus: Bus) -> None:
    with pytest.raises(Exception, match="login1"):
        Logind()


def test_a_bus_that_is_killed_is_noticed(logind: tuple[Logind, Login1], bus: Bus) -> None:
    ours, _ = logind
    bus.kill()

    with pytest.raises(ConnectionError):
        wait_and_hear(ours)
