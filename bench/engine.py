"""A real engine without a worker: its process and its link, for the benches that look at one from outside."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safelight.config import Config
from safelight.jobspec import JobSpec
from safelight.receipt import Receipt
from safelightd import probe
from safelightd.link import EngineProcess

ANSWER_TIMEOUT_S = 300.0


class Engine:
    """An engine and what it answers."""

    def __init__(self, process: EngineProcess) -> None:
        self._process = process
        self._sent = 0

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def run(self, spec: JobSpec, waiting: int = 1) -> Receipt:
        """Run one job to its end.

        Raises:
            SystemExit: it did not get done; with what the engine said.
        """
        link = self._process.link
        assert link is not None
        self._sent += 1
        execution = f"bench-{self._sent}"
        job = spec.model_dump(mode="json")
        link.send("run", execution, spec=job, attempt=1, waiting=waiting, again=False, overruns=[], refused=[])
        while True:
            message: dict[str, Any] | None = link.receive(timeout_s=ANSWER_TIMEOUT_S)
            if message is None:
                raise SystemExit(f"{spec.id}: the engine has said nothing for {ANSWER_TIMEOUT_S:.0f} s.")
            if message["type"] == "failed":
                raise SystemExit(f"{spec.id}: {message['message']}")
            if message["type"] == "done" and message["execution"] == execution:
                return Receipt.model_validate(message["receipt"], strict=False)

    def memory_bytes(self, field: str = "VmRSS") -> int:
        """Return a figure of the process's /proc/PID/status: VmRSS, RssAnon."""
        lines = Path(f"/proc/{self.pid}/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


@contextmanager
def engine(config: Config) -> Iterator[Engine]:
    """Have an engine, as the worker starts it; it has exited when the block ends."""
    process = EngineProcess(config, probe.read_machine(config))
    process.ensure()
    try:
        yield Engine(process)
    finally:
        process.stop(timeout_s=30)
