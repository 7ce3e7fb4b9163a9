"""What of a machine would hurt tonight, read from the files that a machine has: here below a folder of the test."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from safelight import tonight
from safelight.finding import Finding, exit_code, fail, ok, warn
from safelight.machine import GIB

NOW = datetime(2026, 11, 25, 21, tzinfo=UTC)
Write = Callable[[str, str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Put a file below the root that is looked at."""

    def put(path: str, text: str = "") -> Path:
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return file

    return put


def only(found: object) -> Finding:
    (one,) = found  # type: ignore[misc] - an iterator of Findings
    assert isinstance(one, Finding)
    return one


def program(folder: Path, name: str, script: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


@pytest.mark.parametrize(
    ("findings", "code"),
    [([], 0), ([ok("a", "")], 0), ([warn("a", "", "")], 0), ([fail("a", "", "", 4), fail("b", "", "", 5)], 5),
     ([fail("a", "", "", 5), fail("b", "", "")], 3)],
)  # fmt: skip
def test_the_exit_code_is_that_of_the_gravest(findings: list[Finding], code: int) -> None:
    assert exit_code(findings) == code


# -- sleep -------------------------------------------------------------------------------------------------------


def test_lingering_is_the_file_that_systemd_keeps(tmp_path: Path, write: Write) -> None:
    missing = tonight.lingering("ada", tmp_path)
    write("var/lib/systemd/linger/ada", "")

    assert (missing.look, missing.remedy) == ("warn", "loginctl enable-linger ada")
    assert tonight.lingering("ada", tmp_path).look == "ok"


def test_a_machine_without_a_lid_has_nothing_to_say_of_it(tmp_path: Path) -> None:
    assert list(tonight.lid(tmp_path)) == []


@pytest.mark.parametrize(
    ("written", "look"),
    [
        ("", "warn"),
        ("[Login]\nHandleLidSwitch=ignore\n", "ok"),
        ("[Login]\nHandleLidSwitchExternalPower=lock\n", "ok"),
        ("[Login]\nHandleLidSwitch=ignore\nHandleLidSwitchExternalPower=hibernate\n", "warn"),
        ("[Login]\n#HandleLidSwitch=ignore\n", "warn"),
        ("[Other]\nHandleLidSwitch=ignore\n", "warn"),
    ],
)
def test_a_lid_that_sleeps_on_mains_power_is_named(tmp_path: Path, write: Write, written: str, look: str) -> None:
    write("proc/acpi/button/lid/LID0/state", "state: open\n")
    write("etc/systemd/logind.conf", written)

    assert only(tonight.lid(tmp_path)).look == look


def test_drop_ins_of_logind_win_in_the_order_of_their_names_and_folders(tmp_path: Path, write: Write) -> None:
    write("usr/lib/systemd/logind.conf", "[Login]\nIdleAction=suspend\nHandleLidSwitch=poweroff\n")
    write("etc/systemd/logind.conf", "[Login]\nIdleAction=lock\n")
    write("usr/lib/systemd/logind.conf.d/50-a.conf", "[Login]\nIdleAction=hibernate\nIdleActionSec=5min\n")
    write("etc/systemd/logind.conf.d/50-a.conf", "[Login]\nIdleActionSec=10min\n")
    write("run/systemd/logind.conf.d/90-b.conf", "[Login]\n; nothing\nIdleAction = halt\nIdleActionSec=\n")

    assert tonight.logind_settings(tmp_path) == {"IdleAction": "halt"}
    assert tonight.logind_settings(tmp_path / "nowhere") == {}


def test_idle_actions_of_logind_are_named_with_their_time(tmp_path: Path, write: Write) -> None:
    calm = only(tonight.idle(tmp_path, {}))
    write("etc/systemd/logind.conf", "[Login]\nIdleAction=suspend\nIdleActionSec=20min\n")
    found = only(tonight.idle(tmp_path, {}))

    assert calm.look == "ok"
    assert found.look == "warn"
    assert "suspend after 20min" in found.says


@pytest.mark.parametrize(
    ("kind", "seconds", "look"), [("'suspend'", 3600, "warn"), ("'nothing'", 3600, "ok"), ("'suspend'", 0, "ok")]
)
def test_gnomes_own_idle_action_is_asked_for_in_gnome_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, seconds: int, look: str
) -> None:
    program(tmp_path / "bin", "gsettings", f'case "$3" in *-type) echo "{kind}";; *) echo {seconds};; esac')
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")

    _logind, gnome = tonight.idle(tmp_path, {"XDG_CURRENT_DESKTOP": "ubuntu:GNOME"})

    assert gnome.look == look
    assert look == "ok" or "60 min" in gnome.says
    assert only(tonight.idle(tmp_path, {"XDG_CURRENT_DESKTOP": "KDE"})).look == "ok"


def test_a_polkit_rule_lets_services_keep_the_machine_awake(tmp_path: Path, write: Write) -> None:
    without_logind = tonight.staying_awake(tmp_path)
    (tmp_path / "run/systemd/seats").mkdir(parents=True)
    write("usr/share/polkit-1/rules.d/50-default.rules", "polkit.addRule(function(action, subject) {});")
    denied = tonight.staying_awake(tmp_path)
    write(
        "etc/polkit-1/rules.d/50-safelight.rules",
        'if (action.id == "org.freedesktop.login1.inhibit-block-sleep") return "yes";',
    )

    assert (without_logind.look, denied.look) == ("ok", "warn")
    assert "service install" in denied.remedy
    assert "50-safelight.rules" in tonight.staying_awake(tmp_path).says


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every folder")
def test_rules_that_are_closed_to_a_person_are_unknown(tmp_path: Path, write: Write) -> None:
    (tmp_path / "run/systemd/seats").mkdir(parents=True)
    folder = write("etc/polkit-1/rules.d/50-safelight.rules", "").parent
    folder.chmod(0)

    assert "unknown" in tonight.staying_awake(tmp_path).says

    folder.chmod(stat.S_IRWXU)


