"""What a real watchdog hears: progress is life, and nothing else is."""

from __future__ import annotations

import psutil

from tests.systemd.booted import LONG_S, SETTINGS, Daemon, Machine, until

WATCHDOG_S = 20
"""In place of two minutes; a `long` step takes as many times as long as one of five minutes in a night."""

SOON = "[Service]\nRestartSec=200ms\n"
IMPATIENT = f"[Service]\nWatchdogSec={WATCHDOG_S}s\n"
"""Of the worker alone: on a busy machine a server may be without the CPU for half of that."""


def test_a_step_longer_than_the_watchdogs_time_is_alive_and_a_hung_engine_is_not(machine: Machine) -> None:
    """Side by side: the system's worker is in a long step, the person's has an engine that hangs. First the horse
    notices and kills it; then the horse is stopped as well, and nobody is left but systemd."""
    system, user = Daemon(machine, "system"), Daemon(machine, "user")
    system.script(SOON)
    system.drop_in("worker@", IMPATIENT, "impatient")
    system.install()
    assert until(lambda: system.active("redis", "worker@0"), 60), machine.journal()
    (long,) = system.submit("long")  # before the person has a daemon that takes the person's jobs
    assert system.started(long)
    patient = (system.main("worker@0"), system.show("worker@0", "NRestarts"))
    system.safelight("pause", "dinner")

    user.script(SOON)
    user.drop_in("worker@", IMPATIENT, "impatient")
    user.install(f"{SETTINGS}[worker.deadline_s]\ndenoise = 3\n")
    assert until(lambda: user.active("redis", "worker@0"), 60), machine.journal()
    (hung,) = user.submit("hang hang ok")
    first = user.main("worker@0")
    assert until(lambda: user.runs().count(f"start {hung}") == 2, 30), machine.journal()
    assert user.main("worker@0") == first
    worker = psutil.Process(machine.outside(first))
    next(child for child in worker.children() if "worker_process" in " ".join(child.cmdline())).suspend()

    running = f"Running {long}; denoise 1 of 2; Held: user: dinner"
    assert until(lambda: system.show("worker@0", "StatusText") == running, 15), system.show("worker@0", "StatusText")
    assert until(lambda: user.main("worker@0") not in (0, first), 3 + 3 * WATCHDOG_S), machine.journal()
    assert user.done([hung]), machine.journal()
    assert user.runs() == [f"start {hung}"] * 3 + [f"done {hung}"]
    assert f"Watchdog timeout (limit {WATCHDOG_S}s)!" in machine.journal(500)

    assert system.done([long]), machine.journal()
    assert (system.main("worker@0"), system.show("worker@0", "NRestarts")) == patient
    assert system.runs() == [f"start {long}", f"done {long}"]
    assert LONG_S / WATCHDOG_S == 300 / 120
    assert until(lambda: system.show("worker@0", "StatusText") == "Held: user: dinner", 10)
