"""How fast each model has been here."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from safelight import models
from safelight.receipt import PhaseRecord, Receipt
from safelightd import calibration
from tests.integration.making import image_spec

FACTS = models.load()["tiny-flux-schnell"]


def receipt(seconds_per_step: float | None = 2.0, state: str = "done", **phases: float) -> Receipt:
    seconds = phases or {"load": 5.0, "encode": 1.0, "denoise": 8.5, "decode": 1.0}
    records = {name: PhaseRecord(seconds=spent) for name, spent in seconds.items()}
    return Receipt.model_validate(
        {"id": "a", "state": state, "spec": image_spec(width=64, height=64), "phases": records,
         "seconds_per_step": seconds_per_step, "finished_at": "2026-11-22T12:00:00+00:00"}
    )  # fmt: skip


def test_one_finished_job_teaches_the_pace_of_its_steps_and_of_the_rest() -> None:
    pace = calibration.learned({}, receipt(), FACTS)["tiny-flux-schnell"]

    assert pace.seconds_per_token_step == pytest.approx(2.0 / FACTS.tokens(64, 64, None))
    assert pace.other_seconds == pytest.approx(15.5 - 4 * 2.0)
    assert pace.seconds(image_spec(width=64, height=64), FACTS) == pytest.approx(15.5)


def test_the_last_job_weighs_half() -> None:
    once = calibration.learned({}, receipt(2.0), FACTS)
    twice = calibration.learned(once, receipt(4.0, denoise=16.0), FACTS)["tiny-flux-schnell"]

    assert twice.seconds_per_token_step == pytest.approx(3.0 / FACTS.tokens(64, 64, None))
    assert twice.other_seconds == pytest.approx(7.5 / 2)


@pytest.mark.parametrize(
    "nothing", [receipt(state="failed"), receipt(seconds_per_step=None), receipt(encode=1.0)], ids=str
)
def test_what_shows_no_pace_changes_nothing(nothing: Receipt) -> None:
    before = calibration.learned({}, receipt(), FACTS)

    assert calibration.learned(before, nothing, FACTS) is before


def test_what_was_learned_is_there_after_a_restart(tmp_path: Path) -> None:
    learned = calibration.learned({}, receipt(), FACTS)

    assert calibration.load(tmp_path) == {}

    calibration.save(tmp_path, learned)

    assert learned == calibration.load(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"flux-dev": 1}', b"\xff"])
def test_a_damaged_file_is_learned_again_and_fails_no_job(
    tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "calibration.json").write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert calibration.load(tmp_path) == {}

    assert "calibration.damaged" in caplog.text

    calibration.save(tmp_path, calibration.learned({}, receipt(), FACTS))

    assert list(calibration.load(tmp_path)) == ["tiny-flux-schnell"]
