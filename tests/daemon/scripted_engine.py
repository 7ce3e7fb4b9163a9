"""An engine without torch: a real process on the real link that does what the prompt says.

The prompt is a list of words, one an attempt (the last repeats): `ok`, `slow` (2 s of steps), `fail`, `crash`
(SIGKILLs itself), `hang` (no progress), `machine`, `torn` (dies while it publishes), `late` (dies when it has
published). What an earlier attempt began to publish it finishes first. What it did is appended to outbox/runs.log,
who did it to outbox/engines.log.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections import defaultdict
from datetime import datetime

from safelight import config as settings
from safelight.jobspec import JobSpec
from safelight.ledger import Ledger
from safelight.receipt import Receipt
from safelightd.link import EngineGone, Link


def main() -> None:
    config = settings.load()
    link = Link(socket.socket(fileno=int(sys.argv[-1])))
    ledger = Ledger(config.paths)
    cancelled: dict[str, threading.Event] = defaultdict(threading.Event)
    jobs: list[dict] = []
    came = threading.Event()

    def read() -> None:
        while True:
            try:
                message = link.receive()
            except EngineGone:
                os._exit(0)
            if message["type"] == "run":
                jobs.append(message)
                came.set()
            elif message["type"] == "cancel":
                cancelled[message["execution"]].set()

    threading.Thread(target=read, daemon=True).start()
    while True:
        came.wait()
        came.clear()
        message = jobs.pop()
        run(link, config, ledger, message, cancelled[message["execution"]])


def note(config: settings.Config, line: str) -> None:
    config.paths.outbox.mkdir(parents=True, exist_ok=True)
    with (config.paths.outbox / "runs.log").open("a") as log:
        log.write(line + "\n")


def run(link: Link, config: settings.Config, ledger: Ledger, message: dict, cancelled: threading.Event) -> None:
    execution, spec = message["execution"], JobSpec.model_validate(message["spec"], strict=False)
    words = spec.prompt.split()
    word = words[min(message["attempt"], len(words)) - 1]
    note(config, f"start {spec.id}")
    (config.paths.outbox / "engines.log").open("a").write(f"{os.getpid()}\n")
    link.send("phase", execution, phase="denoise")
    waiting = config.paths.unfinished / spec.id / "output.png"
    if found := ledger.intended(spec.id):
        waiting.rename(config.paths.outbox / f"{spec.id}.png")
        finish(link, config, ledger, execution, found)
        return
    if word == "crash":
        os.kill(os.getpid(), signal.SIGKILL)
    if word == "hang":
        time.sleep(60)
    if word in ("fail", "machine"):
        kind = {"fail": "job"}.get(word, word)
        link.send("failed", execution, kind=kind, message=f"it was told to {word}", phase="denoise")
        return
    steps = 20 if word == "slow" else 1
    for i in range(1, steps + 1):
        link.send("step", execution, phase="denoise", i=i, n=steps, seconds_left=0.1 * (steps - i))
        if cancelled.wait(0.1 if word == "slow" else 0.01):
            link.send("failed", execution, kind="cancelled", message="cancelled", phase="denoise")
            return
    receipt = Receipt(
        id=spec.id,
        state="done",
        spec=spec,
        attempts=message["attempt"],
        finished_at=datetime.now().astimezone().isoformat(),
    )
    if word == "torn":
        waiting.parent.mkdir(parents=True)
        waiting.touch()
    ledger.intend(receipt)
    if word == "torn":
        os.kill(os.getpid(), signal.SIGKILL)
    finish(link, config, ledger, execution, receipt, late=word == "late")


def finish(
    link: Link, config: settings.Config, ledger: Ledger, execution: str, receipt: Receipt, *, late: bool = False
) -> None:
    note(config, f"done {receipt.id}")
    ledger.fulfil(receipt.id)
    if late:
        os.kill(os.getpid(), signal.SIGKILL)
    link.send("done", execution, receipt=receipt.model_dump(mode="json"))


if __name__ == "__main__":
    main()
