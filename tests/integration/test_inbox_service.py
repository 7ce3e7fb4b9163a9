"""The inbox process on real folders with a real server: what a person drops, and what a night does to it."""

from __future__ import annotations

import io
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

from safelight import drops, inbox, inputs, queueserver
from safelight.config import Config
from safelight.errors import BadConfig
from safelight.jobqueue import JobQueue
from safelight.jobspec import JobSpec
from safelightd import inbox_service, redis_server
from tests.conftest import Installation


class Process:
    """The inbox process, forked from this one: it is real, and it is there at once."""

    def __init__(self, config: Config, in_child: Callable[[], object] = lambda: None) -> None:
        self.pid = os.fork()
        if self.pid == 0:
            status = 70
            try:
                in_child()
                status = inbox_service.serve(config)
            except BadConfig as error:
                status = error.exit_code
            finally:
                os._exit(status)
        self.status: int | None = None

    def ended(self) -> bool:
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = os.waitstatus_to_exitcode(status) if pid else None
        return self.status is not None

    def stop(self, number: int = signal.SIGTERM) -> int:
        if not self.ended():
            os.kill(self.pid, number)
            self.status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        assert self.status is not None
        return self.status


@contextmanager
def running(config: Config, in_child: Callable[[], object] = lambda: None) -> Iterator[Process]:
    process = Process(config, in_child)
    try:
        yield process
    finally:
        process.stop(signal.SIGKILL)


def tuned(installation: Installation, **inbox: float) -> Config:
    """Return the installation's settings with other values of [inbox]."""
    settings = installation.config.settings
    changed = settings.model_copy(update={"inbox": settings.inbox.model_copy(update=inbox)})
    return replace(installation.config, settings=changed)


def until(condition: Callable[[], object], timeout_s: float = 120.0) -> None:
    ends_at = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < ends_at, "it did not happen in time"
        time.sleep(0.005)


def drop(folder: Path, path: str, content: str | bytes) -> Path:
    """Put a file into the inbox as a program does that writes elsewhere and renames."""
    whole = folder.parent / "being-written"
    whole.write_bytes(content.encode() if isinstance(content, str) else content)
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    return whole.rename(folder / path)


def picture(colour: str, size: tuple[int, int] = (96, 64), mode: str = "RGB") -> bytes:
    content = io.BytesIO()
    Image.new(mode, size, colour).save(content, "PNG")
    return content.getvalue()


def line(queue: JobQueue) -> list[JobSpec]:
    """Return the jobs that wait, in order."""
    return [spec for job in queue.waiting_ids() if (spec := queue.spec(job))]


def prompts(queue: JobQueue) -> list[str]:
    return [spec.prompt for spec in line(queue)]


def filed(folder: Path, suffix: str = "") -> list[str]:
    """Return the names of what was filed below a folder, without their ids; notes only where asked for."""
    names = [file.name.split("~", 1)[1] for file in folder.rglob("*~*")]
    return sorted(name for name in names if name.endswith(suffix) and (suffix or not name.endswith((".json", "r.txt"))))


def left(folder: Path) -> list[str]:
    """Return what a person still sees in the inbox."""
    kept = (folder / "accepted", folder / "rejected", folder / ".safelight")
    files = (file for file in folder.rglob("*") if not file.is_dir() or file.is_symlink())
    return sorted(str(file.relative_to(folder)) for file in files if not any(own in file.parents for own in kept))


