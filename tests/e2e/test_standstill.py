"""Everything is stopped in the middle of a job while clients ask; the long form is `python -m bench.standstill`."""

from __future__ import annotations

import pytest
from bench.standstill import stand_still


@pytest.mark.timeout(600)
def test_processes_that_stood_still_run_no_job_twice_and_clients_that_asked_break_nothing() -> None:
    found = stand_still(seconds=1)  # as long as the clients' patience: all of them ask once

    assert found["ok"], found
    assert found["jobs"] == 4
