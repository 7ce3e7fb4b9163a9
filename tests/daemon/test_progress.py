"""What a phase's seconds are made of, as the watch hears it."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from safelightd import progress
from safelightd.progress import Watch


class Clock:
    """Seconds as the test says them."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


class LateDevice:
    """A device that is behind what it was told by `late_s`; settling waits for it."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.late_s = 0.0

    def reset(self) -> None: ...

    def settle(self) -> None:
        self._clock.now += self.late_s
        self.late_s = 0.0

    def peaks(self) -> tuple[int, int]:
        return 0, 0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_loading_compiling_and_steps_are_told_apart(clock: Clock) -> None:
    sent: list[dict[str, Any]] = []
    watch = Watch(sent.append, threading.Event(), LateDevice(clock))
    with watch.phase("denoise"):
        clock.now += 5.0
        watch.loaded()
        for i, seconds in enumerate((21.0, 1.0, 1.0, 1.0)):
            clock.now += seconds
            watch.step(i + 1, 4)
        clock.now += 0.5
    record = watch.records["denoise"]

    assert (record.seconds, record.load_seconds, record.first_step_seconds) == (29.5, 5.0, 21.0)
    assert record.swap_seconds is None
    assert watch.seconds_per_step == 1.0
    assert [message["seconds_left"] for message in sent[1:]] == [63.0, 2.0, 1.0, 0.0]


def test_a_second_experts_loading_is_no_step(clock: Clock) -> None:
    watch = Watch(lambda _told: None, threading.Event(), LateDevice(clock))
    with watch.phase("denoise"):
        for expert in range(2):
            clock.now += 7.0
            watch.loaded()
            for i in range(2):
                clock.now += 2.0
                watch.step(2 * expert + i + 1, 4)
    record = watch.records["denoise"]

    assert (record.load_seconds, record.swap_seconds, record.first_step_seconds) == (14.0, 7.0, 2.0)
    assert watch.seconds_per_step == 2.0


def test_a_job_of_one_step_has_that_steps_pace_without_its_loading(clock: Clock) -> None:
    watch = Watch(lambda _told: None, threading.Event(), LateDevice(clock))
    with watch.phase("denoise"):
        clock.now += 9.0
        watch.loaded()
        clock.now += 0.25
        watch.step(1, 1)

    assert watch.seconds_per_step == 0.25


def test_a_step_has_ended_when_the_device_has_done_it_and_not_when_it_was_told(clock: Clock) -> None:
    device = LateDevice(clock)
    watch = Watch(lambda _told: None, threading.Event(), device)
    with watch.phase("denoise"):
        watch.loaded()
        for i in range(2):
            clock.now += 0.1
            device.late_s = 0.9
            watch.step(i + 1, 2)

    assert watch.seconds_per_step == pytest.approx(1.0)
