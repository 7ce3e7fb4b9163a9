"""Both sets under a real systemd, the system's and that of a person who lingers: stopped, killed, restarted, starved.

The worker is the real one and its engine is scripted (tests/daemon/scripted_engine.py): no torch, and it does what the
prompt says. The waits before restarts are shortened to 0.2 s. One machine a set is booted for all tests of this file;
each leaves it as it was.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from safelightd import redis_server
from tests.systemd.booted import Daemon, boot, until
from tests.systemd.conftest import KINDS

SERVICES = ("redis", "inbox", "worker@0")

EXPOSURE_MAX = {
    ("system", "redis"): 0.2,
    ("system", "inbox"): 0.2,
    ("system", "worker@0"): 1.0,
    ("user", "redis"): 6.1,
    ("user", "inbox"): 6.1,
    ("user", "worker@0"): 6.3,
}
"""What `systemd-analyze security` of systemd 252 says of the loaded units, 2026-11-26: 0 is best."""

LIMIT_BYTES = 200 << 20


@pytest.fixture(scope="module", params=KINDS)
def booted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with boot(tmp_path_factory.mktemp("machine")) as machine:
        daemon = Daemon(machine, request.param)
        daemon.script("[Service]\nRestartSec=200ms\n")
        daemon.install()
        yield daemon


@pytest.fixture
def daemon(booted: Daemon) -> Daemon:
    """All services up, nothing in the line."""
    booted.systemctl("reset-failed", "safelight*")
    booted.systemctl("start", *(f"safelight-{name}.service" for name in SERVICES))
    assert until(lambda: booted.active(*SERVICES), 60), booted.machine.journal()
    return booted


@pytest.fixture
def slow_server(daemon: Daemon) -> Iterator[Path]:
    """Put a server in place of ours that begins to load when the file that this yields is there."""
    gate = daemon.paths.state / "gate"
    server = daemon.machine.path(redis_server.find_binary())
    real = server.rename(server.with_name("the-real-one"))
    wait = f"[ $1 = --version ] || until [ -e {daemon.inside(gate)} ]; do sleep 0.1; done"
    # Named by where this one lies: a checkout below /tmp is not seen by a service with PrivateTmp=.
    server.write_text(f'#!/bin/sh\n{wait}\nexec "${{0%/*}}/{real.name}" "$@"\n')
    server.chmod(0o755)
    gate.unlink(missing_ok=True)
    yield gate
    gate.touch()
    real.rename(server)


def began(daemon: Daemon, jobs: list[str]) -> list[str]:
    """Return these jobs in the order in which they began, as often as they did."""
    words = [line.split() for line in daemon.runs()]
    return [job for word, job in words if word == "start" and job in jobs]


def times_done(daemon: Daemon, jobs: list[str]) -> list[int]:
    return [daemon.runs().count(f"done {job}") for job in jobs]


def ended(daemon: Daemon, name: str) -> tuple[str, str]:
    """Return how a service's last process ended, and what systemd thinks of it."""
    code = {"1": "exited", "2": "killed", "3": "dumped"}.get(daemon.show(name, "ExecMainCode"), "?")
    return f"{code}:{daemon.show(name, 'ExecMainStatus')}", daemon.show(name, "Result")


def children(daemon: Daemon, name: str) -> list[psutil.Process]:
    """Return what a service that runs has started."""
    return psutil.Process(daemon.machine.outside(daemon.main(name))).children()


def named(daemon: Daemon, name: str) -> list[str]:
    """Return what the children of a service are called; nothing while it does not run."""
    try:
        return [one.name() for one in children(daemon, name)] if daemon.main(name) else []
    except psutil.NoSuchProcess:
        return []


def child(daemon: Daemon, name: str, word: str, *, without: bool = False) -> psutil.Process:
    """Return the child of a service whose command line has, or has not, a word."""
    return next(one for one in children(daemon, name) if (word in " ".join(one.cmdline())) != without)


# -- stopping and starting again ------------------------------------------------------------------------------------


def test_nothing_is_ready_before_the_server_answers(daemon: Daemon, slow_server: Path) -> None:
    """The server takes its time to load; later it hangs while a worker starts."""
    restart = [f"safelight-{name}.service" for name in ("redis", "worker@0")]
    daemon.systemctl("stop", *restart)
    daemon.systemctl("start", "--no-block", *restart)

    # A child that only says its version comes first.
    assert until(lambda: named(daemon, "redis") == ["valkey-server"], 40), daemon.machine.journal()
    assert [daemon.show(name, "ActiveState") for name in ("redis", "worker@0")] == ["activating", "inactive"]

    slow_server.touch()

    assert until(lambda: daemon.active("redis", "worker@0"), 30)

    server = child(daemon, "redis", "the-real-one")
    daemon.systemctl("stop", "safelight-worker@0.service")
    server.suspend()
    try:
        daemon.systemctl("start", "--no-block", "safelight-worker@0.service")

        assert until(lambda: daemon.show("worker@0", "StatusText") == "Waiting for the queue server", 20)
        assert daemon.show("worker@0", "ActiveState") == "activating"
    finally:
        server.resume()
    assert until(lambda: daemon.active("worker@0"), 30)
    assert daemon.show("worker@0", "StatusText") == "Waiting for jobs"
    assert daemon.show("redis", "StatusText").startswith("Serving on /run/")


