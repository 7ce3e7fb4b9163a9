"""The daily call of `safelight prune`: a process of its own, which can hold up and hurt nobody."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable

import pytest

from safelight import config as settings
from safelight.jobqueue import JobQueue
from safelightd import pruning
from safelightd.pruning import Pruning
from tests.client.test_retention import FIRST, collected, in_outbox, night
from tests.conftest import Installation
from tests.integration.test_inbox_service import prompts, running, until


def written(installation: Installation, text: str) -> settings.Config:
    with installation.config.source.open("a") as file:
        file.write(text)
    return settings.load(installation.env)


def looking_until(daily: Pruning, condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        daily.look()
        time.sleep(0.02)


def test_what_is_old_goes_and_it_is_logged(installation: Installation, caplog: pytest.LogCaptureFixture) -> None:
    collected(installation, *night(installation, FIRST, "done"))
    daily = Pruning(written(installation, "[retention]\noutputs_days = 30\n"), first_s=0)
    caplog.set_level("INFO")

    looking_until(daily, lambda: "retention.pruned" in caplog.text)

    assert in_outbox(installation) == []
    assert "Removed 1 output" in caplog.text


def test_a_child_that_fails_is_logged_and_the_service_goes_on(
    installation: Installation, caplog: pytest.LogCaptureFixture
) -> None:
    daily = Pruning(written(installation, "[retention]\noutputs_days = 30\n"), first_s=0)
    installation.config.source.write_text("[retention]\noutput_days = 30\n")

    looking_until(daily, lambda: "retention.failed" in caplog.text)

    assert "outputs_days" in caplog.text
    daily.look()


def test_nothing_is_started_where_everything_is_kept_or_before_its_time(installation: Installation) -> None:
    kept = Pruning(installation.config, first_s=0)
    early = Pruning(written(installation, "[retention]\nledger_days = 30\n"))

    for daily in (kept, early):
        daily.look()
        assert daily.process is None


def test_stopping_ends_the_child(installation: Installation) -> None:
    daily = Pruning(written(installation, "[retention]\noutputs_days = 30\n"), first_s=0)
    daily.look()
    assert daily.process is not None

    daily.stop()

    assert daily.process.wait(10) == -signal.SIGKILL
    assert daily.process.stderr is not None
    daily.process.stderr.close()


def test_the_inbox_calls_it_and_goes_on_taking_files(
    installation: Installation, queue: JobQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pruning, "FIRST_S", 0.0)
    collected(installation, *night(installation, FIRST, "done"))
    with running(written(installation, "[retention]\noutputs_days = 30\nledger_days = 30\n")) as process:
        until(lambda: in_outbox(installation) == [] and installation.ledger.ended() == set())
        (installation.paths.inbox / "fox.txt").write_text("a fox")
        until(lambda: prompts(queue) == ["a fox"])

        assert process.stop() == 0
