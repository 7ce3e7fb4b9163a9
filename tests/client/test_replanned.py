"""A job that is planned again, after attempts on this machine or on another: a plan that fits, or a reason."""

from __future__ import annotations

from contextlib import suppress
from typing import Any, get_args

from hypothesis import given, settings
from hypothesis import strategies as st

from safelight import footprint, jobspec, models, planner
from safelight.begun import Begun
from safelight.calibration import NOTHING_LEARNED
from safelight.computed import Computed
from safelight.errors import InvalidJob
from safelight.jobspec import JobSpec
from safelight.machine import GIB, Machine
from safelight.plan import Overrun, Plan
from safelight.planner import make_plan
from safelight.rung import Circumstances

TABLE = models.load()
CLIPS = ("wan-ti2v-5b", "wan-t2v-a14b", "wan-i2v-a14b", "demo-wan", "tiny-wan-ti2v")

waiting = st.sampled_from((1, 3, 100))
shares = st.floats(0.2, 1)
machines = st.one_of(
    st.builds(
        lambda vram_gib, ram_gib, free, available, capability, compiler: Machine(
            device="cuda", gpu="a card", capability=capability, vram_total_bytes=vram_gib * GIB,
            vram_free_bytes=int(vram_gib * free * GIB), ram_total_bytes=ram_gib * GIB,
            ram_available_bytes=int(ram_gib * available * GIB), cpus=8, compiler=compiler,
        ),
        st.sampled_from((4, 6, 8, 12, 16, 24, 80)), st.sampled_from((8, 16, 32, 64, 256)), shares, shares,
        st.sampled_from(((7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (12, 0))), st.booleans(),
    ),
    st.builds(
        lambda ram_gib, available: Machine(
            device="cpu", ram_total_bytes=ram_gib * GIB, ram_available_bytes=int(ram_gib * available * GIB), cpus=8
        ),
        st.sampled_from((8, 16, 32, 64)), shares,
    ),
)  # fmt: skip
overruns = st.builds(
    Overrun,
    phase=st.sampled_from(("encode", "denoise", "decode")),
    memory=st.sampled_from(("device", "host")),
    rung=st.just("some"),
    predicted_bytes=st.integers(1, 16 * GIB),
)


@st.composite
def jobs(draw: st.DrawFn) -> JobSpec:
    """Legal clips, with and without settings of their own."""
    asked: dict[str, Any] = {
        "num_frames": (5, 17, 49, 121), "num_inference_steps": (4, 20, 50), "guidance_scale": (1.0, 5.0),
        "precision": get_args(jobspec.Precision), "offload": get_args(jobspec.Offload), "compile": ("on", "off"),
        "vae_tiling": ("off", "on"), "text_encoder_device": ("gpu", "cpu"),
    }  # fmt: skip
    written = {name: draw(st.sampled_from(values)) for name, values in asked.items() if draw(st.integers(0, 4)) == 0}
    key = draw(st.sampled_from(CLIPS))
    image = {"image": "a" * 64} if TABLE[key].image == "required" else {}
    found = jobspec.check(
        {"model": key, "prompt": "a red circle moving", "seed": 1, **image, **written}, TABLE, "a test",
        image_model="flux-schnell", video_model="wan-ti2v-5b",
    )  # fmt: skip
    return found if isinstance(found, JobSpec) else draw(jobs())


def begun_of(plan: Plan, step: int) -> Begun:
    return Begun(step=step, **Computed.of(plan).model_dump())


@settings(max_examples=1000)
@given(
    spec=jobs(), was_on=machines, is_on=machines, before=waiting, now=waiting, step=st.integers(1, 4),
    overran=st.lists(overruns, max_size=2), refused=st.sampled_from(((), ("bf16",), ("nf4",))),
)  # fmt: skip
def test_whatever_was_tried_before_there_is_a_plan_that_fits_and_is_what_was_asked_for_or_a_reason(
    spec: JobSpec, was_on: Machine, is_on: Machine, before: int, now: int, step: int, overran: list[Overrun],
    refused: tuple[str, ...],
) -> None:  # fmt: skip
    begun = None
    with suppress(InvalidJob):
        begun = begun_of(make_plan(spec, was_on, TABLE, NOTHING_LEARNED, Circumstances(waiting=before)), step)
    around = Circumstances(waiting=now, overruns=tuple(overran), refused=refused, begun=begun)
    plan = None
    with suppress(InvalidJob):
        plan = make_plan(spec, is_on, TABLE, NOTHING_LEARNED, around)
    if plan is None:
        return
    assert plan.device == is_on.device
    for peak in plan.predicted.values():
        assert peak.host_bytes <= is_on.ram_available_bytes
        assert peak.device_bytes == 0 or peak.device_bytes <= is_on.vram_free_bytes
    assert spec.compile == "auto" or plan.compiled == (spec.compile == "on")
    assert spec.offload in ("auto", plan.offload)
    assert spec.vae_tiling != "off" or not (plan.vae_tiling or plan.vae_strip_rows)
    assert spec.text_encoder_device == "auto" or (spec.text_encoder_device == "cpu") == (
        plan.text_encoder_device == "cpu"
    )


def test_what_must_leave_a_little_more_ram_than_it_pins_is_planned_at_once() -> None:
    """It came nearer by what was lacking, one byte here, each time it was planned again."""
    found = jobspec.check(
        {"model": "flux-dev", "prompt": "a fox", "seed": 1, "precision": "bf16"}, TABLE, "a test",
        image_model="flux-schnell", video_model="wan-ti2v-5b",
    )  # fmt: skip
    assert isinstance(found, JobSpec)
    card = Machine(
        device="cuda", gpu="a card", capability=(8, 9), vram_total_bytes=12 * GIB, vram_free_bytes=11 * GIB,
        ram_total_bytes=128 * GIB, ram_available_bytes=100 * GIB, cpus=8, compiler=True,
    )  # fmt: skip
    first = make_plan(found, card, TABLE, NOTHING_LEARNED)
    held = first.predicted["decode"].host_bytes
    base = footprint.HOST_BYTES["cuda"]
    overrun = Overrun(
        phase="decode", memory="host", rung="some", predicted_bytes=base + int((held - 1 - base) / planner.SMALLER)
    )
    again = make_plan(found, card, TABLE, NOTHING_LEARNED, Circumstances(overruns=(overrun,)))

    assert first.streamed_from == "pinned"
    assert again.predicted["decode"].host_bytes < held
