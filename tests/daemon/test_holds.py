"""Why no job starts: each reason from the files and folders that say so."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from datetime import datetime, timedelta
from datetime import time as wall_time
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from safelight import config as settings
from safelight.config import Config
from safelightd import holds
from safelightd.holds import GpuTrouble, Setback

SETTINGS = """\
[paths]
inbox = "inbox"
outbox = "outbox"
state = "state"
models = "models"
[worker]
device = "{device}"
[policy]
min_free_disk_gib = {least}
"""


def config_in(folder: Path, device: str = "cpu", least: float = 0) -> Config:
    file = folder / "safelight.toml"
    file.write_text(SETTINGS.format(device=device, least=least))
    config = settings.load({"HOME": str(folder), "XDG_RUNTIME_DIR": str(folder)}, file)
    config.paths.state.mkdir(exist_ok=True)
    return config


def read(config: Config, **said: str | None) -> dict[str, str]:
    return holds.read(config, user_hold=said.get("user"), gpu=said.get("gpu"), machine=said.get("machine"))


# -- each reason -------------------------------------------------------------------------------------------------------


def test_a_machine_without_troubles_holds_nothing(tmp_path: Path) -> None:
    assert read(config_in(tmp_path)) == {}


def test_holds_are_a_set_and_each_stands_alone(tmp_path: Path) -> None:
    config = config_in(tmp_path, device="cuda", least=1e9)
    found = read(config, user="dinner", gpu="Xid 79", machine="no space left")

    assert {"user", "disk", "gpu", "machine"} <= set(found)
    assert (found["user"], found["gpu"], found["machine"]) == ("dinner", "Xid 79", "no space left")


def test_a_cpu_worker_does_not_care_about_gpu_and_power(tmp_path: Path) -> None:
    assert read(config_in(tmp_path, device="cpu"), gpu="Xid 79") == {}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (json.dumps({"reason": "dinner"}), "dinner"),
        (json.dumps({"reason": None}), "paused by safelight pause"),
        (json.dumps({}), "paused by safelight pause"),
        ("", "paused by safelight pause"),
        ("[]", "paused by safelight pause"),
        ("null", "paused by safelight pause"),
        ('{"reason": ', "paused by safelight pause"),
        ("\udcff", "paused by safelight pause"),
    ],
)
def test_the_users_hold_is_on_disk_and_stands_even_when_it_cannot_be_read(
    tmp_path: Path, content: str, reason: str
) -> None:
    config = config_in(tmp_path)
    config.paths.user_hold.write_text(content, errors="surrogateescape")

    assert read(config) == {"user": reason}
    assert read(config, user="what the queue says") == {"user": reason}


def test_too_little_room_for_outputs_names_the_folder_and_the_setting(tmp_path: Path) -> None:
    config = config_in(tmp_path, least=1e9)
    reason = read(config)["disk"]

    assert str(config.paths.outbox) in reason
    assert "min_free_disk_gib = 1e+09" in reason
    assert not config.paths.outbox.exists()


def test_a_disk_that_cannot_be_looked_at_is_a_hold_and_not_the_workers_end(tmp_path: Path) -> None:
    """As an unmounted network folder; a name too long for any file system fails in the same call."""
    config = config_in(tmp_path)
    lost = replace(config, paths=replace(config.paths, outbox=tmp_path / ("x" * 300)))

    assert "name too long" in read(lost)["disk"]


def test_a_models_disk_that_is_unmounted_is_missed_once_it_was_seen(tmp_path: Path) -> None:
    config = config_in(tmp_path)

    assert read(config) == {}

    model = config.paths.models / "flux-schnell"
    model.mkdir(parents=True)
    (model / "model_index.json").touch()

    assert read(config) == {}

    config.paths.models.rename(tmp_path / "elsewhere")

    assert "is its disk mounted?" in read(config)["models"]

    (tmp_path / "elsewhere").rename(config.paths.models)

    assert read(config) == {}


def supply(power: Path, name: str, **files: str) -> None:
    (power / name).mkdir(parents=True)
    for file, content in files.items():
        (power / name / file).write_text(content + "\n")


@pytest.mark.parametrize(
    ("supplies", "expected"),
    [
        ({}, False),
        ({"BAT0": {"type": "Battery", "status": "Discharging"}, "AC": {"type": "Mains", "online": "0"}}, True),
        ({"BAT0": {"type": "Battery", "status": "Discharging"}, "AC": {"type": "Mains", "online": "1"}}, False),
        ({"BAT0": {"type": "Battery", "status": "Discharging"}, "ucsi": {"type": "USB", "online": "1"}}, False),
        ({"BAT0": {"type": "Battery", "status": "Charging"}}, False),
        ({"BAT0": {"type": "Battery", "status": "Not charging"}, "AC": {"type": "Mains", "online": "0"}}, False),
        ({"BAT0": {"type": "Battery", "status": "Full"}, "BAT1": {"type": "Battery", "status": "Discharging"}}, True),
        ({"hidpp_battery_0": {"type": "Battery", "status": "Discharging", "scope": "Device"}}, False),
        ({"BAT0": {"type": "Battery"}}, False),
    ],
)
def test_on_battery_means_the_machines_own_battery_and_no_mains(
    tmp_path: Path, supplies: dict[str, dict[str, str]], expected: bool
) -> None:
    for name, files in supplies.items():
        supply(tmp_path / "power_supply", name, **files)

    assert holds.on_battery(tmp_path / "power_supply") == expected


# -- windows -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("window", "inside", "outside"),
    [
        ("23:00-07:00", ["23:00", "23:59", "00:00", "06:59"], ["07:00", "12:00", "22:59"]),
        ("01:00-05:30", ["01:00", "05:29"], ["00:59", "05:30", "23:00"]),
    ],
)
def test_a_window_may_cross_midnight_and_its_end_is_outside(window: str, inside: list[str], outside: list[str]) -> None:
    assert all(holds.in_window(window, wall_time.fromisoformat(at)) for at in inside)
    assert not any(holds.in_window(window, wall_time.fromisoformat(at)) for at in outside)


@given(st.times(), st.times(), st.times())
def test_a_window_and_its_opposite_make_a_day(start: wall_time, end: wall_time, now: wall_time) -> None:
    start, end = start.replace(second=0, microsecond=0), end.replace(second=0, microsecond=0)
    assume(start != end)
    there, back = (f"{a:%H:%M}-{b:%H:%M}" for a, b in ((start, end), (end, start)))

    assert holds.in_window(there, now) != holds.in_window(back, now)


def test_night_jobs_start_in_the_window_or_after_all_others_without_one() -> None:
    noon = datetime(2026, 11, 22, 12)

    assert holds.open_classes("", noon) == [0, 1, 2, 3]
    assert holds.open_classes("23:00-07:00", noon) == [0, 1, 2]
    assert holds.open_classes("23:00-07:00", noon + timedelta(hours=12)) == [0, 1, 2, 3]


# -- troubles that pass ------------------------------------------------------------------------------------------------


def test_gpu_trouble_stands_until_a_probe_lifts_it_and_is_not_probed_at_once() -> None:
    trouble = GpuTrouble()

    assert (trouble.reason, trouble.due()) == (None, False)

    trouble.failed("Xid 79")

    assert (trouble.reason, trouble.due()) == ("Xid 79", False)

    trouble.lifted()

    assert (trouble.reason, trouble.due()) == (None, False)


def test_a_setback_holds_for_a_while_and_longer_each_time_until_a_job_ends() -> None:
    setback = Setback()

    assert setback.reason is None

    setback.failed("disk full")

    assert setback.reason == "disk full; the next job starts 1 s after that"

    setback.failed("disk full")

    assert setback.reason == "disk full; the next job starts 5 s after that"

    setback.lifted()

    assert setback.reason is None

    setback.failed("disk full")
    until = time.monotonic() + holds.START_AGAIN_S[0]
    while setback.reason:
        assert time.monotonic() < until + 1

    assert time.monotonic() >= until - 0.1