def test_drops_become_jobs_and_every_file_says_what_became_of_it(installation: Installation, queue: JobQueue) -> None:
    folder = installation.paths.inbox
    for path, content in {
        "10.txt": "ten", "2.txt": "two", "notes.pdf": "%PDF", "night/owl.md": "an owl", "high/first.txt": "first",
        "low/summer/b.txt": "low b", "summer/2.txt": "s two\ns three", "summer/10.txt": "s ten",
        "bad.md": "---\nwidth: 30\nheight: 31\n---\nx", ".hidden.txt": "hidden", "cat.txt~": "backup",
    }.items():  # fmt: skip
        drop(folder, path, content)
    (folder / "link.txt").symlink_to("/etc/hostname")
    os.mkfifo(folder / "pipe.txt")

    with running(installation.config) as process:
        until(lambda: left(folder) == [".hidden.txt", "cat.txt~"] and len(filed(installation.paths.rejected)) == 4)
        assert process.stop() == 0

    assert prompts(queue) == ["first", "two", "ten", "s two", "s three", "s ten", "low b", "an owl"]
    assert [spec.batch for spec in line(queue)] == ["first", "2", "10", *["summer"] * 4, "owl"]
    assert [spec.id for spec in installation.ledger.accepted()] == sorted(queue.waiting_ids())
    assert filed(installation.paths.rejected) == ["bad.md", "link.txt", "notes.pdf", "pipe.txt"]
    said = next(installation.paths.rejected.glob("*bad.md.error.txt")).read_text()
    assert "width 30 is not a multiple of 16" in said
    assert "height 31 is not a multiple of 16" in said
    tickets = [json.loads(file.read_text()) for file in installation.paths.accepted.rglob("*.ticket.json")]
    assert sorted(job for ticket in tickets for job in ticket["jobs"]) == sorted(queue.waiting_ids())
    assert list(installation.paths.claimed.iterdir()) == []


def test_a_picture_beside_a_text_for_flux_is_what_it_starts_from(installation: Installation, queue: JobQueue) -> None:
    folder = installation.paths.inbox
    with running(installation.config):
        drop(folder, "fox.png", picture("red"))
        drop(folder, "fox.md", "---\nmodel: tiny-flux-schnell\nstrength: 0.4\n---\na fox")
        drop(folder, "owl.jpg", picture("blue"))
        drop(folder, "owl.md", "---\nkind: image\n---\nan owl")
        until(lambda: len(queue.waiting_ids()) == 2)

    jobs = {spec.prompt: spec for spec in line(queue)}
    assert {name: (spec.model, spec.strength) for name, spec in jobs.items()} == {
        "a fox": ("tiny-flux-schnell", 0.4),
        "an owl": ("tiny-flux-schnell", 0.6),
    }
    assert {spec.image for spec in jobs.values()} == {file.name for file in installation.paths.inputs.iterdir()}


def test_file_is_queued_soon_after_it_is_whole_and_not_before(installation: Installation, queue: JobQueue) -> None:
    folder = installation.paths.inbox
    with running(installation.config):
        until(installation.paths.rejected.is_dir)
        with (folder / "slow.txt").open("w") as slow:
            slow.write("a fox")
            slow.flush()
            drop(folder, "quick.txt", "a hare")  # is taken while the other is still being written
            until(lambda: prompts(queue) == ["a hare"])
            slow.write(" in the snow")
        until(lambda: prompts(queue) == ["a hare", "a fox in the snow"], timeout_s=30)


def test_claimed_file_that_is_still_written_waits_for_its_writer(installation: Installation, queue: JobQueue) -> None:
    """It was claimed in the moment it was opened, and then the process died."""
    paths = installation.paths
    inbox.prepare(paths)
    drop(paths.inbox, "night/late.txt", "a fox")
    entry = drops.scan(paths.inbox, None, time.monotonic).entries["night/late.txt"]
    with (paths.inbox / "night/late.txt").open("a") as late:
        inbox.claim(paths, entry, inbox.new_submission())
        with running(installation.config, lambda: os.close(late.fileno())):
            drop(paths.inbox, "other.txt", "a hare")
            until(lambda: prompts(queue) == ["a hare"])
            late.write(" in the snow")
            late.close()
            until(lambda: prompts(queue) == ["a hare", "a fox in the snow"])
    assert [spec.priority for spec in line(queue)] == ["normal", "night"]


def test_inbox_may_be_a_link_to_another_folder(installation: Installation, queue: JobQueue) -> None:
    """And what happens there is noticed at once, not at the next look, which may be a minute off."""
    real = installation.root / "elsewhere"
    real.mkdir()
    installation.paths.inbox.symlink_to(real)
    with running(installation.config):
        until(installation.paths.rejected.is_dir)
        for number in range(3):
            drop(installation.paths.inbox, f"summer/{number}.txt", f"fox {number}")
            until(lambda: len(prompts(queue)) == number + 1, timeout_s=3.0)  # noqa: B023 - called at once


