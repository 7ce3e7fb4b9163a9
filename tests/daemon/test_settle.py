"""What becomes of a job that came back without a verdict."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safelight.ledger import Attempts
from safelightd.settle import CRASHES_MAX, RETURNS_MAX, Cause, begin, decide

FRESH = Attempts(id="a")
causes = st.lists(st.sampled_from(["crash", "return", "stop"]), max_size=60)


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


def test_a_person_may_stop_the_worker_as_often_as_he_likes() -> None:
    attempts = FRESH
    for _ in range(50):
        decision = decide(begin(attempts, "w", ""), "stop", "the worker was stopped")
        attempts = decision.attempts

    assert decision.requeue
    assert (attempts.attempts, attempts.crashes, attempts.returns) == (50, 0, 0)


@given(causes)
def test_no_job_loops_for_ever_and_none_is_set_aside_without_three_counted_ends(history: list[Cause]) -> None:
    attempts, set_aside = FRESH, False
    for cause in history:
        decision = decide(begin(attempts, "w", ""), cause, "why")
        attempts, set_aside = decision.attempts, not decision.requeue
        if set_aside:
            break
    unfinished = sum(cause != "stop" for cause in history[: attempts.attempts])

    assert set_aside == (attempts.crashes >= CRASHES_MAX)
    assert unfinished <= RETURNS_MAX + CRASHES_MAX
    assert attempts.crashes + attempts.returns == unfinished


@pytest.mark.parametrize("cause", ["crash", "return", "stop"])
def test_what_worker_and_lock_were_stays_known_for_the_next_attempt(cause: Cause) -> None:
    begun = begin(FRESH, "worker", "/lock")

    assert decide(begun, cause, "why").attempts.worker == "worker"
