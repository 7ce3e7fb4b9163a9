"""What a person is told in the morning, or in the night: the line is empty, a hold lasts, no job gets through, a job
was set aside.

By a command of theirs, which gets the event as JSON on its stdin, and by the desktop. Both run in processes of their
own that nobody waits for: neither can hurt a job, nor outlive the worker.

`python -m safelightd.notices` shows the event on its stdin on the desktop (org.freedesktop.Notifications).
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime

from safelight.config import NotifySection
from safelight.receipt import Receipt
from safelightd.logs import Log

ENDS_WITHIN_S = 60.0
"""What a command and a desktop get; then they are killed."""

AT_ONCE = 8
"""Commands under way; what comes on top is said in the log alone."""

MESSAGE_CHARACTERS_MAX = 2000
"""An event is written to a pipe of 64 KiB in one go."""

SHOWS_ON_DESKTOP = (sys.executable, "-m", "safelightd.notices")

log = Log("safelight.notices")


@dataclass
class _Told:
    process: subprocess.Popen[bytes]
    until: float


class Notices:
    """Tells of what `ended` and `look` are told; for one thread."""

    def __init__(self, settings: NotifySection, clock: Callable[[], float] = time.monotonic) -> None:
        self._settings = settings
        self._clock = clock
        self._ended: dict[str, int] = {}
        self._held: dict[str, float] = {}
        self._said: set[str] = set()
        self._taken_back = ""
        self._under_way: list[_Told] = []

    def ended(self, receipt: Receipt | None) -> None:
        """Count a job that has ended, and tell of one that was set aside; None is a job that waits again."""
        if receipt is None:
            return
        self._taken_back = ""
        self._ended[receipt.state] = self._ended.get(receipt.state, 0) + 1
        if receipt.state == "quarantined":
            self._tell("job.quarantined", f"{receipt.id} was set aside: {receipt.error}", id=receipt.id)

    def taken_back(self, reason: str) -> None:
        """Remember why the machine took a job back: it is told as a hold is, where no job ends for so long."""
        self._taken_back = reason

    def look(self, counts: Mapping[str, int], holds: Mapping[str, str]) -> None:
        """See whether the line became empty and which holds last; ends what takes too long.

        Args:
            counts: jobs that are queued, and that run.
        """
        self._reap()
        if self._ended and not (counts["queued"] or counts["running"]):
            ended, self._ended = self._ended, {}
            what = ", ".join(f"{count} {state}" for state, count in sorted(ended.items()))
            self._tell("queue.empty", f"All jobs have ended: {what}.", **ended)
        now = self._clock()
        lasting = {name: (reason, "Nothing starts") for name, reason in holds.items()}
        if not counts["queued"]:
            self._taken_back = ""  # else the jobs of another night would be said not to get through
        if self._taken_back:  # under the name of the hold between its tries: one wait, told once
            lasting["machine"] = (self._taken_back, "No job gets through")
        self._held = {name: self._held.get(name, now) for name in lasting}
        self._said &= set(lasting)
        for name, (reason, what) in lasting.items():
            minutes = (now - self._held[name]) / 60
            if name not in self._said and minutes >= self._settings.hold_minutes:
                self._said.add(name)
                self._tell("hold.lasts", f"{what}: {name}: {reason}", hold=name, reason=reason[:MESSAGE_CHARACTERS_MAX])

    def close(self) -> None:
        """End what is still under way."""
        for told in self._under_way:
            _end(told.process)
        self._under_way = []

    def _tell(self, event: str, message: str, **facts: object) -> None:
        at = datetime.now().astimezone().isoformat(timespec="seconds")
        facts |= {"event": event, "message": message[:MESSAGE_CHARACTERS_MAX], "at": at, "host": socket.gethostname()}
        told = json.dumps(facts)
        log.info("notice", told=event, message=message)
        if self._settings.command:
            self._start(shlex.split(self._settings.command), told)
        if self._settings.desktop:
            self._start(SHOWS_ON_DESKTOP, told)

    def _start(self, command: list[str] | tuple[str, ...], told: str) -> None:
        self._reap()
        if len(self._under_way) >= AT_ONCE:
            log.warning("notice.untold", command=command[0], reason=f"{AT_ONCE} are under way")
            return
        reading, writing = os.pipe()
        try:
            process = subprocess.Popen(
                command, stdin=reading, stdout=subprocess.DEVNULL, stderr=sys.stderr, start_new_session=True
            )
            self._under_way.append(_Told(process, self._clock() + ENDS_WITHIN_S))
            os.set_blocking(writing, False)  # also when nobody reads it
            with suppress(BlockingIOError, BrokenPipeError):
                os.write(writing, told.encode() + b"\n")
        except OSError as error:
            log.warning("notice.untold", command=command[0], reason=error)
        finally:
            os.close(reading)
            os.close(writing)

    def _reap(self) -> None:
        now = self._clock()
        for told in self._under_way:
            if told.process.poll() is None and now >= told.until:
                log.warning("notice.killed", command=str(told.process.args), after_s=ENDS_WITHIN_S)
                _end(told.process)
        self._under_way = [told for told in self._under_way if told.process.poll() is None]


def _end(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def main() -> int:
    """Show the event on stdin; exit 1 where there is no desktop to show it on."""
    from jeepney import DBusAddress, new_method_call
    from jeepney.io.blocking import open_dbus_connection

    told = json.loads(sys.stdin.readline())
    name = "org.freedesktop.Notifications"
    address = DBusAddress("/org/freedesktop/Notifications", bus_name=name, interface=name)
    body: tuple[object, ...] = ("safelight", 0, "", "safelight", told["message"], [], {}, -1)
    try:
        with open_dbus_connection(bus="SESSION") as bus:
            bus.send_and_get_reply(new_method_call(address, "Notify", "susssasa{sv}i", body), timeout=10)
    except Exception as error:  # noqa: BLE001 - whatever a desktop answers, it is this process's end and nobody else's
        print(f"no desktop could be told: {error}", file=sys.stderr)  # noqa: T201 - the worker's log
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