def test_a_stop_in_the_middle_of_a_job_puts_it_back_in_front_and_exits_0(daemon: Daemon) -> None:
    running, *waiting = daemon.submit("slow ok", "ok", "ok")
    assert daemon.started(running)
    began_at = time.monotonic()
    stopped = daemon.systemctl("stop", "safelight-worker@0.service")

    assert stopped.returncode == 0, stopped.stderr
    assert time.monotonic() - began_at < 60  # of TimeoutStopSec=90s
    assert ended(daemon, "worker@0") == ("exited:0", "success")
    assert daemon.states([running, *waiting]) == ["queued"] * 3
    with daemon.queue() as queue:
        assert [job for job in queue.waiting_ids() if job in (running, *waiting)] == [running, *waiting]
    attempts = daemon.ledger.attempts(running)
    assert (attempts.crashes, attempts.returns, attempts.running) == (0, 0, False)

    daemon.systemctl("start", "safelight-worker@0.service")

    assert daemon.done([running, *waiting])
    assert began(daemon, [running, *waiting]) == [running, running, *waiting]
    assert times_done(daemon, [running, *waiting]) == [1, 1, 1]


def test_two_quick_sigterms_end_the_worker_once_and_politely(daemon: Daemon) -> None:
    """It is not restarted here, so that systemd still tells how it ended."""
    (job,) = daemon.submit("slow ok")
    assert daemon.started(job)
    daemon.drop_in("worker@", "[Service]\nRestart=no\n", "once")
    try:
        twice = "kill -TERM $0; sleep 0.05; kill -TERM $0"
        killed = daemon.machine.root("sh", "-c", twice, str(daemon.main("worker@0")))

        assert killed.returncode == 0, killed.stderr
        assert until(lambda: daemon.show("worker@0", "ActiveState") == "inactive", 20)
    finally:
        daemon.drop_in("worker@", "", "once")
    assert ended(daemon, "worker@0") == ("exited:0", "success")
    assert daemon.states([job]) == ["queued"]
    attempts = daemon.ledger.attempts(job)
    assert (attempts.crashes, attempts.returns) == (0, 0)

    daemon.systemctl("start", "safelight-worker@0.service")

    assert daemon.done([job])
    assert times_done(daemon, [job]) == [1]


def test_a_restart_of_everything_with_100_waiting_loses_and_doubles_nothing(daemon: Daemon) -> None:
    jobs = daemon.submit("slow ok", *["ok"] * 100)
    assert daemon.started(jobs[0])
    before = [daemon.main(name) for name in SERVICES]
    restarted = daemon.systemctl("restart", *(f"safelight-{name}.service" for name in SERVICES))

    assert restarted.returncode == 0, restarted.stderr
    assert not set(before) & {daemon.main(name) for name in SERVICES}
    assert daemon.done(jobs)
    assert began(daemon, jobs) == [jobs[0], *jobs]
    assert times_done(daemon, jobs) == [1] * 101


@pytest.mark.parametrize(("words", "status"), [("--no-such-option", "2"), ("--config /nowhere", "3")])
def test_what_restarting_cannot_help_is_not_restarted(daemon: Daemon, words: str, status: str) -> None:
    for name in SERVICES:
        wrong = f"{daemon.bin}/safelightd {words} {name.removesuffix('@0')}"
        daemon.drop_in(name.removesuffix("0"), f"[Service]\nExecStart=\nExecStart={wrong}\n", "wrong")
    try:
        daemon.systemctl("restart", "--no-block", *(f"safelight-{name}.service" for name in SERVICES))

        assert until(lambda: all(daemon.show(name, "ActiveState") == "failed" for name in SERVICES), 20)
        assert [daemon.show(name, "ExecMainStatus") for name in SERVICES] == [status] * 3
        assert [daemon.show(name, "NRestarts") for name in SERVICES] == ["0"] * 3
    finally:
        for name in SERVICES:
            daemon.drop_in(name.removesuffix("0"), "", "wrong")


