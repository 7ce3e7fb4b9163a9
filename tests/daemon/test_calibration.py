"""What receipts and overruns of this machine teach the planner."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from safelight import models, pace
from safelight.calibration import NOTHING_LEARNED, PIN, Calibration, load_key, memory_key, work_key
from safelight.machine import GIB, Machine
from safelight.plan import Overrun, Plan
from safelight.planner import make_plan, with_known_embeddings
from safelight.receipt import PhaseRecord, Receipt
from safelight.rung import Circumstances
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
    """A job that took `slower` times the seconds of the shipped figures, and `larger` times the GPU memory of `of`."""
    records = {}
    for phase, found in of.predicted.items():
        told = found.shipped
        assert told is not None
        load = told.load_seconds + told.pin_seconds
        work = pace.overlapped(told.compute_seconds, told.copy_seconds)
        steps = SPEC.num_inference_steps if phase == "denoise" else 1
        first = told.compile_seconds + work / steps
        records[phase] = PhaseRecord(
            seconds=(load + told.compile_seconds + work) * slower,
            load_seconds=None if phase == "encode" else load * slower,
            first_step_seconds=None if phase == "encode" else first * slower,
            device_peak_bytes=int(found.device_bytes * larger),
        )
    told = of.predicted["denoise"].shipped
    assert told is not None
    each = pace.overlapped(told.compute_seconds, told.copy_seconds) / SPEC.num_inference_steps
    return Receipt.model_validate(
        {"id": "a", "state": state, "spec": SPEC, "plan": of, "phases": records,
         "seconds_per_step": each * slower, "finished_at": "2026-11-22T12:00:00+00:00"}
    )  # fmt: skip


def test_after_one_job_its_like_are_predicted_right() -> None:
    first = plan()
    again = plan(calibration.learned(NOTHING_LEARNED, receipt(first, slower=3.0)))

    assert again.precision == first.precision
    assert again.seconds == pytest.approx(3.0 * (first.seconds or 0), rel=0.01)


@pytest.mark.parametrize(("slower", "known"), [(2.0, 2.2), (4.0, 3.4)], ids=["faster", "slower"])
def test_a_further_job_corrects_the_more_where_it_was_faster(slower: float, known: float) -> None:
    learned = calibration.learned(NOTHING_LEARNED, receipt(plan(), slower=3.0))
    name = work_key(plan(), "decode")
    after = calibration.learned(learned, receipt(plan(learned), slower=slower))

    assert (learned.work[name], after.work[name]) == (pytest.approx(3.0), pytest.approx(known))


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
    for _ in range(30):
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


STREAMING = SPEC.model_copy(update={"precision": "bf16", "offload": "partial", "compile": "off"})


def streaming(learned: Calibration = NOTHING_LEARNED, **machine: object) -> Plan:
    small = MACHINE.model_copy(update={"vram_free_bytes": 12 * GIB, **machine})
    return make_plan(STREAMING, small, TABLE, learned, Circumstances(waiting=100))


def test_a_slow_link_is_told_from_a_slow_card() -> None:
    """A step that waits for the link says nothing of how fast the card is, and the other way round."""
    first = streaming(link_bytes_per_second=5_000_000_000)
    slow_link = calibration.learned(NOTHING_LEARNED, receipt(first, slower=2.0))
    slow_card = calibration.learned(NOTHING_LEARNED, receipt(plan(), slower=2.0))

    assert first.streamed_from == "pinned"
    assert slow_link.link["pinned"] > 2
    assert work_key(first, "denoise") not in slow_link.work
    assert slow_card.link == {}
    assert slow_card.work[work_key(plan(), "denoise")] == pytest.approx(2.0)


def test_slow_pinning_is_told_from_slow_reading_once_reading_is_known() -> None:
    read = calibration.learned(NOTHING_LEARNED, receipt(plan(), slower=1.0))
    first = streaming(read)
    slow = receipt(first)
    record = slow.phases["denoise"]
    told = first.predicted["denoise"].shipped
    assert told is not None
    assert told.pin_seconds > 0
    longer = record.model_copy(update={"seconds": record.seconds + told.pin_seconds})
    after = calibration.learned(read, slow.model_copy(update={"phases": {**slow.phases, "denoise": longer}}))

    assert after.pin[PIN] == pytest.approx(2.0, rel=0.01)
    assert after.load[load_key(first, "denoise")] == pytest.approx(1.0)


def test_compiling_is_no_part_of_a_step() -> None:
    night = make_plan(SPEC, MACHINE.model_copy(update={"compiler": True}), TABLE, NOTHING_LEARNED, Circumstances(100))
    after = calibration.learned(NOTHING_LEARNED, receipt(night, slower=1.5))

    assert night.compiled
    assert after.compile[work_key(night, "denoise")] == pytest.approx(1.5)
    assert after.work[work_key(night, "denoise")] == pytest.approx(1.5, rel=0.01)


def test_a_way_that_has_not_run_is_taken_to_be_as_slow_as_others_and_then_known_by_itself() -> None:
    """What others have shown is no part of what a first job of a kind shows."""
    slow = calibration.learned(NOTHING_LEARNED, receipt(plan(), slower=4.0))
    other = SPEC.model_copy(update={"precision": "nf4", "compile": "off"})
    first = make_plan(other, MACHINE, TABLE, slow)
    after = calibration.learned(slow, receipt(first, slower=4.0))

    assert after.load[load_key(first, "denoise")] == pytest.approx(4.0)
    assert make_plan(other, MACHINE, TABLE, after).seconds == pytest.approx(first.seconds, rel=0.01)


def test_encoding_that_did_not_happen_teaches_nothing() -> None:
    known = with_known_embeddings(plan(), TABLE[plan().model])
    after = calibration.learned(NOTHING_LEARNED, receipt(plan()).model_copy(update={"plan": known}))

    assert not any("/encode/" in name for name in after.load)


def test_an_engine_that_the_kernel_ended_makes_the_next_plans_smaller_and_is_slowly_forgotten() -> None:
    first = streaming()
    held = first.predicted["denoise"].host_bytes
    over = Overrun(phase="denoise", memory="host", rung=first.rung, predicted_bytes=held)
    after = calibration.overran(NOTHING_LEARNED, over, first)
    smaller = streaming(after)
    later = after
    for _ in range(30):
        later = calibration.learned(later, receipt(smaller).model_copy(update={"machine": MACHINE}))

    assert after.host_room_bytes is not None
    assert after.host_room_bytes < held
    assert smaller.predicted["denoise"].host_bytes <= after.host_room_bytes
    assert later.host_room_bytes is None


def test_a_card_that_computes_slowly_is_not_taken_for_a_slow_link() -> None:
    """Where the link is known and a way to compute is new, time that the link does not explain is the way's."""
    bf16 = streaming(link_bytes_per_second=1_000_000_000)
    known = calibration.learned(NOTHING_LEARNED, receipt(bf16))
    other = STREAMING.model_copy(update={"precision": "fp8-dynamic", "compile": "off", "offload": "partial"})
    small = MACHINE.model_copy(update={"vram_free_bytes": 7 * GIB, "link_bytes_per_second": 1_000_000_000})
    first = make_plan(other, small, TABLE, known, Circumstances(waiting=100))
    told = first.predicted["denoise"].shipped
    assert told is not None
    assert told.copy_seconds > told.compute_seconds
    after = calibration.learned(known, receipt(first, slower=3.0))

    assert after.link["pinned"] == pytest.approx(known.link["pinned"])
    assert after.work[work_key(first, "denoise")] > 3


def test_a_first_job_from_a_cold_disk_is_forgotten_though_each_job_pins() -> None:
    first = streaming()
    learned = calibration.learned(NOTHING_LEARNED, receipt(first, slower=4.0))
    for _ in range(6):
        learned = calibration.learned(learned, receipt(first))

    assert streaming(learned).predicted["denoise"].seconds == pytest.approx(first.predicted["denoise"].seconds, rel=0.1)
    assert learned.load[load_key(first, "denoise")] < 1.2
    assert learned.pin[PIN] < 1.2


def test_a_text_encoder_that_is_streamed_is_read_at_a_pace_of_its_own() -> None:
    """It is read for each prompt and never held: what one on a full card takes says nothing of one on an empty card."""
    streamed = plan()
    held = streamed.model_copy(update={"streamed": {}})
    known = calibration.learned(NOTHING_LEARNED, receipt(held, slower=3.0))
    known = calibration.learned(known, receipt(streamed, slower=0.8))

    assert any(name.startswith("text_encoder") for name in streamed.streamed)
    assert known.load[load_key(held, "encode")] == pytest.approx(3.0)
    assert known.load[load_key(streamed, "encode")] == pytest.approx(0.8)
