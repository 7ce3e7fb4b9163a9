"""Whether the machine runs on its battery, from files as the kernel shows them."""

from __future__ import annotations

from pathlib import Path

import pytest

from safelightd.power import on_battery


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

    assert on_battery(tmp_path / "power_supply") == expected
