"""Several people and one system service: what a member drops is taken, a stranger's is not, nothing is in anyone's way.

The inbox is the real one in its whole sandbox; nobody renders here, for the queue is paused.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.systemd.booted import Daemon, boot, until

MEMBER, STRANGER = 1990, 1991


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with boot(tmp_path_factory.mktemp("machine")) as machine:
        daemon = Daemon(machine, "system")
        daemon.install()
        assert until(lambda: daemon.active("redis", "inbox", "worker@0"), 60), machine.journal()
        daemon.safelight("pause", "nothing is rendered here")
        yield daemon


def waiting(daemon: Daemon, beginning: str) -> list[str]:
    """Return the prompts in the line that begin so."""
    with daemon.queue() as queue:
        prompts = [spec.prompt for job in queue.waiting_ids() if (spec := queue.spec(job))]
    return [prompt for prompt in prompts if prompt.startswith(beginning)]


def by_name(folder: Path, name: str) -> Path | None:
    return next((path for path in folder.rglob(f"*{name}")), None)


def test_a_members_file_is_claimed_by_rename_inside_the_sandbox(daemon: Daemon) -> None:
    """The file that was dropped is the one that is kept: not a copy, whatever mounts the sandbox has made."""
    copy = (
        "umask 077; cd /var/lib/safelight/inbox; echo 'a red fox' > .fox.part; mv .fox.part fox.txt; stat -c %i fox.txt"
    )
    dropped = daemon.machine.person("sh", "-c", f"cd /; {copy}")

    assert until(lambda: by_name(daemon.paths.accepted, "~fox.txt"), 20), daemon.machine.journal()
    kept = by_name(daemon.paths.accepted, "~fox.txt")
    assert kept is not None
    assert kept.stat().st_ino == int(dropped.stdout)
    assert (kept.stat().st_uid, kept.read_text()) == (MEMBER, "a red fox\n")
    assert list(daemon.paths.claimed.iterdir()) == []


def test_a_members_slow_copy_is_not_read_half(daemon: Daemon) -> None:
    """The service has no capability to ask the kernel who writes another's file: it has seen the copy open."""
    slow = "exec 3> slow.txt; printf 'a slow' >&3; sleep 6; printf ' fox' >&3; exec 3>&-"
    copied = daemon.machine.person("sh", "-c", f"umask 022; cd /var/lib/safelight/inbox; {slow}")

    assert copied.returncode == 0, copied.stderr
    assert until(lambda: by_name(daemon.paths.accepted, "~slow.txt"), 20), daemon.machine.journal()
    assert waiting(daemon, "a slow") == ["a slow fox"]


def test_a_copy_that_began_before_the_service_is_not_read_half(daemon: Daemon) -> None:
    """Nobody saw it open: it would have to be still for unseen_s, and its close is seen before."""
    stop, start = "systemctl stop safelight-inbox.service", "systemctl start safelight-inbox.service"
    member = f"setpriv --reuid={MEMBER} --regid={MEMBER} --init-groups sh -c"
    copy = "umask 022; exec 3> early.txt; printf %s early >&3; sleep 8; printf %s -owl >&3; exec 3>&-"
    whole = f'cd /var/lib/safelight/inbox; {stop}; {member} "{copy}" & sleep 1; {start}; wait'
    copied = daemon.machine.root("sh", "-c", whole)

    assert copied.returncode == 0, copied.stderr
    assert until(lambda: by_name(daemon.paths.accepted, "~early.txt"), 20), daemon.machine.journal()
    assert waiting(daemon, "early") == ["early-owl"]


def test_a_members_private_file_is_left_with_a_word_until_its_owner_opens_it(daemon: Daemon) -> None:
    """mv keeps the mode: nobody but the member can read it. What comes after it is taken."""
    move = "umask 077; echo 'a secret' > ~/secret.txt; mv ~/secret.txt /var/lib/safelight/inbox/"
    daemon.machine.person("sh", "-c", f"{move}; echo 'an owl' > /var/lib/safelight/inbox/owl.txt")

    assert until(lambda: by_name(daemon.paths.accepted, "~owl.txt"), 20), daemon.machine.journal()
    left = "inbox.left file=secret.txt problem='cannot be taken: Permission denied'"
    assert until(lambda: left in daemon.machine.journal(), 10), daemon.machine.journal()
    assert (daemon.paths.inbox / "secret.txt").exists()

    daemon.machine.person("chmod", "a+r", "/var/lib/safelight/inbox/secret.txt")

    assert until(lambda: by_name(daemon.paths.accepted, "~secret.txt"), 20), daemon.machine.journal()


def test_a_stranger_can_neither_drop_nor_look_nor_connect(daemon: Daemon) -> None:
    stranger = ("setpriv", f"--reuid={STRANGER}", f"--regid={STRANGER}", "--clear-groups", "sh", "-c")
    for attempt in (
        "echo 'a fox' > /var/lib/safelight/inbox/stranger.txt",
        "ls /var/lib/safelight/outbox",
        "ls /var/lib/safelight/state",
        "cat /etc/safelight/safelight.toml",
        "ls /run/safelight/redis",
    ):
        tried = daemon.machine.root(*stranger, attempt)

        assert tried.returncode != 0, attempt
        assert "ermission denied" in tried.stderr, tried.stderr
