"""What is too old and goes: decided by values alone, removed so that whatever dies, nothing is lost or run again."""

from __future__ import annotations

import errno
import hashlib
import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from safelight import collect as collecting
from safelight import content, inbox, inputs, retention
from safelight.config import Config
from safelight.errors import Forgotten
from safelight.ids import job_id, submission_of
from safelight.lora import Lora
from safelight.receipt import Output, Poster, Receipt
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


@pytest.mark.parametrize("pictures", [(), (".png",), (".png", ".jpg")])
def test_a_claim_that_the_inbox_has_not_finished_keeps_its_submission(
    installation: Installation, pictures: tuple[str, ...]
) -> None:
    """Its service was off for months; it would take the file for a new one."""
    night(installation, FIRST, "failed")
    installation.paths.claimed.mkdir(parents=True)
    claim = installation.paths.claimed / inbox.Claim(FIRST, "cat.txt", pictures).name
    claim.touch()

    assert prune(installation, ledger_days=30) == []

    claim.unlink()

    assert prune(installation, ledger_days=30) == [Gone("record", FIRST)]


@pytest.mark.parametrize("began", ["1970-01-01", "2000-01-01", "2024-06-11"])
def test_a_night_under_a_clock_that_had_lost_its_battery_is_not_called_old(
    installation: Installation, began: str
) -> None:
    """It was set right in the morning: nobody knows how long ago the jobs ended."""
    night(installation, f"{began.replace('-', '')}-210000-000abcd", "done", "failed",
          days=(NOW - datetime.fromisoformat(f"{began}T21:00Z")) / timedelta(days=1))  # fmt: skip
    before = in_outbox(installation)

    assert prune(installation, outputs_days=30, ledger_days=30, uncollected="remove") == []
    assert in_outbox(installation) == before


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


def with_picture(installation: Installation, submission: str, letter: str, state: str | None) -> Path:
    """A submission of one job that began with a picture, which was put there as long ago as the job ended."""
    digest = letter * 64
    spec = making.image_spec(id=job_id(submission, 1), index=1, image=digest)
    installation.ledger.accept({submission: [spec]})
    finished_at = (NOW - timedelta(days=40)).isoformat()
    if state:
        receipt = {"id": spec.id, "state": state, "spec": spec, "finished_at": finished_at}
        installation.ledger.record(Receipt.model_validate(receipt))
    return picture_of(installation, digest)


def picture_of(installation: Installation, digest: str, days: float = 40) -> Path:
    file = installation.paths.inputs / digest
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(b"picture")
    old = (NOW - timedelta(days=days)).timestamp()
    os.utime(file, (old, old))
    return file


def test_input_pictures_go_with_the_last_record_that_names_them(installation: Installation) -> None:
    ended = with_picture(installation, FIRST, "a", "failed")
    waiting = with_picture(installation, SECOND, "b", None)
    lone, just_stored = picture_of(installation, "c" * 64), picture_of(installation, "d" * 64, days=0.1)
    before = sorted(installation.paths.inputs.iterdir())
    said = prune(installation, dry_run=True, ledger_days=30)

    assert sorted(installation.paths.inputs.iterdir()) == before
    assert said == prune(installation, ledger_days=30)
    assert said == [Gone("record", FIRST), Gone("input", ended.name, 7), Gone("input", lone.name, 7)]
    assert sorted(installation.paths.inputs.iterdir()) == [waiting, just_stored]


def test_a_lora_that_a_job_came_with_stays_as_long_as_a_record_names_it(installation: Installation) -> None:
    lora = Lora(path="style.safetensors", sha256="e" * 64)
    installation.ledger.accept({FIRST: [making.image_spec(id=job_id(FIRST, 1), loras=(lora,))]})
    kept = picture_of(installation, lora.sha256)

    assert prune(installation, ledger_days=30) == []
    assert kept.exists()


def test_where_a_record_cannot_be_read_no_input_picture_goes(installation: Installation) -> None:
    picture = with_picture(installation, FIRST, "a", "failed")
    (installation.paths.jobs / f"{SECOND}.jsonl").write_text("{\n")

    assert prune(installation, ledger_days=30) == [Gone("record", FIRST)]
    assert picture.exists()


