"""A job of which a part is done goes on in the way it was begun in, where that has room and pays."""

from __future__ import annotations

import pytest

from safelight import models
from safelight.begun import Begun
from safelight.calibration import NOTHING_LEARNED
from safelight.computed import Computed
from safelight.jobspec import JobSpec
from safelight.machine import GIB, Machine
from safelight.plan import Overrun, Plan
from safelight.planner import make_plan
from safelight.rung import Circumstances
from tests.integration.making import clip_spec

TABLE = models.load()
CARD = Machine(
    device="cuda", capability=(8, 9), vram_total_bytes=16 * GIB, vram_free_bytes=15 * GIB, ram_total_bytes=32 * GIB,
    ram_available_bytes=26 * GIB, cpus=8, compiler=True,
)  # fmt: skip
CLIP = clip_spec(model="wan-ti2v-5b", width=832, height=480, num_frames=49, num_inference_steps=20)
NIGHT, ALONE = 100, 1
DECIDED = tuple(Computed.model_fields)


def planned(machine: Machine, waiting: int, spec: JobSpec = CLIP, **around: object) -> Plan:
    return make_plan(spec, machine, TABLE, NOTHING_LEARNED, Circumstances(waiting=waiting, **around))  # type: ignore[arg-type] # by name


def begun(plan: Plan, step: int) -> Begun:
    return Begun(step=step, **{name: getattr(plan, name) for name in DECIDED})


def way(plan: Plan) -> tuple[object, ...]:
    return tuple(getattr(plan, name) for name in DECIDED)


def test_a_clip_that_was_begun_compiled_goes_on_so_though_no_others_wait_any_more() -> None:
    first, alone = planned(CARD, NIGHT), planned(CARD, ALONE)
    again = planned(CARD, ALONE, begun=begun(first, step=15))

    assert way(alone) != way(first)
    assert way(again) == way(first)


def test_a_clip_goes_on_beside_a_game_with_its_weights_elsewhere_and_the_same_bits() -> None:
    """What its blocks do not find room for is streamed: the way that a fresh job would take there has other bits."""
    first = planned(CARD, NIGHT)
    full = CARD.model_copy(update={"vram_free_bytes": 7 * GIB})
    again = planned(full, NIGHT, begun=begun(first, step=10))

    assert way(again) == way(first)
    assert max(phase.device_bytes for phase in again.predicted.values()) <= full.vram_free_bytes


def test_what_was_begun_in_a_way_that_has_no_room_any_more_begins_anew() -> None:
    first = planned(CARD, ALONE, CLIP.model_copy(update={"precision": "int8-bnb"}))  # whose blocks cannot be streamed
    full = CARD.model_copy(update={"vram_free_bytes": 5 * GIB})
    fresh = planned(full, ALONE)
    again = planned(full, ALONE, begun=begun(first, step=19))

    assert way(fresh) != way(first)
    assert again == fresh


@pytest.mark.parametrize(("step", "goes_on"), [(1, False), (19, True)], ids=["hardly begun", "nearly done"])
def test_it_begins_anew_where_that_is_sooner(step: int, goes_on: bool) -> None:
    slow = planned(CARD, ALONE, CLIP.model_copy(update={"precision": "int8-bnb"}))
    fresh = planned(CARD, ALONE)
    again = planned(CARD, ALONE, begun=begun(slow, step))

    assert (slow.seconds_per_step or 0) > 1.5 * (fresh.seconds_per_step or 0)
    assert way(again) == way(slow if goes_on else fresh)


def test_what_a_cpu_has_begun_begins_anew_on_a_card_and_the_other_way_round() -> None:
    """A person tries it on the CPU, mends the driver and starts the worker again."""
    cpu = Machine(device="cpu", ram_total_bytes=32 * GIB, ram_available_bytes=26 * GIB, cpus=8)
    on_cpu, on_card = planned(cpu, ALONE), planned(CARD, ALONE)

    assert planned(CARD, ALONE, begun=begun(on_cpu, step=15)) == on_card
    assert planned(cpu, ALONE, begun=begun(on_card, step=15)) == on_cpu


def test_a_precision_whose_result_was_refused_is_not_gone_on_with() -> None:
    first = planned(CARD, NIGHT)
    again = planned(CARD, NIGHT, begun=begun(first, step=19), refused=(first.precision,))

    assert again.precision != first.precision


def test_what_ran_out_of_memory_goes_on_with_less_of_it() -> None:
    first = planned(CARD, NIGHT)
    held = first.predicted["denoise"].device_bytes
    over = Overrun(phase="denoise", memory="device", rung=first.rung, predicted_bytes=held, reached_bytes=held)
    again = planned(CARD, NIGHT, begun=begun(first, step=10), overruns=(over,))

    assert way(again) == way(first)
    assert again.predicted["denoise"].device_bytes < held
