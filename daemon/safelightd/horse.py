"""What worker and work horse share over the fork, and how the horse hears that it should stop."""

from __future__ import annotations

import mmap
import os
import signal
import struct
from typing import Literal

Request = Literal["cancel", "stop"]
"""cancel: a person wants the job gone. stop: the worker ends, the job keeps its place."""


class Shared:
    """Two facts in shared memory: whether a job is with the engine, and until when it may be silent
    (CLOCK_MONOTONIC, which worker and horse read alike)."""

    LAYOUT = struct.Struct("=?d")

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, mmap.PAGESIZE)

    def set(self, *, busy: bool, deadline: float = 0.0) -> None:
        self._memory[: self.LAYOUT.size] = self.LAYOUT.pack(busy, deadline)

    @property
    def busy(self) -> bool:
        return bool(self.LAYOUT.unpack(self._memory[: self.LAYOUT.size])[0])

    @property
    def deadline(self) -> float:
        return float(self.LAYOUT.unpack(self._memory[: self.LAYOUT.size])[1])


class Requests:
    """Wakes the horse out of its wait on the engine: a pipe that signal handlers and threads may write to."""

    def __init__(self) -> None:
        self.descriptor, self._write = os.pipe()
        os.set_blocking(self.descriptor, False)
        os.set_blocking(self._write, False)

    def on_sigterm(self) -> None:
        """Take SIGTERM as the request to stop; Ctrl-C is the worker's business."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda _number, _frame: self.ask("stop"))

    def ask(self, request: Request) -> None:
        os.write(self._write, request[:1].encode())

    def take(self) -> Request | None:
        """Return the first request that came since the last call, None when none did."""
        try:
            asked = os.read(self.descriptor, 64)
        except BlockingIOError:
            return None
        return "cancel" if asked[:1] == b"c" else "stop"
