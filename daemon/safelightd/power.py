"""Where the machine's power comes from."""

from __future__ import annotations

from pathlib import Path


def on_battery(power: Path = Path("/sys/class/power_supply")) -> bool:
    """Whether the machine's own battery discharges and no mains supply is online; a mouse has a battery, too."""
    discharging = False
    for supply in sorted(power.glob("*")):
        if _word(supply / "scope") == "Device":
            continue
        kind = _word(supply / "type")
        if kind in ("Mains", "USB") and _word(supply / "online") == "1":
            return False
        discharging |= kind == "Battery" and _word(supply / "status") == "Discharging"
    return discharging


def _word(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""