def test_pair_and_named_pictures_become_inputs_and_leave_with_their_texts(
    installation: Installation, queue: JobQueue
) -> None:
    folder = installation.paths.inbox
    video = "---\nkind: video\n---\n"
    drop(folder, "cat.png", picture("red"))
    drop(folder, "cat.txt", f"{video}a cat\n--prompt 'a dog' --image summer/ref.png\n")
    drop(folder, "summer/ref.png", picture("blue"))
    drop(folder, "summer/a.md", "---\nkind: video\nimage: ref.png\n---\nwaves")
    drop(folder, "summer/day/b.md", "---\nkind: video\nimage: ref.png\n---\nclouds")
    drop(folder, "lone.png", picture("green"))

    with running(tuned(installation, partner_s=1.5)):
        until(lambda: is_finished(installation))

    by_prompt = {spec.prompt: spec.image for spec in line(queue)}
    assert by_prompt.keys() == {"a cat", "a dog", "waves", "clouds"}
    assert (installation.paths.inputs / str(by_prompt["a cat"])).read_bytes() == picture("red")
    for prompt in ("a dog", "waves", "clouds"):
        assert (installation.paths.inputs / str(by_prompt[prompt])).read_bytes() == picture("blue")
    assert filed(installation.paths.accepted) == ["a.md", "b.md", "cat.png", "cat.txt", "ref.png"]
    assert filed(installation.paths.rejected) == ["lone.png"]


def test_a_clip_has_the_shape_of_its_picture_and_one_with_transparency_is_refused(
    installation: Installation, queue: JobQueue
) -> None:
    folder = installation.paths.inbox
    for name, content in {
        "tall": picture("red", (200, 300)), "wide": picture("blue", (300, 200)), "hole": picture("#f000", mode="RGBA"),
    }.items():  # fmt: skip
        drop(folder, f"{name}.png", content)
        drop(folder, f"{name}.txt", f"---\nkind: video\n---\na {name} one")

    with running(tuned(installation, partner_s=1.5)):
        until(lambda: is_finished(installation))

    sizes = {spec.prompt: (spec.width, spec.height) for spec in line(queue)}
    assert sizes == {"a tall one": (64, 96), "a wide one": (96, 64)}
    assert filed(installation.paths.rejected) == ["hole.png", "hole.txt"]
    said = next(installation.paths.rejected.glob("*hole.txt.error.txt")).read_text()
    assert "image hole.png: it has transparency" in said


def test_text_waits_for_the_pictures_it_names_and_is_refused_without(
    installation: Installation, queue: JobQueue
) -> None:
    folder = installation.paths.inbox
    drop(folder, "early.md", "---\nkind: video\nimage: late.png\n---\nwaves")
    drop(folder, "never.md", "---\nkind: video\nimage: none.png\n---\nclouds")
    drop(folder, "clip.md", "---\nmodel: tiny-wan-i2v-a14b\n---\nrain")

    with running(tuned(installation, partner_s=2.0)):
        until(installation.paths.rejected.is_dir)
        time.sleep(1.0)  # longer than settle_s: they wait for their pictures, not for time
        assert prompts(queue) == []
        drop(folder, "clip.png", picture("red"))
        drop(folder, "late.png", picture("blue"))
        until(lambda: is_finished(installation))

    assert sorted(prompts(queue)) == ["rain", "waves"]
    assert filed(installation.paths.rejected) == ["never.md"]
    assert "none.png" in next(installation.paths.rejected.glob("*.error.txt")).read_text()


def test_files_stay_in_the_inbox_while_the_server_is_away(installation: Installation) -> None:
    paths = installation.paths
    drop(paths.inbox, "early.txt", "early")
    manager = Manager(installation.root / "notify")
    with running(installation.config, manager.adopt):
        manager.hear("READY=1")
        manager.hear("STATUS=Waiting")
        assert left(paths.inbox) == ["early.txt"]
        with server(installation) as queue:
            until(lambda: prompts(queue) == ["early"])
        drop(paths.inbox, "late.txt", "late")
        manager.hear("STATUS=Waiting")
        assert left(paths.inbox) == ["late.txt"]
        with server(installation) as queue:
            until(lambda: prompts(queue) == ["early", "late"])


