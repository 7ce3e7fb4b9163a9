"""What a client wrote down and did not hand over is found, whatever the clock does meanwhile."""

from __future__ import annotations

import os

from safelightd.recovery import LATE_S, written_late
from tests.conftest import Installation
from tests.daemon.test_worker import specs_of

NOON = 1_800_000_000.0
HOUR = 3600.0


def written_at(installation: Installation, name: str, moment: float) -> None:
    spec = specs_of(installation, ["a fox"])[0]
    installation.ledger.accept({name: [spec]})
    file = installation.paths.jobs / f"{name}.jsonl"
    os.utime(file, (moment, moment))


def test_a_submission_is_late_once_its_client_has_had_its_time(installation: Installation) -> None:
    written_at(installation, "a", NOON)
    ledger = installation.ledger

    assert written_late(ledger, NOON - 1, NOON + 1) == ([], NOON - 1)  # looked a moment ago
    late, looked = written_late(ledger, NOON - LATE_S, NOON + LATE_S + 1)
    assert (late, looked) == (["a"], NOON + 1)
    assert written_late(ledger, looked, NOON + 60) == ([], NOON + 60 - LATE_S)


def test_a_clock_that_is_set_back_an_hour_hides_nothing(installation: Installation) -> None:
    looked = NOON - LATE_S
    written_at(installation, "before", NOON)  # by the old clock
    late, looked = written_late(installation.ledger, looked, NOON - HOUR)

    assert late == ["before"]

    written_at(installation, "after", NOON - HOUR + 1)
    late, looked = written_late(installation.ledger, looked, NOON - HOUR + 1 + 2 * LATE_S)

    assert late == ["after"]


def test_a_clock_that_is_set_forward_an_hour_hides_nothing(installation: Installation) -> None:
    written_at(installation, "before", NOON)
    late, looked = written_late(installation.ledger, NOON - LATE_S, NOON + HOUR)

    assert late == ["before"]
    assert looked == NOON + HOUR - LATE_S
