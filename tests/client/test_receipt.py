"""Receipts, old ones among them: what a night produced must be readable for ever."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from safelight.receipt import Receipt
from tests.integration.making import image_spec

OLD = Path(__file__).parents[1] / "data" / "v1_receipt.json"


def test_a_receipt_of_version_1_loads_with_everything_it_says() -> None:
    receipt = Receipt.model_validate(json.loads(OLD.read_text()), strict=False)

    assert receipt.plan is not None
    assert receipt.machine is not None
    assert (receipt.state, receipt.spec.seed, receipt.plan.offload, receipt.machine.capability) == (
        "done", 7, "model", (8, 9),
    )  # fmt: skip
    assert receipt.outputs[0].path == "2026-11-22/night/0001_a-red-fox_s7.mp4"
    assert receipt.phases["denoise"].seconds == 398.0
    assert receipt.spec.axes == {"guidance_scale": 5.0, "seed": 7, "prompt": "fox"}


def test_a_receipt_written_and_read_back_is_the_same() -> None:
    receipt = Receipt.model_validate(json.loads(OLD.read_text()), strict=False)

    assert receipt == Receipt.model_validate_json(receipt.model_dump_json(exclude_none=True), strict=False)


def test_a_receipt_of_before_there_were_posters_and_new_frames_has_neither() -> None:
    (output,) = Receipt.model_validate(json.loads(OLD.read_text()), strict=False).outputs

    assert (output.poster, output.interpolated_by) == (None, None)
    assert "poster" not in output.model_dump_json(exclude_none=True)


def test_a_receipt_of_before_checkpoints_held_caches_says_where_its_cache_began_anew() -> None:
    record = {"kind": "first-block", "forwards": 6, "skipped": 2, "restarted_after_step": 5}
    written = {**json.loads(OLD.read_text()), "cache": record, "resumed_after_step": 5}
    receipt = Receipt.model_validate(written, strict=False)

    assert receipt.cache is not None
    assert (receipt.cache.restarted_after_step, receipt.resumed_after_step, receipt.began_anew) == (5, 5, None)


@pytest.mark.parametrize("change", [{"v": 2}, {"state": "almost"}, {"surprise": 1}, {"outputs": [{"path": "x"}]}])
def test_a_receipt_of_another_version_or_shape_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Receipt.model_validate({**json.loads(OLD.read_text()), **change}, strict=False)


def test_a_receipt_cannot_be_changed() -> None:
    receipt = Receipt(id="a", state="done", spec=image_spec(), finished_at="2026-11-22T12:00:00+00:00")

    with pytest.raises(ValidationError, match="frozen"):
        receipt.state = "failed"
