"""What is too old and goes: decided by values alone, removed so that whatever dies, nothing is lost or run again."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safelight import collect as collecting
from safelight import retention
from safelight.config import Config
from safelight.errors import Forgotten
from safelight.ledger import job_id, submission_of
from safelight.receipt import Output, Receipt
from safelight.retention import Ended, Gone, Rules
from tests.cli_steps import runner
from tests.conftest import Installation
from tests.integration import making

NOW = datetime(2026, 11, 25, 12, tzinfo=UTC)
FIRST, SECOND, THIRD = "20261001-210000-000abcd", "20261002-210000-000abcd", "20261003-210000-000abcd"
FRESH = "20261124-210000-000abcd"

# -- deciding ----------------------------------------------------------------------------------------------------

IDS = [f"job-{number}" for number in range(6)]
ENDED = st.builds(
    Ended,
    state=st.sampled_from(["done", "failed", "quarantined", "cancelled"]),
    finished_at=st.integers(-2000, 100).map(lambda hours: NOW + timedelta(hours=hours)),
)
JOBS = st.dictionaries(st.sampled_from(IDS), ENDED)
SOME = st.frozensets(st.sampled_from(IDS))
DAYS = st.sampled_from([0.0, 0.5, 14.0, 30.0])
RULES = st.builds(
    Rules, outputs_days=DAYS, uncollected=st.sampled_from(["keep", "remove"]), ledger_days=DAYS.filter(bool)
)


@given(JOBS, RULES, SOME, SOME)
def test_outputs_go_only_when_old_and_collected_or_told(
    jobs: dict[str, Ended], rules: Rules, collected: frozenset[str], removed: frozenset[str]
) -> None:
    going = retention.outputs_to_remove(jobs, rules, NOW, collected=collected, removed=removed)

    for job in going:
        assert jobs[job].state == "done"
        assert 0 < rules.outputs_days < (NOW - jobs[job].finished_at) / timedelta(days=1)
        assert job in collected or rules.uncollected == "remove"
        assert job not in removed
    if not rules.outputs_days:
        assert going == []


@given(JOBS, RULES, SOME, SOME, st.dictionaries(st.sampled_from("abc"), SOME))
def test_records_go_by_whole_submissions_of_jobs_that_ended_long_ago(
    jobs: dict[str, Ended], rules: Rules, collected: frozenset[str], removed: frozenset[str],
    submissions: Mapping[str, frozenset[str]],
) -> None:  # fmt: skip
    going = retention.records_to_remove(submissions, jobs, rules, NOW, collected=collected, removed=removed)

    for job in [job for name in going for job in submissions[name]]:
        assert jobs[job].state != "quarantined"
        assert (NOW - jobs[job].finished_at) / timedelta(days=1) > rules.ledger_days
        if jobs[job].state == "done" and rules.uncollected == "keep":
            assert job in collected | removed
        if jobs[job].state == "done" and rules.outputs_days:
            assert job in removed


@given(JOBS, RULES, SOME, st.integers(1, 1000))
def test_what_goes_today_goes_tomorrow_too(
    jobs: dict[str, Ended], rules: Rules, collected: frozenset[str], hours: int
) -> None:
    later = NOW + timedelta(hours=hours)

    today = retention.outputs_to_remove(jobs, rules, NOW, collected=collected, removed=frozenset())
    tomorrow = retention.outputs_to_remove(jobs, rules, later, collected=collected, removed=frozenset())

    assert set(today) <= set(tomorrow)


def test_by_default_everything_is_kept(installation: Installation) -> None:
    assert not Rules.of(installation.config.settings)


def test_no_record_goes_while_the_queue_lists_its_job(installation: Installation) -> None:
    assert Rules.of(tuned(installation, ledger_days=1).settings).ledger_days == 14


# -- doing -------------------------------------------------------------------------------------------------------


def tuned(installation: Installation, **values: Any) -> Config:
    """Return the installation's settings with other values of [retention]."""
    settings = installation.config.settings
    changed = settings.model_copy(update={"retention": settings.retention.model_copy(update=values)})
    return replace(installation.config, settings=changed)


