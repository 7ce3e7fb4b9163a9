"""Wan 2.2 A14B on cards of 16, 12 and 8 GB from prepared weights: steps, the experts' exchange, memory as planned.

    python -m bench.gpu_video_a14b                                          # fp8-dynamic, compiled: seven minutes
    python -m bench.gpu_video_a14b --part resident cases --cap 16           # a step's bar and 16 GB alone: four
    python -m bench.gpu_video_a14b --model wan-i2v-a14b                     # the same from a picture
    python -m bench.gpu_video_a14b --part compiled                          # the expert in bf16 once more, compiled
    python -m bench.gpu_video_a14b --precision nf4 --part cases --cap 8     # or a part of it
    python -m bench.gpu_video_a14b --precision bf16 --part cases --cap 16   # streamed; 40 GB of disk
    python -m bench.gpu_video_a14b --limit-s 460                            # begins nothing after so many seconds
    python -m bench.gpu_video_a14b --tiny                                   # the jobs' path in seconds, on the CPU

Random weights of full size (bench/quantised.py): 12 GB of disk below --folder, and 14 for fp8 or 8 for nf4, of which
the second expert's files are links to the first's. `resident`: a step of one expert in bf16, all of it on the GPU, no
cap, eager as diffusers runs it, in the process that builds; `compiled`: the same, compiled. `cases`: jobs of three
steps at 832x480, of which the second expert runs the last; one card after the other, the longest clip first. The
minutes are those of an H100. Prints a JSON object for each as soon as it is there; a step's and an exchange's bar as
soon as they can be told, those of memory and seconds at the end; exits 1 where one is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import torch

from bench import fullsize, options, quantised
from bench.cases import learn, run_cases
from bench.gpu_memory import TINY_SHRINK, case_bars
from bench.measured import Budget, Place, place
from safelight import models
from safelight.models import ModelFacts
from safelightd import compiling

TINY = {"wan-t2v-a14b": "tiny-wan-t2v-a14b", "wan-i2v-a14b": "tiny-wan-i2v-a14b"}
PARTS = ("resident", "compiled", "cases")
PRECISIONS = ("fp8-dynamic", "fp8-weight-only", "nf4", "bf16")

SIZE = (832, 480, 81)
FITS = {16: ("832x480x81", "832x480x49"), 12: ("832x480x81", "832x480x49"), 8: ("832x480x81", "832x480x49")}
"""What must run on a card of so many GB."""

STEP_SHARE = 1.15
SWAP_S = 10.0
FORWARDS = 3


def main() -> int:
    arguments = _arguments()
    budget = Budget(arguments.limit_s)
    key = TINY[arguments.model] if arguments.tiny else arguments.model
    folder = arguments.folder / key
    lines: list[dict[str, Any]] = []
    if not arguments.tiny:
        lines += _elsewhere(key, folder, arguments)
    shown: list[dict[str, Any]] = []
    folders = {} if arguments.tiny else {key: folder}
    prepared = None if arguments.tiny else arguments.folder
    with place("cpu" if arguments.tiny else "cuda", folders, arguments.folder / "compiled", prepared) as at:
        at.attention = arguments.attention
        if not arguments.tiny:
            compiled = arguments.compile or ("on" if arguments.precision == "fp8-dynamic" else "auto")
            at.asked = {"precision": arguments.precision, "compile": compiled}
        for line in _cases(at, key, arguments, budget):
            print(json.dumps(line), flush=True)
            lines.append(line)
            for bar in step_bars(lines):
                if bar not in shown:
                    print(json.dumps(bar), flush=True)
                    shown.append(bar)
    found = bars(lines)
    for bar in found:
        if bar not in shown:
            print(json.dumps(bar), flush=True)
    return 0 if arguments.tiny or (found and all(bar["ok"] for bar in found)) else 1


def _elsewhere(key: str, folder: Path, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Build the folders, and run the expert that is all on the GPU: in a process of its own, whose context and kernels
    are none of the jobs'. Return its lines, which it has printed."""
    with tempfile.NamedTemporaryFile() as told:
        fullsize.elsewhere(
            _build_and_run, key, folder, arguments.precision, arguments.folder, tuple(arguments.part), Path(told.name)
        )
        return [json.loads(line) for line in Path(told.name).read_text().splitlines()]


