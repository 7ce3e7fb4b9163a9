"""`safelightd digests` as a process of its own: what it makes, how it is stopped, and what happens meanwhile."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from safelight import digesting, registered
from safelight.registered import FileDigest
from tests.cli_steps import runner
from tests.conftest import Installation
from tests.daemon.test_supervisor import PROGRAM
from tests.daemon.test_worker import eventually
from tests.integration import registering
from tests.integration.registering import FLUX, WAN, add, in_cache, row
from tests.programs import Start, programs

own, disk = registering.own, registering.disk

LONG_BYTES = 32 * 2**30
"""Of holes: takes seconds to read, and no room."""

LOOKING = """
from safelight import config
from safelightd import logs
from safelightd.supervisor import Supervisor
logs.set_up()
looks = iter(range(40))
Supervisor(config.load(), ["digests"]).run(until=lambda: next(looks, None) is None, poll_s=0.1)
"""
"""`up`, for as many looks at what is registered."""


@pytest.fixture
def start(own: Installation) -> Iterator[Start]:
    with programs(own.env) as run:
        yield lambda *words: run(*(words or ("-m", "safelightd.cli", "digests")))


@pytest.fixture
def long(own: Installation, disk: Path) -> Path:
    """The last file of a registered model, which takes seconds to read."""
    file = disk / FLUX / "vae/zz.txt"
    file.touch()
    os.truncate(file, LONG_BYTES)
    add(own, disk / FLUX, "--as", "fox")
    return file


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, log = process.communicate(timeout=300)
    return process.returncode, log


def reads(own: Installation, file: Path) -> None:
    """Return when it is in the middle of a file."""
    eventually(lambda: digesting.read(own.paths.digests).file == str(file))


def files_with_digests(own: Installation, key: str = "fox") -> set[str]:
    file = own.paths.models / f"registered/{key}.digests.json"
    return set(registered.Digests.model_validate_json(file.read_bytes()).files) if file.exists() else set()


def all_files(own: Installation, key: str = "fox") -> set[str]:
    registration = registered.read(own.paths.models, key)
    assert registration
    return {str(file) for file in registered.files_of(registration)}


def test_what_lacks_digests_gets_them_and_then_nothing_is_done(own: Installation, disk: Path, start: Start) -> None:
    said = add(own, disk / FLUX, "--as", "fox").stderr.splitlines()[-1]
    cache = in_cache(disk, WAN, "somebody/a-model") / "models--somebody--a-model"
    add(own, cache, "--as", "wan")
    before = row(own, "fox")
    first = ended(start())
    written = (own.paths.models / "registered").stat().st_mtime_ns
    second = ended(start())

    assert said == ("digests: made in the background while the daemon runs, or now: safelight models verify fox")
    assert before["digests_done_bytes"] == 0
    assert (first[0], second) == (0, (0, "")), first[1]
    assert "digests.made key=fox" in first[1]
    assert files_with_digests(own) == all_files(own)
    assert runner(own)("models", "verify", "fox").stdout == "fox is as it was\n"
    assert (own.paths.models / "registered").stat().st_mtime_ns == written
    assert row(own, "fox")["digests_done_bytes"] == row(own, "fox")["digests_total_bytes"] > 0
    assert "digests" not in runner(own)("models", "list").stdout
    assert not own.paths.digests.exists()


def test_a_killed_one_is_gone_on_with_and_progress_is_told(own: Installation, long: Path, start: Start) -> None:
    killed = start()
    reads(own, long)
    told = row(own, "fox")
    eventually(lambda: row(own, "fox")["digests_done_bytes"] > told["digests_done_bytes"])
    listed = runner(own)("models", "list").stdout
    killed.kill()
    killed.wait()
    known = files_with_digests(own)
    os.truncate(long, 1_000)
    again = ended(start())

    assert 0 < told["digests_done_bytes"] < told["digests_total_bytes"]
    assert "present, digests " in listed
    assert known == all_files(own) - {str(long)}
    assert again[0] == 0
    assert "files=1 bytes=1000" in again[1]
    assert files_with_digests(own) == all_files(own)
    assert not list(own.paths.models.glob("registered/.*.part"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_one_leaves_it_to_the_first_which_a_signal_ends_in_the_middle_of_a_file(
    own: Installation, long: Path, start: Start, number: signal.Signals
) -> None:
    first = start()
    reads(own, long)
    second = ended(start())
    assert first.poll() is None
    first.send_signal(number)
    status, log = ended(first)

    assert second[0] == 0
    assert "digests.elsewhere" in second[1]
    assert status == 0
    assert "digests.stopped" in log
    assert files_with_digests(own) == all_files(own) - {str(long)}
    assert not own.paths.digests.exists()


def test_it_goes_after_everybody_else(own: Installation, long: Path, start: Start) -> None:
    process = start()
    reads(own, long)
    seen = psutil.Process(process.pid)

    assert (seen.nice(), seen.ionice().ioclass) == (19, psutil.IOPRIO_CLASS_IDLE)


def test_a_model_that_is_forgotten_meanwhile_is_read_no_further(own: Installation, long: Path, start: Start) -> None:
    process = start()
    reads(own, long)
    removed = runner(own)("models", "rm", "fox", "--yes")
    status, log = ended(process)

    assert removed.exit_code == 0
    assert status == 0
    assert "digests.forgotten key=fox" in log
    assert [file.name for file in (own.paths.models / "registered").iterdir()] == []


def test_a_model_that_is_registered_meanwhile_is_read_next(
    own: Installation, disk: Path, long: Path, start: Start
) -> None:
    """A path unit does not look while its service runs."""
    os.truncate(long, 2**32)
    process = start()
    reads(own, long)
    add(own, disk / WAN, "--as", "another")

    assert ended(process)[0] == 0
    assert files_with_digests(own, "another") == all_files(own, "another")


def test_a_file_that_changes_meanwhile_gets_no_digest_and_is_told(own: Installation, long: Path, start: Start) -> None:
    os.truncate(long, 2**32)
    process = start()
    reads(own, long)
    with long.open("r+b") as stream:
        stream.write(b"fox")
    status, log = ended(process)

    assert "'it was changed while it was read'" in log
    assert status == 0  # the digests that were made brought one more round, which found it at rest
    assert files_with_digests(own) == all_files(own)
    assert runner(own)("models", "verify", "fox").stdout == "fox is as it was\n"


def test_a_file_that_cannot_be_read_is_told_and_hinders_no_other(own: Installation, disk: Path, start: Start) -> None:
    odd = disk / FLUX / "scheduler/odd.txt"
    odd.mkdir()
    add(own, disk / FLUX, "--as", "fox")
    status, log = ended(start())
    told = row(own, "fox")["digests_faults"]
    listed = runner(own)("models", "list").stdout
    again = ended(start())
    odd.rmdir()
    gone = row(own, "fox")["digests_faults"]

    assert (status, again[0]) == (1, 1)
    assert "digests.unread key=fox" in log
    assert told == [f"{odd}: cannot be read (Is a directory)"]
    assert f"{odd}: cannot be read" in listed
    assert files_with_digests(own) == all_files(own)
    assert gone == []


def test_a_folder_that_is_gone_hinders_no_other(own: Installation, disk: Path, start: Start) -> None:
    add(own, disk / FLUX, "--as", "fox")
    add(own, disk / WAN, "--as", "gone")
    (disk / WAN).rename(disk / "moved")
    status, log = ended(start())

    assert status == 0
    assert "digests.gone key=gone" in log
    assert files_with_digests(own) == all_files(own)


def test_digests_that_several_write_are_all_kept_and_none_outlives_its_model(own: Installation, disk: Path) -> None:
    add(own, disk / FLUX, "--as", "fox")
    registration = registered.read(own.paths.models, "fox")
    assert registration
    files = [Path(f"/{number}") for number in range(64)]
    found = FileDigest(size_bytes=1, sha256="0" * 64)

    def write(file: Path) -> bool:
        return registered.remember(own.paths.models, registration, file, found)

    with ThreadPoolExecutor(8) as pool:
        kept = list(pool.map(write, files))
    known = files_with_digests(own)
    registered.forget(own.paths.models, "fox")

    assert all(kept)
    assert known == set(map(str, files))
    assert not write(files[0])
    assert files_with_digests(own) == set()


def test_up_makes_them_when_something_was_registered_and_does_not_insist(
    own: Installation, disk: Path, long: Path, start: Start
) -> None:
    process = start("-c", PROGRAM, "digests")
    reads(own, long)
    children = psutil.Process(process.pid).children()
    children[0].kill()
    eventually(lambda: not children[0].is_running())
    os.truncate(long, 1_000)
    add(own, disk / WAN, "--as", "another")
    eventually(lambda: files_with_digests(own, "another") == all_files(own, "another"))
    process.terminate()
    status, log = ended(process)

    assert status == 0
    assert "died" not in log
    assert "ended process=digests status=-9" in log
    assert files_with_digests(own) == all_files(own)


def test_digests_that_cannot_be_written_are_not_tried_again_and_again(
    own: Installation, disk: Path, start: Start
) -> None:
    """Each try would read gigabytes; and it changes the folder that is looked at."""
    add(own, disk / FLUX, "--as", "fox")
    in_the_way = own.paths.models / "registered/fox.digests.json"
    (in_the_way / "something").mkdir(parents=True)
    status, log = ended(start("-c", LOOKING))

    assert status == 0
    assert log.count("started process=digests") == 1
    assert f"{in_the_way.parent}/.fox.digests.json" in log
    assert "Is a directory. Make it writable" in log
    assert log.count("ended process=digests status=1") == 1
