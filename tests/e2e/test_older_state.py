"""The folders of an older version under this one: the night goes on where that one stopped.

tests/data/state_of_2026-11-22.tar.gz was left behind by the version of that day (`git show 1aa77ef`), stopped politely:
two jobs done, one cancelled, a person's pause, and three jobs that wait, one of them urgent and one from the inbox. It
lay in another folder, on a machine with another name.
"""

from __future__ import annotations

import hashlib
import tarfile
import time
from pathlib import Path

from tests.cli_steps import runner
from tests.conftest import Installation
from tests.e2e.test_chaos import Daemon, receipts

STATE = Path(__file__).parents[1] / "data" / "state_of_2026-11-22.tar.gz"


def pictures(outbox: Path) -> dict[str, str]:
    """Return the digest of every picture by its name; `latest` shows some of them a second time."""
    files = [file for file in outbox.rglob("*.png") if "latest" not in file.relative_to(outbox).parts]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_an_older_versions_night_goes_on_with_its_pause_and_nothing_is_rendered_twice(
    installation: Installation,
) -> None:
    with tarfile.open(STATE) as archive:
        archive.extractall(installation.root, filter="data")
    before = pictures(installation.paths.outbox)
    safelight = runner(installation)
    daemon = Daemon(installation)
    try:
        deadline = time.monotonic() + 120
        while "paused by safelight pause" not in safelight("status").stdout:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert len(installation.ledger.ended()) == 3

        safelight("resume")
        while len(installation.ledger.ended()) < 6:
            assert time.monotonic() < deadline, safelight("status").stdout
            time.sleep(0.1)
        listed = safelight("list").stdout
    finally:
        daemon.stop()

    ended = sorted(receipts(installation), key=lambda receipt: receipt.finished_at)
    after = pictures(installation.paths.outbox)

    assert [(receipt.spec.prompt, receipt.state) for receipt in ended[3:]] == [
        ("an urgent owl", "done"), ("a late heron", "done"), ("a dropped newt --seed 6", "done"),
    ]  # fmt: skip
    assert before.items() <= after.items()
    assert len(after) == len(before) + 3 == 5
    assert all(prompt in listed for prompt in ("a red fox", "a blue whale", "a cancelled crow", "an urgent owl"))
