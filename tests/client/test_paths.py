"""Where one installation's files live: systemd's variables, then XDG, then the home folder."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from safelight import config as settings
from safelight import paths
from safelight.errors import BadConfig
from safelight.paths import Paths


def at(root: str, runtime: str = "/run/x") -> Paths:
    return Paths(*(Path(root) / field.name for field in fields(Paths)[:-1]), runtime=Path(runtime))


@pytest.mark.parametrize(
    ("function", "env", "expected"),
    [
        (paths.config_home, {"CONFIGURATION_DIRECTORY": "/etc/safelight:/b", "XDG_CONFIG_HOME": ""}, "/etc/safelight"),
        (paths.config_home, {"XDG_CONFIG_HOME": "/c"}, "/c/safelight"),
        (paths.state_home, {"STATE_DIRECTORY": "/var/lib/safelight", "XDG_STATE_HOME": "/s"}, "/var/lib/safelight"),
        (paths.state_home, {"XDG_STATE_HOME": "/s"}, "/s/safelight"),
        (paths.data_home, {"XDG_DATA_HOME": "/d"}, "/d/safelight"),
    ],
)  # fmt: skip
def test_systemd_wins_over_xdg(function: object, env: dict[str, str], expected: str) -> None:
    assert callable(function)
    assert Path(expected) == function(env)


def test_without_any_variable_the_home_folder_has_it_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")

    assert Path("/home/ada/.config/safelight") == paths.config_home({})
    assert Path("/home/ada/.local/state/safelight") == paths.state_home({})
    assert Path("/home/ada/.local/share/safelight") == paths.data_home({})
    assert Path("/home/ada/.local/state/safelight/run") == paths.runtime_home({}, paths.state_home({}))


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({"RUNTIME_DIRECTORY": "/run/safelight/worker-0"}, "/run/safelight"),
        ({"RUNTIME_DIRECTORY": "/run/user/1000/safelight/redis:/run/b"}, "/run/user/1000/safelight"),
        ({"RUNTIME_DIRECTORY": "/run/safelight"}, "/run/safelight"),
        ({"XDG_RUNTIME_DIR": "/run/user/1000"}, "/run/user/1000/safelight"),
        ({}, "/state/run"),
    ],
)
def test_all_units_of_one_installation_share_the_folder_of_the_sockets(env: dict[str, str], expected: str) -> None:
    assert Path(expected) == paths.runtime_home(env, Path("/state"))


def test_the_socket_fits_to_the_last_byte_and_no_further() -> None:
    rest = len("/redis/redis.sock")
    longest = "/" + "r" * (paths.SOCKET_PATH_BYTES_MAX - rest - 1)

    assert len(str(at("/s", longest).socket)) == paths.SOCKET_PATH_BYTES_MAX
    with pytest.raises(BadConfig, match="too long for a unix socket"):
        _ = at("/s", longest + "r").socket


def test_the_length_of_the_socket_counts_bytes_and_not_letters() -> None:
    with pytest.raises(BadConfig, match="too long"):
        _ = at("/s", "/" + "ü" * 50).socket


def test_looking_at_the_folders_creates_none(tmp_path: Path) -> None:
    names = ("XDG_STATE_HOME", "XDG_RUNTIME_DIR", "XDG_CONFIG_HOME", "XDG_DATA_HOME")
    found = settings.load({name: str(tmp_path / name[4]) for name in names}).paths  # short: a socket is among them
    shown = [getattr(found, name) for name in dir(Paths) if isinstance(getattr(Paths, name), property)]

    assert found.jobs in shown
    assert list(tmp_path.iterdir()) == []


def test_what_must_be_renamed_into_place_lies_on_the_side_it_is_renamed_to() -> None:
    """A rename across file systems fails: claims are below the inbox, unfinished outputs below the outbox."""
    here = at("/root")

    assert here.claimed.is_relative_to(here.inbox)
    assert here.accepted.is_relative_to(here.inbox)
    assert here.rejected.is_relative_to(here.inbox)
    assert here.unfinished.is_relative_to(here.outbox)
    assert here.publishing.parent == here.receipts.parent
