"""Why no job starts: each reason from the files and folders that say so."""

from __future__ import annotations

import json
import os
import tempfile
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from datetime import time as wall_time
from itertools import pairwise
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from safelight import config as settings
from safelight import dues
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
    return holds.read(
        config,
        user_hold=said.get("user"),
        gpu=said.get("gpu"),
        machine=said.get("machine"),
        sleep=said.get("sleep"),
    )


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


def test_a_machine_that_goes_to_sleep_starts_nothing_whatever_the_device(tmp_path: Path) -> None:
    assert read(config_in(tmp_path, device="cpu"), sleep="it goes to sleep") == {"sleep": "it goes to sleep"}


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


def test_a_folder_that_cannot_be_written_is_a_hold_and_burns_no_job() -> None:
    """As after a remount read-only, or in a folder of somebody else."""
    with tempfile.TemporaryDirectory() as made:  # pytest's own folders are closed to others
        folder = Path(made)
        config = config_in(folder)
        folder.chmod(0o555)
        is_root = os.geteuid() == 0
        if is_root:
            os.seteuid(65534)
        try:
            reason = read(config)["disk"]
        finally:
            if is_root:
                os.seteuid(0)
            folder.chmod(0o755)

        assert reason == f"nothing can be written to {folder}: mounted read-only, or not this user's"
        assert read(config) == {}


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


def test_what_is_remembered_of_the_models_disk_may_be_damaged_and_is_written_anew(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    config.paths.state.mkdir(parents=True, exist_ok=True)
    seen = config.paths.state / "models.seen"
    seen.write_bytes(b"\xff\xfe")

    assert read(config) == {}

    model = config.paths.models / "flux-schnell"
    model.mkdir(parents=True)
    (model / "model_index.json").touch()

    assert read(config) == {}
    assert seen.read_bytes() == os.fsencode(config.paths.models)


# -- windows -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("window", "inside", "outside"),
    [
        ("23:00-07:00", ["23:00", "23:59", "00:00", "06:59"], ["07:00", "12:00", "22:59"]),
        ("01:00-05:30", ["01:00", "05:29"], ["00:59", "05:30", "23:00"]),
    ],
)
def test_a_window_may_cross_midnight_and_its_end_is_outside(window: str, inside: list[str], outside: list[str]) -> None:
    assert all(dues.in_window(window, wall_time.fromisoformat(at)) for at in inside)
    assert not any(dues.in_window(window, wall_time.fromisoformat(at)) for at in outside)


@given(st.times(), st.times(), st.times())
def test_a_window_and_its_opposite_make_a_day(start: wall_time, end: wall_time, now: wall_time) -> None:
    start, end = start.replace(second=0, microsecond=0), end.replace(second=0, microsecond=0)
    assume(start != end)
    there, back = (f"{a:%H:%M}-{b:%H:%M}" for a, b in ((start, end), (end, start)))

    assert dues.in_window(there, now) != dues.in_window(back, now)


def test_night_jobs_start_in_the_window_or_after_all_others_without_one() -> None:
    noon = datetime(2026, 11, 22, 12)

    assert holds.open_classes("", noon) == [0, 1, 2, 3]
    assert holds.open_classes("23:00-07:00", noon) == [0, 1, 2]
    assert holds.open_classes("23:00-07:00", noon + timedelta(hours=12)) == [0, 1, 2, 3]


BERLIN = ZoneInfo("Europe/Berlin")


@pytest.mark.parametrize(
    ("window", "begins", "open_hours"),
    [
        ("23:00-07:00", "2026-11-22T21:00Z", 8),
        ("23:00-07:00", "2026-03-28T21:00Z", 7),  # at 02:00 it is 03:00
        ("23:00-07:00", "2026-10-24T20:00Z", 9),  # at 03:00 it is 02:00 again
        ("02:15-02:45", "2026-03-28T21:00Z", 0),  # there is no such time that night
        ("02:15-02:45", "2026-10-24T20:00Z", 1),  # it comes twice
        ("01:00-02:30", "2026-03-28T21:00Z", 1),
    ],
)
def test_a_window_is_what_the_clock_on_the_wall_says_also_when_it_is_changed(
    window: str, begins: str, open_hours: float
) -> None:
    """Minute by minute, as the machine lives through the night."""
    night = datetime.fromisoformat(begins)
    minutes = [(night + timedelta(minutes=minute)).astimezone(BERLIN) for minute in range(12 * 60)]

    assert sum(3 in holds.open_classes(window, minute) for minute in minutes) == open_hours * 60


def test_a_window_is_one_piece_from_evening_to_morning_in_every_night_of_a_year() -> None:
    noon = datetime(2026, 1, 1, 11, tzinfo=UTC)
    for day in range(365):
        hours = [(noon + timedelta(days=day, hours=hour)).astimezone(BERLIN) for hour in range(24)]
        states = [3 in holds.open_classes("23:00-07:00", hour) for hour in hours]

        assert sum(before != after for before, after in pairwise(states)) == 2, hours[0]


def test_the_zone_may_change_under_a_running_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A person who travels tells the machine, and not each process."""
    monkeypatch.setenv("TZ", "UTC-5")
    east = holds.wall_clock()
    os.environ["TZ"] = "UTC+5"
    west = holds.wall_clock()
    monkeypatch.undo()
    time.tzset()

    assert round((east - west).total_seconds() / 3600) == 10


# -- troubles that pass ------------------------------------------------------------------------------------------------


def test_gpu_trouble_stands_until_a_probe_lifts_it_and_is_not_probed_at_once() -> None:
    trouble = GpuTrouble()

    assert (trouble.reason, trouble.due()) == (None, False)

    trouble.failed("Xid 79")

    assert (trouble.reason, trouble.due()) == ("Xid 79", False)

    trouble.lifted()

    assert (trouble.reason, trouble.due()) == (None, False)


def test_jobs_without_room_hold_those_after_them_for_a_moment_however_many_they_are() -> None:
    setback = Setback()
    for _ in range(9):
        setback.failed("no room", of_all=False)

    assert setback.reason == "no room; the next job starts 1 s after that"


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
