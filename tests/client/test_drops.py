"""What lies in the inbox, and from when each file may be taken. Time is an argument here."""

from __future__ import annotations

import math
import os
import tracemalloc
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safelight import drops
from safelight.drops import EMPTY_S, LEFTOVER_S, Patience, Scan

PATIENCE = Patience(settle_s=1.0, partner_s=60.0)


@dataclass
class Folder:
    """An inbox and a clock that stands still until it is moved."""

    top: Path
    now: float = 1000.0
    last: Scan | None = None

    def drop(self, *paths: str, content: str = "a fox") -> None:
        for path in paths:
            (self.top / path).parent.mkdir(parents=True, exist_ok=True)
            (self.top / path).write_text(content)

    def scan(self) -> Scan:
        self.last = drops.scan(self.top, self.last, lambda: self.now)
        return self.last

    def due_in(
        self, used: dict[str, int] | None = None, stuck: set[str] | None = None, claimed: tuple[str, ...] = ()
    ) -> dict[str, float]:
        """Scan, and return in how many seconds each file may be taken."""
        due = drops.due(self.scan(), PATIENCE, used or {}, stuck or set(), claimed)
        return {entry.path: at - self.now for at, entry in due}


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


@pytest.mark.parametrize(
    ("path", "priority", "batch", "area"),
    [
        ("cat.md", None, "cat", ""),
        ("night/cat.md", "night", "cat", "night"),
        ("summer/cat.md", None, "summer", "summer"),
        ("summer/day1/cat.md", None, "summer", "summer"),
        ("high/summer/cat.md", "high", "summer", "high/summer"),
        ("high/summer/day1/cat.md", "high", "summer", "high/summer"),
        ("high.md", None, "high", ""),
        ("High/cat.md", None, "High", "High"),
    ],
)
def test_folders_say_priority_and_batch(path: str, priority: str | None, batch: str, area: str) -> None:
    place = drops.place_of(path)

    assert (place.priority, place.batch, place.area) == (priority, batch, area)


def test_order_is_priority_then_as_people_count() -> None:
    expected = [
        "high/z.txt",
        "1.txt",
        "2.txt",
        "normal/3.txt",
        "10.txt",
        "cat 2.txt",
        "Cat 10.txt",
        "summer/02.txt",
        "summer/10.txt",
        "summer.txt",
        "low/a.txt",
        "night/a.txt",
    ]

    mixed = expected[::-1]

    assert sorted(mixed, key=drops.order) == expected


@given(st.lists(st.text(min_size=1), max_size=20))
def test_order_is_total_for_any_names(names: list[str]) -> None:
    once = sorted(names, key=drops.order)

    mixed = names[::-1]

    assert sorted(mixed, key=drops.order) == once


@pytest.mark.parametrize(
    "name",
    [
        ".hidden.txt", "cat.txt~", "#cat.txt#", ".cat.txt.swp", "4913", "cat.tmp", "cat.txt.part", "cat.crdownload",
        "cat.png.filepart", ".goutputstream-X1Y2Z3", ".syncthing.cat.txt.tmp", "._cat.txt", ".DS_Store", "Thumbs.db",
        "desktop.ini", "cat.sync-conflict-20261122-101010-ABCDEFG.txt", "odd\n.tmp",
    ],
)  # fmt: skip
def test_scan_ignores_what_programs_leave_lying_about(folder: Folder, name: str) -> None:
    folder.drop(name, "cat.txt")

    assert list(folder.scan().entries) == ["cat.txt"]


@pytest.mark.parametrize("name", ["@eaDir", "__MACOSX", ".stfolder", "accepted", "rejected"])
def test_scan_enters_no_folder_that_is_not_the_persons(folder: Folder, name: str) -> None:
    folder.drop(f"{name}/cat.txt", f"summer/{'@eaDir' if name == '@eaDir' else 'x'}/cat.txt")

    assert not any(path.startswith(name) for path in folder.scan().entries)


def test_scan_tells_kinds_apart_without_following_or_opening_anything(folder: Folder) -> None:
    folder.drop("cat.txt", "cat.PNG", "cat.pdf", "no suffix")
    os.mkfifo(folder.top / "fifo.txt")
    (folder.top / "link.txt").symlink_to(folder.top / "cat.txt")
    (folder.top / "loop").symlink_to(folder.top, target_is_directory=True)

    kinds = {path: entry.kind for path, entry in folder.scan().entries.items()}
    assert kinds == {
        "cat.txt": "text", "cat.PNG": "picture", "cat.pdf": "other", "no suffix": "other",
        "fifo.txt": "odd", "link.txt": "odd", "loop": "odd",
    }  # fmt: skip


