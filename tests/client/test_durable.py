"""Files are whole or absent, whatever happens while they are written."""

from __future__ import annotations

import errno
import os
import random
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from safelight import durable


def test_a_file_is_written_with_its_folders_and_replaced_whole(tmp_path: Path) -> None:
    file = tmp_path / "a" / "b" / "file"
    durable.write(file, b"one")
    durable.write(file, b"two")

    assert file.read_bytes() == b"two"
    assert [file] == list(file.parent.iterdir())


def test_a_file_that_is_written_in_pieces_is_whole_or_the_old_one(tmp_path: Path) -> None:
    file = tmp_path / "new" / "file"

    def interrupted() -> None:
        with durable.writing(file) as stream:
            stream.write(b"three")
            raise KeyboardInterrupt

    with durable.writing(file) as stream:
        stream.write(b"one, ")
        stream.write(b"two")
        assert not file.exists()
    with pytest.raises(KeyboardInterrupt):
        interrupted()

    assert file.read_bytes() == b"one, two"
    assert [file] == list(file.parent.iterdir())


@pytest.mark.parametrize("count", [0, 1, durable.SYNC_ONE_BY_ONE_MAX, durable.SYNC_ONE_BY_ONE_MAX + 1, 300])
def test_many_files_are_all_there(tmp_path: Path, count: int) -> None:
    durable.write_all((tmp_path / f"{i:03d}", str(i).encode()) for i in range(count))

    assert {f"{i:03d}": str(i) for i in range(count)} == {file.name: file.read_text() for file in tmp_path.iterdir()}


def test_a_group_that_cannot_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "in the way").write_text("a file, not a folder")
    with pytest.raises(NotADirectoryError):
        durable.write_all([(tmp_path / "first", b"1"), (tmp_path / "in the way" / "second", b"2")])

    assert os.listdir(tmp_path) == ["in the way"]


def test_new_files_whose_folder_cannot_be_synced_are_taken_back_and_what_was_there_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The names would be there until a power cut: whoever was told that it failed would find them."""
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(descriptor)

    before, new = tmp_path / "before", tmp_path / "new"
    before.write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="Input/output"):
        durable.create_all([(before, b"1"), (new, b"2")])

    assert before.read_bytes() == b"1"
    assert os.listdir(tmp_path) == ["before"]


def test_a_full_disk_leaves_the_old_file_and_no_leftover(tmp_path: Path) -> None:
    """RLIMIT_FSIZE makes the write fail in the middle, as a full disk does."""
    file = tmp_path / "file"
    file.write_bytes(b"old")
    program = (
        "import resource, sys; from pathlib import Path; from safelight import durable\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "durable.write(Path(sys.argv[1]), b'x' * 2000)\n"
    )
    done = _python(program, str(file))

    assert done.returncode != 0
    assert "File too large" in done.stderr
    assert file.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_full_disk_leaves_no_leftover_in_a_folder_that_is_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_bytes = Path.write_bytes

    def fills(file: Path, content: bytes) -> int:
        write_bytes(file, content[:1])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fills)
    with pytest.raises(OSError, match="No space"):
        durable.write(tmp_path / "new" / "file", b"content")

    assert list((tmp_path / "new").iterdir()) == []


def test_a_reader_never_sees_half_a_file_while_its_writer_is_killed(tmp_path: Path) -> None:
    file = tmp_path / "file"
    contents = [letter * 300_000 for letter in (b"a", b"b")]
    durable.write(file, contents[0])
    program = (
        "import sys, itertools; from pathlib import Path; from safelight import durable\n"
        "print('started', flush=True)\n"
        "for letter in itertools.cycle('ab'): durable.write(Path(sys.argv[1]), letter.encode() * 300_000)\n"
    )
    chance = random.Random(20261122)
    for _ in range(6):
        writer = subprocess.Popen([sys.executable, "-c", program, str(file)], env=_env(), stdout=subprocess.PIPE)
        assert writer.stdout is not None
        writer.stdout.readline()
        until = time.monotonic() + chance.uniform(0.0, 0.05)
        while time.monotonic() < until:
            assert file.read_bytes() in contents
        writer.kill()
        writer.wait()
        writer.stdout.close()

        assert file.read_bytes() in contents


def test_what_is_unfinished_is_hidden_from_every_scan(tmp_path: Path) -> None:
    """Leftovers of a killed process start with a dot; no glob of the ledger takes them for its own."""
    staged = durable._stage(tmp_path / "20261122-210000-000abcd.jsonl", b"x")

    assert staged.parent == tmp_path
    assert list(tmp_path.glob("[!.]*")) == []


def _env() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(durable.__file__).parents[1])}


def _python(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env=_env(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_a_sweep_removes_what_dead_writers_left_and_nothing_else(tmp_path: Path) -> None:
    done = subprocess.Popen(["true"])
    done.wait()
    dead, own = tmp_path / f".a.json.{done.pid}.part", tmp_path / f".b.json.{os.getpid()}.part"
    others = [tmp_path / name for name in ("a.json", ".hidden", ".c.part", "d.1.part")]
    for file in (dead, own, *others):
        file.write_text("x")

    assert durable.sweep(tmp_path) == [dead]
    assert sorted(tmp_path.iterdir()) == sorted([own, *others])
    assert durable.sweep(tmp_path / "none") == []
