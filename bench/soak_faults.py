"""What a soak does to the daemon: the faults, when they come, and how those that last end."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from bench.scratch import Scratch
from bench.soak_jobs import Commands, Said
from bench.soak_processes import ROLES, Processes
from safelight.ledger import Attempts, Ledger

RESERVE_BYTES = 4 << 20
"""[policy] min_free_disk_gib of the soak."""

CATCH_S = 0.3
"""For so long the soak does nothing but watch for a moment that is too short for its usual looks."""

PUBLISHING_S = 0.04
"""Publishing takes about half of it; a fault's own delay, of at most half a second, picks the moment."""


@dataclass(frozen=True)
class Fault:
    """One thing that happens, so long after so many jobs have ended, and for how long."""

    after_jobs: int
    delay_s: float
    act: str
    on: str
    seconds: float


KILLS = [("kill", role) for role in ROLES] + [("catch", "engine")]
STOPS = [("stop", role) for role in (*ROLES, "everything")]
ENDS_A_LIFE = {(act, role) for act in ("kill", "term", "catch") for role in ("inbox", "worker", "horse", "engine")}
"""What a figure of memory over a long life cannot bear."""

OTHERS = [
    ("term", "redis"), ("term", "inbox"), ("term", "worker"), ("outage", "redis"), ("outage", "redis"),
    ("wipe", "redis"), ("pause", "queue"), ("fill", "state"), ("fill", "out"), ("fill", "state+out"),
    ("hide", "models"),
]  # fmt: skip


def schedule(faults: int, jobs: int, spared_from: int, left_out: Mapping[str, str], rng: random.Random) -> list[Fault]:
    """Return that many faults in the order in which they come: each kind once at least, then at random.

    Args:
        spared_from: after so many jobs nothing ends a worker, an inbox or an engine any more.
        left_out: acts that this machine or this soak cannot do.
    """
    possible = [kind for kind in KILLS + STOPS + OTHERS if kind[0] not in left_out]
    # a kill is what a night is most likely to bring, and the cheapest here
    drawn = possible + rng.choices(possible, [3 if kind in KILLS else 1 for kind in possible], k=faults)
    found = []
    for act, on in drawn[: max(faults, len(possible))]:
        last = spared_from if (act, on) in ENDS_A_LIFE else jobs
        after = rng.randrange(int(last * 0.75))
        found.append(Fault(after, round(rng.uniform(0.0, 0.5), 3), act, on, round(rng.uniform(0.5, 2.5), 2)))
    return sorted(found, key=lambda fault: fault.after_jobs)


