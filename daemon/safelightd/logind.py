"""systemd-logind over D-Bus: inhibitors, and the word that the machine goes to sleep or is back (logind(5), interface
org.freedesktop.login1.Manager). Knows no job. Starts no thread, and waits for no answer longer than ANSWER_S.
"""

from __future__ import annotations

import os
from collections import deque
from contextlib import suppress
from typing import Any

from jeepney import DBusAddress, DBusErrorResponse, HeaderFields, MatchRule, Message, Properties, new_method_call
from jeepney.bus_messages import message_bus
from jeepney.io.blocking import DBusConnection, get_bus, prep_socket
from jeepney.wrappers import unwrap_msg

ANSWER_S = 2.0
"""logind answers within milliseconds, with polkit's word in tens of them."""

WHO = "safelight"
DENIED = ("org.freedesktop.DBus.Error.AccessDenied", "org.freedesktop.DBus.Error.InteractiveAuthorizationRequired")

_NAME = "org.freedesktop.login1"
_MANAGER = DBusAddress("/org/freedesktop/login1", bus_name=_NAME, interface=f"{_NAME}.Manager")
_SLEEP = {"type": "signal", "interface": f"{_NAME}.Manager", "member": "PrepareForSleep"}


class Denied(Exception):
    """polkit does not let this process inhibit what it asked for."""


class _Connection(DBusConnection):  # type: ignore[misc] # jeepney has no types
    """jeepney's, which would wait for ever for the answer to its first call."""

    def send_and_get_reply(self, message: Message, *, timeout: float | None = None) -> Message:
        return super().send_and_get_reply(message, timeout=ANSWER_S if timeout is None else timeout)


class Logind:
    """One connection to logind. Any call may raise whatever a broken bus makes jeepney raise: then close it."""

    def __init__(self) -> None:
        end = prep_socket(get_bus("SYSTEM"), enable_fds=True, timeout=ANSWER_S)
        try:
            end.settimeout(ANSWER_S)  # writing to a bus that does not read ends as well
            self._bus = _Connection(end, enable_fds=True)
        except BaseException:
            end.close()
            raise
        try:
            self._heard: deque[Message] = deque()
            self._bus.filter(MatchRule(**_SLEEP), queue=self._heard)
            self._call(message_bus.AddMatch(MatchRule(sender=_NAME, **_SLEEP)))
            self.delay_max_s = self._delay_max_s()
        except BaseException:
            self.close()
            raise

    @property
    def descriptor(self) -> int:
        """Readable when the bus has said something."""
        return int(self._bus.sock.fileno())

    def inhibit(self, what: str, mode: str, why: str) -> int:
        """Return a descriptor that inhibits `what` until all its copies are closed.

        Args:
            what: "sleep", "idle" or "handle-lid-switch".
            mode: "block", or "delay" for at most `delay_max_s`, of sleep alone.

        Raises:
            Denied: polkit refuses.
        """
        try:
            (handed,) = self._call(new_method_call(_MANAGER, "Inhibit", "ssss", (what, WHO, why, mode)))
        except DBusErrorResponse as error:
            if error.name in DENIED:
                raise Denied(what) from error
            raise
        descriptor = int(handed.to_raw_fd())
        os.set_inheritable(descriptor, False)  # noqa: FBT003 - its only form; recvmsg(2) hands them out inheritable
        return descriptor

    def sleeps(self) -> list[bool]:
        """Return what logind has said since the last call: True before each sleep, False after it."""
        with suppress(TimeoutError):
            while True:
                self._bus.recv_messages(timeout=0)
        said = []
        while self._heard:
            message = self._heard.popleft()
            if message.header.fields.get(HeaderFields.sender) == self._owner():
                said.append(bool(message.body[0]))
        return said

    def close(self) -> None:
        """Leave the bus; in a fork this closes the fork's copy alone."""
        self._bus.close()

    def _owner(self) -> str:
        """Ask each time: logind may have been restarted, and anybody may send a signal of any name to one process."""
        return str(self._call(message_bus.GetNameOwner(_NAME))[0])

    def _delay_max_s(self) -> float:
        (_signature, microseconds) = self._call(Properties(_MANAGER).get("InhibitDelayMaxUSec"))[0]
        return float(microseconds) / 1e6

    def _call(self, message: Message) -> tuple[Any, ...]:
        return tuple(unwrap_msg(self._bus.send_and_get_reply(message)))
