"""A job's place in the line: how it sorts, and what others may have written there."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safelight.jobspec import PRIORITIES
from safelight.place import Place
from tests.integration.making import image_spec

IDS = st.from_regex(r"[A-Za-z0-9-]{1,30}", fullmatch=True)
PLACES = st.builds(Place, st.sampled_from(range(len(PRIORITIES))), st.integers(0, 999_999_999_999), IDS)
SPEC = image_spec(id="20261122-213000-123abcd-00001")


@given(PLACES, PLACES)
def test_places_sort_as_what_is_written_in_the_line_does(one: Place, other: Place) -> None:
    assert (one < other) == (str(one) < str(other))
    assert Place.parse(str(one)) == one


def test_priority_comes_before_not_before_and_that_before_the_order_of_submission() -> None:
    dated = SPEC.model_copy(update={"not_before": "2026-11-22T21:00:30+00:00"})
    by_class = [Place.of(SPEC.model_copy(update={"priority": name})) for name in PRIORITIES]

    assert str(Place.of(SPEC)) == f"1:000000000000:{SPEC.id}"
    assert by_class == sorted(by_class)
    assert by_class[0] < Place.of(SPEC) < Place.of(SPEC.model_copy(update={"id": f"{SPEC.id[:-1]}2"})) < Place.of(dated)
    assert Place.of(dated).not_before == 1_795_381_230
    assert Place.of(SPEC.model_copy(update={"not_before": "1969-01-01T00:00:00+00:00"})) == Place.of(SPEC)


def test_a_job_may_be_put_off_beyond_what_it_says_and_not_before_it() -> None:
    dated = SPEC.model_copy(update={"not_before": "2026-11-22T21:00:30+00:00"})

    assert Place.of(SPEC, 99.2).not_before == 100
    assert Place.of(dated, 99.2) == Place.of(dated)


@pytest.mark.parametrize(
    "written",
    ["", "1:", "1:soon:x", "4:000000000000:x", "1:000000000000:", "1:000000000000:../evil", "1:0:x", "x\n"],
)
def test_what_others_may_have_written_there_is_no_place(written: str) -> None:
    assert Place.parse(written) is None