# -- killing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("victim", ["worker", "engine", "horse", "redis", "valkey", "inbox"])
def test_whatever_is_killed_its_unit_is_back_and_the_job_is_done_once(daemon: Daemon, victim: str) -> None:
    first, second = daemon.submit("slow ok", "ok")
    assert daemon.started(first)
    unit = {"worker": "worker@0", "engine": "worker@0", "horse": "worker@0", "valkey": "redis"}.get(victim, victim)
    mains = {name: daemon.main(name) for name in SERVICES}
    match victim:
        case "engine":
            child(daemon, unit, "worker_process", without=True).kill()
        case "horse":
            child(daemon, unit, "worker_process").kill()
        case "valkey":
            child(daemon, unit, "valkey-server").kill()
        case _:
            psutil.Process(daemon.machine.outside(daemon.main(unit))).kill()

    assert daemon.done([first, second]), daemon.machine.journal()
    assert times_done(daemon, [first, second]) == [1, 1]
    assert until(lambda: daemon.active(*SERVICES), 20)
    gone = {name for name in SERVICES if daemon.main(name) != mains[name]}
    assert gone == (set() if victim in ("engine", "horse") else {unit})
    assert daemon.submit("ok")


# -- memory and sandbox ---------------------------------------------------------------------------------------------


@pytest.fixture
def limited(daemon: Daemon) -> Iterator[Daemon]:
    """Little memory for the worker and its engine, of whichever version cgroups have here."""
    unit = "safelight-worker@0.service"
    old = Path("/sys/fs/cgroup/memory")
    if not (old / "memory.limit_in_bytes").exists():
        daemon.systemctl("set-property", "--runtime", unit, f"MemoryMax={LIMIT_BYTES}", "MemorySwapMax=0")
        if not list(daemon.machine.path("/sys/fs/cgroup").rglob(f"{unit}/memory.max")):
            pytest.skip("no cgroup limits memory here")
        yield daemon
        daemon.systemctl("set-property", "--runtime", unit, "MemoryMax=", "MemorySwapMax=")
        return
    folder = old / f"safelight-test-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"no cgroup can be made here: {error}")
    (folder / "memory.limit_in_bytes").write_text(str(LIMIT_BYTES))
    main = psutil.Process(daemon.machine.outside(daemon.main("worker@0")))
    for process in (main, *main.children(recursive=True)):
        (folder / "cgroup.procs").write_text(str(process.pid))
    yield daemon
    for pid in (folder / "cgroup.procs").read_text().split():
        (old / "cgroup.procs").write_text(pid)
    folder.rmdir()


def test_an_engine_that_the_kernel_kills_for_memory_leaves_the_worker(limited: Daemon) -> None:
    main, restarts = limited.main("worker@0"), limited.show("worker@0", "NRestarts")
    swollen, fine = limited.submit("swell ok", "ok")

    assert limited.done([swollen, fine]), limited.machine.journal()
    assert (limited.main("worker@0"), limited.show("worker@0", "NRestarts")) == (main, restarts)
    assert times_done(limited, [swollen, fine]) == [1, 1]
    receipt = limited.ledger.receipt(swollen)
    assert receipt is not None
    assert receipt.plan is not None
    assert [overrun.memory for overrun in receipt.overruns] == ["host"]
    assert receipt.plan.rung != receipt.overruns[0].rung


def test_exposure_of_the_loaded_units_is_no_higher_than_measured(daemon: Daemon) -> None:
    for name in SERVICES:
        words = [f"--{daemon.kind}", "security", "--no-pager", f"safelight-{name}.service"]
        told = daemon.as_owner("systemd-analyze", *words).stdout
        exposure = re.search(r"Overall exposure level for \S+: ([0-9.]+)", told)

        assert exposure, told
        assert float(exposure[1]) <= EXPOSURE_MAX[daemon.kind, name], told


def test_inside_its_sandbox_no_service_reaches_network_or_system(daemon: Daemon) -> None:
    daemon.machine.path("/tmp/of-the-machine").touch()
    folder = daemon.paths.state
    for name in SERVICES:
        seen = daemon.inside(folder / f"seen-{name}")
        look = f"{daemon.bin}/python {daemon.checkout}/tests/systemd/look_around.py {seen}"
        daemon.drop_in(name.removesuffix("0"), f"[Service]\nExecStartPre={look}\n", "look")
    restarted = daemon.systemctl("restart", *(f"safelight-{name}.service" for name in SERVICES))
    for name in SERVICES:
        daemon.drop_in(name.removesuffix("0"), "", "look")

    assert restarted.returncode == 0, restarted.stderr + daemon.machine.journal()
    for name in SERVICES:
        found = json.loads((folder / f"seen-{name}").read_text())
        families = {"inet": "EAFNOSUPPORT", "inet6": "EAFNOSUPPORT", "netlink": "EAFNOSUPPORT", "unix": "done"}
        assert families.items() <= found.items(), name
        assert found["no_new_privileges"] == "1"
        if daemon.kind == "system":
            assert found["interfaces"] == ["lo"]
            assert (found["usr"], found["home"], found["tmp"]) == ("EROFS", "EACCES", False)
            assert int(found["capabilities"], 16) == 0, name
