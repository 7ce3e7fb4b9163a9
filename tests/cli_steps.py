"""What the tests of the client's commands do: run a command line, and play the worker's part on the real queue."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from click.testing import CliRunner, Result
from PIL import Image

from safelight.cli import main
from safelight.jobqueue import JobQueue
from safelight.jobspec import JobSpec
from safelight.machine import GIB, Machine
from safelight.place import Place
from safelight.receipt import Output, Receipt
from tests.conftest import Installation

Safelight = Callable[..., Result]

WORKER = "desk-cpu"

CPU = Machine(device="cpu", ram_total_bytes=32 * GIB, ram_available_bytes=28 * GIB, cpus=8)


def runner(installation: Installation) -> Safelight:
    unset = dict.fromkeys(name for name in os.environ if name.startswith(("XDG_", "SAFELIGHT_")))

    def run(*words: str, stdin: str | bytes | None = None) -> Result:
        return CliRunner().invoke(main, words, input=stdin, env={**unset, **installation.env}, prog_name="safelight")

    return run


def ids_of(result: Result) -> list[str]:
    assert result.exit_code == 0, result.output
    return result.stdout.split()


def start(queue: JobQueue, job: str) -> None:
    """Give a waiting job to the worker, as a worker does."""
    place = Place.parse(queue.fields(job)["place"])
    assert place is not None
    assert queue.dispatch(WORKER, place, f"rq:queue:{WORKER}", f"rq-{job}", f"rq:job:{job}", {"origin": WORKER})
    queue.server.delete(f"rq:queue:{WORKER}")


def end(
    installation: Installation, queue: JobQueue, job: str, state: str = "done", error: str | None = None
) -> Receipt:
    """Let a job end as a worker does: outputs, receipt, queue."""
    start(queue, job)
    spec = queue.spec(job)
    assert spec is not None
    receipt = receipt_of(installation, spec, state, error)
    installation.ledger.record(receipt)
    assert queue.conclude(receipt, WORKER)
    return receipt


def receipt_of(installation: Installation, spec: JobSpec, state: str, error: str | None = None) -> Receipt:
    outputs = []
    if state == "done":
        path = f"2026-11-22/{spec.batch}/{spec.index:04d}_s{spec.seed}.png"
        file = installation.paths.outbox / path
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (spec.width, spec.height), "red").save(file)
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        outputs = [Output(path=path, sha256=digest, bytes=file.stat().st_size, width=spec.width, height=spec.height)]
    receipt = Receipt.model_validate(
        {"id": spec.id, "state": state, "spec": spec, "outputs": outputs, "error": error, "attempts": 1,
         "finished_at": "2026-11-22T23:00:00+00:00"}
    )  # fmt: skip
    for output in receipt.outputs:
        (installation.paths.outbox / output.path).with_suffix(".json").write_text(receipt.model_dump_json())
    return receipt


def process(installation: Installation, *words: str, **kwargs: Any) -> subprocess.Popen[str]:
    path = os.pathsep.join(["client", "daemon"])
    return subprocess.Popen(
        [sys.executable, "-m", "safelight.cli", *words],
        env={**installation.env, "PYTHONPATH": path}, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, **kwargs,
    )  # fmt: skip


def listed(safelight: Safelight, *words: str) -> list[dict[str, Any]]:
    result = safelight("list", "--json", *words)
    assert result.exit_code == 0, result.output
    found: list[dict[str, Any]] = json.loads(result.stdout)
    return found
