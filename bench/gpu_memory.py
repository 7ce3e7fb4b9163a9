"""Memory and time as planned against memory and time as measured, and what the engine keeps: bars that hold or not.

    python -m bench.gpu_memory --cap 16                            # every part on a card of 16 GB
    python -m bench.gpu_memory --cap 16 12 8 --part cases --model flux-dev --sizes 512x512 1024x1024
    python -m bench.gpu_memory --cap 8 --limit-s 500               # begins no job after so many seconds
    python -m bench.gpu_memory --cap 16 12 8 --part cases --model wan-ti2v-5b --sizes 704x1280x121+image
    python -m bench.gpu_memory --merge first.jsonl second.jsonl    # the bars of several calls together
    python -m bench.gpu_memory --tiny                              # the same path in a minute, on the CPU

FLUX.1 at full size with random weights (bench/fullsize.py, 33 GB of disk below --folder), torch kept from more memory
than a card of that size has. Prints a JSON object for each job, then one for each bar; exits 1 where a bar is missed.
Pairs are [predicted, measured], in GiB or seconds. With --tiny only what fails is judged.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

from bench import options
from bench.measured import HOST_GIB, Budget

PARTS = ("release", "slope", "oom", "cases", "prepare", "speed", "techniques")
TINY = {"flux-schnell": "tiny-flux-schnell", "flux-dev": "tiny-flux-dev", "wan-ti2v-5b": "tiny-wan-ti2v"}
TINY_SHRINK = 8

OVER_SHARE, OVER_GIB = 1.10, 0.3
"""How far a prediction may be above what was measured."""

SECONDS_FROM, SECONDS_TO = 0.75, 1.25
"""Measured to predicted, once a machine has run such a job."""

AUTO_SHARE, EXACT_SHARE = 0.35, 0.55
"""Of the stock pipeline's seconds."""

CONTEXT_SHARE = 0.10
SLOPE_MIB = 0.05

PREPARED = "fp8-dynamic"
"""What is prepared before the speed is taken: a person who leaves hundreds of jobs does so once."""

PREPARE_HOST_GIB = 4.0
"""A process with torch and a context holds 2.4; the largest weight in float32 is 0.2."""


def main() -> int:
    arguments = _arguments()
    if arguments.merge:
        lines = [json.loads(line) for file in arguments.merge for line in file.read_text().splitlines() if line]
        lines = [line for line in lines if "part" in line]
    else:
        lines = measure(arguments)
    found = bars(lines)
    for bar in found:
        print(json.dumps(bar), flush=True)
    judged = [bar for bar in found if not arguments.tiny or bar["bar"].endswith("failed")]
    return 0 if all(bar["ok"] for bar in judged) else 1


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Run the parts asked for; return their lines, each printed as soon as it is there."""
    from bench import fullsize
    from bench.processes import run_oom, run_release, run_slope

    device = "cpu" if arguments.tiny else "cuda"
    shrink = TINY_SHRINK if arguments.tiny else 1
    budget = Budget(arguments.limit_s)
    needed = [*(["flux-schnell"] if "flux-dev" in arguments.model else []), *arguments.model]
    folders = {} if arguments.tiny else {key: arguments.folder / key for key in needed}
    if folders:
        fullsize.build_elsewhere(folders)
    keys = [TINY[model] if arguments.tiny else model for model in arguments.model]
    lines: list[dict[str, Any]] = []

    def add(more: Iterable[dict[str, Any]]) -> None:
        for line in more:
            print(json.dumps(line), flush=True)
            lines.append(line)

    # What looks at processes from outside comes before this one has a context of its own.
    if "release" in arguments.part:
        add(run_release(device, keys[0], folders, shrink))
    if "slope" in arguments.part:
        add(run_slope(device, arguments.jobs))
    if "oom" in arguments.part and device == "cuda":
        add(run_oom(keys[-1], folders, arguments.leave_gib, shrink))
    if {"cases", "techniques", "speed", "prepare"} & set(arguments.part):
        add(_in_this_process(arguments, device, folders, keys, shrink, budget))
    return lines


def _in_this_process(
    arguments: argparse.Namespace, device: str, folders: dict[str, Path], keys: list[str], shrink: int, budget: Budget
) -> Iterator[dict[str, Any]]:
    """Yield the lines of what is measured from inside of the process that has the GPU."""
    from bench.cases import learn, run_cases, run_techniques
    from bench.measured import place
    from bench.processes import run_prepare
    from bench.speed import run_speed

    with place(device, folders, arguments.folder / "compiled") as at:
        at.attention = arguments.attention
        if "cases" in arguments.part:
            every = [(key, cap) for key in keys for cap in arguments.cap]
            for key, cap in every:
                yield from learn(at, key, cap, shrink, budget)
            for key, cap in every:
                yield from run_cases(at, key, cap, arguments.sizes, shrink, budget)
        if "prepare" in arguments.part and not budget.is_spent():
            yield from run_prepare(at.config, keys[0], "bf16" if device == "cpu" else PREPARED)
        if "speed" in arguments.part and 16 in arguments.cap and not budget.is_spent():
            at.become(16)
            yield from run_speed(at, keys[0], shrink)
        if "techniques" in arguments.part and not budget.is_spent():
            at.become(arguments.cap[0])
            yield from run_techniques(at, keys[0], arguments.technique, shrink, budget)


def bars(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return each bar that these lines can tell of: what was measured, the bound, and whether it holds."""
    of: dict[str, list[dict[str, Any]]] = {part: [line for line in lines if line["part"] == part] for part in PARTS}
    return [*case_bars(of["cases"]), *_speed_bars(of["speed"]), *_process_bars(of), *_technique_bars(of["techniques"])]


