"""What worker and work horse share over the fork, and how the horse hears that it should stop."""

from __future__ import annotations

import mmap
import os
import select
import signal
import struct
from contextlib import suppress
from types import FrameType
from typing import Literal

Request = Literal["cancel", "stop"]
"""cancel: a person wants the job gone. stop: the worker ends, the job keeps its place."""


class Shared:
    """Four facts in shared memory: whether a job is with the engine, until when it may be silent (CLOCK_MONOTONIC,
    which worker and horse read alike), why the machine took the job back, if it did, and how far it is, for people."""

    LAYOUT = struct.Struct("=?d")
    REASON = struct.Struct("=H?1000s")
    PROGRESS = struct.Struct("=60s")
    _reason_at = LAYOUT.size
    _progress_at = _reason_at + REASON.size

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, mmap.PAGESIZE)

    def set(self, *, busy: bool, deadline: float = 0.0) -> None:
        self._memory[: self.LAYOUT.size] = self.LAYOUT.pack(busy, deadline)

    def set_setback(self, reason: str, *, of_all: bool = True) -> None:
        """Say why the machine took the job back, and whether it would take back any other."""
        said = reason.encode(errors="backslashreplace")[:1000]
        self.REASON.pack_into(self._memory, self._reason_at, len(said), of_all, said)

    def take_setback(self) -> tuple[str, bool]:
        """Return why the machine took the job back, "" when it did not, and whether that is of all; forget it."""
        length, of_all, said = self.REASON.unpack_from(self._memory, self._reason_at)
        self.REASON.pack_into(self._memory, self._reason_at, 0, 0, b"")
        return bytes(said[:length]).decode(errors="replace"), bool(of_all)

    @property
    def busy(self) -> bool:
        return bool(self.LAYOUT.unpack(self._memory[: self.LAYOUT.size])[0])

    @property
    def deadline(self) -> float:
        return float(self.LAYOUT.unpack(self._memory[: self.LAYOUT.size])[1])

    @property
    def progress(self) -> str:
        (said,) = self.PROGRESS.unpack_from(self._memory, self._progress_at)
        return bytes(said).rstrip(b"\0").decode(errors="replace")

    @progress.setter
    def progress(self, said: str) -> None:
        self.PROGRESS.pack_into(self._memory, self._progress_at, said.encode())


class Requests:
    """Wakes the horse out of its wait on the engine: a pipe that signal handlers and threads may write to."""

    def __init__(self) -> None:
        self.descriptor, self._write = os.pipe()
        os.set_blocking(self.descriptor, False)
        os.set_blocking(self._write, False)
        self._stopped, self._stop = os.pipe()
        os.set_blocking(self._stopped, False)
        os.set_blocking(self._stop, False)

    def on_sigterm(self) -> None:
        """Take SIGTERM as the request to stop; Ctrl-C is the worker's business."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, self._on_signal)

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self.ask("stop")
        os.write(self._stop, b"s")  # stays in the pipe, so that every later wait ends as well

    def wait_unless_stopped(self, seconds: float) -> bool:
        """Wait, at most until the worker has asked this process to stop; return whether it has."""
        return bool(select.select([self._stopped], [], [], seconds)[0])

    def ask(self, request: Request) -> None:
        os.write(self._write, request[:1].encode())

    def forget(self) -> None:
        """Drop what came too late for the job before."""
        for descriptor in (self.descriptor, self._stopped):
            with suppress(BlockingIOError):
                os.read(descriptor, 64)

    def take(self) -> Request | None:
        """Return the first request that came since the last call, None when none did."""
        try:
            asked = os.read(self.descriptor, 64)
        except BlockingIOError:
            return None
        return "cancel" if asked[:1] == b"c" else "stop"
