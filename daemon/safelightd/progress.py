"""What flows back from a running job: phases, steps, and whether somebody asked to stop it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from safelight.plan import Plan
from safelight.receipt import Phase, PhaseRecord
from safelightd.preview import Preview, Values


class Cancelled(BaseException):
    """The person cancelled the job, or the worker took it back.

    Derives from BaseException so that no library's `except Exception` between a transformer block and the engine
    can swallow it.
    """


class Meter(Protocol):
    """Reads what the process holds; the engine's reads the GPU, a test's may read nothing."""

    def reset(self) -> None: ...

    def peaks(self) -> tuple[int, int]:
        """Return the peak bytes on the device and in host RAM since `reset`."""
        ...

    def settle(self) -> None:
        """Return when the device has done all that it was told: only then is a clock read that means anything."""
        ...


class Watch:
    """Passed down through a job: it tells the worker how far the job is and stops it when asked.

    `step` and `check` raise Cancelled. Call `check` wherever seconds can pass without a step: before each block of a
    transformer, between two frames of a decode.
    """

    def __init__(self, send: Callable[[dict[str, Any]], None], stop: threading.Event, meter: Meter) -> None:
        self._send = send
        self._stop = stop
        self._meter = meter
        self.current: Phase = "plan"
        self.plan: Plan | None = None
        """Set once the job is planned. The next phase's beginning tells the worker, which then knows it also when this
        process can say nothing any more."""
        self._plan_told: Plan | None = None
        self.records: dict[str, PhaseRecord] = {}
        self.seconds_per_step: float | None = None
        self.preview: Preview | None = None
        self.is_given_up = False
        """Whether nobody will go on with the job once it has stopped: it was cancelled, not the worker stopped."""
        self.resumed_after_step: int | None = None
        """What an earlier attempt had denoised."""
        self.began_anew: str | None = None
        """Why nothing of what an earlier attempt had left is in this one."""
        self.forwards = self.skipped = 0
        """Of the transformers, and those of them that a cache answered."""
        self._phase_started = self._last_heard = self._first_step_ended = time.monotonic()
        self._load_seconds: float | None = None
        self._first_step_seconds: float | None = None
        self._swap_seconds: float | None = None

    def check(self) -> None:
        if self._stop.is_set():
            raise Cancelled

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """Run one phase of the job: announced, timed, and its peaks recorded."""
        self.check()
        self.current = name
        self._phase_started = self._last_heard = time.monotonic()
        self._load_seconds = self._first_step_seconds = self._swap_seconds = None
        self._meter.reset()
        self._send({"type": "phase", "phase": name, **self._news_of_plan()})
        yield
        device, host = self.peaks()
        seconds = time.monotonic() - self._phase_started
        before = self.records.get(name, PhaseRecord(seconds=0.0))
        self.records[name] = PhaseRecord(
            seconds=round(before.seconds + seconds, 3),
            load_seconds=self._load_seconds,
            first_step_seconds=self._first_step_seconds,
            swap_seconds=self._swap_seconds,
            device_peak_bytes=max(before.device_peak_bytes, device),
            host_peak_bytes=max(before.host_peak_bytes, host),
        )

    def _news_of_plan(self) -> dict[str, Any]:
        if self.plan is self._plan_told or self.plan is None:
            return {}
        self._plan_told = self.plan
        return {"plan": self.plan.model_dump(mode="json")}

    def peaks(self) -> tuple[int, int]:
        """Return the peak bytes on the device and in host RAM since the phase began."""
        return self._meter.peaks()

    def loaded(self) -> None:
        """Say that what computes is in place: from here on it is steps. A second expert's loading is no step either."""
        self._meter.settle()
        now = time.monotonic()
        waited = now - self._last_heard
        self._load_seconds = round((self._load_seconds or 0.0) + waited, 3)
        if self._first_step_seconds is not None:
            self._swap_seconds = round((self._swap_seconds or 0.0) + waited, 3)
        self._first_step_ended += waited
        self._last_heard = now

    def goes_on_after(self, step: int) -> None:
        """Say that so many steps of this phase were done by an earlier attempt."""
        self.resumed_after_step = step

    def begins_anew(self, reason: str) -> None:
        """Say why what an earlier attempt had left is of no use: "its checkpoint is damaged"."""
        self.began_anew = reason

    def forwarded(self, asked: int, skipped: int) -> None:
        """Say how many forwards a cache was asked for, and how many it answered by itself."""
        self.forwards += asked
        self.skipped += skipped

    def show(self, latents_of: Callable[[], Values]) -> None:
        """Let people see what is denoised: `latents_of` is asked when it is time for a picture."""
        if self.preview:
            self.preview.show(latents_of)

    def step(self, i: int, n: int) -> None:
        """Say that `i` of `n` steps of this phase are done (denoise) or parts (decode).

        A step's seconds are taken from the end of the first, which may have compiled.
        """
        self._meter.settle()
        self.check()
        now = time.monotonic()
        if self._first_step_seconds is None:
            self._first_step_seconds = rate = round(now - self._last_heard, 4)
            self._first_step_ended = now
        else:
            before = (self.resumed_after_step or 0) if self.current == "denoise" else 0
            rate = (now - self._first_step_ended) / max(i - 1 - before, 1)
        self._last_heard = now
        if self.current == "denoise":
            self.seconds_per_step = round(rate, 4)
        seconds_left = round(rate * (n - i), 1)
        self._send({"type": "step", "phase": self.current, "i": i, "n": n, "seconds_left": seconds_left})
