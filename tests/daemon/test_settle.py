"""What becomes of a job that came back without a verdict."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safelight.ledger import Attempts
from safelight.plan import Overrun
from safelightd.settle import CRASHES_MAX, OVERRUNS_MAX, RETURNS_MAX, Cause, begin, decide, overran, refused

FRESH = Attempts(id="a")
OVERRUN = Overrun(phase="denoise", memory="device", rung="bf16, offload model", predicted_bytes=9, reached_bytes=11)
causes = st.lists(st.sampled_from(["crash", "return", "stop", "no-start", "no-room", "oom"]), max_size=80)


def test_an_attempt_is_counted_before_it_begins_and_says_whose_it_is() -> None:
    begun = begin(FRESH, "worker", "/lock")

    assert begun == Attempts(id="a", attempts=1, running=True, worker="worker", lock="/lock")
    assert begin(begun, "worker", "/lock").attempts == 2


def test_the_third_crash_sets_a_job_aside_with_the_last_reason() -> None:
    attempts = FRESH
    for n in range(1, CRASHES_MAX + 1):
        decision = decide(begin(attempts, "w", ""), "crash", f"reason {n}")
        attempts = decision.attempts

        assert decision.requeue == (n < CRASHES_MAX)
        assert not attempts.running
    assert decision.reason == "It broke the engine 3 times, last: reason 3"


def test_the_machine_may_take_a_job_back_five_times_uncounted_and_then_it_counts() -> None:
    attempts = FRESH
    seen = []
    for _ in range(RETURNS_MAX + CRASHES_MAX):
        decision = decide(begin(attempts, "w", ""), "return", "disk full")
        attempts = decision.attempts
        seen.append((decision.requeue, attempts.returns, attempts.crashes))

    assert seen == [
        (True, 1, 0), (True, 2, 0), (True, 3, 0), (True, 4, 0), (True, 5, 0), (True, 5, 1), (True, 5, 2), (False, 5, 3),
    ]  # fmt: skip


@pytest.mark.parametrize("cause", ["stop", "no-start", "no-room"])
def test_a_stop_an_engine_that_does_not_start_and_a_want_of_room_are_never_counted(cause: Cause) -> None:
    attempts = FRESH
    for _ in range(50):
        decision = decide(begin(attempts, "w", ""), cause, "why")
        attempts = decision.attempts

    assert decision.requeue
    assert (attempts.attempts, attempts.crashes, attempts.returns) == (50, 0, 0)


@given(causes)
def test_no_job_loops_for_ever_and_none_is_set_aside_without_three_counted_ends(history: list[Cause]) -> None:
    attempts, set_aside = FRESH, False
    for cause in history:
        begun = begin(attempts, "w", "")
        decision = decide(overran(begun, OVERRUN) if cause == "oom" else begun, cause, "why")
        attempts, set_aside = decision.attempts, not decision.requeue
        if set_aside:
            break
    ended = history[: attempts.attempts]
    unfinished = sum(cause not in ("stop", "no-start", "no-room") for cause in ended)

    assert set_aside == (attempts.crashes >= CRASHES_MAX)
    assert unfinished <= RETURNS_MAX + OVERRUNS_MAX + CRASHES_MAX
    assert attempts.crashes + attempts.returns + min(ended.count("oom"), OVERRUNS_MAX) == unfinished


def test_a_plan_that_ran_out_is_remembered_and_not_counted_until_no_ladder_is_as_long() -> None:
    attempts = FRESH
    seen = []
    for _ in range(OVERRUNS_MAX + CRASHES_MAX):
        decision = decide(overran(begin(attempts, "w", ""), OVERRUN), "oom", "out of memory")
        attempts = decision.attempts
        seen.append((decision.requeue, attempts.crashes))

    assert seen == [(True, 0)] * OVERRUNS_MAX + [(True, 1), (True, 2), (False, 3)]
    assert attempts.overruns == (OVERRUN,) * (OVERRUNS_MAX + CRASHES_MAX)
    assert begin(attempts, "w", "").overruns == attempts.overruns


def test_a_precision_that_was_refused_is_remembered_and_not_counted() -> None:
    after = decide(refused(begin(FRESH, "w", ""), "nf4"), "refused", "The picture is black.")

    assert after.requeue
    assert (after.attempts.refused, after.attempts.crashes, after.attempts.returns) == (("nf4",), 0, 0)


@pytest.mark.parametrize("cause", ["crash", "return", "stop", "oom", "refused"])
def test_what_worker_and_lock_were_stays_known_for_the_next_attempt(cause: Cause) -> None:
    begun = begin(FRESH, "worker", "/lock")

    assert decide(begun, cause, "why").attempts.worker == "worker"