def case_bars(cases: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the bars of jobs that were planned and run: memory of both kinds, and seconds."""
    if not cases:
        return []
    done = [case for case in cases if "phases" in case]
    found = [_failed("cases", cases, ("error", "refused"))]
    pairs = [
        (f"{case['name']}, {phase}", *figures["device_gib"])
        for case in done
        for phase, figures in case["phases"].items()
        if figures["device_gib"][0]
    ]
    if pairs:
        found += [
            _worst("device: measured / predicted", pairs, lambda told, took: took / told, 1.0),
            _worst(
                f"device: predicted - ({OVER_SHARE} x measured + {OVER_GIB} GiB)", pairs,
                lambda told, took: told - OVER_SHARE * took - OVER_GIB, 0.0,
            ),
        ]  # fmt: skip
    host = [
        (f"{case['name']}, {phase}", *case["phases"][phase]["host_gib"]) for case in done for phase in case["phases"]
    ]
    if host:
        found.append(_worst("host GiB", host, lambda _told, took: took, HOST_GIB))
    known = [(case["name"], *case["seconds"]) for case in done if not case["first_of_kind"]]
    if known:
        found += [
            _worst("seconds: measured / predicted", known, lambda told, took: took / told, SECONDS_TO),
            _worst("seconds: predicted / measured", known, lambda told, took: told / took, 1 / SECONDS_FROM),
        ]
    return found


def _worst(
    bar: str, pairs: Sequence[tuple[str, float, float]], of: Callable[[float, float], float], bound: float
) -> dict[str, Any]:
    """Return a bar over pairs of predicted and measured: none may be above the bound."""
    values = {name: round(of(told, took), 4) for name, told, took in pairs}
    missed = {name: value for name, value in values.items() if value > bound}
    measured = max(values.values())
    return {"bar": bar, "measured": measured, "bound": round(bound, 4), "ok": not missed, "missed": missed}


def _speed_bars(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    named = {line["name"]: line for line in lines}
    if not {"auto", "bf16", "stock", "bits"} <= set(named):
        return []
    stock = named["stock"]["seconds"]
    found = []
    for name, bound in (("auto", AUTO_SHARE), ("bf16", EXACT_SHARE)):
        share = round(named[name]["seconds"] / stock, 4)
        found.append({"bar": f"{name} seconds / stock's", "measured": share, "bound": bound, "ok": share <= bound})
    same = named["bits"]["bf16_equals_resident"]
    return [
        *found,
        {"bar": "bf16 latents equal those of resident weights", "measured": same, "bound": True, "ok": same},
    ]


def _process_bars(of: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    from safelight.footprint import CONTEXT_BYTES

    found = []
    for line in of["slope"]:
        slope = line["slope_mib_a_job"]
        bar = f"RAM MiB a job, {line['name']}"
        found.append({"bar": bar, "measured": slope, "bound": SLOPE_MIB, "ok": slope <= SLOPE_MIB})
    for line in (line for line in of["release"] if line["device"] == "cuda"):
        off = round(abs(line["warm_bytes"] / CONTEXT_BYTES - 1), 4)
        found += [
            {
                "bar": f"device after a job, {line['warm_bytes']:,} bytes, off the constant {CONTEXT_BYTES:,} by",
                "measured": off, "bound": CONTEXT_SHARE, "ok": off <= CONTEXT_SHARE,
            },
            {
                "bar": "device bytes after the engine's end",
                "measured": line["ended_bytes"], "bound": 0, "ok": line["ended_bytes"] <= 0,
            },
        ]  # fmt: skip
    for line in of["prepare"]:
        good = line["exit"] == 0 and line["host_gib"] <= PREPARE_HOST_GIB
        bar = f"host GiB while {line['name']} is prepared"
        found.append({"bar": bar, "measured": line["host_gib"], "bound": PREPARE_HOST_GIB, "ok": good})
    for line in of["oom"]:
        if line["next"]:
            bar, good = "the next such job runs out no more", not line["overruns"]
        else:
            bar, good = "a job whose memory is taken ends once, on a smaller rung", len(line["overruns"]) == 1
        good = good and (line["state"], line["outputs"]) == ("done", 1)
        found.append({"bar": bar, "measured": line["state"], "bound": "done", "ok": good})
    return found


def _technique_bars(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [_failed("techniques", lines, ("error",))] if lines else []


def _failed(what: str, lines: Sequence[dict[str, Any]], words: Sequence[str]) -> dict[str, Any]:
    failed = {line["name"]: line[word] for line in lines for word in words if word in line}
    return {"bar": f"{what} that failed", "measured": len(failed), "bound": 0, "ok": not failed, "missed": failed}


def _arguments() -> argparse.Namespace:
    parser = options.full_size(__doc__)
    parser.add_argument("--cap", type=int, nargs="+", choices=(16, 12, 8), default=[16], help="GB of the card to be")
    parser.add_argument("--part", nargs="+", choices=PARTS, default=[part for part in PARTS if part != "oom"])
    parser.add_argument("--model", nargs="+", choices=tuple(TINY), default=["flux-schnell", "flux-dev"])
    parser.add_argument("--sizes", nargs="+", metavar="WIDTHxHEIGHT[xFRAMES][+image]", help="+image: from a picture")
    parser.add_argument("--technique", nargs="+", default=[], help="of bench/cases.py; all by default")
    parser.add_argument("--attention", default="auto", help="[worker] attention")
    parser.add_argument("--jobs", type=int, default=50, help="of the slope")
    parser.add_argument("--leave-gib", type=float, default=1.0, help="what oom leaves free")
    parser.add_argument("--merge", nargs="+", type=Path, metavar="FILE", help="judge what earlier calls printed")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