class Manager:
    """A service manager's ear."""

    def __init__(self, address: Path) -> None:
        self._address = address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(address))
        self._socket.settimeout(20)

    def adopt(self) -> None:
        os.environ["NOTIFY_SOCKET"] = str(self._address)

    def hear(self, words: str) -> None:
        while words.encode() not in self._socket.recv(4096):
            pass

    def __del__(self) -> None:
        self._socket.close()


@contextmanager
def server(installation: Installation) -> Iterator[JobQueue]:
    """A server on the installation's data that is killed in the end."""
    paths = installation.paths
    paths.redis.mkdir(parents=True, exist_ok=True)
    paths.socket.parent.mkdir(parents=True, exist_ok=True)
    paths.socket.unlink(missing_ok=True)
    command = redis_server.command(redis_server.find_binary(), paths.socket, paths.redis)
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        until(paths.socket.exists)
        connection = queueserver.connect(installation.config.url)
        yield JobQueue(connection)
        connection.close()
        process.kill()


def test_nothing_is_lost_or_doubled_while_the_disk_is_full(installation: Installation, queue: JobQueue) -> None:
    """The kernel refuses what is longer than RLIMIT_FSIZE as it does on a full disk: no byte can be added."""
    folder = installation.paths.inbox
    drop(folder, "fox.txt", "a fox\na hare")

    def no_room() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, resource.RLIM_INFINITY))

    with running(installation.config, no_room) as process:
        until(lambda: list(installation.paths.claimed.glob("*fox.txt")))
        time.sleep(0.5)  # it tries, and tries again
        assert prompts(queue) == []
        assert installation.ledger.submission(next(installation.paths.claimed.iterdir()).name[:23]) == []
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        until(lambda: filed(installation.paths.accepted) == ["fox.txt"])

    assert prompts(queue) == ["a fox", "a hare"]


def test_a_pair_stays_together_through_a_passing_fault_of_the_disk(installation: Installation, queue: JobQueue) -> None:
    """The picture is stored and the text is claimed when the ledger has no room; the next turn goes past the claim."""
    paths = installation.paths
    source = installation.root / "yesterday.png"
    source.write_bytes(picture("red"))
    inputs.store(source, paths.inputs)
    manager = Manager(installation.root / "notify")

    def no_room() -> None:
        manager.adopt()
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, resource.RLIM_INFINITY))

    drop(paths.inbox, "cat.png", picture("red"))
    drop(paths.inbox, "cat.txt", "---\nkind: video\n---\na cat")
    with running(tuned(installation, settle_s=1.0), no_room) as process:
        manager.hear("STATUS=Waiting")
        manager.hear("jobs queued")
        assert left(paths.inbox) == ["cat.png"]
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        until(lambda: is_finished(installation))

    assert filed(paths.accepted) == ["cat.png", "cat.txt"]
    assert [(spec.prompt, bool(spec.image)) for spec in line(queue)] == [("a cat", True)]


def test_a_picture_waits_for_its_text_that_is_claimed_and_still_written(
    installation: Installation, queue: JobQueue
) -> None:
    paths = installation.paths
    inbox.prepare(paths)
    drop(paths.inbox, "cat.png", picture("red"))
    drop(paths.inbox, "cat.txt", "---\nkind: video\n---\n")
    entry = drops.scan(paths.inbox, None, time.monotonic).entries["cat.txt"]
    with (paths.inbox / "cat.txt").open("a") as late:
        inbox.claim(paths, entry, inbox.new_submission(), (".png",))
        with running(tuned(installation, partner_s=0.1), lambda: os.close(late.fileno())):
            drop(paths.inbox, "summer/hare.txt", "a hare")
            until(lambda: prompts(queue) == ["a hare"])
            assert left(paths.inbox) == ["cat.png"]
            late.write("a cat")
            late.close()
            until(lambda: is_finished(installation))

    assert filed(paths.accepted) == ["cat.png", "cat.txt", "hare.txt"]
    assert sorted((spec.prompt, bool(spec.image)) for spec in line(queue)) == [("a cat", True), ("a hare", False)]


