"""The inbox's protocol over folders: reading, claiming, filing."""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safelight import drops, ids, inbox, promptfile
from safelight.drops import Entry
from safelight.errors import BadConfig, Fault, InvalidJob, SafelightError
from safelight.inbox import Claim, Identity, Reading
from safelight.paths import Paths

SUBMISSION = "20261122-213000-123abcd"


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    made = Paths(*(tmp_path / name for name in ("inbox", "outbox", "state", "models", "run")))
    inbox.prepare(made)
    return made


def drop(paths: Paths, path: str, content: str | bytes = "a fox") -> Entry:
    """Put a file into the inbox and return how a scan sees it."""
    file = paths.inbox / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return seen(paths, path)


def seen(paths: Paths, path: str) -> Entry:
    return drops.scan(paths.inbox, None, lambda: 0.0).entries[path]


def read(paths: Paths, entry: Entry) -> Reading | None:
    """Read one's own file, of which the kernel tells who writes it."""
    return inbox.read(paths.inbox, entry, _unasked)


def _unasked(identity: Identity) -> bool:
    raise AssertionError("the kernel knows")


# -- the folders


def test_prepare_makes_the_folders_and_leaves_nothing_behind(paths: Paths) -> None:
    inbox.prepare(paths)

    assert sorted(os.listdir(paths.inbox)) == [".safelight", "accepted", "rejected"]
    assert [*paths.claimed.iterdir(), *paths.accepted.iterdir(), *paths.rejected.iterdir()] == []


@pytest.mark.skipif(not os.path.ismount("/dev/shm"), reason="needs a second file system")
def test_prepare_refuses_an_inbox_whose_folders_lie_on_another_file_system(tmp_path: Path) -> None:
    paths = Paths(*(tmp_path / name for name in ("inbox", "outbox", "state", "models", "run")))
    elsewhere = Path("/dev/shm") / f"safelight-{os.getpid()}"
    elsewhere.mkdir()
    paths.inbox.mkdir()
    (paths.inbox / "accepted").symlink_to(elsewhere)
    try:
        with pytest.raises(BadConfig, match="one file system"):
            inbox.prepare(paths)
    finally:
        for left in elsewhere.iterdir():
            left.unlink()
        elsewhere.rmdir()


def test_prepare_refuses_a_file_where_a_folder_belongs(tmp_path: Path) -> None:
    paths = Paths(*(tmp_path / name for name in ("inbox", "outbox", "state", "models", "run")))
    paths.inbox.mkdir()
    (paths.inbox / "rejected").write_text("")

    with pytest.raises(BadConfig, match="rejected"):
        inbox.prepare(paths)


# -- reading


def test_read_returns_what_a_settled_file_holds(paths: Paths) -> None:
    reading = read(paths, drop(paths, "summer/cat.txt", "a fox"))

    assert reading is not None
    assert reading.content == b"a fox"


def test_read_waits_for_a_writer_who_has_it_open(paths: Paths) -> None:
    """Also one that has not written for long: a slow program, a stalled copy."""
    drop(paths, "cat.txt")
    with (paths.inbox / "cat.txt").open("a"):
        assert read(paths, seen(paths, "cat.txt")) is None

    assert read(paths, seen(paths, "cat.txt")) is not None


def test_writer_who_comes_while_we_look_harms_nobody(paths: Paths) -> None:
    """The kernel breaks our lease with a signal that must not end the process, and the writer must get through."""
    drop(paths, "cat.txt")
    script = "import sys\nfor _ in range(400): open(sys.argv[1], 'a').close()"
    with subprocess.Popen([sys.executable, "-c", script, str(paths.inbox / "cat.txt")]) as writer:
        while writer.poll() is None:
            read(paths, seen(paths, "cat.txt"))

    assert writer.returncode == 0