def test_a_picture_that_is_submitted_again_is_as_new(installation: Installation, tmp_path: Path) -> None:
    source = tmp_path / "fox.png"
    Image.new("RGB", (8, 8), "red").save(source)
    digest = inputs.store(source, installation.paths.inputs).digest
    os.utime(installation.paths.inputs / digest, (0, 0))
    inputs.store(source, installation.paths.inputs)

    assert prune(installation, ledger_days=30) == []
    assert (installation.paths.inputs / digest).exists()


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


def clips(installation: Installation) -> tuple[Receipt, Receipt]:
    """A clip with its poster, and a folder of frames, both old and collected."""
    clip, frames = night(installation, FIRST, "done", "done")
    outbox = installation.paths.outbox
    receipts = []
    for receipt, is_folder in ((clip, False), (frames, True)):
        (output,) = receipt.outputs
        file = outbox / output.path
        if is_folder:
            file.unlink()
            file = file.with_suffix("")
            file.mkdir()
            for number in range(3):
                (file / f"{number:04}.png").write_bytes(b"frame %d" % number)
            said = {"sha256": content.digest(file), "bytes": content.size_bytes(file)}
            output = output.model_copy(update={"path": output.path.removesuffix(".png"), **said})
        else:
            poster = file.with_suffix(".jpg")
            poster.write_bytes(b"poster")
            path = str(poster.relative_to(outbox))
            output = output.model_copy(
                update={"poster": Poster(path=path, sha256=content.digest(poster), bytes=6)},
            )
        receipts.append(receipt.model_copy(update={"outputs": (output,)}))
        file.with_suffix(".json").write_text(receipts[-1].model_dump_json())
    installation.ledger.record_all(receipts)
    collected(installation, *receipts)
    return receipts[0], receipts[1]


def test_posters_and_folders_of_frames_go_too(installation: Installation) -> None:
    clip, frames = clips(installation)

    gone = prune(installation, outputs_days=30)

    assert {(one.name, one.bytes) for one in gone} == {
        (output.path, output.bytes) for receipt in (clip, frames) for output in receipt.outputs
    }
    assert in_outbox(installation) == []


@pytest.mark.parametrize("change", ["edited", "added", "hidden", "linked", "replaced by a link"])
def test_folder_that_somebody_changed_stays(installation: Installation, change: str) -> None:
    _, frames = clips(installation)
    folder = installation.paths.outbox / frames.outputs[0].path
    if change == "edited":
        (folder / "0001.png").write_bytes(b"frame X")
    elif change == "added":
        (folder / "masks").mkdir()
    elif change == "hidden":
        (folder / ".notes").write_text("mine")
    elif change == "linked":
        (folder / "0001.png").rename(installation.root / "moved.png")
        (folder / "0001.png").symlink_to(installation.root / "moved.png")
    else:
        folder.rename(installation.root / "moved")
        folder.symlink_to(installation.root / "moved")
    before = sorted(folder.iterdir())

    prune(installation, outputs_days=30)

    assert sorted(folder.iterdir()) == before


def test_picture_that_replaced_a_poster_stays(installation: Installation) -> None:
    clip, _ = clips(installation)
    poster = (installation.paths.outbox / clip.outputs[0].path).with_suffix(".jpg")
    poster.write_bytes(b"a person's own")

    prune(installation, outputs_days=30)

    assert [installation.paths.outbox / name for name in in_outbox(installation)] == [poster]


def test_removal_of_a_folder_that_was_killed_is_finished(
    installation: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, frames = clips(installation)
    remove = content.remove

    def half(path: Path) -> None:
        if path.is_dir():
            (path / "0000.png").unlink()
            raise OSError(errno.EIO, "the plug was pulled")
        remove(path)

    monkeypatch.setattr(content, "remove", half)
    with pytest.raises(OSError, match="the plug was pulled"):
        prune(installation, outputs_days=30)
    monkeypatch.undo()

    prune(installation, outputs_days=30)

    assert in_outbox(installation) == []
    assert frames.id in installation.ledger.outputs_removed()