def night(installation: Installation, submission: str, *states: str, days: float = 40) -> list[Receipt]:
    """A submission whose jobs have ended like this, so many days ago; those that are done have an output."""
    specs = [
        making.image_spec(id=job_id(submission, index), index=index, prompt=f"{submission}")
        for index in range(1, len(states) + 1)
    ]
    installation.ledger.accept({submission: specs})
    receipts = []
    for spec, state in zip(specs, states, strict=True):
        outputs = []
        if state == "done":
            content = f"picture of {spec.id}".encode()
            path = f"{submission[:8]}/night/{spec.id}.png"
            file = installation.paths.outbox / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
            digest = hashlib.sha256(content).hexdigest()
            outputs = [Output(path=path, sha256=digest, bytes=len(content), width=64, height=48)]
        finished_at = (NOW - timedelta(days=days)).isoformat()
        receipt = Receipt.model_validate(
            {"id": spec.id, "state": state, "spec": spec, "outputs": outputs, "finished_at": finished_at}
        )
        for output in receipt.outputs:
            (installation.paths.outbox / output.path).with_suffix(".json").write_text(receipt.model_dump_json())
        receipts.append(receipt)
    installation.ledger.record_all(receipts)
    return receipts


def collected(installation: Installation, *receipts: Receipt) -> None:
    copied = collecting.collect(receipts, installation.paths.outbox, installation.root / "Pictures")
    collecting.note(copied, installation.paths, NOW)


def prune(installation: Installation, *, dry_run: bool = False, **values: Any) -> list[Gone]:
    return list(retention.prune(tuned(installation, **values), installation.ledger, NOW, dry_run=dry_run))


def in_outbox(installation: Installation) -> list[str]:
    outbox = installation.paths.outbox
    return sorted(str(file.relative_to(outbox)) for file in outbox.rglob("*") if not file.is_dir())


def test_collected_outputs_go_with_their_receipts_and_their_folders(installation: Installation) -> None:
    (old,) = night(installation, FIRST, "done")
    (young,) = night(installation, FRESH, "done", days=1)
    collected(installation, old, young)

    gone = prune(installation, outputs_days=30)

    assert gone == [Gone("output", old.outputs[0].path, old.outputs[0].bytes)]
    assert in_outbox(installation) == [f"20261124/night/{young.id}.json", f"20261124/night/{young.id}.png"]
    assert [folder.name for folder in installation.paths.outbox.iterdir()] == ["20261124"]
    assert installation.ledger.receipt(old.id) == old
    assert prune(installation, outputs_days=30) == []


def test_what_was_not_collected_stays_until_it_is_told(installation: Installation) -> None:
    night(installation, FIRST, "done", "done")
    before = in_outbox(installation)

    assert prune(installation, outputs_days=30, ledger_days=30) == []
    assert in_outbox(installation) == before

    gone = prune(installation, outputs_days=30, ledger_days=30, uncollected="remove")

    assert [one.what for one in gone] == ["output", "output", "record"]
    assert in_outbox(installation) == []


def test_dry_run_says_the_same_and_changes_nothing(installation: Installation) -> None:
    collected(installation, *night(installation, FIRST, "done", "failed"))
    wanted = {"outputs_days": 30, "ledger_days": 30}
    before = sorted(map(str, installation.root.rglob("*")))

    said = prune(installation, dry_run=True, **wanted)

    assert sorted(map(str, installation.root.rglob("*"))) == before
    assert said == prune(installation, **wanted)
    assert [one.what for one in said] == ["output", "record"]


