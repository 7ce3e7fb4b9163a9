"""What the watch sees of the inbox's files, with real files, real opens and real events."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from safelight.drops import OPEN_S, Patience, Seen
from safelight.inbox import identity_of
from safelightd.closes import Closes
from safelightd.inbox_watch import Watch


@pytest.fixture
def inbox(tmp_path: Path) -> Path:
    (tmp_path / "inbox/summer").mkdir(parents=True)
    (tmp_path / "inbox/.claimed").mkdir()
    return tmp_path / "inbox"


@pytest.fixture
def closes(inbox: Path) -> Closes:
    """Of an inbox that is watched from now on, with a file in it from before."""
    (inbox / "early.txt").write_text("a fox")
    closes = Closes()
    assert Watch(inbox, lambda: None, closes).follow(["summer"])
    return closes


def until(condition: Callable[[], object]) -> None:
    ends_at = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < ends_at, "it did not happen in time"
        time.sleep(0.005)


def seen(closes: Closes, inbox: Path, path: str) -> Seen:
    return closes.glimpse(path).seen(identity_of((inbox / path).stat()))


@pytest.mark.parametrize("path", ["fox.txt", "summer/fox.txt", "summer/day/fox.txt"])
def test_a_file_is_open_until_it_is_closed(closes: Closes, inbox: Path, path: str) -> None:
    if path.count("/") == 2:
        (inbox / path).parent.mkdir()
        time.sleep(0.3)  # what comes at once with a new folder may go unseen
    with (inbox / path).open("w", buffering=1) as writer:
        writer.write("a fox\n")
        until(lambda: seen(closes, inbox, path) == "open")

    until(lambda: seen(closes, inbox, path) == "closed")


def test_a_change_after_the_close_takes_its_word_back(closes: Closes, inbox: Path) -> None:
    (inbox / "fox.txt").write_text("a fox")
    until(lambda: seen(closes, inbox, "fox.txt") == "closed")

    os.utime(inbox / "fox.txt", (1, 1))  # no open, no close

    assert seen(closes, inbox, "fox.txt") == "unseen"


def test_a_mode_that_changes_changes_nothing(closes: Closes, inbox: Path) -> None:
    (inbox / "fox.txt").write_text("a fox")
    until(lambda: seen(closes, inbox, "fox.txt") == "closed")

    (inbox / "fox.txt").chmod(0o600)

    assert seen(closes, inbox, "fox.txt") == "closed"


def test_a_reader_makes_an_unseen_file_neither_closed_nor_open_for_long(closes: Closes, inbox: Path) -> None:
    with (inbox / "early.txt").open():
        until(lambda: seen(closes, inbox, "early.txt") == "open")

    until(lambda: seen(closes, inbox, "early.txt") == "unseen")


def test_readers_do_not_close_what_a_writer_has_open(closes: Closes, inbox: Path) -> None:
    with (inbox / "fox.txt").open("w", buffering=1) as writer:
        writer.write("a fox\n")
        for _ in range(20):
            (inbox / "fox.txt").read_text()
        (inbox / "last.txt").write_text("an event behind all of those")
        until(lambda: seen(closes, inbox, "last.txt") == "closed")

        assert seen(closes, inbox, "fox.txt") == "open"


def test_a_rename_into_place_is_as_good_as_a_close(closes: Closes, inbox: Path) -> None:
    (inbox.parent / "fox.txt").write_text("a fox")
    (inbox.parent / "fox.txt").rename(inbox / "fox.txt")
    (inbox / ".owl.part").write_text("an owl")
    (inbox / ".owl.part").rename(inbox / "owl.txt")

    until(lambda: [seen(closes, inbox, name) for name in ("fox.txt", "owl.txt")] == ["closed", "closed"])


def test_a_rename_makes_nothing_whole_that_was_open_or_unseen(closes: Closes, inbox: Path) -> None:
    """The file's own rename, or that of a folder around it."""
    (inbox / "summer/day").mkdir()
    time.sleep(0.3)  # what comes at once with a new folder may go unseen
    (inbox / "summer/day/whole.txt").write_text("a hare")
    with (inbox / "fox.txt").open("w", buffering=1) as one, (inbox / "summer/day/owl.txt").open("w") as other:
        one.write("a fox\n")
        until(lambda: closes.glimpse("fox.txt").is_open and closes.glimpse("summer/day/owl.txt").is_open)
        until(lambda: seen(closes, inbox, "summer/day/whole.txt") == "closed")
        (inbox / "fox.txt").rename(inbox / "hare.txt")
        (inbox / "summer/day").rename(inbox / "summer/night")
        (inbox / "early.txt").rename(inbox / "late.txt")
        until(lambda: seen(closes, inbox, "summer/night/whole.txt") == "closed")

        until(lambda: seen(closes, inbox, "hare.txt") == "open")
        assert seen(closes, inbox, "summer/night/owl.txt") == "open"
        assert seen(closes, inbox, "late.txt") == "unseen"
        other.write("an owl")

    until(lambda: [seen(closes, inbox, path) for path in ("hare.txt", "summer/night/owl.txt")] == ["closed", "closed"])


def test_what_is_hard_linked_into_the_inbox_was_not_seen(closes: Closes, inbox: Path) -> None:
    """Its writer may go on under its other name, and no event tells."""
    (inbox.parent / "fox.txt").write_text("a fox")
    (inbox / "fox.txt").hardlink_to(inbox.parent / "fox.txt")
    (inbox / "last.txt").write_text("an event behind that one")
    until(lambda: seen(closes, inbox, "last.txt") == "closed")

    assert seen(closes, inbox, "fox.txt") == "unseen"


def test_nothing_is_remembered_of_files_that_have_gone(closes: Closes, inbox: Path) -> None:
    for number in range(100):
        (inbox / f"{number}.txt").write_text("a fox")
    until(lambda: len(closes) == 100)
    for number in range(100):
        if number % 2:
            (inbox / f"{number}.txt").unlink()
        else:
            (inbox / f"{number}.txt").rename(inbox / f".claimed/{number}.txt")

    until(lambda: len(closes) == 0)


def test_nothing_is_remembered_of_folders_that_are_watched_no_more(inbox: Path) -> None:
    closes = Closes()
    watch = Watch(inbox, lambda: None, closes)
    watch.follow(["summer"])
    for path in ("summer/fox.txt", "owl.txt"):
        (inbox / path).write_text("a fox")
    until(lambda: [seen(closes, inbox, path) for path in ("summer/fox.txt", "owl.txt")] == ["closed", "closed"])

    watch.follow([])

    assert len(closes) == 1
    assert seen(closes, inbox, "owl.txt") == "closed"


def test_what_is_not_known_to_be_closed_must_be_still_for_longer() -> None:
    patience = Patience(settle_s=1.0, partner_s=60.0, unseen_s=30.0)

    assert [patience.still_s(one) for one in ("closed", "unseen", "open")] == [1.0, 30.0, OPEN_S]
    assert Patience(settle_s=900.0, partner_s=60.0).still_s("open") == 900.0
