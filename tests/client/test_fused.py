"""Kept results: what names them, when a plan reads or makes one, and what it says of its seconds. No torch."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safelight import calibration, fused, lora, submit
from safelight.calibration import NOTHING_LEARNED
from safelight.jobspec import JobSpec
from safelight.lora import Lora
from safelight.machine import GIB, Machine
from safelight.plan import Plan
from safelight.prepared import MANIFEST, DamagedFolder
from tests.client.test_plan import TABLE, gpu, job, plan_of

STYLE = Lora(name="style", sha256="a" * 64, size_bytes=100_000_000)
GRAIN = Lora(name="grain", sha256="b" * 64, size_bytes=100_000_000)

LORA = st.tuples(
    st.sampled_from("ab").map(lambda letter: letter * 64), st.floats(-2, 2), st.sampled_from(["both", "low"])
)
SETS = st.tuples(st.lists(LORA, min_size=1).map(tuple), st.sampled_from(["bfloat16", "float16"]), st.text(max_size=5))


def with_loras(*loras: Lora, **fields: Any) -> JobSpec:
    return job(**{"model": "flux-dev", "precision": "fp8", **fields}).model_copy(update={"loras": loras or (STYLE,)})


def set_of(spec: JobSpec, precision: Any = "fp8-dynamic") -> str:
    digest = fused.digest(fused.loras_of(spec.loras), "bfloat16", "Some GPU")
    return fused.set_name(spec.model, precision, digest)


def roomy(*names: str, vram_gib: float = 14.8, **more: Any) -> Machine:
    return gpu(vram_gib, fused=names, fused_room_bytes=32 * GIB, **more)


def load_seconds(plan: Plan) -> float:
    shipped = plan.predicted["denoise"].shipped
    assert shipped is not None
    return shipped.load_seconds


@given(SETS, SETS)
def test_two_sets_share_a_name_only_where_loras_order_scale_expert_dtype_and_card_are_the_same(
    one: tuple[Any, ...], other: tuple[Any, ...]
) -> None:
    assert (fused.digest(*one) == fused.digest(*other)) == (str(one) == str(other))


@given(st.binary(max_size=200))
def test_bytes_that_are_no_manifest_are_a_damaged_folder(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / MANIFEST).write_bytes(content)
        with pytest.raises(DamagedFolder):
            fused.read(Path(folder))


def test_the_first_job_of_its_loras_makes_and_does_not_keep() -> None:
    plan = plan_of(with_loras(), roomy())

    assert (plan.fused, plan.keeping) == ((), False)
    assert "1 LoRA fused," in f"{plan.rung},"


@pytest.mark.parametrize("why", [{"again": True}, {"seen": frozenset({set_of(with_loras())})}])
def test_a_job_whose_loras_come_again_keeps_what_it_makes_and_counts_the_time_once(why: dict[str, Any]) -> None:
    plain, keeping = (plan_of(with_loras(), roomy(), **around) for around in ({}, why))
    after = plan_of(with_loras(), roomy(f"{set_of(with_loras())}/transformer"), **why)

    assert keeping.keeping
    assert "1 LoRA fused and kept" in keeping.rung
    assert load_seconds(keeping) > load_seconds(plain)
    assert keeping.predicted["denoise"].host_bytes > plain.predicted["denoise"].host_bytes
    assert keeping.seconds is not None
    assert after.seconds is not None
    later = (keeping.seconds_of(2) or 0) - keeping.seconds
    assert later == pytest.approx(after.seconds - sum(p.once_seconds for p in after.predicted.values()), abs=0.1)


@pytest.mark.parametrize("vram_gib", [6.8, 10.8, 14.8, 22.8, 78.0])
@pytest.mark.parametrize("steps", [4, 28])
@pytest.mark.parametrize("waiting", [1, 10])
def test_what_is_kept_or_will_be_decides_nothing_about_the_pixels(vram_gib: float, steps: int, waiting: int) -> None:
    spec = with_loras(precision="auto", num_inference_steps=steps)
    names = [set_of(spec, precision) for precision in ("fp8-dynamic", "nf4", "int8-weight-only")]
    none = plan_of(spec, gpu(vram_gib), waiting=waiting)
    around = {"waiting": waiting, "again": True, "seen": frozenset(names)}
    for machine in (roomy(vram_gib=vram_gib), roomy(*(f"{name}/transformer" for name in names), vram_gib=vram_gib)):
        plan = plan_of(spec, machine, **around)

        assert (plan.precision, plan.dtype, plan.compiled) == (none.precision, none.dtype, none.compiled)


def test_what_is_kept_is_read_in_half_the_time_and_needs_no_more_memory() -> None:
    made = plan_of(with_loras(), roomy())
    read = plan_of(with_loras(), roomy(f"{set_of(with_loras())}/transformer"))

    assert (read.fused, read.keeping, read.prepared) == (("transformer",), False, ())
    assert "1 LoRA fused before" in read.rung
    assert load_seconds(read) < 0.6 * load_seconds(made)
    for phase in ("encode", "denoise", "decode"):
        assert read.predicted[phase].device_bytes <= made.predicted[phase].device_bytes
        assert read.predicted[phase].host_bytes <= made.predicted[phase].host_bytes


def test_what_is_kept_may_be_streamed_from_its_file_where_ram_is_short() -> None:
    short = {"vram_gib": 6.8, "ram_gib": 5.0}
    plan = plan_of(with_loras(), roomy(f"{set_of(with_loras())}/transformer", **short))

    assert (plan.fused, plan.streamed_from) == (("transformer",), "file")


@pytest.mark.parametrize(
    "spec",
    [
        with_loras(GRAIN), with_loras(STYLE, GRAIN), with_loras(STYLE.model_copy(update={"scale": 0.5})),
        with_loras(precision="nf4"), with_loras(model="flux-schnell"), with_loras(precision="bf16"),
    ],
)  # fmt: skip
def test_what_is_kept_of_other_loras_another_precision_or_model_is_not_read(spec: JobSpec) -> None:
    assert plan_of(spec, roomy(f"{set_of(with_loras())}/transformer")).fused == ()


def test_what_another_card_has_kept_is_not_read() -> None:
    machine = roomy(f"{set_of(with_loras())}/transformer").model_copy(update={"gpu": "Another GPU"})

    assert plan_of(with_loras(), machine).fused == ()


def test_both_experts_must_be_there_to_be_read_and_have_room_to_be_kept() -> None:
    clip = with_loras(model="wan-t2v-a14b", precision="fp8-weight-only", width=832, height=480, num_frames=33)
    name = set_of(clip, "fp8-weight-only")
    both = (f"{name}/transformer", f"{name}/transformer_2")

    assert plan_of(clip, roomy(*both)).fused == ("transformer", "transformer_2")
    assert plan_of(clip, roomy(both[0])).fused == ()
    assert plan_of(clip, roomy(), again=True).keeping
    assert not plan_of(clip, roomy().model_copy(update={"fused_room_bytes": 20 * GIB}), again=True).keeping


@pytest.mark.parametrize("room", [0, 5 * GIB])
def test_nothing_is_kept_without_room_for_it(room: int) -> None:
    machine = roomy().model_copy(update={"fused_room_bytes": room})

    plan = plan_of(with_loras(), machine, again=True, waiting=9)

    assert not plan.keeping
    assert any("[worker] fused_gib" in said for said in plan.warnings)


def test_nothing_kept_is_used_after_it_was_found_damaged() -> None:
    machine = roomy(f"{set_of(with_loras())}/transformer")
    plan = plan_of(with_loras(), machine, again=True, without_fused=True)

    assert (plan.fused, plan.keeping) == ((), False)


def test_plain_weights_are_never_kept() -> None:
    assert not plan_of(with_loras(precision="bf16"), roomy(), again=True).keeping


def test_a_night_that_reads_what_is_kept_is_not_told_that_it_makes_it_each_time() -> None:
    assert plan_of(with_loras(), roomy(f"{set_of(with_loras())}/transformer"), waiting=9).warnings == ()
    assert plan_of(with_loras(), roomy(), waiting=9, again=True).warnings == ()


def test_jobs_that_make_keep_and_read_are_learned_from_apart() -> None:
    plans = (
        plan_of(with_loras(), roomy()), plan_of(with_loras(), roomy(), again=True),
        plan_of(with_loras(), roomy(f"{set_of(with_loras())}/transformer")),
    )  # fmt: skip

    keys = [calibration.load_key(plan, "denoise").removeprefix("flux-dev/denoise/fp8-dynamic") for plan in plans]
    assert keys == [" fused", " fused and kept", " fused before"]


def test_a_forecast_tells_jobs_whose_result_is_kept_from_others_and_expects_a_night_of_one_set_to_keep_it() -> None:
    kept, other = with_loras(), with_loras(GRAIN)
    machine = roomy(f"{set_of(kept)}/transformer")

    found = submit.forecast([kept, other, kept, other], machine, TABLE, NOTHING_LEARNED)
    sweep = [with_loras(GRAIN.model_copy(update={"scale": i / 10})) for i in range(1, 5)]
    (swept,) = submit.forecast(sweep, machine, TABLE, NOTHING_LEARNED)

    assert [(shape.jobs, shape.plan and (shape.plan.fused, shape.plan.keeping)) for shape in found] == [
        (2, (("transformer",), False)),
        (2, ((), True)),
    ]
    assert (swept.jobs, swept.plan and swept.plan.keeping) == (4, False)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ((STYLE,), (STYLE,), True),
        ((STYLE,), (Lora(name="style"),), True),
        ((STYLE,), (Lora(name="copy", sha256="a" * 64),), True),
        ((STYLE, GRAIN), (GRAIN, STYLE), False),
        ((STYLE,), (Lora(name="style", sha256="c" * 64),), False),
        ((STYLE,), (Lora(name="style", scale=0.5),), False),
        ((STYLE,), (), False),
    ],
)
def test_loras_are_the_same_by_digest_and_by_name_where_nobody_has_looked(one: Any, other: Any, same: bool) -> None:
    assert lora.same(one, other) == lora.same(other, one) == same