def test_what_a_person_changed_linked_or_added_is_left_alone(installation: Installation) -> None:
    edited, linked, noted = night(installation, FIRST, "done", "done", "done")
    collected(installation, edited, linked, noted)
    outbox = installation.paths.outbox
    (outbox / edited.outputs[0].path).write_bytes(b"better")
    moved = installation.root / "moved.png"
    (outbox / linked.outputs[0].path).rename(moved)
    (outbox / linked.outputs[0].path).symlink_to(moved)
    (outbox / noted.outputs[0].path).with_suffix(".json").write_text('{"note": "my favourite"}')
    (outbox / "20261001/night/own.png").write_bytes(b"mine")

    gone = prune(installation, outputs_days=30)

    assert [one.name for one in gone] == [noted.outputs[0].path]
    assert moved.is_file()
    assert in_outbox(installation) == sorted(
        [
            "20261001/night/own.png",
            f"20261001/night/{noted.id}.json",
            *(f"20261001/night/{one.id}.{suffix}" for one in (edited, linked) for suffix in ("json", "png")),
        ]
    )


def test_a_folder_that_a_person_moved_elsewhere_and_linked_is_left_alone(installation: Installation) -> None:
    (old,) = night(installation, FIRST, "done")
    collected(installation, old)
    elsewhere = installation.root / "big-disk"
    (installation.paths.outbox / "20261001").rename(elsewhere)
    (installation.paths.outbox / "20261001").symlink_to(elsewhere)

    assert prune(installation, outputs_days=30) == []
    assert (elsewhere / f"night/{old.id}.png").is_file()


def test_an_outbox_whose_disk_is_away_lets_nothing_go(installation: Installation) -> None:
    """Its mount point is there and empty: nobody has removed anything from it."""
    collected(installation, *night(installation, FIRST, "done"))
    away = installation.root / "away"
    installation.paths.outbox.rename(away)
    installation.paths.outbox.mkdir()
    wanted = {"outputs_days": 30, "ledger_days": 30}

    assert prune(installation, **wanted) == []

    installation.paths.outbox.rmdir()
    away.rename(installation.paths.outbox)

    assert [one.what for one in prune(installation, **wanted)] == ["output", "record"]


def test_records_go_and_their_jobs_are_refused_for_ever(installation: Installation) -> None:
    """A queue that was restored from an old file may still hold them."""
    ledger = installation.ledger
    old = night(installation, FIRST, "failed", "cancelled", "done")
    collected(installation, *old[2:])

    assert prune(installation, ledger_days=30) == [Gone("record", FIRST)]
    assert ledger.ended() == set()
    assert ledger.submission(FIRST) == []
    assert not any(installation.paths.collected.iterdir())
    for receipt in old:
        with pytest.raises(Forgotten, match="submit it anew"):
            ledger.receipt(receipt.id)
    assert ledger.receipt(job_id(SECOND, 1)) is None
    assert prune(installation, ledger_days=30) == []


@pytest.mark.parametrize("state", ["quarantined", None])
def test_a_submission_with_a_job_that_waits_or_is_quarantined_stays_whole(
    installation: Installation, state: str | None
) -> None:
    night(installation, FIRST, "failed", state or "failed")
    if state is None:
        installation.ledger.reopen(job_id(FIRST, 2))

    assert prune(installation, ledger_days=30) == []
    assert job_id(FIRST, 1) in installation.ledger.ended()
    assert len(installation.ledger.submission(FIRST)) == 2


def test_a_claim_that_the_inbox_has_not_finished_keeps_its_submission(installation: Installation) -> None:
    """Its service was off for months; it would take the file for a new one."""
    night(installation, FIRST, "failed")
    installation.paths.claimed.mkdir(parents=True)
    claim = installation.paths.claimed / f"{FIRST}~cat.txt"
    claim.touch()

    assert prune(installation, ledger_days=30) == []

    claim.unlink()

    assert prune(installation, ledger_days=30) == [Gone("record", FIRST)]


def test_damaged_records_stay_for_a_person_to_see(installation: Installation) -> None:
    night(installation, FIRST, "failed", "failed")
    (installation.paths.receipts / f"{job_id(FIRST, 2)}.json").write_text("{")
    night(installation, SECOND, "failed")
    (installation.paths.jobs / f"{SECOND}.jsonl").write_text("{\n")

    assert prune(installation, ledger_days=30) == []
    assert len(installation.ledger.ended()) == 3


