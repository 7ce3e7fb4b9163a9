"""`cancel`, `retry`, `pause`, `collect`, `rerun` as a person uses them, on a real server and a real ledger."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

from safelight import cancelling
from safelight.jobqueue import JobQueue
from safelight.ledger import Ledger
from safelight.plan import Plan
from safelight.receipt import Receipt
from tests.cli_steps import (
    Safelight,
    end,
    ids_of,
    runner,
    start,
)
from tests.conftest import Installation


@pytest.fixture
def safelight(installation: Installation, queue: JobQueue) -> Safelight:
    """Runs a command line against the installation, whose server is up."""
    return runner(installation)


def test_cancel_leaves_receipts_and_asks_what_runs(
    safelight: Safelight, installation: Installation, queue: JobQueue
) -> None:
    a, b = ids_of(safelight("add", "a b", "c d"))
    start(queue, a)

    result = safelight("cancel", "--all")

    assert result.stdout.splitlines() == [f"{a} running: asked to stop", f"{b} cancelled"]
    assert queue.wait_for_cancel(a, 0.1)
    assert installation.ledger.receipt(a) is None
    receipt = installation.ledger.receipt(b)
    assert receipt is not None
    assert receipt.state == "cancelled"
    assert safelight("cancel", b).stdout.splitlines() == [f"{b} cancelled"]


@pytest.mark.parametrize("everything", [True, False])
def test_cancel_writes_the_receipt_that_an_earlier_attempt_missed(
    safelight: Safelight, installation: Installation, queue: JobQueue, everything: bool
) -> None:
    """Killed between queue and ledger, the job would come back after the server lost its data."""
    (job,) = ids_of(safelight("add", "a red fox"))
    queue.cancel([job])

    safelight("cancel", "--all" if everything else job)

    assert installation.ledger.ended() == {job}


def test_cancel_reaches_a_job_that_only_the_ledger_knows(
    safelight: Safelight, installation: Installation, queue: JobQueue
) -> None:
    (job,) = ids_of(safelight("add", "a red fox"))
    queue.server.flushall()

    assert safelight("cancel", job).stdout == f"{job} cancelled\n"
    assert installation.ledger.ended() == {job}


def test_a_cancelled_job_that_was_put_back_leaves_nothing_of_its_run(
    safelight: Safelight, installation: Installation
) -> None:
    (job,) = ids_of(safelight("add", "a red fox"))
    kept = [installation.paths.checkpoints / job, installation.paths.previews / f"{job}.jpg"]
    for file in kept:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()

    safelight("cancel", job)

    assert not any(file.exists() for file in kept)


@pytest.mark.parametrize("moment", ["before a worker writes", "after a worker wrote", "while a worker writes"])
def test_a_retry_comes_through_whenever_a_worker_writes_down_the_cancellation(
    moment: str, safelight: Safelight, installation: Installation, queue: JobQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A queued job with a receipt would be answered with it, and not run."""
    (job,) = ids_of(safelight("add", "a red fox"))
    queue.cancel([job])
    record_all, requeue = Ledger.record_all, JobQueue.requeue

    def recording(ledger: Ledger, receipts: Iterable[Receipt]) -> None:
        written = list(receipts)
        if moment == "before a worker writes":
            assert safelight("retry", job).exit_code == 0
        record_all(ledger, written)
        if moment == "after a worker wrote":
            assert safelight("retry", job).exit_code == 0

    def requeueing(of: JobQueue, id_: str) -> bool:
        cancelling.write_down(queue, installation.ledger)
        return requeue(of, id_)

    if moment == "while a worker writes":
        monkeypatch.setattr(JobQueue, "requeue", requeueing)
        assert safelight("retry", job).exit_code == 0
    else:
        monkeypatch.setattr(Ledger, "record_all", recording)
        cancelling.write_down(queue, installation.ledger)

    assert queue.state(job) == "queued"
    assert installation.ledger.receipt(job) is None


def test_cancel_of_a_batch_leaves_others(safelight: Safelight, queue: JobQueue) -> None:
    ids_of(safelight("add", "a b", "c d", "--batch", "one"))
    (other,) = ids_of(safelight("add", "e f", "--batch", "two"))

    safelight("cancel", "--batch", "one")

    assert queue.waiting_ids() == [other]