def test_read_asks_for_stillness_where_the_kernels_word_is_no_proof(paths: Paths) -> None:
    """On a network file system: others may write there, and it refuses leases also where nobody does."""
    entry = drop(paths, "cat.txt")
    asked: list[Identity] = []

    assert inbox.read(paths.inbox, entry, lambda identity: bool(asked.append(identity)), leases=False) is None
    reading = inbox.read(paths.inbox, entry, lambda _: True, leases=False)
    assert reading is not None
    assert asked == [reading.identity]
    assert inbox.is_whole(paths.inbox, entry, lambda _: True, leases=False)
    assert not inbox.is_whole(paths.inbox, entry, lambda _: False, leases=False)


def test_read_refuses_what_has_changed_since_the_scan(paths: Paths) -> None:
    entry = drop(paths, "cat.txt", "a fox")
    (paths.inbox / "cat.txt").write_text("a fox in the snow")
    assert read(paths, entry) is None

    (paths.inbox / "cat.txt").unlink()
    assert read(paths, entry) is None


def test_read_neither_blocks_nor_follows_what_took_the_place_of_a_file(paths: Paths, tmp_path: Path) -> None:
    entry = drop(paths, "cat.txt")
    (paths.inbox / "cat.txt").unlink()
    os.mkfifo(paths.inbox / "cat.txt")
    assert read(paths, entry) is None

    secret = tmp_path / "secret.txt"
    secret.write_text("not yours")
    (paths.inbox / "cat.txt").unlink()
    (paths.inbox / "cat.txt").symlink_to(secret)
    with pytest.raises(OSError, match="symbolic links"):
        read(paths, entry)


def test_read_and_claim_do_not_walk_through_a_folder_that_became_a_link(paths: Paths, tmp_path: Path) -> None:
    entry = drop(paths, "summer/cat.txt")
    (paths.inbox / "summer").rename(tmp_path / "elsewhere")
    (paths.inbox / "summer").symlink_to(tmp_path / "elsewhere")

    with pytest.raises(NotADirectoryError):
        read(paths, entry)
    with pytest.raises(NotADirectoryError):
        inbox.claim(paths, entry, SUBMISSION)
    assert (tmp_path / "elsewhere/cat.txt").exists()


def test_read_holds_no_more_than_a_prompt_file_may_have(paths: Paths) -> None:
    with (paths.inbox / "huge.txt").open("wb") as huge:
        huge.truncate(1 << 40)

    reading = read(paths, seen(paths, "huge.txt"))

    assert reading is not None
    assert len(reading.content) == promptfile.TABLE_BYTES_MAX + 1


# -- claiming


@given(
    path=st.lists(
        st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=20).filter(
            lambda name: name not in (".", "..")
        ),
        min_size=1,
        max_size=3,
    ).map("/".join),
    pictures=st.sampled_from([(), (".png",), (".PNG", ".jpg")]),
)
def test_claim_is_told_by_its_name(path: str, pictures: tuple[str, ...]) -> None:
    taken = Claim(SUBMISSION, path, pictures)

    assert "/" not in taken.name
    assert len(os.fsencode(taken.name)) <= 255
    if len(os.fsencode(taken.name)) < 200:
        assert Claim.of(taken.name) == taken


def test_claim_of_a_long_name_keeps_its_folder_and_suffix() -> None:
    told = Claim.of(Claim(SUBMISSION, f"night/summer/{'狐' * 80}.yaml").name)

    assert told is not None
    assert told.path.startswith("night/summer/狐狐")
    assert told.path.endswith("狐.yaml")


@pytest.mark.parametrize("name", ["cat.txt", "x~cat.txt", f"{SUBMISSION}~", f"{SUBMISSION}cat.txt", "~", ""])
def test_foreign_file_is_no_claim(name: str) -> None:
    assert Claim.of(name) is None


def test_claim_knows_the_moment_of_its_submission() -> None:
    now = datetime.now(UTC)

    assert abs((Claim(ids.submission_id(now), "x").claimed_at - now).total_seconds()) < 60
    assert Claim(SUBMISSION, "x").claimed_at == datetime(2026, 11, 22, 21, 30, 0, 123000, tzinfo=UTC)


