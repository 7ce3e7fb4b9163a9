"""An engine without torch: a real process on the real link that does what the prompt says.

The prompt is a list of words, one an attempt (the last repeats): `ok`, `slow` (2 s of steps), `fail`, `crash`
(SIGKILLs itself), `hang` (no progress), `long` (none for 4 s, of the 60 that its plan expects of a step), `machine`,
`torn` (dies while it publishes), `late` (dies when it has published), `oom` (its plan runs out of GPU memory),
`late-oom` (the same, once it is asked to stop), `swell` (takes memory until the kernel ends it), `refused` (the result
is broken). What an earlier attempt began to publish it finishes first. Its plan has a rung for each overrun that it is
told of. What it did is appended to outbox/runs.log, who did it to outbox/engines.log, what it was told of earlier
attempts and of the line to outbox/told.log.
"""

from __future__ import annotations

import json
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
from safelight.plan import PhasePrediction, Plan
from safelight.receipt import Receipt
from safelightd import shortage
from safelightd.link import EngineGone, Link

BLOCKS_MORE = 10
"""Blocks that each rung streams more than the one before."""


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


def plan_of(message: dict) -> Plan:
    """Return the plan of this attempt: each overrun makes it smaller."""
    rung = len(message["overruns"])
    return Plan(
        model=message["spec"]["model"],
        device="cuda",
        dtype="bfloat16",
        precision="bf16" if message["refused"] else "fp8-dynamic",
        offload="partial",
        streamed={"transformer": tuple(range(BLOCKS_MORE * (rung + 1)))},
        text_encoder_device="cuda",
        vae_tiling=False,
        seconds_per_step=60.0 if "long" in message["spec"]["prompt"].split() else None,
        predicted={"denoise": PhasePrediction(device_bytes=13 << 30 >> rung, host_bytes=9 << 30 >> rung)},
    )


def swell() -> None:
    """Take memory and touch it until somebody stops it."""
    taken = []
    while True:
        taken.append(b"x" * (8 << 20))


def end_early(word: str, config: settings.Config, cancelled: threading.Event) -> None:
    match word:
        case "crash":
            os.kill(os.getpid(), signal.SIGKILL)
        case "swell":
            swell()
        case "hang":
            time.sleep(60)
        case "long":
            time.sleep(4)
        case "unmount" | "unmount-crash":
            config.paths.models.rename(config.paths.models.with_name("unmounted"))
            config.paths.models.mkdir()
            if word == "unmount-crash":
                os.kill(os.getpid(), signal.SIGBUS)  # as from the mapped file of a disk that was pulled out
        case "late-oom":
            cancelled.wait()


def failure(word: str, plan: Plan) -> dict | None:
    match word:
        case "oom" | "late-oom":
            overrun = shortage.overrun(plan, "denoise", "device", 15 << 30).model_dump(mode="json")
            return {"kind": "oom", "message": "CUDA out of memory", "phase": "denoise",
                    "memory": "device", "overrun": overrun}  # fmt: skip
        case "refused":
            return {"kind": "refused", "message": "The picture is black.", "phase": "verify",
                    "precision": plan.precision}  # fmt: skip
        case "fail" | "unmount" | "machine" | "spent" | "no-room" | "too-large":
            kind = {"fail": "job", "unmount": "job"}.get(word, word)
            return {"kind": kind, "message": f"it was told to {word}", "phase": "denoise"}
    return None


def run(link: Link, config: settings.Config, ledger: Ledger, message: dict, cancelled: threading.Event) -> None:
    execution, spec = message["execution"], JobSpec.model_validate(message["spec"], strict=False)
    words = spec.prompt.split()
    word = words[min(message["attempt"], len(words)) - 1]
    note(config, f"start {spec.id}")
    (config.paths.outbox / "engines.log").open("a").write(f"{os.getpid()}\n")
    told = {name: message[name] for name in ("attempt", "waiting", "again", "overruns", "refused")}
    (config.paths.outbox / "told.log").open("a").write(json.dumps({"id": spec.id, **told}) + "\n")
    plan = plan_of(message)
    link.send("phase", execution, phase="load", plan=plan.model_dump(mode="json"))
    link.send("phase", execution, phase="denoise")
    waiting = config.paths.unfinished / spec.id / "output.png"
    if found := ledger.intended(spec.id):
        waiting.rename(config.paths.outbox / f"{spec.id}.png")
        finish(link, config, ledger, execution, found)
        return
    end_early(word, config, cancelled)
    if failed := failure(word, plan):
        link.send("failed", execution, **failed)
        if failed["kind"] in ("oom", "spent"):
            sys.exit(1)
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
        plan=plan,
        attempts=message["attempt"],
        overruns=message["overruns"],
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