def test_cancel_and_retry_say_that_there_is_nothing_to_do(safelight: Safelight) -> None:
    (job,) = ids_of(safelight("add", "a b", "--batch", "one"))
    nothing_failed = safelight("retry", "--batch", "one")
    safelight("cancel", job)
    nothing_open = safelight("cancel", "--batch", "one")

    assert (nothing_failed.stdout, nothing_open.stdout) == ("", "")
    assert nothing_failed.stderr == "Nothing to retry: none of them is failed or quarantined or cancelled.\n"
    assert nothing_open.stderr == "Nothing to cancel: all of them have ended.\n"


@pytest.mark.parametrize("words", [["cancel"], ["retry"], ["cancel", "--all", "--batch", "x"], ["cancel", "nosuchjob"]])
def test_cancel_and_retry_refuse_an_unclear_selection(safelight: Safelight, words: Sequence[str]) -> None:
    assert safelight(*words).exit_code == 2


def test_retry_queues_what_failed_again_and_nothing_else(
    safelight: Safelight, installation: Installation, queue: JobQueue
) -> None:
    a, b, c = ids_of(safelight("add", "a b", "c d", "e f"))
    end(installation, queue, a, "failed", "because")
    end(installation, queue, b)

    result = safelight("retry", a, b, c)

    assert result.exit_code == 0
    assert result.stdout.splitlines() == [f"{a} queued", f"{b} done", f"{c} queued"]
    assert queue.waiting_ids() == [a, c]
    assert installation.ledger.ended() == {b}
    assert safelight("retry", a).stdout == f"{a} queued\n"
    assert queue.waiting_ids() == [a, c]


def test_retry_brings_back_what_the_queue_has_forgotten(
    safelight: Safelight, installation: Installation, queue: JobQueue
) -> None:
    (job,) = ids_of(safelight("add", "a red fox"))
    end(installation, queue, job, "quarantined", "it broke the engine three times")
    queue.server.flushall()

    safelight("retry", job)

    assert queue.waiting_ids() == [job]
    assert installation.ledger.ended() == set()


def test_retry_all_can_be_narrowed_to_a_state(
    safelight: Safelight, installation: Installation, queue: JobQueue
) -> None:
    a, b = ids_of(safelight("add", "a b", "c d"))
    end(installation, queue, a, "failed", "because")
    safelight("cancel", b)

    assert safelight("retry", "--all", "--state", "failed").stdout == f"{a} queued\n"
    assert queue.waiting_ids() == [a]


def test_pause_is_on_disk_and_in_the_queue_until_resume(
    safelight: Safelight, installation: Installation, queue: JobQueue
) -> None:
    assert safelight("pause", "a game").exit_code == 0
    written = json.loads(installation.paths.user_hold.read_text())
    assert (written["reason"], queue.user_hold()) == ("a game", "a game")

    assert safelight("resume").exit_code == 0
    assert not installation.paths.user_hold.exists()
    assert queue.user_hold() is None


def test_collect_copies_once_and_may_be_repeated(
    safelight: Safelight, installation: Installation, queue: JobQueue
) -> None:
    a, b = ids_of(safelight("add", "a b", "c d", "--batch", "foxes"))
    end(installation, queue, a)
    end(installation, queue, b, "failed", "because")
    target = installation.root / "mine"

    first = safelight("collect", "--all", "--to", str(target))
    again = safelight("collect", "--batch", "foxes", "--to", str(target))

    assert (first.exit_code, again.exit_code) == (0, 0)
    assert first.stdout == again.stdout
    (copy,) = first.stdout.splitlines()
    assert Path(copy).parent == target / "foxes"
    assert Path(copy).with_suffix(".json").is_file()
    assert safelight("collect", b, "--to", str(target)).exit_code == 1
    assert safelight("collect", "--date", "2026-11-21", "--to", str(target)).stdout == ""
    assert safelight("collect", "--date", "yesterday", "--to", str(target)).exit_code == 2