def test_scan_goes_on_past_a_folder_that_is_too_deep(folder: Folder) -> None:
    deep = "/".join("abcdefghij")
    folder.drop(f"{deep}/cat.txt", "a/dog.txt")

    scan = folder.scan()

    assert list(scan.entries) == ["a/dog.txt"]
    assert [path for path, _ in scan.troubles] == ["a/b/c/d/e/f/g/h/i"]


def test_scan_of_a_missing_inbox_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        drops.scan(tmp_path / "gone", None, lambda: 0.0)


def test_file_is_due_when_it_has_not_changed_for_settle(folder: Folder) -> None:
    folder.drop("cat.txt")
    assert folder.due_in() == {"cat.txt": 1.0}

    folder.now += 0.9
    assert folder.due_in()["cat.txt"] == pytest.approx(0.1)

    folder.drop("cat.txt", content="a fox in the snow")
    assert folder.due_in() == {"cat.txt": 1.0}


def test_file_replaced_by_one_of_the_same_size_and_time_starts_anew(folder: Folder) -> None:
    """mv keeps size and mtime; inode and ctime tell."""
    folder.drop("cat.txt", "other/cat.txt")
    os.utime(folder.top / "cat.txt", ns=(1, 1))
    os.utime(folder.top / "other/cat.txt", ns=(1, 1))
    folder.scan()
    folder.now += 5

    (folder.top / "other/cat.txt").rename(folder.top / "cat.txt")

    assert folder.due_in()["cat.txt"] == 1.0


def test_inbox_made_again_under_its_name_remembers_nothing(folder: Folder) -> None:
    folder.drop("cat.txt")
    folder.scan()
    folder.now += 5
    folder.top.rename(folder.top.with_name("old"))
    folder.top.mkdir()
    os.link(folder.top.with_name("old") / "cat.txt", folder.top / "cat.txt")

    assert folder.due_in() == {"cat.txt": 1.0}


def test_empty_file_waits_a_minute_because_downloads_start_so(folder: Folder) -> None:
    folder.drop("cat.txt", content="")

    assert folder.due_in() == {"cat.txt": EMPTY_S}


@pytest.mark.parametrize("partial", ["cat.txt.part", "cat.txt.crdownload", ".cat.txt.Ab12Cd", ".syncthing.cat.txt.tmp"])
def test_file_waits_for_its_own_download(folder: Folder, partial: str) -> None:
    folder.drop("cat.txt", partial)

    assert folder.due_in() == {"cat.txt": LEFTOVER_S}


@pytest.mark.parametrize("partial", ["cat.txt.part", ".cat.txt.backup", ".syncthing.cat.txt.tmp", "cat.png.part"])
def test_partial_file_that_has_not_changed_for_long_holds_nothing(folder: Folder, partial: str) -> None:
    folder.drop(partial)
    folder.scan()
    folder.now += LEFTOVER_S - 1
    folder.drop("cat.txt")
    assert folder.due_in() == {"cat.txt": 1.0}

    folder.now += 1
    assert folder.due_in() == {"cat.txt": 0.0}

    folder.now += 1
    folder.drop(partial, content="it goes on after all")
    assert folder.due_in() == {"cat.txt": LEFTOVER_S}


def test_partial_file_that_grows_holds_as_long_as_it_does(folder: Folder) -> None:
    folder.drop("cat.txt")
    for size in range(30):
        folder.drop("cat.txt.part", content="x" * size)

        assert folder.due_in() == {"cat.txt": LEFTOVER_S}
        folder.now += LEFTOVER_S / 2


def test_partial_file_that_was_left_behind_is_said_once(folder: Folder) -> None:
    folder.drop("summer/cat.png.part")
    troubles = []
    for _ in range(30):
        troubles += folder.scan().troubles
        folder.now += LEFTOVER_S / 10

    ((path, problem),) = troubles
    assert path == "summer/cat.png.part"
    assert problem.startswith("it is a part of summer/cat.png and has not changed for 10 minutes: ")


def test_text_waits_for_a_picture_of_its_name_that_arrives(folder: Folder) -> None:
    folder.drop("cat.txt")
    folder.scan()
    folder.now += 0.9
    folder.drop("cat.png")

    assert folder.due_in()["cat.txt"] == 1.0


