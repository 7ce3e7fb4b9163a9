"""What receipts and overruns of this machine teach the planner."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from safelight import models
from safelight.calibration import NOTHING_LEARNED, Calibration, key, memory_key
from safelight.machine import GIB, Machine
from safelight.plan import Overrun, Plan
from safelight.planner import make_plan
from safelight.receipt import PhaseRecord, Receipt
from safelightd import calibration
from tests.integration.making import image_spec

TABLE = models.load()
MACHINE = Machine(
    device="cuda", capability=(8, 9), vram_total_bytes=40 * GIB, vram_free_bytes=40 * GIB, ram_total_bytes=64 * GIB,
    ram_available_bytes=48 * GIB, cpus=8,
)  # fmt: skip
SPEC = image_spec(model="flux-schnell", width=1024, height=1024, num_inference_steps=4)


def plan(learned: Calibration = NOTHING_LEARNED) -> Plan:
    return make_plan(SPEC, MACHINE, TABLE, learned)


def receipt(of: Plan, slower: float = 1.0, larger: float = 1.0, state: str = "done") -> Receipt:
    """A job that took `slower` times the seconds of `of`, and `larger` times its GPU memory."""
    records = {
        phase: PhaseRecord(seconds=(found.seconds or 0) * slower, device_peak_bytes=int(found.device_bytes * larger))
        for phase, found in of.predicted.items()
    }
    return Receipt.model_validate(
        {"id": "a", "state": state, "spec": SPEC, "plan": of, "phases": records,
         "seconds_per_step": (of.seconds_per_step or 0) * slower, "finished_at": "2026-11-22T12:00:00+00:00"}
    )  # fmt: skip


def test_after_one_job_its_like_are_predicted_right() -> None:
    first = plan()
    again = plan(calibration.learned(NOTHING_LEARNED, receipt(first, slower=3.0)))

    assert again.precision == first.precision
    assert again.seconds == pytest.approx(3.0 * (first.seconds or 0), rel=0.01)


def test_further_jobs_correct_half_of_what_is_left() -> None:
    learned = calibration.learned(NOTHING_LEARNED, receipt(plan(), slower=3.0))
    name = key(plan(), "decode")
    before = learned.seconds[name]
    after = calibration.learned(learned, receipt(plan(learned), slower=2.0)).seconds[name]

    assert after == pytest.approx(1.5 * before, rel=0.01)


def test_more_memory_than_predicted_is_predicted_the_next_time_and_less_is_not_relied_on() -> None:
    first = plan()
    more = plan(calibration.learned(NOTHING_LEARNED, receipt(first, larger=1.1)))
    less = plan(calibration.learned(NOTHING_LEARNED, receipt(first, larger=0.5)))

    for phase in first.predicted:
        assert more.predicted[phase].device_bytes >= 1.1 * first.predicted[phase].device_bytes
        assert less.predicted[phase].device_bytes == first.predicted[phase].device_bytes


@pytest.mark.parametrize("state", ["failed", "cancelled"])
def test_a_job_that_did_not_end_well_teaches_nothing(state: str) -> None:
    assert calibration.learned(NOTHING_LEARNED, receipt(plan(), 3.0, state=state)) == NOTHING_LEARNED


def overrun(of: Plan, reached: float) -> Overrun:
    predicted = of.predicted["denoise"].device_bytes
    return Overrun(
        phase="denoise",
        memory="device",
        rung=of.rung,
        predicted_bytes=predicted,
        reached_bytes=int(predicted * reached),
    )


def test_a_plan_that_held_more_than_predicted_is_predicted_larger() -> None:
    first = plan()
    after = calibration.overran(NOTHING_LEARNED, overrun(first, 1.25), first)

    assert after.device[memory_key(first, "denoise")] >= 1.25
    assert after.room_bytes is None


def test_memory_that_others_took_is_not_counted_on_and_slowly_forgotten() -> None:
    first = plan()
    after = calibration.overran(NOTHING_LEARNED, overrun(first, 0.5), first)
    left = first.predicted["denoise"].device_bytes // 2
    smaller = make_plan(SPEC, MACHINE, TABLE, after)
    later = after
    for _ in range(12):
        later = calibration.learned(later, receipt(first).model_copy(update={"machine": MACHINE}))

    assert after.room_bytes == left
    assert smaller.predicted["denoise"].device_bytes <= left
    assert later.room_bytes is None


def test_what_was_learned_is_there_after_a_restart(tmp_path: Path) -> None:
    learned = calibration.learned(NOTHING_LEARNED, receipt(plan(), slower=2.0))

    assert calibration.load(tmp_path) == NOTHING_LEARNED

    calibration.save(tmp_path, learned)

    assert learned == calibration.load(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"flux-dev": {"seconds_per_token_step": 1}}', b"\xff"])
def test_a_damaged_or_older_file_is_learned_again_and_fails_no_job(
    tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "calibration.json").write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert calibration.load(tmp_path) == NOTHING_LEARNED

    assert "calibration.damaged" in caplog.text