def test_collect_of_an_unknown_batch_is_a_usage_error(safelight: Safelight, installation: Installation) -> None:
    ids_of(safelight("add", "a b", "--batch", "foxes"))
    target = str(installation.root / "mine")

    unknown, waiting = (safelight("collect", "--batch", batch, "--to", target) for batch in ("foxxes", "foxes"))

    assert (unknown.exit_code, "no job is of this batch" in unknown.stderr) == (2, True)
    assert (waiting.exit_code, waiting.stderr) == (0, "Nothing is done that fits.\n")


def test_collect_says_where_what_was_moved_before_went(
    safelight: Safelight, installation: Installation, queue: JobQueue
) -> None:
    a, b = ids_of(safelight("add", "a b", "c d", "--batch", "foxes"))
    lay = installation.paths.outbox / end(installation, queue, a).outputs[0].path
    (copy,) = safelight("collect", a, "--to", str(installation.root / "mine"), "--move").stdout.splitlines()
    for words in (["list", "--json"], ["show", a, "--json"], ["wait", a]):
        said = safelight(*words).stdout
        assert (str(copy) in said, str(lay) in said) == (True, False)
    (installation.paths.outbox / end(installation, queue, b).outputs[0].path).unlink()

    again = safelight("collect", "--batch", "foxes", "--to", str(installation.root / "elsewhere"))

    assert again.exit_code == 0
    assert f"{lay} was collected before, to {copy} (job {a})." in again.stderr
    assert "1 collected before, 1 missing." in again.stderr
    assert safelight("collect", a, "--to", str(installation.root / "elsewhere")).exit_code == 1


def test_collect_is_not_stopped_by_one_damaged_receipt(
    safelight: Safelight, installation: Installation, queue: JobQueue
) -> None:
    a, b = ids_of(safelight("add", "a b", "c d"))
    end(installation, queue, a)
    end(installation, queue, b)
    (installation.paths.receipts / f"{a}.json").write_text("{")

    result = safelight("collect", "--all", "--to", str(installation.root / "mine"))

    assert result.exit_code == 1
    assert len(result.stdout.splitlines()) == 1
    assert f"{a}.json" in result.stderr


def test_rerun_submits_the_same_job_under_a_new_id(
    safelight: Safelight, installation: Installation, queue: JobQueue
) -> None:
    (job,) = ids_of(safelight("add", "a {red|blue} fox", "--seed", "7", "--steps", "2", "--batch", "foxes"))
    receipt = end(installation, queue, job)
    file = installation.paths.outbox / receipt.outputs[0].path

    same, *others = ids_of(safelight("rerun", str(file), "--seed", "+1", "-n", "2"))

    assert same != job
    old, new = receipt.spec, queue.spec(same)
    assert new is not None
    assert new == old.model_copy(update={"id": same, "seed": 8, "submitted_at": new.submitted_at})
    assert [spec.seed for spec in map(queue.spec, others) if spec] == [9]
    assert installation.ledger.spec(same) == new


@pytest.mark.parametrize(
    ("decoded", "word"), [({"vae_tiling": True}, "on"), ({"vae_strip_rows": 64}, "strips"), ({}, "off")]
)
def test_rerun_holds_the_planner_to_the_plan_of_the_file(
    decoded: dict[str, Any], word: str, safelight: Safelight, installation: Installation, queue: JobQueue
) -> None:
    (job,) = ids_of(safelight("add", "a red fox"))
    receipt = end(installation, queue, job)
    plan = Plan(
        model="tiny-flux-schnell", device="cuda", dtype="bfloat16", precision="bf16", offload="model",
        text_encoder_device="cpu", **{"vae_tiling": False, **decoded},
    )  # fmt: skip
    record = installation.root / "record.json"
    record.write_text(receipt.model_copy(update={"plan": plan}).model_dump_json())

    (planned,), (free,) = ids_of(safelight("rerun", str(record))), ids_of(safelight("rerun", str(record), "--replan"))

    held = queue.spec(planned)
    assert held is not None
    assert (held.precision, held.offload, held.vae_tiling, held.text_encoder_device) == ("bf16", "model", word, "cpu")
    assert (held.compile, held.text_encoder_precision) == ("off", "auto")
    spec = queue.spec(free)
    assert spec is not None
    assert (spec.precision, spec.vae_tiling, spec.compile) == ("auto", "auto", "auto")


