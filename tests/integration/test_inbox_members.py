"""The inbox of a system service: other people's files, of which the kernel does not say who still writes them.

The process is the real one without CAP_LEASE; a member is a real process of another user.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from safelight.config import Config
from safelight.jobqueue import JobQueue
from tests.conftest import Installation
from tests.integration.test_inbox_service import Process, filed, line, picture, prompts, running, tuned, until
from tests.leases import give_up_leases

MEMBER = 4711
LONG_S = 300.0
"""An unseen_s that no test outlasts."""

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be two users")


@pytest.fixture
def folder(installation: Installation) -> Path:
    """The inbox, open to all."""
    installation.paths.inbox.mkdir(parents=True)
    installation.paths.inbox.chmod(0o777)
    installation.root.chmod(0o711)
    return installation.paths.inbox


@contextmanager
def serving(config: Config, folder: Path) -> Iterator[Process]:
    """Run the inbox, and wait until it watches: what is dropped then is seen."""
    with running(config, give_up_leases) as process:
        watched = 0
        while not watched:
            (folder / "lookout.txt").write_text("a lookout")
            os.chown(folder / "lookout.txt", MEMBER, -1)
            ends_at = time.monotonic() + 1.0
            while time.monotonic() < ends_at and not watched:
                watched = len(filed(folder / "accepted", "lookout.txt"))
                time.sleep(0.01)
        yield process


class Member:
    """A shell of another user in the inbox, who does one line at a time."""

    def __init__(self, folder: Path) -> None:
        self._shell = subprocess.Popen(
            ["sh"], cwd=folder, user=MEMBER, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    def does(self, command: str) -> None:
        assert self._shell.stdin is not None
        assert self._shell.stdout is not None
        self._shell.stdin.write(f"{command}; echo $?\n")
        assert self._shell.stdout.readline() == "0\n"

    def leaves(self) -> None:
        self._shell.communicate()


@pytest.fixture
def member(folder: Path) -> Iterator[Member]:
    someone = Member(folder)
    yield someone
    someone.leaves()


def come(queue: JobQueue) -> list[str]:
    return [prompt for prompt in prompts(queue) if prompt != "a lookout"]


def stays_out(queue: JobQueue, *allowed: str) -> None:
    """Fail if anything but `allowed` is taken within many times settle_s."""
    ends_at = time.monotonic() + 2.5
    while time.monotonic() < ends_at:
        assert set(come(queue)) <= set(allowed)
        time.sleep(0.02)


def test_the_kernel_really_denies_a_lease_on_a_members_file(folder: Path, member: Member) -> None:
    """What these tests are about: without it they would pass for another reason."""
    script = (
        "import fcntl, os\n"
        "from tests.leases import give_up_leases\n"
        "give_up_leases()\n"
        "try: fcntl.fcntl(os.open('theirs.txt', os.O_RDONLY), fcntl.F_SETLEASE, fcntl.F_RDLCK)\n"
        "except PermissionError: print('denied')"
    )
    member.does("echo a fox > theirs.txt")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", script]

    said = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)

    assert said.stdout == "denied\n"


@pytest.mark.parametrize(
    ("begin", "finish", "whole"),
    [
        ("exec 3> slow.txt; printf 'a fox' >&3", "printf ' in the snow' >&3; exec 3>&-", "a fox in the snow"),
        ("printf 'a fox' > slow.txt; exec 3>> slow.txt", "printf ' runs' >&3; exec 3>&-", "a fox runs"),
        ("exec 3> slow.txt; printf 'a fox' >&3; cat slow.txt >/dev/null", "printf s >&3; exec 3>&-", "a foxs"),
        ("exec 3> .s.part; printf 'a fox' >&3; mv .s.part slow.txt", "printf es >&3; exec 3>&-", "a foxes"),
        ("exec 3> slow.txt; printf 'a fox' >&3; touch -d 2001-01-01 slow.txt", "printf y >&3; exec 3>&-", "a foxy"),
    ],
    ids=["slow copy", "reopened to append", "read meanwhile", "renamed before its close", "old time"],
)
def test_a_members_file_is_not_taken_while_it_is_open_however_long(
    installation: Installation, queue: JobQueue, folder: Path, member: Member, begin: str, finish: str, whole: str
) -> None:
    with serving(tuned(installation, settle_s=0.2, unseen_s=1.0), folder):
        member.does(begin)
        member.does("echo a hare > quick.txt")
        until(lambda: come(queue) == ["a hare"], timeout_s=30)
        stays_out(queue, "a hare")
        member.does(finish)
        until(lambda: come(queue) == ["a hare", whole], timeout_s=30)


def test_a_file_that_was_there_before_the_watch_must_be_still_for_longer(
    installation: Installation, queue: JobQueue, folder: Path, member: Member
) -> None:
    member.does("exec 3> early.txt; printf 'a fox' >&3; echo an owl > left.txt")
    started = time.monotonic()
    with serving(tuned(installation, settle_s=0.2, unseen_s=20.0), folder):
        stays_out(queue)
        member.does("printf ' in the snow' >&3; exec 3>&-")
        until(lambda: come(queue) == ["a fox in the snow"], timeout_s=30)
        assert time.monotonic() - started < 20.0
        until(lambda: sorted(come(queue)) == ["a fox in the snow", "an owl"])
        assert time.monotonic() - started > 20.0


@pytest.mark.parametrize(
    "drop",
    [
        "echo a fox > fox.txt",
        "echo a fox > ../elsewhere/fox.txt; mv ../elsewhere/fox.txt fox.txt",
        "echo a fox > ../elsewhere/fox.txt; touch -d 2001-01-01 ../elsewhere/fox.txt; cp -p ../elsewhere/fox.txt .",
        "echo a fox > .fox.txt.Ab12Cd; mv .fox.txt.Ab12Cd fox.txt",
        "printf 'a ' > fox.txt; echo fox >> fox.txt; chmod 600 fox.txt; chmod 644 fox.txt",
    ],
    ids=["written", "moved", "copied with its time", "as rsync does", "appended, then opened to all"],
)
def test_a_members_file_whose_close_was_seen_is_taken_at_once(
    installation: Installation, queue: JobQueue, folder: Path, member: Member, drop: str
) -> None:
    (folder.parent / "elsewhere").mkdir(mode=0o777)
    (folder.parent / "elsewhere").chmod(0o777)
    with serving(tuned(installation, settle_s=0.2, unseen_s=LONG_S), folder):
        member.does(drop)
        until(lambda: come(queue) == ["a fox"], timeout_s=30)


def test_a_text_waits_for_a_members_picture_that_is_still_open(
    installation: Installation, queue: JobQueue, folder: Path, member: Member
) -> None:
    """A pair, of which the picture is copied slowly; and a picture that a text names."""
    (folder.parent / "red.png").write_bytes(picture("red"))
    (folder.parent / "red.png").chmod(0o644)
    half = len(picture("red")) // 2
    with serving(tuned(installation, settle_s=0.2, unseen_s=1.0), folder):
        member.does(f"exec 3> cat.png; head -c {half} ../red.png >&3; exec 4> ref.png; head -c {half} ../red.png >&4")
        member.does("printf -- '---\\nkind: video\\n---\\na cat' > cat.txt")
        member.does("printf -- '---\\nkind: video\\nimage: ref.png\\n---\\nwaves' > waves.md")
        stays_out(queue)
        member.does(f"tail -c +{half + 1} ../red.png >&3; exec 3>&-; tail -c +{half + 1} ../red.png >&4; exec 4>&-")
        until(lambda: sorted(come(queue)) == ["a cat", "waves"], timeout_s=30)
    assert not filed(installation.paths.rejected)
    for spec in line(queue):
        assert not spec.image or (installation.paths.inputs / spec.image).read_bytes() == picture("red")
    assert [bool(spec.image) for spec in line(queue) if spec.prompt != "a lookout"] == [True, True]


def test_files_of_batch_folders_are_seen_closed_too(
    installation: Installation, queue: JobQueue, folder: Path, member: Member
) -> None:
    with serving(tuned(installation, settle_s=0.2, unseen_s=LONG_S), folder):
        member.does("mkdir summer; echo wait > summer/wait.tmp")
        time.sleep(1.0)  # a look, from which on the folder is watched
        member.does("mkdir summer/day; sleep 1; echo a fox > summer/day/fox.txt; echo an owl > summer/owl.txt")
        until(lambda: sorted(come(queue)) == ["a fox", "an owl"], timeout_s=30)
