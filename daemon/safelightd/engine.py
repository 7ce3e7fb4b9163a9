"""The engine: the process that has torch and the GPU. It takes one job at a time from the link and answers.

Killed, it gives every byte of the GPU back; so everything that can break CUDA happens here and nothing else does.
Knows no queue and no RQ. It ends when the link closes, and with the worker.
"""

from __future__ import annotations

import argparse
import os
import queue
import signal
import socket
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

from safelight import config as settings
from safelight import models
from safelight.config import Config
from safelight.errors import InvalidJob, SafelightError
from safelight.jobspec import JobSpec
from safelight.ledger import Ledger
from safelight.machine import GIB
from safelight.plan import Overrun
from safelight.planner import make_plan
from safelight.rung import Circumstances
from safelightd import calibration, logs, probe
from safelightd.link import EngineGone, Link
from safelightd.logs import Log
from safelightd.progress import Cancelled, Watch

ALIVE_EVERY_S = 1.0

OOM_SCORE_ADJ = 800
"""Of -1000 to 1000: the kernel ends this process before the worker, which can tell and try again, and before a person's
own programs."""

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
        self._asked: dict[str, str] = {}
        """What was asked of an execution, running or not yet: "cancel", or "stop" where the worker stops."""
        self._watch: Watch | None = None

    def serve(self) -> int:
        """Answer jobs one after another; returns when the worker closes the link, or after a job that broke CUDA or ran
        out of memory: the next one gets a fresh process."""
        threading.Thread(target=self._read, daemon=True).start()
        from safelightd import fused, runjob  # torch and diffusers: seconds, once
        from safelightd.embeddings import Cache
        from safelightd.pinnedset import PinnedSet

        setting = runjob.Setting(
            self._config,
            self._models,
            self._ledger,
            PinnedSet(_pinned_limit(self._config)),
            Cache(self._config.paths.embeddings, int(self._config.settings.worker.embeddings_gib * GIB)),
        )
        fused.tidy(self._config, self._models)
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
                self._asked[message["execution"]] = message["reason"]
                self._end_if_asked()

    def _end_if_asked(self) -> None:
        """Make the job that runs stop if it is the one that was asked to; the reason first, which it then looks at."""
        watch, reason = self._watch, self._asked.get(self._execution)
        if watch is None or reason is None:
            return
        watch.is_given_up = reason == "cancel"
        self._stop.set()

    def _leave(self) -> None:
        """The worker closed the link: end now in the middle of a job, in order between two."""
        if self._execution:
            os._exit(0)
        self._jobs.put(None)

    def _answer(self, message: dict[str, Any], setting: Any) -> bool:
        """Run one job and send its verdict; False when this process must not run another."""
        from safelightd import device, runjob
        from safelightd.failure import failure
        from safelightd.wan_cli import job as wan_cli

        self._execution = execution = str(message["execution"])
        self._stop.clear()
        done = threading.Event()
        threading.Thread(target=self._say_alive, args=(execution, done), daemon=True).start()
        watch = Watch(
            lambda fields: self._link.send(fields.pop("type"), execution, **fields), self._stop, device.ProcessMeter()
        )
        self._watch = watch
        self._end_if_asked()
        usable = True
        try:
            spec = spec_of(message)
            self._models = self._models.current()
            setting = replace(setting, models=self._models)
            run_job = {"diffusers": runjob.run_job, "wan-cli": wan_cli.run_job}[spec.backend]
            receipt = run_job(spec, int(message["attempt"]), setting, watch, circumstances_of(message))
            verdict: dict[str, Any] = {"kind": "done", "receipt": receipt.model_dump(mode="json", exclude_none=True)}
        except (Exception, Cancelled) as error:
            verdict = failure(error, watch)
            usable = verdict["kind"] in ("job", "cancelled", "machine", "refused", "no-room", "too-large")
            if not isinstance(error, (SafelightError, Cancelled)):
                log.exception("job.broke", execution=execution, phase=watch.current)
        done.set()
        if usable:  # else this process ends; of a broken context even giving back fails, and the verdict would be lost
            device.release()
            if kept := device.held_bytes():
                log.warning("device.kept", execution=execution, bytes=kept)
        if verdict["kind"] == "refused" and not self._has_another(message, verdict["precision"]):
            verdict["kind"] = "job"
        self._execution, self._watch = "", None
        self._asked.pop(execution, None)
        self._link.send("done" if verdict["kind"] == "done" else "failed", execution, **verdict)
        return usable

    def _has_another(self, message: dict[str, Any], precision: str) -> bool:
        """Whether the job could run in a precision whose result has not been refused; a person's own word stands."""
        from safelightd import device

        known = circumstances_of(message)
        around = replace(known, refused=(*known.refused, precision))
        learned = calibration.load(self._config.paths.state)
        try:
            machine = probe.read_machine(self._config, device.own())
            plan = make_plan(spec_of(message), machine, self._models, learned, around)
        except InvalidJob:
            return False
        return plan.precision not in around.refused

    def _say_alive(self, execution: str, done: threading.Event) -> None:
        while not done.wait(ALIVE_EVERY_S):
            try:
                self._link.send("alive", execution)
            except EngineGone:
                return


def _pinned_limit(config: Config) -> int:
    """Return how much pinned memory may wait for the next job; the plan has found room for all it asks for."""
    limit = config.settings.worker.host_cache_gib
    return sys.maxsize if limit == "auto" else int(float(limit) * GIB)


def spec_of(message: dict[str, Any]) -> JobSpec:
    return JobSpec.model_validate(message["spec"], strict=False)


def circumstances_of(message: dict[str, Any]) -> Circumstances:
    """Return what the worker knows of the job and a plan has to heed."""
    return Circumstances(
        waiting=int(message["waiting"]),
        overruns=tuple(Overrun.model_validate(overrun) for overrun in message["overruns"]),
        refused=tuple(message["refused"]),
        again=bool(message["again"]),
    )


def _offer_to_the_oom_killer(own: Path = Path("/proc/self/oom_score_adj")) -> None:
    own.write_text(str(max(int(own.read_text()), OOM_SCORE_ADJ)))


def main() -> int:
    """Serve the link whose descriptor is on the command line."""
    parser = argparse.ArgumentParser(prog="safelightd.engine")
    parser.add_argument("--link", type=int, required=True)
    parser.add_argument("--gpu", default="", help="the worker's, which need not be that of the settings")
    arguments = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal is the worker's business
    _offer_to_the_oom_killer()
    logs.set_up()
    link = Link(socket.socket(fileno=arguments.link))
    config = settings.load()
    return Engine(config.with_gpu(arguments.gpu) if arguments.gpu else config, link).serve()


if __name__ == "__main__":
    sys.exit(main())
