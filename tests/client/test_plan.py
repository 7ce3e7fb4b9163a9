"""Plans: what runs how, what it needs, and what is refused with a remedy. Pure: no GPU, no torch."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safelight import jobspec, models, plan
from safelight.errors import InvalidJob
from safelight.jobspec import JobSpec
from safelight.machine import GIB, Machine
from safelight.models import Models
from safelight.plan import DoesNotFit, Pace, Plan, make_plan
from tests.integration.making import image_spec

TABLE = models.load()
LIGHT = {"transformer": 100_000_000, "text_encoder": 100_000_000}
FIVE_B = TABLE["wan-ti2v-5b"]
LARGE_DECODE = Models({FIVE_B.key: FIVE_B.model_copy(update={"components": {**FIVE_B.components, **LIGHT}})})
"""A model whose largest phase is the decode."""

CPU = Machine(device="cpu", ram_total_bytes=64 * GIB, ram_available_bytes=48 * GIB, cpus=8)


def gpu(vram_gib: float, ram_gib: float = 28) -> Machine:
    return Machine(
        device="cuda",
        gpu="Some GPU",
        vram_total_bytes=int(vram_gib * GIB),
        vram_free_bytes=int(vram_gib * GIB),
        ram_total_bytes=32 * GIB,
        ram_available_bytes=int(ram_gib * GIB),
        cpus=8,
    )


def job(**written: object) -> JobSpec:
    fields = {"prompt": "a fox", "seed": 1, **written}
    spec = jobspec.check(fields, TABLE, "test", image_model="flux-schnell", video_model="wan-ti2v-5b")
    assert isinstance(spec, JobSpec), spec
    return spec


def test_a_gpu_gets_bf16_with_one_component_at_a_time_and_the_cpu_float32() -> None:
    on_gpu = make_plan(job(), gpu(40), TABLE, {})
    on_cpu = make_plan(job(model="tiny-flux-schnell"), CPU, TABLE, {})

    assert (on_gpu.device, on_gpu.dtype, on_gpu.offload, on_gpu.text_encoder_device) == (
        "cuda", "bfloat16", "model", "cuda",
    )  # fmt: skip
    assert (on_cpu.device, on_cpu.dtype, on_cpu.offload, on_cpu.text_encoder_device) == (
        "cpu",
        "float32",
        "none",
        "cpu",
    )
    assert {phase.device_bytes for phase in on_cpu.predicted.values()} == {0}


def test_the_prediction_of_flux_is_its_weights_and_little_more() -> None:
    predicted = make_plan(job(), gpu(40), TABLE, {}).predicted

    assert 2 * 4_762_310_656 <= predicted["encode"].device_bytes < 2 * 4_762_310_656 + GIB
    assert 2 * 11_891_178_560 < predicted["denoise"].device_bytes < 2 * 11_891_178_560 + GIB
    assert 2.4 * GIB < predicted["decode"].device_bytes < 2.7 * GIB


def test_decode_is_tiled_only_where_the_whole_does_not_fit_and_the_plan_says_so() -> None:
    clip = job(model="wan-ti2v-5b")
    whole = make_plan(clip, gpu(24), LARGE_DECODE, {})
    tiled = make_plan(clip, gpu(9), LARGE_DECODE, {})

    assert (whole.vae_tiling, whole.passed_over) == (False, ())
    assert tiled.vae_tiling
    assert tiled.passed_over == ("whole decode: does not fit",)
    assert tiled.predicted["decode"].device_bytes < whole.predicted["decode"].device_bytes


def test_what_the_user_wrote_about_tiling_is_never_changed() -> None:
    assert make_plan(job(vae_tiling="on"), gpu(40), TABLE, {}).vae_tiling
    with pytest.raises(DoesNotFit, match="decode of wan-ti2v-5b"):
        make_plan(job(model="wan-ti2v-5b", vae_tiling="off"), gpu(9), LARGE_DECODE, {})


def test_a_job_that_cannot_fit_is_refused_with_what_it_needs_what_there_is_and_what_to_do() -> None:
    with pytest.raises(DoesNotFit) as refused:
        make_plan(job(), gpu(15.5), TABLE, {})

    said = str(refused.value)
    assert "denoise of flux-schnell at 1024x1024 needs about" in said
    assert "GPU memory on Some GPU. 15.5 GiB is free." in said
    assert "The weights alone do not fit" in said
    assert refused.value.exit_code == 2


def test_a_clip_that_is_too_long_is_refused_with_the_longest_that_fits() -> None:
    with pytest.raises(DoesNotFit) as refused:
        make_plan(job(model="wan-ti2v-5b"), gpu(13), TABLE, {})
    fits = re.search(r"1280x704x(\d+) would fit", str(refused.value))

    assert fits
    longest = int(fits[1])
    assert make_plan(job(model="wan-ti2v-5b", num_frames=longest), gpu(13), TABLE, {})
    with pytest.raises(DoesNotFit):
        make_plan(job(model="wan-ti2v-5b", num_frames=longest + 4), gpu(13), TABLE, {})


def test_text_encoders_on_the_cpu_need_ram_and_no_gpu_memory() -> None:
    predicted = make_plan(job(text_encoder_device="cpu"), gpu(40), TABLE, {}).predicted["encode"]

    assert predicted.device_bytes == 0
    assert 2 * 4_762_310_656 <= predicted.host_bytes < 2 * 4_762_310_656 + GIB
    with pytest.raises(DoesNotFit, match="GiB of RAM"):
        make_plan(job(text_encoder_device="cpu"), gpu(40, ram_gib=4), TABLE, {})


@pytest.mark.parametrize(
    ("written", "machine", "named"),
    [
        ({"precision": "nf4"}, gpu(40), "precision nf4"),
        ({"precision": "bf16"}, CPU, "precision bf16"),
        ({"offload": "leaf"}, gpu(40), "offload leaf"),
        ({"offload": "model"}, CPU, "offload model"),
        ({"text_encoder_device": "gpu"}, CPU, "text_encoder_device gpu"),
    ],
)
def test_what_no_rung_offers_is_refused_and_not_replaced(
    written: dict[str, object], machine: Machine, named: str
) -> None:
    with pytest.raises(InvalidJob, match=f"{named} is not offered .* Use "):
        make_plan(job(model="tiny-flux-schnell", **written), machine, TABLE, {})


def test_all_that_is_not_offered_is_said_at_once() -> None:
    with pytest.raises(InvalidJob) as refused:
        make_plan(job(precision="int8", offload="block"), gpu(40), TABLE, {})

    assert len(refused.value.faults) == 2


def test_a_model_that_has_left_the_table_since_is_named() -> None:
    with pytest.raises(InvalidJob, match="model my-flux is not known any more"):
        make_plan(image_spec(model="my-flux"), CPU, TABLE, {})


def test_seconds_grow_with_steps_and_tokens_and_are_none_while_nothing_was_measured() -> None:
    pace = {"flux-schnell": Pace(seconds_per_token_step=0.0001, other_seconds=10.0)}
    small, large = job(width=512, height=512), job()

    assert make_plan(small, gpu(40), TABLE, {}).seconds is None
    assert make_plan(small, gpu(40), TABLE, pace).seconds == pytest.approx(10.0 + 0.0001 * 1024 * 4)
    assert make_plan(large, gpu(40), TABLE, pace).seconds == pytest.approx(10.0 + 0.0001 * 4096 * 4)


def attempt(spec: JobSpec, machine: Machine) -> Plan | DoesNotFit:
    try:
        return make_plan(spec, machine, TABLE, {})
    except DoesNotFit as refused:
        return refused


sides = st.integers(1, 40).map(lambda n: n * 32)


@given(
    key=st.sampled_from(TABLE.keys()),
    width=sides,
    height=sides,
    frames=st.integers(1, 30).map(lambda n: 4 * n + 1),
    vram_gib=st.floats(0.1, 100),
    ram_gib=st.floats(0, 200),
    on_cpu=st.booleans(),
)
def test_any_legal_job_on_any_machine_has_a_plan_that_fits_or_a_reason(
    key: str, width: int, height: int, frames: int, vram_gib: float, ram_gib: float, *, on_cpu: bool
) -> None:
    facts = TABLE[key]
    spec = image_spec(model=key, kind=facts.kind, width=width, height=height,
                      num_frames=frames if facts.kind == "video" else None)  # fmt: skip
    machine = gpu(vram_gib, ram_gib)
    if on_cpu:
        machine = machine.model_copy(update={"device": "cpu"})
    found = attempt(spec, machine)
    if isinstance(found, DoesNotFit):
        assert found.faults
        assert all(fault.remedy for fault in found.faults)
        return
    for peak in found.predicted.values():
        assert peak.host_bytes <= machine.ram_available_bytes
        assert peak.device_bytes == 0 or peak.device_bytes + plan.BASELINE_BYTES <= machine.vram_free_bytes
    assert found == Plan.model_validate_json(found.model_dump_json(), strict=False)


def test_planning_imports_no_torch_and_no_redis() -> None:
    """`safelight plan` answers at once on a machine that has neither."""
    program = "import sys, safelight.plan; sys.exit(any(name in sys.modules for name in ('torch', 'redis', 'rq')))"

    assert (
        subprocess.run([sys.executable, "-c", program], env={"PYTHONPATH": ":".join(sys.path)}, check=False).returncode
        == 0
    )