def test_rerun_of_what_a_cpu_made_is_free_where_its_weights_lie(
    safelight: Safelight, installation: Installation, queue: JobQueue
) -> None:
    """Where a CPU has only one way, naming it would be refused: on a CPU as well as on a card."""
    (job,) = ids_of(safelight("add", "a red fox"))
    plan = Plan(
        model="tiny-flux-schnell", device="cpu", dtype="float32", precision="fp32", offload="partial",
        text_encoder_device="cpu", vae_tiling=False,
    )  # fmt: skip
    record = installation.root / "record.json"
    record.write_text(end(installation, queue, job).model_copy(update={"plan": plan}).model_dump_json())
    (again,) = ids_of(safelight("rerun", str(record)))

    spec = queue.spec(again)
    assert spec is not None
    assert (spec.precision, spec.offload, spec.compile, spec.vae_tiling) == ("auto", "auto", "auto", "off")


def test_rerun_with_a_strength_starts_from_the_picture_itself(
    safelight: Safelight, installation: Installation, queue: JobQueue
) -> None:
    (job,) = ids_of(safelight("add", "a red fox", "--seed", "7", "--steps", "8", "--size", "96x64"))
    receipt = end(installation, queue, job)
    file = installation.paths.outbox / receipt.outputs[0].path
    safelight("rerun", str(file), "--strength", "0.5", "--dry-run")
    left_by_dry_run = list(installation.paths.inputs.glob("*"))

    first, second = ids_of(safelight("rerun", str(file), "--strength", "0.5", "--seed", "+1", "-n", "2"))
    specs = [spec for spec in map(queue.spec, (first, second)) if spec]

    assert left_by_dry_run == []
    assert [(spec.image, spec.strength, spec.seed) for spec in specs] == [
        (receipt.outputs[0].sha256, 0.5, 8),
        (receipt.outputs[0].sha256, 0.5, 9),
    ]
    assert {(spec.prompt, spec.width, spec.height, spec.num_inference_steps) for spec in specs} == {
        ("a red fox", 96, 64, 8)
    }
    assert (installation.paths.inputs / receipt.outputs[0].sha256).read_bytes() == file.read_bytes()


@pytest.mark.parametrize(
    ("what", "strength", "says"),
    [
        ("picture", "2", "strength 2 is not above 0 and at most 1"),
        ("record", "0.5", "a variation starts from a picture, and this is none"),
        ("clip", "0.5", "a variation starts from a picture, and this is none"),
    ],
)
def test_rerun_with_a_strength_refuses_what_is_no_picture(
    safelight: Safelight, installation: Installation, queue: JobQueue, what: str, strength: str, says: str
) -> None:
    words = ["--model", "tiny-wan-ti2v", "--frames", "5"] if what == "clip" else []
    (job,) = ids_of(safelight("add", "a red fox", *words))
    receipt = end(installation, queue, job)
    file = installation.paths.outbox / receipt.outputs[0].path

    result = safelight("rerun", str(file.with_suffix(".json") if what == "record" else file), "--strength", strength)

    assert result.exit_code == 2
    assert says in result.stderr
    assert list(installation.paths.inputs.glob("*")) == [] or what == "picture"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model": "flux-that-was"}, "flux-that-was"),
        ({"batch": "../../.config/autostart"}, "cannot be a folder name"),
        (
            {"image": "../../../../../etc/passwd", "model": "tiny-wan-ti2v", "kind": "video", "output_format": "mp4"},
            "its image",
        ),
        ({"width": 100_000}, "width 100000"),
    ],
)
def test_rerun_checks_a_file_from_elsewhere_like_any_other(
    safelight: Safelight, installation: Installation, queue: JobQueue, changes: dict[str, Any], says: str
) -> None:
    """A picture from the internet may say anything about how it was made."""
    (job,) = ids_of(safelight("add", "a red fox"))
    receipt = end(installation, queue, job)
    spec = receipt.spec.model_copy(update=changes)
    file = installation.root / "found.json"
    file.write_text(receipt.model_copy(update={"spec": spec}).model_dump_json())

    result = safelight("rerun", str(file))

    assert result.exit_code == 2
    assert says in result.stderr
    assert queue.waiting_ids() == []
