"""The engine: the process that has torch and the GPU. It takes one job at a time from the link and answers.

Killed, it gives every byte of the GPU back; so everything that can break CUDA happens here and nothing else does.
Knows no queue and no RQ. It ends when the link closes, and with the worker.
"""

from __future__ import annotations

import argparse
import errno
import os
import queue
import signal
import socket
import sys
import threading
from typing import Any

from safelight import config as settings
from safelight import models
from safelight.config import Config
from safelight.errors import SafelightError
from safelight.jobspec import JobSpec
from safelight.ledger import Ledger
from safelightd import logs
from safelightd.link import EngineGone, Link
from safelightd.logs import Log
from safelightd.progress import Cancelled, Watch

ALIVE_EVERY_S = 1.0

MACHINE_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ENOTCONN, errno.ESTALE)
"""What a full, read-only, broken or unmounted disk says: the machine's fault, not the job's."""

log = Log("safelight.engine")


class Engine:
    """Serves jobs from a link until it closes."""

    def __init__(self, config: Config, link: Link) -> None:
        self._config = config
        self._link = link
        self._models = models.load(config)
        self._ledger = Ledger(config.paths)
        self._jobs: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._stop = threading.Event()
        self._execution = ""
        self._cancelled_early: set[str] = set()

    def serve(self) -> int:
        """Answer jobs one after another; returns when the worker closes the link, or after a job that broke CUDA."""
        threading.Thread(target=self._read, daemon=True).start()
        from safelightd import runjob  # torch and diffusers: seconds, once

        setting = runjob.Setting(self._config, self._models, self._ledger)
        while (message := self._jobs.get()) is not None:
            if not self._answer(message, setting):
                return 1
        return 0

    def _read(self) -> None:
        """Take messages while a job runs: a cancellation must not wait for a kernel."""
        while True:
            try:
                message = self._link.receive()
            except EngineGone:
                self._leave()
                return
            if message is None:
                continue
            if message["type"] == "run":
                self._jobs.put(message)
            elif message["type"] == "cancel":
                self._cancelled_early.add(message["execution"])
                if message["execution"] == self._execution:
                    self._stop.set()

    def _leave(self) -> None:
        """The worker closed the link: end now in the middle of a job, in order between two."""
        if self._execution:
            os._exit(0)
        self._jobs.put(None)

    def _answer(self, message: dict[str, Any], setting: Any) -> bool:
        """Run one job and send its verdict; False when this process must not run another."""
        from safelightd import device, runjob

        self._execution = execution = str(message["execution"])
        self._stop.clear()
        if execution in self._cancelled_early:
            self._stop.set()
        done = threading.Event()
        threading.Thread(target=self._say_alive, args=(execution, done), daemon=True).start()
        watch = Watch(
            lambda fields: self._link.send(fields.pop("type"), execution, **fields), self._stop, device.ProcessMeter()
        )
        usable = True
        try:
            spec = JobSpec.model_validate(message["spec"], strict=False)
            receipt = runjob.run_job(spec, int(message["attempt"]), setting, watch)
            verdict: dict[str, Any] = {"kind": "done", "receipt": receipt.model_dump(mode="json", exclude_none=True)}
        except (Exception, Cancelled) as error:
            verdict = failure(error) | {"phase": watch.current}
            usable = verdict["kind"] in ("job", "cancelled", "machine")
            if not isinstance(error, (SafelightError, Cancelled)):
                log.exception("job.broke", execution=execution, phase=watch.current)
        done.set()
        device.release()
        if kept := device.held_bytes():
            log.warning("device.kept", execution=execution, bytes=kept)
        self._execution = ""
        self._cancelled_early.discard(execution)
        self._link.send("done" if verdict["kind"] == "done" else "failed", execution, **verdict)
        return usable

    def _say_alive(self, execution: str, done: threading.Event) -> None:
        while not done.wait(ALIVE_EVERY_S):
            try:
                self._link.send("alive", execution)
            except EngineGone:
                return


def failure(error: BaseException) -> dict[str, Any]:
    """Return whose fault an error is: the job's own, the machine's, or one after which this process is not trusted."""
    import torch

    from safelightd.outputs import OutboxUnwritable

    if isinstance(error, Cancelled):
        return {"kind": "cancelled", "message": "cancelled", "oom": False}
    if isinstance(error, OutboxUnwritable) or (isinstance(error, OSError) and error.errno in MACHINE_ERRNOS):
        return {"kind": "machine", "message": f"{error}", "oom": False}
    if isinstance(error, SafelightError):
        return {"kind": "job", "message": str(error), "oom": False}
    oom = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    if oom or isinstance(error, torch.AcceleratorError) or "CUDA" in str(error):
        return {"kind": "engine", "message": f"{type(error).__name__}: {error}", "oom": oom}
    return {"kind": "job", "message": f"{type(error).__name__}: {error}", "oom": False}


def main() -> int:
    """Serve the link whose descriptor is on the command line."""
    parser = argparse.ArgumentParser(prog="safelightd.engine")
    parser.add_argument("--link", type=int, required=True)
    parser.add_argument("--gpu", default="", help="the worker's, which need not be that of the settings")
    arguments = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal is the worker's business
    logs.set_up()
    link = Link(socket.socket(fileno=arguments.link))
    config = settings.load()
    return Engine(config.with_gpu(arguments.gpu) if arguments.gpu else config, link).serve()


if __name__ == "__main__":
    sys.exit(main())