def test_a_job_that_only_the_queue_had_known_goes_by_itself(installation: Installation) -> None:
    (lone,) = night(installation, FIRST, "cancelled")
    (installation.paths.jobs / f"{FIRST}.jsonl").unlink()

    assert prune(installation, ledger_days=30) == [Gone("record", lone.id)]
    with pytest.raises(Forgotten):
        installation.ledger.receipt(lone.id)


def test_retried_jobs_leave_no_old_receipts(installation: Installation) -> None:
    (failed,) = night(installation, FIRST, "failed")
    installation.ledger.reopen(failed.id)
    installation.ledger.record(failed)

    prune(installation, ledger_days=30)

    assert list((installation.paths.receipts / "old").iterdir()) == []


# -- dying -------------------------------------------------------------------------------------------------------

CHANGES = ("os.remove", "os.rename", "os.rmdir")


def killed_at(change: int, installation: Installation, **values: Any) -> bool:
    """Prune in a process that dies before its `change`th removal or rename; False when it came to its end."""
    child = os.fork()
    if child == 0:
        seen = 0

        def count(event: str, _args: object) -> None:
            nonlocal seen
            if event in CHANGES:
                seen += 1
                if seen == change:
                    os._exit(9)

        sys.addaudithook(count)
        status = 1
        try:
            prune(installation, **values)
            status = 0
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 9)
    return status == 9


def test_a_run_that_dies_anywhere_leaves_nothing_unknown_and_the_next_finishes_it(installation: Installation) -> None:
    wanted = {"outputs_days": 30, "ledger_days": 30}
    paths, ledger = installation.paths, installation.ledger
    change = 0
    while True:
        change += 1
        going = [*night(installation, FIRST, "done", "failed"), *night(installation, SECOND, "done")]
        staying = night(installation, THIRD, "done", "quarantined")
        collected(installation, *going, *staying)
        died = killed_at(change, installation, **wanted)

        for receipt in going:
            noted = ledger.outputs_removed() | {file.stem for file in paths.removing.glob("*.json")}
            forgotten = submission_of(receipt.id) in ledger.forgotten()
            for output in receipt.outputs:
                assert (paths.outbox / output.path).is_file() or receipt.id in noted or forgotten
            if receipt.id not in ledger.ended():
                with pytest.raises(Forgotten):
                    ledger.receipt(receipt.id)
        if not died:
            break
        prune(installation, **wanted)

        assert in_outbox(installation) == []
        assert ledger.ended() == {receipt.id for receipt in staying}
        assert list(paths.removing.glob("*.json")) == []
        assert [file.stem for file in (paths.jobs / "closed").iterdir()] == [THIRD]
        for receipt in staying:
            (paths.removed / f"{receipt.id}.json").unlink(missing_ok=True)
        paths.forgotten.unlink()  # for the next round, with the same names

    assert change > 20


# -- the command -------------------------------------------------------------------------------------------------


def test_prune_says_what_it_would_remove_and_then_removes_it(installation: Installation) -> None:
    safelight = runner(installation)
    (old,) = night(installation, FIRST, "done")
    kept = safelight("prune")
    with installation.config.source.open("a") as file:
        file.write("[retention]\noutputs_days = 30\n")

    assert (kept.exit_code, kept.stdout) == (0, "")
    assert "outputs_days" in kept.stderr
    assert "Would remove nothing" in safelight("prune", "--dry-run").stderr

    target = str(installation.root / "Pictures")
    assert safelight("collect", "--all", "--to", target).exit_code == 0
    would = safelight("prune", "--dry-run")

    assert would.stdout == f"output {old.outputs[0].path}\n"
    assert in_outbox(installation) != []
    assert safelight("prune").stdout == would.stdout
    assert in_outbox(installation) == []
    assert "Nothing is done that fits" in safelight("collect", "--all", "--to", target).stderr
