"""`safelight up` with real processes: what dies is started again, what is hopeless ends all, nothing is left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from functools import partial

import psutil
import pytest

from safelight import queueserver
from safelight.jobqueue import JobQueue
from tests.conftest import Installation
from tests.daemon.test_worker import eventually, gone
from tests.programs import Start, programs

PROGRAM = """
import signal, sys
from safelight import config
from safelightd import logs
from safelightd.supervisor import Supervisor
if "--nohup" in sys.argv:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
logs.set_up()
sys.exit(Supervisor(config.load(), [name for name in sys.argv[1:] if name[0] != "-"]).run())
"""


@pytest.fixture
def up(installation: Installation) -> Iterator[Start]:
    with programs(installation.env) as run:
        yield partial(run, "-c", PROGRAM)


def family(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def serving(installation: Installation) -> JobQueue | None:
    try:
        return JobQueue(queueserver.connect(installation.config.url, timeout_s=1.0, retries=0))
    except queueserver.QueueUnreachable:
        return None


def server_pid(installation: Installation) -> int:
    queue = serving(installation)
    if queue is None:
        return 0
    pid = int(queue.server.info("server")["process_id"])
    queue.server.close()
    return pid


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_polite_signal_ends_all_with_0_and_leaves_no_process(
    up: Start, installation: Installation, number: signal.Signals
) -> None:
    process = up("redis")
    eventually(lambda: server_pid(installation))
    children = family(process)
    process.send_signal(number)

    assert process.wait(30) == 0
    assert len(children) == 2
    assert all(map(gone, children))


def test_a_closed_terminal_ends_nothing_under_nohup(up: Start, installation: Installation) -> None:
    process = up("redis", "--nohup")
    eventually(lambda: server_pid(installation))
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGTERM)
    _, log = process.communicate(timeout=300)

    assert process.returncode == 0
    assert "died" not in log


def test_a_killed_supervisor_takes_everything_along(up: Start, installation: Installation) -> None:
    process = up("redis")
    eventually(lambda: server_pid(installation))
    children = family(process)
    process.kill()
    eventually(lambda: all(map(gone, children)))


def test_whatever_dies_is_started_again_and_the_worker_goes_before_its_server(
    up: Start, installation: Installation
) -> None:
    process = up("redis", "worker")
    eventually(lambda: server_pid(installation))
    queue = serving(installation)
    assert queue is not None
    eventually(queue.workers)

    before = server_pid(installation)
    os.kill(before, signal.SIGKILL)
    eventually(lambda: server_pid(installation) not in (0, before))

    worker = next(child for child in psutil.Process(process.pid).children() if "worker" in child.cmdline())
    worker.kill()
    queue.server.delete("safelight:workers")
    eventually(queue.workers)
    children = family(process)
    process.terminate()
    _, log = process.communicate(timeout=300)

    assert process.returncode == 0
    assert all(map(gone, children))
    assert log.count("died process=redis status=1") == 1
    assert log.count("died process=worker status=-9") == 1
    assert "killed" not in log
    queue.server.close()


@pytest.mark.parametrize(("name", "status"), [("redis", 3), ("nonsense", 2)])
def test_what_a_restart_cannot_help_ends_all_with_its_exit_code(
    up: Start, installation: Installation, name: str, status: int
) -> None:
    installation.paths.redis.mkdir(parents=True)
    (installation.paths.redis / "server.json").write_text(json.dumps({"name": "valkey", "version": [99, 0, 0]}))
    process = up(name)
    _, log = process.communicate(timeout=300)

    assert process.returncode == status
    assert f"hopeless process={name} status={status}" in log


def test_a_home_that_cannot_be_written_ends_all_at_once_with_the_folder_named(installation: Installation) -> None:
    """Not a traceback every ten seconds for ever."""
    env = {
        name: value for name, value in installation.env.items() if name not in ("SAFELIGHT_CONFIG", "XDG_RUNTIME_DIR")
    }
    with programs(env | {"HOME": "/proc/nobody"}) as run:
        process = run("-m", "safelight.cli", "up")
        _, log = process.communicate(timeout=300)

    assert process.returncode == 3
    assert "/proc/nobody: No such file or directory. The queue server keeps its data in /proc/nobody/.local/" in log
    assert "Traceback" not in log
    assert log.count("started process=") == 1


def test_a_signal_during_the_wait_before_a_restart_is_heard(up: Start, installation: Installation) -> None:
    """A server that cannot listen dies at once, again and again."""
    (installation.paths.socket / "in the way").mkdir(parents=True)
    process = up("redis")
    assert process.stderr is not None
    waits = []
    while len(waits) < 3:
        line = process.stderr.readline()
        if "died process=redis status=1" in line:
            waits.append(line.split("restart_in_s=")[1].strip())
    process.terminate()
    _, rest = process.communicate(timeout=300)

    assert waits == ["0.1", "0.5", "2"]
    assert process.returncode == 0
    assert "started" not in rest
