"""How long the demo takes until every output is verified, and each of its jobs.

    python -m bench.demo                 # half a minute on two cores
    python -m bench.demo --svg FILE      # keep its picture

Prints a JSON object of seconds, then one a bar; exits 1 where one is missed. A job's seconds are its receipt's, from
the moment it is taken to its files in the outbox; the first of each model, which also loads it for the first time,
stands for no other.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from safelight.ledger import Ledger
from safelight.receipt import Receipt
from safelightd import demo

WHOLE_S = 60.0
JOB_S = {"picture": 1.5, "clip": 15.0}
"""Of a warm job on two cores: 128x128, in four steps without guidance or a LoRA; 17 frames."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--svg", type=Path, help="write what a terminal shows as an SVG")
    svg: Path | None = parser.parse_args().svg
    console = Console(record=True, width=100, file=io.StringIO(), force_terminal=True, highlight=False)
    parent = Path(tempfile.mkdtemp(prefix="slb-"))
    started = time.monotonic()
    try:
        demo.run(parent / "safelight-demo", console)
        seconds = round(time.monotonic() - started, 1)
        taken = job_seconds(_receipts(parent / "safelight-demo"))
    finally:
        shutil.rmtree(parent, ignore_errors=True)
    if svg:
        text = console.export_svg(title="safelight demo").replace(f"{parent}/", "")
        text = re.sub(r"@font-face \{.*?\}\n", "", text, flags=re.DOTALL)  # no fetching: the reader's own monospace
        svg.write_text(text, encoding="utf-8")
    print(json.dumps({"demo_seconds": seconds, **{f"{kind}_seconds": each for kind, each in taken.items()}}))
    bars = [_bar("the whole demo, seconds", seconds, WHOLE_S)]
    bars += [_bar(f"the slowest warm {kind}, seconds", max(taken[kind], default=None), JOB_S[kind]) for kind in JOB_S]
    for bar in bars:
        print(json.dumps(bar))
    return 0 if all(bar["ok"] for bar in bars) else 1


def job_seconds(receipts: Sequence[Receipt]) -> dict[str, list[float]]:
    """Return the seconds of each warm job that is as the bars say, in the order in which they began."""
    found: dict[str, list[float]] = {kind: [] for kind in JOB_S}
    warm: set[str] = set()
    for receipt in sorted(receipts, key=lambda receipt: receipt.started_at or ""):
        spec = receipt.spec
        is_plain = spec.num_frames is not None or (spec.num_inference_steps == 4 and not spec.loras)
        if spec.model in warm and is_plain and receipt.started_at:
            began, ended = map(datetime.fromisoformat, (receipt.started_at, receipt.finished_at))
            found["clip" if spec.num_frames else "picture"].append(round((ended - began).total_seconds(), 2))
        warm.add(spec.model)
    return found


def _receipts(folder: Path) -> list[Receipt]:
    ledger = Ledger(demo.prepare(folder).paths)
    found = [ledger.receipt(job) for job in ledger.ended()]
    return [receipt for receipt in found if receipt is not None]


def _bar(name: str, measured: float | None, bound: float) -> dict[str, Any]:
    return {"bar": name, "measured": measured, "bound": bound, "ok": measured is not None and measured <= bound}


if __name__ == "__main__":
    sys.exit(main())