class Faults:
    """Brings scheduled faults over the daemon when they are due and possible, and ends those that last."""

    def __init__(
        self, due: Sequence[Fault], place: Scratch, processes: Processes, commands: Commands, disks: Mapping[str, Path]
    ) -> None:
        self._due = list(due)
        self._place = place
        self._paths = place.config.paths
        self._processes = processes
        self._commands = commands
        self._disks = disks
        self._ledger = Ledger(place.config.paths)
        self._since: float | None = None
        self._ends: list[tuple[float, str, Callable[[], None]]] = []
        self._left = 0
        self.struck: Counter[str] = Counter()
        self.pauses: list[tuple[float, float]] = []
        """From when to when (epoch seconds) nothing may have started."""

    @property
    def left(self) -> int:
        """How many have not come, because their time or their victim never did."""
        return self._left or len(self._due)

    def state(self) -> list[str]:
        """Return in words what lasts, and what is to come next."""
        return [f"{act} lasts" for _, act, _ in self._ends] + [f"{fault} waits" for fault in self._due[:1]]

    @property
    def lasting(self) -> bool:
        return bool(self._ends)

    def tend(self, ended: int) -> None:
        """End what has lasted long enough, then bring the next fault if it is due."""
        now = time.monotonic()
        for entry in [entry for entry in self._ends if entry[0] <= now]:
            self._ends.remove(entry)
            entry[2]()
        if not self._due or ended < self._due[0].after_jobs:
            return
        fault = self._due[0]
        self._since = self._since or now
        if now >= self._since + fault.delay_s and self._strike(fault, now):
            self._due.pop(0)
            self._since = None
            self.struck[f"{fault.act} {fault.on}"] += 1

    def end_all(self) -> None:
        """Drop what has not come, and end what lasts, now: what follows needs the daemon whole."""
        self._left = len(self._due)
        self._due.clear()
        for _, _, end in self._ends:
            end()
        self._ends.clear()

    def _strike(self, fault: Fault, now: float) -> bool:
        """Bring a fault; False while it is not possible: no such process runs, or the same fault lasts."""
        if any(key == fault.act for _, key, _ in self._ends):
            return False
        match fault.act:
            case "kill" | "term":
                return self._signal(fault)
            case "catch":
                return self._catch_publishing(fault.delay_s * PUBLISHING_S)
            case "stop":
                return self._stop(fault, now)
            case "outage":
                if not self._kill("valkey"):
                    return False
                self._processes.away_until["redis"] = now + fault.seconds
            case "wipe":
                return self._wipe()
            case "pause":
                self._pause(fault.seconds)
            case "fill":
                self._fill(fault, now)
            case "hide":
                self._hide_models(fault, now)
        return True

    # -- processes ------------------------------------------------------------------------------------------------

    def _signal(self, fault: Fault) -> bool:
        if not self._may_disturb(fault.on):
            return False
        if fault.act == "kill":
            return self._kill(fault.on)
        process = self._processes.find(fault.on)
        if process is not None:
            process.terminate()
        return process is not None

    def _kill(self, role: str) -> bool:
        process = self._processes.find(role)
        if process is None:
            return False
        with suppress(psutil.NoSuchProcess):
            process.kill()
        return True

    def _catch_publishing(self, later_s: float) -> bool:
        """Kill the engine between the writing of a receipt-to-be and its becoming the receipt: milliseconds."""
        if not self._may_disturb("engine"):
            return False
        until = time.monotonic() + CATCH_S
        while time.monotonic() < until:
            with suppress(FileNotFoundError):
                if os.listdir(self._paths.publishing):
                    time.sleep(later_s)  # at any of the renames and syncs in between
                    return self._kill("engine")
        return False

    def _may_disturb(self, role: str) -> bool:
        """A job that breaks the engine three times, or that the machine takes back six times, is rightly set aside:
        spare what is near that through no fault of its own."""
        started = self._ledger.interrupted() if role in ("engine", "horse", "worker") else []
        return not any(self._is_worn(attempts) for attempts in started)

    def _is_worn(self, attempts: Attempts) -> bool:
        return attempts.crashes >= 1 or attempts.returns >= 3

    def _stop(self, fault: Fault, now: float) -> bool:
        roles = ROLES if fault.on == "everything" else (fault.on,)
        found = [process for role in roles if (process := self._processes.find(role))]
        if not found:
            return False
        for process in found:
            with suppress(psutil.NoSuchProcess):
                process.suspend()

        def go_on() -> None:
            for process in found:
                with suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGCONT)

        self._ends.append((now + fault.seconds, "stop", go_on))
        return True

    def _wipe(self) -> bool:
        """Kill the server and delete what it kept, before it is started again."""
        found = [process for role in ("redis", "valkey") if (process := self._processes.find(role))]
        if len(found) < 2:
            return False
        for process in found:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(found, timeout=10)
        shutil.rmtree(self._paths.redis)
        return True

    # -- the rest -------------------------------------------------------------------------------------------------

    def _pause(self, seconds: float) -> None:
        """Pause as a person does, resume so much later, and remember in between; both until they succeed."""
        self._ends.append((float("inf"), "pause", lambda: None))  # lasts until it has been resumed

        def paused(said: Said) -> None:
            if said.status:
                self._commands.start(["pause", "soak"], paused)
                return
            since = time.time()
            self._ends.append((time.monotonic() + seconds, "resume", lambda: resume(since)))

        def resume(since: float) -> None:
            self.pauses.append((since, time.time()))
            self._commands.start(["resume"], resumed)

        def resumed(said: Said) -> None:
            if said.status or "resume again" in said.err:
                self._commands.start(["resume"], resumed)
                return
            self._ends[:] = [entry for entry in self._ends if entry[1] != "pause"]

        self._commands.start(["pause", "soak"], paused)

    def _fill(self, fault: Fault, now: float) -> None:
        """Fill disks to their last byte, or to below the reserve."""
        leave_bytes = 0 if fault.seconds < 1.5 else RESERVE_BYTES // 2
        fillers = [self._disks[name] / "filler" for name in fault.on.split("+")]
        for filler in fillers:
            _fill(filler, leave_bytes)

        def free() -> None:
            for filler in fillers:
                filler.unlink(missing_ok=True)

        self._ends.append((now + fault.seconds, "fill", free))

    def _hide_models(self, fault: Fault, now: float) -> None:
        """Leave an empty folder where the models were, as an unmounted disk does."""
        models = self._paths.models
        away = models.with_name("models.away")
        models.rename(away)
        models.mkdir()

        def bring_back() -> None:
            models.rmdir()
            away.rename(models)

        self._ends.append((now + fault.seconds, "hide", bring_back))


def _fill(filler: Path, leave_bytes: int) -> None:
    """Make a file that leaves so much of its disk; others write meanwhile, so what fails is asked for again."""
    with filler.open("wb") as file:
        for _ in range(20):
            there = os.fstatvfs(file.fileno())
            free_bytes = there.f_bavail * there.f_frsize - leave_bytes
            if free_bytes <= 0:
                return
            with suppress(OSError):
                os.posix_fallocate(file.fileno(), os.fstat(file.fileno()).st_size, free_bytes)
