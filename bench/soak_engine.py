"""The soak's worker and the two engines behind it: the real one, and one without torch that publishes real files.

The first word of a prompt says what its job does to the engine: `ok` nothing, `slow` takes its steps' time, `faulty`
cannot run as asked, `poison` kills the engine in every attempt, `hang` shows no progress. Each rendering that starts is
appended to the file that SOAK_STARTS names, so that an audit sees a job which is rendered again after its end.
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
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from safelight import config as settings
from safelight.config import Config
from safelight.errors import SafelightError
from safelight.jobspec import JobSpec
from safelight.ledger import Ledger
from safelight.plan import Plan
from safelight.receipt import Output, Receipt
from safelight.rung import Circumstances
from safelightd import logs, outputs, verify, worker
from safelightd.link import EngineGone, Link
from safelightd.progress import Cancelled, Watch

STARTS = "SOAK_STARTS"
"""The environment variable with the file of starts: a line "<nanoseconds since the epoch> <id>" each."""

STEP_S = 0.04
"""Of a slow job: time enough to be cancelled, stopped and killed in."""

HANG_S = 3600.0


def command(call: str) -> list[str]:
    """Return the command line that calls a function of this module in a fresh process."""
    return [sys.executable, "-c", f"from bench import soak_engine; soak_engine.{call}"]


def work(engine: str) -> None:
    """Run the real worker with the named engine, "real" or "scripted", and exit as `safelightd worker` does."""
    logs.set_up()
    try:
        sys.exit(worker.serve(settings.load(), command(f"serve_{engine}()")))
    except SafelightError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)


def heed(spec: JobSpec, watch: Watch) -> None:
    """Do what the first word of the prompt says; the worker has heard of the job when this is called.

    Raises:
        SafelightError: the job is `faulty`.
    """
    match spec.prompt.split()[0]:
        case "faulty":
            raise SafelightError("It asks for what nobody has. Ask for something else.")
        case "poison":
            os.kill(os.getpid(), signal.SIGKILL)
        case "hang":
            time.sleep(HANG_S)  # the deadline ends it: to hang is to await nothing
    watch.check()


def note_start(spec: JobSpec) -> None:
    """Append the start of a rendering to its file, in one write, so that a kill leaves whole lines."""
    with Path(os.environ[STARTS]).open("ab", buffering=0) as starts:
        starts.write(f"{time.time_ns()} {spec.id}\n".encode())


def serve_real() -> None:
    """Be the real engine, whose jobs do what their prompts say before they run."""
    from safelightd import engine, runjob

    run_job = runjob.run_job

    def run(spec: JobSpec, attempt: int, setting: runjob.Setting, watch: Watch, around: Circumstances) -> Receipt:
        if setting.ledger.intended(spec.id) is None:
            note_start(spec)
        with watch.phase("plan"):
            heed(spec, watch)
        return run_job(spec, attempt, setting, watch, around)

    runjob.run_job = run  # type: ignore[assignment]  # its default is not needed here
    sys.exit(engine.main())


def serve_scripted() -> None:
    """Be an engine that draws noise and publishes it as the real one publishes its pictures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--link", type=int, required=True)
    parser.add_argument("--gpu")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logs.set_up()
    ScriptedEngine(settings.load(), Link(socket.socket(fileno=parser.parse_args().link))).serve()


class NoMeter:
    """Reads no memory: there is no device."""

    def reset(self) -> None:
        pass

    def settle(self) -> None:
        pass

    def peaks(self) -> tuple[int, int]:
        return 0, 0


@dataclass
class Asked:
    """The job that runs, and whether somebody wants it stopped."""

    execution: str
    stop: threading.Event


class ScriptedEngine:
    """Answers jobs from a link, one after another, until it closes."""

    def __init__(self, config: Config, link: Link) -> None:
        self._config = config
        self._link = link
        self._ledger = Ledger(config.paths)
        self._jobs: queue.SimpleQueue[tuple[dict[str, Any], Asked]] = queue.SimpleQueue()

    def serve(self) -> None:
        threading.Thread(target=self._read, daemon=True).start()
        while True:
            self._answer(*self._jobs.get())

    def _read(self) -> None:
        """Take messages while a job runs; end with the link, as the real engine does in the middle of a job."""
        latest: Asked | None = None
        while True:
            try:
                message = self._link.receive()
            except EngineGone:
                os._exit(0)
            if message is None:
                continue
            if message["type"] == "run":
                latest = Asked(message["execution"], threading.Event())
                self._jobs.put((message, latest))
            elif message["type"] == "cancel" and latest and latest.execution == message["execution"]:
                latest.stop.set()

    def _answer(self, message: dict[str, Any], asked: Asked) -> None:
        execution = asked.execution
        done = threading.Event()
        threading.Thread(target=self._say_alive, args=(execution, done), daemon=True).start()
        watch = Watch(lambda said: self._link.send(said.pop("type"), execution, **said), asked.stop, NoMeter())
        spec = JobSpec.model_validate(message["spec"], strict=False)
        verdict: dict[str, Any]
        try:
            receipt = self._run(spec, int(message["attempt"]), watch)
        except Cancelled:
            verdict = {"kind": "cancelled", "message": "cancelled"}
        except SafelightError as error:
            verdict = {"kind": "job", "message": str(error)}
        except OSError as error:
            if error.errno != errno.ENOSPC and not isinstance(error, outputs.OutboxUnwritable):
                raise
            verdict = {"kind": "machine", "message": str(error)}
        else:
            verdict = {"receipt": receipt.model_dump(mode="json", exclude_none=True)}
        done.set()
        kind = "done" if "receipt" in verdict else "failed"
        self._link.send(kind, execution, **verdict, **({} if kind == "done" else {"phase": watch.current}))

    def _say_alive(self, execution: str, done: threading.Event) -> None:
        while not done.wait(1.0):
            self._link.send("alive", execution)

    def _run(self, spec: JobSpec, attempt: int, watch: Watch) -> Receipt:
        """Return the receipt of a job, written, verified and published with the daemon's own functions."""
        paths = self._config.paths
        if receipt := outputs.finish(spec.id, self._ledger, paths):
            return receipt
        note_start(spec)
        outputs.discard(spec.id, paths)
        started_at = _now()
        plan = watch.plan = _plan(spec)
        with watch.phase("load"):
            heed(spec, watch)
        with watch.phase("denoise"):
            for step in range(1, spec.num_inference_steps + 1):
                if spec.prompt.startswith("slow"):
                    time.sleep(STEP_S)  # stands for a step's work
                watch.step(step, spec.num_inference_steps)
        with watch.phase("decode"):
            pixels = np.random.default_rng(spec.seed).integers(0, 256, (spec.height, spec.width, 3), dtype=np.uint8)
            file = outputs.write(spec, plan, [pixels], self._config)
        with watch.phase("verify"):
            verify.output(file, spec)

        def receipt_of(published: tuple[Output, ...]) -> Receipt:
            return Receipt(
                id=spec.id, state="done", spec=spec, plan=plan, outputs=published, attempts=attempt,
                started_at=started_at, finished_at=_now(), phases=dict(watch.records),
            )  # fmt: skip

        with watch.phase("publish"):
            return outputs.publish(receipt_of, file, spec, self._ledger, paths)


def _plan(spec: JobSpec) -> Plan:
    return Plan(
        model=spec.model, device="cpu", dtype="float32", precision="fp32", offload="none",
        text_encoder_device="cpu", vae_tiling=False,
    )  # fmt: skip


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="milliseconds")
