"""What of the machine would hurt an unattended night: sleep, lid, memory, clock. Reads files; changes nothing.

Every check takes the root of the file system that it looks at. What cannot be told without trying it is said to be
unknown.
"""

from __future__ import annotations

import os
import pwd
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime, timedelta
from pathlib import Path

from safelight import ids
from safelight.finding import Finding, ok, warn
from safelight.machine import GIB

ROOT = Path("/")

LOGIND_FOLDERS = ("usr/lib", "usr/local/lib", "run", "etc")
"""Later ones win (systemd-system.conf(5))."""

SLEEPLESS = ("ignore", "lock")
"""What a lid may do without hurting a job."""

POLKIT_FOLDERS = ("etc", "run", "usr/local/share", "usr/share")
INHIBIT = "org.freedesktop.login1.inhibit-"
"""How the actions begin that polkit is asked about, such as inhibit-block-sleep."""

SWAP_MIN_GIB = 4.0
"""What the worker's unit lets it swap (MemorySwapMax=)."""

RAM_AMPLE_GIB = 48.0
"""From here on the largest of the models, quantised, and a desktop fit without swap."""

YEAR_MIN, YEAR_MAX = 2026, 2100
"""Before this program was written, or so far off that a battery or a typing mistake is behind it."""

COMMAND_TIMEOUT_S = 5.0

_NUMBER = re.compile(r"\d+")


# -- sleep -------------------------------------------------------------------------------------------------------


def lingering(user: str, root: Path = ROOT) -> Finding:
    """A user's services stop at log-out without it, in the middle of the night's work.

    The file is what `loginctl show-user` reports, also of users that are not logged in.
    """
    if (root / "var/lib/systemd/linger" / user).exists():
        return ok("lingering", f"services of {user} outlive the log-out")
    return warn("lingering", "your services stop when you log out", f"loginctl enable-linger {user}")


def lid(root: Path = ROOT) -> Iterator[Finding]:
    """Only machines with a lid have something to say."""
    if not any(root.glob("proc/acpi/button/lid/*/state")):
        return
    written = logind_settings(root)
    always = written.get("HandleLidSwitch", "suspend")
    on_mains = written.get("HandleLidSwitchExternalPower", always)
    if on_mains in SLEEPLESS:
        on_battery = "" if always in SLEEPLESS else f"; on battery it is HandleLidSwitch={always}"
        yield ok("lid", f"closing it does not make the machine sleep on mains power{on_battery}")
        return
    remedy = (
        "Leave it open, or write HandleLidSwitchExternalPower=ignore below [Login] in "
        "/etc/systemd/logind.conf.d/safelight.conf (read at the next boot)."
    )
    yield warn("lid", f"closing it means {on_mains}, unless a job runs that may keep the machine awake", remedy)