# -- the GPU's memory over a sleep -------------------------------------------------------------------------------


def params(**values: object) -> str:
    return "".join(f"{key}: {value}\n" for key, value in {"ModifyDeviceFiles": 1, **values}.items())


@pytest.mark.parametrize(
    ("values", "look", "says"),
    [
        ({}, "warn", "does not keep"),
        ({"PreserveVideoMemoryAllocations": 0, "UseKernelSuspendNotifiers": 1}, "ok", "Notifiers"),
        ({"PreserveVideoMemoryAllocations": 1, "UseKernelSuspendNotifiers": 1}, "warn", "collide"),
        ({"PreserveVideoMemoryAllocations": 1}, "warn", "nothing tells it"),
    ],
)
def test_driver_settings_that_lose_gpu_memory_are_named(
    tmp_path: Path, write: Write, values: dict[str, object], look: str, says: str
) -> None:
    write("proc/driver/nvidia/params", params(**values))

    found = only(tonight.suspend(None, tmp_path))

    assert found.look == look
    assert says in found.says


@pytest.mark.parametrize(
    ("mount", "vram_bytes", "look", "says"),
    [
        ("/dev/sda1 / ext4 rw 0 0", 1, "ok", "/var"),
        ("/dev/sda1 / ext4 rw 0 0", None, "ok", "/var"),
        ("/dev/sda1 / ext4 rw 0 0\ntmpfs /var tmpfs rw 0 0", 1, "warn", "RAM itself"),
        ("/dev/sda1 / ext4 rw 0 0", 2**60, "warn", "are free there"),
    ],
)
def test_the_place_for_gpu_memory_must_be_a_disk_with_room(
    tmp_path: Path, write: Write, mount: str, vram_bytes: int | None, look: str, says: str
) -> None:
    write("proc/driver/nvidia/params", params(PreserveVideoMemoryAllocations=1, TemporaryFilePath='"/var"'))
    write("proc/self/mounts", f"{mount}\n")
    write("etc/systemd/system/systemd-suspend.service.requires/nvidia-suspend.service", "")
    (tmp_path / "var").mkdir()

    found = only(tonight.suspend(vram_bytes, tmp_path))

    assert found.look == look
    assert says in found.says


def test_without_the_driver_nothing_is_said_of_suspend(tmp_path: Path) -> None:
    assert list(tonight.suspend(None, tmp_path)) == []


# -- memory ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ram_gib", "swap_gib", "devices", "look"),
    [
        (31, 0, [], "warn"),
        (31, 2, ["/swapfile"], "warn"),
        (31, 8, ["/dev/zram0"], "warn"),
        (31, 16, ["/dev/zram0", "/swapfile"], "ok"),
        (31, 8, ["/dev/nvme0n1p3"], "ok"),
        (62, 0, [], "ok"),
    ],
)
def test_too_little_swap_beside_little_ram_is_named(
    tmp_path: Path, write: Write, ram_gib: int, swap_gib: int, devices: list[str], look: str
) -> None:
    kib = GIB // 1024
    write("proc/meminfo", f"MemTotal:  {ram_gib * kib} kB\nSwapCached: 0 kB\nSwapTotal: {swap_gib * kib} kB\n")
    lines = "".join(f"{device} partition 8388604 0 -2\n" for device in devices)
    write("proc/swaps", f"Filename Type Size Used Priority\n{lines}")

    found = only(tonight.swap(tmp_path))

    assert found.look == look
    assert bool(found.remedy) == (look == "warn")


# -- the clock ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("year", [1970, 2025, 2107])
def test_a_year_that_cannot_be_is_named(tmp_path: Path, year: int) -> None:
    found = tonight.clock(NOW.replace(year=year), [], tmp_path)

    assert found.look == "warn"
    assert str(year) in found.says


def test_a_clock_that_went_back_behind_the_last_job_is_named(tmp_path: Path, write: Write) -> None:
    write("run/systemd/timesync/synchronized", "")
    later = f"{NOW + timedelta(days=2):%Y%m%d-%H%M%S}-000abcd"

    assert tonight.clock(NOW, [later, "no-id"], tmp_path).look == "warn"
    assert tonight.clock(NOW + timedelta(days=3), [later, "no-id"], tmp_path).look == "ok"


@pytest.mark.parametrize(
    ("script", "look", "says"),
    [
        ("echo yes", "ok", "network"),
        ("echo no", "warn", "nothing sets it"),
        ("exit 1", "ok", "unknown"),
        (None, "ok", "unknown"),
    ],
)
def test_who_sets_the_clock_is_asked_of_timedatectl(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str | None, look: str, says: str
) -> None:
    program(tmp_path / "bin", "sh-is-elsewhere", "")
    if script:
        program(tmp_path / "bin", "timedatectl", script)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))

    found = tonight.clock(NOW, [], tmp_path)

    assert found.look == look
    assert says in found.says
