"""What systemd is told: one datagram a message (sd_notify(3)). Without systemd nothing is sent."""

from __future__ import annotations

import os
import socket


def notify(*lines: str) -> None:
    """Tell the service manager, e.g. `notify("READY=1", "STATUS=Waiting for jobs")`; a reason of several lines becomes
    one."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
        channel.connect(address)
        channel.sendall("\n".join(" ".join(line.splitlines()) for line in lines).encode(errors="backslashreplace"))


def watchdog_s() -> float | None:
    """Return the seconds within which WATCHDOG=1 is expected of this process, None when it is not."""
    if os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    period = os.environ.get("WATCHDOG_USEC")
    return int(period) / 1_000_000 if period else None