def test_a_picture_of_any_size_holds_up_no_text(installation: Installation, queue: JobQueue) -> None:
    """Reading a sparse file of 40 GB takes 40 s."""
    folder = installation.paths.inbox
    folder.mkdir()
    with (folder / "scan.png").open("wb") as scan:
        scan.truncate(40 << 30)
    with running(tuned(installation, partner_s=0.5)):
        until(lambda: filed(installation.paths.rejected) == ["scan.png"], timeout_s=10)
        drop(folder, "fox.txt", "a fox")
        until(lambda: prompts(queue) == ["a fox"], timeout_s=10)


@pytest.mark.parametrize("change", ["deleted", "renamed away"])
def test_inbox_made_again_keeps_working(installation: Installation, queue: JobQueue, change: str) -> None:
    folder = installation.paths.inbox
    with running(installation.config):
        until(installation.paths.rejected.is_dir)
        drop(folder, "summer/first.txt", "first")
        until(lambda: prompts(queue) == ["first"] and not left(folder))
        if change == "deleted":
            until(lambda: shutil.rmtree(folder, ignore_errors=True) or not folder.exists())
        else:
            folder.rename(folder.with_name("old"))
        time.sleep(0.3)
        assert not folder.exists()
        folder.mkdir()
        until(installation.paths.rejected.is_dir)
        drop(folder, "second.txt", "second")
        drop(folder, "summer/third.txt", "third")
        until(lambda: prompts(queue) == ["first", "second", "third"])


def test_file_that_cannot_be_moved_is_left_and_the_rest_goes_on(installation: Installation, queue: JobQueue) -> None:
    folder = installation.paths.inbox
    stuck = drop(folder, "locked/stuck.txt", "stuck")
    drop(folder, "fox.txt", "a fox")
    with _immovable(stuck), running(installation.config):
        until(lambda: prompts(queue) == ["a fox"])
        assert left(folder) == ["locked/stuck.txt"]


@contextmanager
def _immovable(file: Path) -> Iterator[None]:
    """Nobody but root is stopped by modes, and root by nothing but chattr."""
    if os.geteuid():
        file.parent.chmod(0o500)
        yield
        file.parent.chmod(0o700)
        return
    if subprocess.run(["chattr", "+i", file], stderr=subprocess.DEVNULL).returncode:
        pytest.skip("root, and a file system without chattr +i")
    yield
    subprocess.run(["chattr", "-i", file], check=True)


def test_second_process_is_refused(installation: Installation, queue: JobQueue) -> None:
    with running(installation.config):
        until(installation.paths.rejected.is_dir)
        second = Process(installation.config)
        until(second.ended)

    assert second.status == 3