def _build_and_run(
    key: str, folder: Path, precision: Any, models_folder: Path, parts: Sequence[str], told: Path
) -> None:
    facts = models.load()[key]
    quantised.build(facts, folder, precision, models_folder, "cuda")
    if not {"resident", "compiled"} & set(parts):
        return
    try:
        lines = list(_resident(facts, folder, compiled="compiled" in parts))
    except Exception as error:  # noqa: BLE001 - the cases may still tell something
        traceback.print_exc(limit=-4)
        lines = [{"part": "resident", "name": "bf16, resident", "error": f"{type(error).__name__}: {error}"[:400]}]
    for line in lines:
        print(json.dumps(line), flush=True)
    told.write_text("".join(json.dumps(line) + "\n" for line in lines))


def _cases(at: Place, key: str, arguments: argparse.Namespace, budget: Budget) -> Iterator[dict[str, Any]]:
    shrink = TINY_SHRINK if arguments.tiny else 1
    for cap in arguments.cap if "cases" in arguments.part else ():
        yield from learn(at, key, cap, shrink, budget)
        yield from run_cases(at, key, cap, arguments.sizes or FITS[cap], shrink, budget)


@torch.no_grad()
def _resident(facts: ModelFacts, folder: Path, *, compiled: bool) -> Iterator[dict[str, Any]]:
    """Yield the seconds of a step, two forwards, of an expert in bf16 that is all on the GPU: eager, or compiled."""
    cuda = torch.device("cuda")
    expert: Any = quantised.resident(folder / "transformer", cuda)
    width, height, num_frames = SIZE
    frames, packed = (num_frames - 1) // facts.frames_multiple + 1, facts.vae_scale
    shape = (1, expert.config.in_channels, frames, height // packed, width // packed)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(cuda, torch.bfloat16)
    prompt = torch.randn(1, facts.max_sequence_length, expert.config.text_dim).to(cuda, torch.bfloat16)
    timestep = torch.full((1,), 900.0, device=cuda)
    if compiled:
        compiling.compile_blocks(expert, ["blocks"])
    ends = []
    for _ in range(FORWARDS + 1):
        began = time.perf_counter()
        expert(latents, timestep, prompt, return_dict=False)
        torch.cuda.synchronize()
        ends.append(time.perf_counter() - began)
    yield {
        "part": "resident", "name": "bf16 compiled, resident" if compiled else "bf16, resident",
        "step_s": round(2 * sorted(ends[1:])[FORWARDS // 2], 4), "first_forward_s": round(ends[0], 2),
        "device_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2),
    }  # fmt: skip


def bars(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return each bar that these lines can tell of."""
    return [*step_bars(lines), *case_bars([line for line in lines if line["part"] == "cases"])]


def step_bars(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the bars that one job tells of."""
    cases = [line for line in lines if line["part"] == "cases"]
    step_s = {line["name"]: line["step_s"] for line in lines if line["part"] == "resident" and "step_s" in line}
    whole = "x".join(map(str, SIZE))
    found = []
    for case in cases:
        if "phases" not in case:
            continue
        ours = case["step_ms"][-1] / 1000
        if eager := step_s.get("bf16, resident") if f"{whole} on 16 GB" in case["name"] else None:
            share = round(ours / eager, 4)
            bar = f"{case['name']}: a step / resident in bf16"
            found.append({"bar": bar, "measured": share, "bound": STEP_SHARE, "ok": share <= STEP_SHARE})
        swap_s = case["phases"]["denoise"]["swap_seconds"]
        if swap_s is not None:
            bar = f"{case['name']}: seconds between the experts"
            found.append({"bar": bar, "measured": swap_s, "bound": SWAP_S, "ok": swap_s <= SWAP_S})
    return found


def _arguments() -> argparse.Namespace:
    parser = options.full_size(__doc__)
    parser.add_argument("--model", choices=tuple(TINY), default="wan-t2v-a14b")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp8-dynamic")
    parser.add_argument("--compile", choices=("auto", "on", "off"), help="on for fp8-dynamic by default, else auto")
    parser.add_argument("--attention", default="auto", help="[worker] attention")
    parser.add_argument("--part", nargs="+", choices=PARTS, default=["resident", "cases"])
    parser.add_argument("--cap", type=int, nargs="+", choices=tuple(FITS), default=list(FITS), help="GB of the card")
    parser.add_argument("--sizes", nargs="+", metavar="WIDTHxHEIGHTxFRAMES", help="in the place of those that must fit")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
