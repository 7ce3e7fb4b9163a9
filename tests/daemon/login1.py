"""A bus of the test's own, and on it a small systemd-logind: real messages, real descriptors, no polkit.

Says AccessDenied to what it is told to deny, and knows of each inhibitor whether somebody still has it open.
"""

from __future__ import annotations

import os
import select
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from jeepney import DBusAddress, HeaderFields, MessageType, new_error, new_method_return, new_signal
from jeepney.bus_messages import message_bus
from jeepney.io.blocking import DBusConnection, open_dbus_connection

NAME = "org.freedesktop.login1"
MANAGER = DBusAddress("/org/freedesktop/login1", bus_name=NAME, interface=f"{NAME}.Manager")

BUS = """\
<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
  "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <type>session</type>
  <listen>unix:path={socket}</listen>
  <auth>EXTERNAL</auth>
  <policy context="default">
    <allow user="*"/><allow own="*"/><allow send_destination="*" eavesdrop="true"/><allow eavesdrop="true"/>
  </policy>
</busconfig>
"""


def eventually(true: Callable[[], object], timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


class Bus:
    """A dbus-daemon that can be killed and started again."""

    def __init__(self, folder: Path) -> None:
        self._configuration = folder / "bus.conf"
        self._socket = folder / "bus"
        self.address = f"unix:path={self._socket}"
        self._configuration.write_text(BUS.format(socket=self._socket))
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(
            ["dbus-daemon", f"--config-file={self._configuration}", "--nofork", "--nopidfile"]
        )
        eventually(self._answers)

    def _answers(self) -> bool:
        """Whether it takes connections: its socket is there before it listens."""
        with socket.socket(socket.AF_UNIX) as trying:
            return trying.connect_ex(str(self._socket)) == 0

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self._socket.unlink(missing_ok=True)


class Login1:
    """The stand-in; its thread answers until the bus or the test is gone."""

    def __init__(self, address: str, *, denied: tuple[str, ...] = (), delay_max_s: float = 5.0) -> None:
        self._denied = denied
        self._delay_max_s = delay_max_s
        self._address = address
        self._held: list[tuple[str, int]] = []
        self._handing_out = threading.Lock()  # until its own copy is closed, an inhibitor is held by us as well
        self._bus = open_dbus_connection(address, enable_fds=True)
        self._bus.bus_proxy.RequestName(NAME)
        self._stop, stop = os.pipe()
        self._stopping = stop
        self._thread = threading.Thread(target=self._answer, daemon=True)
        self._thread.start()

    def held(self) -> list[str]:
        """Return "what:mode" of each inhibitor that somebody has open: the other end of its pipe.

        The bus closes its own copy of what it passes on before it answers the next who asks it anything; a bus that is
        gone has none.
        """
        with suppress(OSError), stranger(self._address) as bus:
            bus.send_and_get_reply(message_bus.GetId())
        with self._handing_out:
            return sorted(name for name, ours in self._held if not _closed(ours))

    def prepare_for_sleep(self, begins: bool) -> None:
        self._bus.send(new_signal(MANAGER, "PrepareForSleep", "b", (begins,)))

    def stop(self) -> None:
        os.write(self._stopping, b"x")
        self._thread.join()
        self._bus.close()
        for descriptor in (self._stop, self._stopping, *(ours for _, ours in self._held)):
            os.close(descriptor)

    def _answer(self) -> None:
        while self._stop not in select.select([self._bus.sock, self._stop], [], [])[0]:
            try:
                call = self._bus.receive(timeout=1)
            except (OSError, TimeoutError):
                return
            if call.header.message_type is MessageType.method_call:
                self._reply(call)

    def _reply(self, call: object) -> None:
        match call.header.fields[HeaderFields.member]:
            case "Get":
                value = ("t", int(self._delay_max_s * 1e6))
                self._bus.send(new_method_return(call, "v", (value,)))
            case "Inhibit":
                what, _who, _why, mode = call.body
                if f"{what}:{mode}" in self._denied:
                    self._bus.send(new_error(call, "org.freedesktop.DBus.Error.AccessDenied", "s", ("not you",)))
                    return
                ours, theirs = os.pipe()
                with self._handing_out:
                    self._held.append((f"{what}:{mode}", ours))
                    self._bus.send(new_method_return(call, "h", (theirs,)))
                    os.close(theirs)


def _closed(pipe: int) -> bool:
    readable, _, _ = select.select([pipe], [], [], 0)
    return bool(readable)


@contextmanager
def stranger(address: str) -> Iterator[DBusConnection]:
    """Somebody else on the same bus."""
    connection = open_dbus_connection(address)
    yield connection
    connection.close()


def forged_sleep(address: str, to: str) -> None:
    """Send one process a PrepareForSleep that is not logind's."""
    with stranger(address) as bus:
        message = new_signal(MANAGER, "PrepareForSleep", "b", (True,))
        message.header.fields[HeaderFields.destination] = to
        bus.send(message)
        bus.send_and_get_reply(message_bus.GetId())


Serve = Callable[..., Login1]


@contextmanager
def serving(bus: Bus) -> Iterator[Serve]:
    """Have what starts a logind on `bus` with wishes of its own; all are stopped at the end."""
    started: list[Login1] = []

    def start(**wishes: object) -> Login1:
        started.append(Login1(bus.address, **wishes))
        return started[-1]

    yield start
    for login1 in started:
        login1.stop()