@pytest.mark.parametrize("partial", ["cat.png.part", "cat.webp.crdownload", ".cat.jpg.x1Y2z3"])
def test_text_waits_for_a_picture_of_its_name_that_is_partly_there(folder: Folder, partial: str) -> None:
    folder.drop("cat.txt", "dog.txt", partial)

    assert folder.due_in() == {"cat.txt": LEFTOVER_S, "dog.txt": 1.0}


def test_text_waits_for_an_empty_picture_of_its_name(folder: Folder) -> None:
    folder.drop("cat.txt")
    folder.drop("cat.png", content="")

    assert folder.due_in()["cat.txt"] == EMPTY_S


def test_lone_picture_is_due_after_the_time_for_partners(folder: Folder) -> None:
    folder.drop("cat.png")

    assert folder.due_in() == {"cat.png": 60.0}


@pytest.mark.parametrize("text", ["dog.txt", "summer/dog.txt", "high/summer/dog.txt", "high/dog.txt"])
def test_picture_waits_while_a_text_that_may_name_it_is_on_its_way(folder: Folder, text: str) -> None:
    picture = text.replace("dog.txt", "cat.png")
    folder.drop(text, picture)

    assert folder.due_in()[picture] == math.inf
    assert folder.due_in(stuck={text})[picture] == 60.0


@pytest.mark.parametrize("was_used", [True, False])
def test_picture_waits_for_a_claimed_text_that_may_name_it(folder: Folder, was_used: bool) -> None:
    folder.drop("summer/cat.png")
    used = {"summer/cat.png": folder.scan().entries["summer/cat.png"].mark} if was_used else {}

    assert folder.due_in(used, claimed=("dog.txt",))["summer/cat.png"] == math.inf
    assert folder.due_in(used, claimed=("summer/cat.txt",))["summer/cat.png"] == math.inf
    assert folder.due_in(used, claimed=("winter/cat.txt",))["summer/cat.png"] < math.inf


@pytest.mark.parametrize("was_used", [True, False])
def test_picture_waits_for_a_text_that_is_partly_there_as_long_as_for_partners(folder: Folder, was_used: bool) -> None:
    """Any text of its area may name it; but that of its own name is more likely to be on its way."""
    folder.drop("cat.png", "dog.png", "summer/cat.png", "dog.txt.part")
    used = {path: entry.mark for path, entry in folder.scan().entries.items()} if was_used else {}
    folder.now += 30
    folder.drop("dog.txt.part", content="a fox in the")

    assert folder.due_in(used) == {"cat.png": 60.0, "dog.png": LEFTOVER_S, "summer/cat.png": 60.0}

    folder.now += LEFTOVER_S
    assert max(folder.due_in(used).values()) <= 0


def test_picture_waits_for_a_text_around_its_folder_but_not_for_one_elsewhere(folder: Folder) -> None:
    folder.drop("winter/dog.txt", "summer/refs/cat.png")
    assert folder.due_in()["summer/refs/cat.png"] == 60.0

    folder.drop("summer/fox.txt")
    assert folder.due_in()["summer/refs/cat.png"] == math.inf


def test_used_picture_goes_at_once_when_no_text_needs_it_any_more(folder: Folder) -> None:
    folder.drop("cat.png")
    used = {"cat.png": folder.scan().entries["cat.png"].mark}

    assert folder.due_in(used) == {"cat.png": 1.0}

    folder.drop("cat.png", content="another picture under the same name")
    assert folder.due_in(used) == {"cat.png": 60.0}


def test_batch_is_taken_when_everything_in_it_has_settled(folder: Folder) -> None:
    folder.drop("summer/10.txt")
    folder.scan()
    folder.now += 0.9
    folder.drop("summer/2.txt", "winter/1.txt")

    assert folder.due_in() == pytest.approx({"summer/10.txt": 1.0, "summer/2.txt": 1.0, "winter/1.txt": 1.0})


def test_batch_into_which_somebody_writes_for_ever_is_taken_file_by_file(folder: Folder) -> None:
    folder.drop("summer/cat.txt")
    for _ in range(200):
        folder.drop("summer/growing.log", content="x" * int(folder.now))
        due = folder.due_in()["summer/cat.txt"]
        if due <= 0:
            break
        folder.now += 0.5

    assert folder.now == pytest.approx(1000 + PATIENCE.partner_s)


def test_scan_holds_few_bytes_a_file(folder: Folder) -> None:
    """100,000 files must fit into a process of 200 MiB twice over: the last scan and this one."""
    for number in range(500):
        (folder.top / f"{number:06}.txt").touch()
    tracemalloc.start()
    scan = folder.scan()
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert len(scan.entries) == 500
    assert held < 500 * 600