def idle(root: Path = ROOT, env: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    """What logind does when nobody types, and GNOME where it is this person's desktop."""
    written = logind_settings(root)
    action = written.get("IdleAction", "ignore")
    if action in SLEEPLESS:
        yield ok("idle", "logind lets an idle machine be")
    else:
        after = written.get("IdleActionSec", "30min")
        remedy = "Write IdleAction=ignore below [Login] in /etc/systemd/logind.conf.d/safelight.conf."
        yield warn("idle", f"logind: {action} after {after} without input, unless a job keeps it awake", remedy)
    if "GNOME" in env.get("XDG_CURRENT_DESKTOP", "").split(":"):
        yield from _gnome_idle()


def _gnome_idle() -> Iterator[Finding]:
    schema = "org.gnome.settings-daemon.plugins.power"
    action = _said("gsettings", "get", schema, "sleep-inactive-ac-type")
    after = _NUMBER.search(_said("gsettings", "get", schema, "sleep-inactive-ac-timeout") or "")
    if action is None or after is None:
        return
    minutes = int(after[0]) // 60
    if action.strip("'\n ") == "nothing" or after[0] == "0":
        yield ok("idle", "GNOME lets an idle machine be")
    else:
        says = f"GNOME: {action.strip(chr(39))} after {minutes} min without input, unless a job keeps it awake"
        yield warn("idle", says, f"gsettings set {schema} sleep-inactive-ac-type nothing")


def logind_settings(root: Path = ROOT) -> dict[str, str]:
    """Return what [Login] of logind.conf and its drop-ins say; what is not written has logind's default."""
    mains = [root / folder / "systemd/logind.conf" for folder in reversed(LOGIND_FOLDERS)]
    files = [next(file for file in mains if file.is_file())] if any(file.is_file() for file in mains) else []
    drop_ins: dict[str, Path] = {}
    for folder in LOGIND_FOLDERS:
        drop_ins |= {file.name: file for file in (root / folder / "systemd/logind.conf.d").glob("*.conf")}
    files += [drop_ins[name] for name in sorted(drop_ins)]
    found: dict[str, str] = {}
    for file in files:
        for key, value in _login_lines(file):
            if value:
                found[key] = value
            else:
                found.pop(key, None)  # an empty value is the default again
    return found


def _login_lines(file: Path) -> Iterator[tuple[str, str]]:
    section = ""
    for line in _read(file).splitlines():
        text = line.strip()
        if text.startswith("["):
            section = text
        elif section == "[Login]" and text[:1] not in ("#", ";") and "=" in text:
            key, _, value = text.partition("=")
            yield key.strip(), value.strip()


def staying_awake(root: Path = ROOT) -> Finding:
    """Whether a service, which has no seat, may keep the machine awake: polkit's own default is no."""
    if not (root / "run/systemd/seats").is_dir():
        return ok("awake", "unknown: there is no logind to ask for it")
    closed = []
    for folder in (root / place / "polkit-1/rules.d" for place in POLKIT_FOLDERS):
        if folder.is_dir() and not os.access(folder, os.R_OK | os.X_OK):
            closed.append(str(folder))
            continue
        for rule in sorted(folder.glob("*.rules")):
            if INHIBIT in _read(rule):
                return ok("awake", f"a polkit rule is about it: {rule}")
    if closed:
        return ok("awake", f"unknown: {', '.join(closed)} is closed to you; the worker's log says whether it may")
    remedy = "safelight service install offers the polkit rule."
    return warn("awake", "no polkit rule lets a service keep the machine awake: it delays sleep by seconds", remedy)


# -- the GPU's memory over a sleep -------------------------------------------------------------------------------


def suspend(vram_bytes: int | None, root: Path = ROOT) -> Iterator[Finding]:
    """What the NVIDIA driver does with GPU memory in suspend: what it forgets may cost CUDA until a reboot.

    Args:
        vram_bytes: what it would have to keep, None where nobody knows.
    """
    params = _params(root / "proc/driver/nvidia/params")
    if params is None:
        return
    preserves = params.get("PreserveVideoMemoryAllocations") == "1"
    notified = params.get("UseKernelSuspendNotifiers") == "1"
    if preserves and notified:
        remedy = "Set only one of NVreg_PreserveVideoMemoryAllocations and NVreg_UseKernelSuspendNotifiers to 1."
        yield warn("suspend", "the driver is told two ways of keeping GPU memory over suspend, which collide", remedy)
    elif notified:
        yield ok("suspend", "the driver keeps GPU memory over suspend (UseKernelSuspendNotifiers)")
    elif preserves:
        yield from _preserving(params, vram_bytes, root)
    else:
        remedy = (
            "Set NVreg_PreserveVideoMemoryAllocations=1 and enable nvidia-suspend.service and nvidia-resume.service; "
            "with the open modules of driver 595 or later NVreg_UseKernelSuspendNotifiers=1 instead."
        )
        yield warn("suspend", "the driver does not keep GPU memory over suspend", remedy)


def _params(file: Path) -> dict[str, str] | None:
    if not file.is_file():
        return None
    return {
        key.strip(): value.strip().strip('"')
        for key, _, value in (line.partition(":") for line in _read(file).splitlines())
    }


def _preserving(params: Mapping[str, str], vram_bytes: int | None, root: Path) -> Iterator[Finding]:
    units = (root / folder / "systemd/system" for folder in ("etc", "usr/lib"))
    if not any(any(folder.glob("systemd-suspend.service.*/nvidia-suspend.service")) for folder in units):
        remedy = "sudo systemctl enable nvidia-suspend.service nvidia-hibernate.service nvidia-resume.service"
        yield warn("suspend", "the driver is to keep GPU memory over suspend, but nothing tells it of one", remedy)
        return
    place = params.get("TemporaryFilePath") or "/tmp"  # noqa: S108 - the driver's default
    remedy = "Set NVreg_TemporaryFilePath to a folder on a disk with more room than the card has memory."
    free = shutil.disk_usage(there).free if (there := root / place.lstrip("/")).is_dir() else 0
    kind = _file_system(place, root)
    if kind in ("tmpfs", "ramfs"):
        yield warn("suspend", f"the driver keeps GPU memory over suspend in {place}, which is RAM itself", remedy)
    elif vram_bytes is not None and free < vram_bytes:
        says = f"the driver keeps GPU memory over suspend in {place}: {free / GIB:.1f} of {vram_bytes / GIB:.1f} GiB"
        yield warn("suspend", f"{says} are free there", remedy)
    else:
        yield ok("suspend", f"the driver keeps GPU memory over suspend, in {place}")


def _file_system(place: str, root: Path) -> str:
    """Return the type of the file system that a path of the machine lies on; "" where nobody says."""
    mounts = [line.split() for line in _read(root / "proc/self/mounts").splitlines()]
    holding = [(words[1], words[2]) for words in mounts if len(words) > 2 and Path(place).is_relative_to(words[1])]
    return max(holding, key=lambda mount: len(mount[0]), default=("", ""))[1]


# -- memory ------------------------------------------------------------------------------------------------------


def swap(root: Path = ROOT) -> Iterator[Finding]:
    """Where RAM runs short for a moment, swap is between a slow step and a killed engine."""
    sizes = {
        key: int(number[0]) * 1024
        for key, _, value in (line.partition(":") for line in _read(root / "proc/meminfo").splitlines())
        if (number := _NUMBER.search(value))
    }
    ram, swap_bytes = sizes.get("MemTotal"), sizes.get("SwapTotal", 0)
    if ram is None:
        return
    devices = [line.split()[0] for line in _read(root / "proc/swaps").splitlines()[1:] if line.strip()]
    remedy = "As root: fallocate -l 8G /swapfile && chmod 600 /swapfile && mkswap /swapfile && swapon /swapfile"
    if ram >= RAM_AMPLE_GIB * GIB:
        yield ok("swap", f"{swap_bytes / GIB:.1f} GiB beside {ram / GIB:.0f} GiB of RAM")
    elif swap_bytes < SWAP_MIN_GIB * GIB:
        says = f"{swap_bytes / GIB:.1f} GiB beside {ram / GIB:.0f} GiB of RAM: a job short of it is killed, not slowed"
        yield warn("swap", says, remedy)
    elif devices and all(Path(device).name.startswith("zram") for device in devices):
        yield warn("swap", "zram alone: it lies in the RAM that is short", remedy)
    else:
        yield ok("swap", f"{swap_bytes / GIB:.1f} GiB beside {ram / GIB:.0f} GiB of RAM")


# -- the clock ---------------------------------------------------------------------------------------------------


def clock(now: datetime, submissions: Iterable[str], root: Path = ROOT) -> Finding:
    """Windows, not_before and retention go by it.

    Args:
        submissions: ids, which begin with the time at which they were made.
    """
    remedy = "timedatectl set-ntp true, or set it: timedatectl set-time."
    if not YEAR_MIN <= now.year <= YEAR_MAX:
        return warn("clock", f"it says {now:%d %b %Y}, which cannot be", remedy)
    newest = max((made for made in map(_made_at, submissions) if made), default=None)
    if newest and newest > now + timedelta(hours=1):
        said = f"it says {now:%Y-%m-%d %H:%M}, and jobs were submitted as late as {newest.astimezone():%Y-%m-%d %H:%M}"
        return warn("clock", said, remedy)
    if (root / "run/systemd/timesync/synchronized").exists():
        return ok("clock", "set by the network")
    said_by = (_said("timedatectl", "show", "--property=NTPSynchronized", "--value") or "").strip()
    if said_by == "yes":
        return ok("clock", "set by the network")
    if said_by == "no":
        return warn("clock", "nothing sets it: it may be wrong by any amount", remedy)
    return ok("clock", "unknown whether anything sets it")


def _made_at(submission: str) -> datetime | None:
    try:
        return ids.made_at(submission)
    except ValueError:
        return None


# -- reading -----------------------------------------------------------------------------------------------------


def current_user() -> str:
    """Return the name of who asks; the number where the machine has no name for it."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


def _read(file: Path) -> str:
    """Return what a file says, "" where it is not there or closed to us."""
    try:
        return file.read_text(errors="replace")
    except OSError:
        return ""


def _said(*command: str) -> str | None:
    """Return what a command that only reads prints, None where it is missing or fails."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