def test_claim_moves_the_file_and_only_one_can_have_it(paths: Paths) -> None:
    entry = drop(paths, "night/summer/cat.txt", "a fox")

    taken = inbox.claim(paths, entry, SUBMISSION)
    inbox.sync_claims(paths, [taken])

    assert not (paths.inbox / "night/summer/cat.txt").exists()
    assert (paths.claimed / taken.name).read_text() == "a fox"
    with pytest.raises(FileNotFoundError):
        inbox.claim(paths, entry, "20261122-213000-124abcd")


def test_claim_moves_a_link_and_not_what_it_leads_to(paths: Paths, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("a fox")
    (paths.inbox / "link.txt").symlink_to(tmp_path / "mine.txt")

    taken = inbox.claim(paths, seen(paths, "link.txt"), SUBMISSION)

    assert (paths.claimed / taken.name).is_symlink()
    assert (tmp_path / "mine.txt").read_text() == "a fox"


def test_claims_are_synced_though_their_folder_has_gone(paths: Paths) -> None:
    taken = inbox.claim(paths, drop(paths, "summer/cat.txt"), SUBMISSION)
    (paths.inbox / "summer").rmdir()

    inbox.sync_claims(paths, [taken])

    assert (paths.claimed / taken.name).exists()


def test_late_writer_is_noticed_after_the_claim(paths: Paths) -> None:
    """It opened the file just before the rename: what was read is not what is there."""
    entry = drop(paths, "cat.txt", "a fox")
    reading = read(paths, entry)
    assert reading is not None
    with (paths.inbox / "cat.txt").open("a") as late:
        taken = inbox.claim(paths, entry, SUBMISSION)
        assert inbox.is_unchanged(paths, taken, reading)
        late.write(" in the snow")

    assert not inbox.is_unchanged(paths, taken, reading)


# -- filing


@pytest.mark.parametrize(
    ("path", "kind", "size", "problem"),
    [
        ("cat.txt", "odd", 5, "a link, FIFO, socket or device"),
        ("cat.pdf", "other", 5, r"\.pdf is no prompt file"),
        ("README", "other", 5, "a name without a suffix is no prompt file"),
        ("cat.png", "picture", 5, "no text came"),
        ("cat.txt", "text", 0, "empty"),
        ("ca\nt.txt", "text", 5, "cannot be printed"),
        ("ca\udcfft.txt", "text", 5, "not UTF-8"),
        ("-cat.txt", "text", 5, "cannot be called '-cat'"),
        (f"{'x' * 130}.txt", "text", 5, "cannot be called"),
        (" summer/cat.txt", "text", 5, "cannot be called ' summer'"),
    ],
)
def test_fault_names_the_file_and_the_remedy(path: str, kind: drops.Kind, size: int, problem: str) -> None:
    fault = inbox.fault_of(path, kind, size)

    assert fault is not None
    assert fault.where.isprintable()
    assert fault.remedy
    with pytest.raises(InvalidJob, match=problem):
        raise InvalidJob([fault])


def test_prompt_file_has_no_fault_of_its_own() -> None:
    assert inbox.fault_of(f"high/summer/{'x' * 200}.txt", "text", 5) is None


def test_rejected_file_lies_beside_every_fault(paths: Paths) -> None:
    taken = inbox.claim(paths, drop(paths, "summer/cat.txt", "a fox"), SUBMISSION)
    faults = [Fault("summer/cat.txt:1", "width 30 is not a multiple of 16", "Use 32."), Fault("x", "y", "z.")]

    inbox.file_away([inbox.rejection(paths, taken, faults)])

    assert list(paths.claimed.iterdir()) == []
    assert (paths.rejected / f"{SUBMISSION}~cat.txt").read_text() == "a fox"
    said = (paths.rejected / f"{SUBMISSION}~cat.txt.error.txt").read_text()
    assert said.startswith("summer/cat.txt was not queued.")
    assert all(str(fault) in said for fault in faults)


def test_rejected_link_and_file_without_a_utf_8_name_are_explained_too(paths: Paths) -> None:
    odd = os.fsdecode(b"ca\xfft.txt")
    for name in ("sock.txt", odd):
        if name == odd:
            drop(paths, name)
        else:
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(str(paths.inbox / name))
        entry = seen(paths, name)
        fault = inbox.fault_of(name, entry.kind, entry.size)
        assert fault
        taken = inbox.claim(paths, entry, SUBMISSION)
        inbox.file_away([inbox.rejection(paths, taken, [fault])])

    assert len(list(paths.rejected.iterdir())) == 4
    assert all(note.read_text() for note in paths.rejected.glob("*.error.txt"))


def test_long_names_fit_with_their_notes(paths: Paths) -> None:
    entry = drop(paths, f"{'x' * 251}.txt")
    taken = inbox.claim(paths, entry, SUBMISSION)

    inbox.file_away([inbox.rejection(paths, taken, [Fault("x", "y", "z")])])

    assert len(list(paths.rejected.glob("*.txt"))) == 2


def test_filing_can_be_done_again(paths: Paths) -> None:
    """A crash after the note and before the rename."""
    taken = inbox.claim(paths, drop(paths, "cat.txt"), SUBMISSION)
    filing = inbox.rejection(paths, taken, [Fault("x", "y", "z")])
    filing.note.write_bytes(b"half a no")

    inbox.file_away([filing])

    assert filing.note.read_bytes() == filing.text
    assert filing.target.exists()


def test_pictures_of_one_name_used_by_one_text_are_all_kept(paths: Paths) -> None:
    for folder in ("a", "b"):
        inbox.file_picture(paths, drop(paths, f"{folder}/ref.png", folder), SUBMISSION)

    kept = sorted(paths.accepted.rglob("*ref.png"))
    assert sorted(file.read_text() for file in kept) == ["a", "b"]


def test_prepare_clears_away_notes_that_a_crash_cut_short(paths: Paths) -> None:
    day = paths.accepted / "2026-11-22"
    day.mkdir()
    for folder in (paths.rejected, day):
        (folder / f".{SUBMISSION}~cat.txt.ticket.json.4711.part").write_text("{")
        (folder / f"{SUBMISSION}~cat.txt").write_text("a fox")

    inbox.prepare(paths)

    assert [os.listdir(folder) for folder in (paths.rejected, day)] == [[f"{SUBMISSION}~cat.txt"]] * 2


def test_ticket_names_the_jobs(paths: Paths) -> None:
    from safelight import config, expand, models

    taken = inbox.claim(paths, drop(paths, "cat.txt"), SUBMISSION)
    env = {"XDG_CONFIG_HOME": str(paths.state), "HOME": str(paths.state)}
    specs = expand.expand(
        promptfile.parse(b"a\nb\n", "cat.txt"), models.load(), config.load(env), submission=SUBMISSION,
        now=taken.claimed_at, batch="cat", store_image=str, wildcards=paths.wildcards, max_jobs=10,
    )  # fmt: skip
    now = datetime(2026, 11, 22, 22, 0, tzinfo=UTC)

    inbox.file_away([inbox.acceptance(paths, taken, specs, "0" * 64, now)])

    day = f"{taken.claimed_at:%Y-%m-%d}"
    ticket = json.loads((paths.accepted / day / f"{SUBMISSION}~cat.txt.ticket.json").read_text())
    assert ticket == {
        "v": 1, "submission": SUBMISSION, "file": "cat.txt", "sha256": "0" * 64, "batch": "cat",
        "jobs": [f"{SUBMISSION}-00001", f"{SUBMISSION}-00002"], "enqueued_at": "2026-11-22T22:00:00+00:00",
    }  # fmt: skip


def test_a_full_disk_at_start_is_no_reason_never_to_start_again(paths: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings that are wrong end the service for good; a disk has room again in the morning."""

    def full(self: Path, *_arguments: object, **_named: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))

    monkeypatch.setattr(Path, "touch", full)
    with pytest.raises(SafelightError) as refused:
        inbox.prepare(paths)

    assert not isinstance(refused.value, BadConfig)
    assert "No space left" in str(refused.value)
