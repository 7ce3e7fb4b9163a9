"""How a ControlNet is written, what is a fault, and what the plan counts for it."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safelight import controlnet, models, pairing
from safelight.controlnet import ControlNet
from safelight.jobspec import JobSpec
from tests.client.test_expand import DIGEST, draft, expanded, faults
from tests.client.test_plan import CPU, gpu, job, plan_of

UNION = {"model": "union-pro-2", "image": "pose.png"}


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("union-pro-2:pose.png", {}),
        ("union-pro-2:pose.png:0.7", {"scale": 0.7}),
        ("union-pro-2:pose.png::0.1:0.8", {"start": 0.1, "end": 0.8}),
        (UNION, {}),
        (UNION | {"scale": "0.7", "end": 1}, {"scale": 0.7}),
    ],
)
def test_a_controlnet_is_read_from_a_word_or_a_mapping(written: object, read: dict[str, Any]) -> None:
    assert controlnet.read(written) == ControlNet(model="union-pro-2", image="pose.png", **read)


@pytest.mark.parametrize(
    ("written", "says"),
    [
        ("union-pro-2", "is not MODEL:IMAGE"),
        (":pose.png", "write model: and image:"),
        ({"model": "union-pro-2"}, "write model: and image:"),
        (UNION | {"strength": 1}, "it has no strength"),
        (UNION | {"scale": "much"}, "scale 'much' is not a number"),
        (7, "write model: and image:"),
        (UNION | {"scale": 0}, "scale 0 is not above 0 and at most 2"),
        (UNION | {"start": 0.8, "end": 0.2}, "leads from 0.8 to 0.2 of the steps"),
        (UNION | {"model": "union"}, "flux-dev has no ControlNet 'union'. Did you mean union-pro-2?"),
    ],
)
def test_what_is_none_is_a_fault(written: object, says: str) -> None:
    told = faults(draft(fields={"model": "flux-dev", "controlnet": written}))

    assert len(told) == 1
    assert says in told[0]


@given(st.text())
def test_any_text_is_a_controlnet_or_a_fault(text: str) -> None:
    with suppress(ValueError):
        controlnet.read(text)


def test_models_without_any_are_refused() -> None:
    (schnell,) = faults(draft(fields={"controlnet": UNION}))

    assert "flux-schnell has no ControlNet" in schnell


def test_it_may_lead_from_a_picture_to_start_from() -> None:
    (spec,) = expanded(draft(fields={"model": "flux-dev", "controlnet": UNION, "image": "x.png"}))

    assert (spec.image, spec.strength) == (DIGEST, 0.6)
    assert spec.controlnet is not None


@pytest.mark.parametrize("cache", ["first-block:threshold=0.08", {"kind": "taylorseer", "cache_interval": 3}])
def test_a_cache_beside_it_is_refused_and_either_alone_is_not(cache: object) -> None:
    written = {"model": "flux-dev", "controlnet": UNION, "cache": cache}

    (told,) = faults(draft(fields=written))

    assert "cache and controlnet do not go together: the ControlNet's part is added between" in told
    for alone in ("controlnet", "cache"):
        assert len(expanded(draft(fields={"model": "flux-dev", alone: written[alone]}))) == 1


def test_its_picture_is_kept_by_digest_and_looked_for_beside_the_text() -> None:
    written = draft(fields={"model": "flux-dev", "controlnet": "union-pro-2:pose.png:0.7"})

    (spec,) = expanded(written)

    assert spec.controlnet == ControlNet(model="union-pro-2", image=DIGEST, scale=0.7)
    assert JobSpec.model_validate_json(spec.model_dump_json()) == spec
    assert pairing.pictures_named([written]) == {"pose.png"}


@pytest.mark.parametrize(
    ("start", "end", "leads"),
    [(0, 1, "1111"), (0, 0.5, "1100"), (0.5, 1, "0011"), (0.25, 0.8, "0110"), (0.9, 1, "0000")],
)
def test_it_leads_in_the_steps_between_start_and_end(start: float, end: float, leads: str) -> None:
    net = ControlNet(model="x", image="y", scale=0.7, start=float(start), end=float(end))

    assert [net.scale_at(step, 4) for step in range(4)] == [0.7 * int(step) for step in leads]


def with_union(**written: Any) -> JobSpec:
    return job(model="flux-dev", controlnet=UNION | {"image": DIGEST}, **written)


@pytest.mark.parametrize("precision", ["nf4", "fp8-weight-only"])
def test_the_plan_counts_its_weights_its_sums_and_its_time(precision: str) -> None:
    way = {"precision": precision, "compile": "off", "offload": "model"}
    plain, led = plan_of(job(model="flux-dev", **way), gpu(24)), plan_of(with_union(**way), gpu(24))
    handed_over = 6 * (4096 + 512) * 3072

    assert led.controlnet == "union-pro-2"
    assert "ControlNet union-pro-2" in led.rung
    more = led.predicted["denoise"].device_bytes - plain.predicted["denoise"].device_bytes
    assert more == 2 * (2_140_876_800 + handed_over)
    assert led.seconds_per_step is not None
    assert plain.seconds_per_step is not None
    assert 1.05 * plain.seconds_per_step < led.seconds_per_step < 1.6 * plain.seconds_per_step


@pytest.mark.parametrize("vram_gib", [8, 12, 14.8])
def test_flux_dev_with_a_controlnet_fits_cards_of_all_sizes(vram_gib: float) -> None:
    plan = plan_of(with_union(), gpu(vram_gib))

    assert max(phase.device_bytes for phase in plan.predicted.values()) <= vram_gib * 2**30


def test_the_cpu_counts_it_in_ram() -> None:
    plain = plan_of(job(model="tiny-flux-dev"), CPU)
    led = plan_of(job(model="tiny-flux-dev", controlnet={"model": "tiny", "image": DIGEST}), CPU)

    more = led.predicted["denoise"].host_bytes - plain.predicted["denoise"].host_bytes
    assert more >= 4 * 282_048


def test_a_finetune_keeps_the_controlnets_of_what_it_is_like_and_a_tiny_model_has_its_own() -> None:
    table = models.load()

    assert list(table["flux-dev"].controlnets) == ["union-pro-2"]
    assert list(table["tiny-flux-dev"].controlnets) == ["tiny"]