def test_a_lock_that_a_killed_process_still_holds_for_a_moment_ends_nobody(
    installation: Installation, queue: JobQueue
) -> None:
    """The kernel lets go of it once the disk has answered the dead one's last write."""
    installation.paths.state.mkdir(parents=True, exist_ok=True)
    program = (
        "import fcntl, sys, time\n"
        "lock = open(sys.argv[1], 'a'); fcntl.flock(lock, fcntl.LOCK_EX); print('held', flush=True); time.sleep(1)"
    )
    command = [sys.executable, "-c", program, str(installation.paths.state / "inbox.lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as dying:
        assert dying.stdout is not None
        assert dying.stdout.readline() == b"held\n"
        with running(installation.config):
            until(installation.paths.rejected.is_dir)


def test_unusable_inbox_is_refused_at_start(installation: Installation) -> None:
    installation.paths.inbox.write_text("a file where the folder belongs")
    process = Process(installation.config)

    until(process.ended)

    assert process.status == 3


def test_many_files_are_queued_once_each_in_the_order_people_count(installation: Installation, queue: JobQueue) -> None:
    """They lie in one batch folder, which is taken when it has settled, so the order is that of the names."""
    folder = installation.paths.inbox
    folder.mkdir()
    (folder / "many").mkdir()
    with running(installation.config) as process:
        for number in reversed(range(600)):
            (folder / f"many/{number}.txt").write_text(f"number {number}")
        until(lambda: queue.counts()["queued"] == 600)
        assert process.stop() == 0

    assert prompts(queue) == [f"number {number}" for number in range(600)]


def test_sigterm_in_the_middle_of_many_files_finishes_the_group_in_hand(
    installation: Installation, queue: JobQueue
) -> None:
    folder = installation.paths.inbox
    for number in range(600):
        drop(folder, f"{number}.txt", f"number {number}")
    with running(installation.config) as process:
        until(lambda: queue.counts()["queued"] > 0)
        started = time.monotonic()
        assert process.stop() == 0
        assert time.monotonic() - started < 60

    assert list(installation.paths.claimed.iterdir()) == []
    assert len(left(folder)) == 600 - queue.counts()["queued"]


DROPS: dict[str, str | bytes] = {
    "fox.txt": "a {red|white|grey} fox\na hare",
    "bad.md": "---\nwidth: 30\n---\nx",
    "cat.png": picture("red"),
    "cat.txt": "---\nkind: video\n---\na cat",
    "high/summer/dawn.txt": "--prompt dawn --n_iter 2",
    "night.pdf": "%PDF",
}
JOBS = Counter({"a cat": 1, "dawn": 2, "fox": 1, "a hare": 1})


def test_kill_at_any_step_loses_nothing_and_doubles_nothing(installation: Installation, queue: JobQueue) -> None:
    """SIGKILL before the 1st, 2nd, 3rd ... change that the process makes on disk, and again while it recovers."""
    config = tuned(installation, settle_s=0.0, partner_s=0.1)
    step, unhurt = 0, False
    while not unhurt:
        step += 1
        queue.server.flushall()
        for folder in (installation.paths.inbox, installation.paths.jobs, installation.paths.inputs):
            shutil.rmtree(folder, ignore_errors=True)
        for path, content in DROPS.items():
            drop(installation.paths.inbox, path, content)

        with running(config, partial(die_at, step, installation.root)) as first:
            until(lambda: first.ended() or is_finished(installation))
            unhurt = not first.ended()
        with running(config, partial(die_at, 7 + step % 25, installation.root)) as second:
            until(lambda: second.ended() or is_finished(installation))
        with running(config) as third:
            until(lambda: is_finished(installation))
            assert third.stop() in (0, -signal.SIGTERM)  # the latter when there was nothing left to do for it

        check_nothing_lost_nothing_doubled(installation, queue)
    assert step > 30


def die_at(step: int, root: Path) -> None:
    """Kill this process with SIGKILL in front of its `step`th change below `root`."""
    changes = {"open", "os.rename", "os.mkdir", "os.remove", "os.utime"}
    count = 0

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal count
        if event not in changes or (event == "open" and not int(str(arguments[2])) & os.O_ACCMODE):
            return
        if event == "open" and not str(arguments[0]).startswith(str(root)):
            return
        count += 1
        if count == step:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def is_finished(installation: Installation) -> bool:
    claimed = installation.paths.claimed
    return not left(installation.paths.inbox) and claimed.is_dir() and not os.listdir(claimed)


def check_nothing_lost_nothing_doubled(installation: Installation, queue: JobQueue) -> None:
    jobs = line(queue)
    assert Counter("fox" if job.prompt.endswith("fox") else job.prompt for job in jobs) == JOBS
    assert [job.prompt for job in jobs if job.image] == ["a cat"]
    assert [job.model_dump() for job in installation.ledger.accepted()] == [
        job.model_dump() for job in sorted(jobs, key=lambda job: job.id)
    ]
    assert filed(installation.paths.accepted) == ["cat.png", "cat.txt", "dawn.txt", "fox.txt"]
    assert filed(installation.paths.accepted, ".ticket.json") == [
        f"{name}.ticket.json" for name in ("cat.txt", "dawn.txt", "fox.txt")
    ]
    tickets = [json.loads(file.read_text()) for file in installation.paths.accepted.rglob("*.ticket.json")]
    assert sorted(job for ticket in tickets for job in ticket["jobs"]) == sorted(job.id for job in jobs)
    assert filed(installation.paths.rejected) == ["bad.md", "night.pdf"]
    assert len(filed(installation.paths.rejected, ".error.txt")) == 2
