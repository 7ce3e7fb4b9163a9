"""LoRAs on FLUX.1-schnell on a 16 GB card: what another LoRA costs a warm engine, and what one costs a step.

    python -m bench.gpu_lora                     # bf16 and fp8-dynamic: some six minutes, two of them to write weights
    python -m bench.gpu_lora --precision nf4     # another way alone; --precision may be repeated
    python -m bench.gpu_lora --limit-s 300       # begins no job after so many seconds
    python -m bench.gpu_lora --tiny              # the same path in seconds, on the CPU

Random weights of full size (bench/fullsize.py, 33 GB of disk below --folder) and two LoRAs of rank 16 and 32 for every
Linear of the transformer's blocks. Each precision runs, in one warm process, jobs without a LoRA, with one, with the
same again, with the other, with both; one prompt, 1024x1024 in 4 steps. A first job of each kind, which compiles and
fills the page cache, does not count. Prints a JSON object a job and, after the last of a precision, one a bar: the
seconds that another LoRA takes more than the same one, the graphs that were compiled for it (torch._dynamo's counters),
and a step with LoRAs by one without; exits 1 where a bar is missed, or where the limit came before.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import torch
from safetensors.torch import save_file

from bench import fullsize, options
from bench.measured import Budget, Place, place
from safelight import lorafiles
from safelight.jobspec import JobSpec
from safelight.lora import Lora
from safelight.pace import COMPILED_EFFICIENCY
from safelight.receipt import Receipt
from safelightd.loading import WEIGHTS
from safelightd.modelfolder import model_folder
from safelightd.weights import stored_tensors

MODEL, TINY = "flux-schnell", "tiny-flux-schnell"
CAP = 16
STEPS = 4
RANKS = {"a": 16, "b": 32}

ANOTHER_SECONDS_MAX, STEP_TIMES_MAX = 3.0, 1.02

PRECISIONS = ("bf16", "fp8-dynamic", "fp8-weight-only", "nf4")
"""As a person writes them; compiled, where that is offered."""

USUAL = PRECISIONS[:2]


def main() -> int:
    arguments = _arguments()
    budget = Budget(arguments.limit_s)
    shown = TINY if arguments.tiny else MODEL
    folders = {} if arguments.tiny else {MODEL: arguments.folder / MODEL}
    if folders:
        fullsize.build_elsewhere(folders)
    wanted = ("auto",) if arguments.tiny else arguments.precision or USUAL
    held = True
    with place("cpu" if arguments.tiny else "cuda", folders, arguments.folder / "compiled") as at:
        at.become(CAP)
        loras = written(at, shown)
        for precision in wanted:
            bars = _of_precision(at, shown, precision, loras, budget)
            held = held and bool(bars) and all(bar["ok"] for bar in bars)
            for bar in bars:
                print(json.dumps(bar), flush=True)
    return 0 if arguments.tiny or held else 1


def written(at: Place, model: str) -> dict[str, Lora]:
    """Write a LoRA of each rank for every Linear of the transformer's blocks, so small that no number overflows."""
    folder = model_folder(at.models[model], at.config.paths.models) / "transformer"
    stored = stored_tensors(folder, WEIGHTS["diffusers"])
    wanted = {
        name.removesuffix(".weight"): tensor.shape
        for name, tensor in stored.items()
        if "transformer_blocks." in name and name.endswith(".weight") and len(tensor.shape) == 2
    }
    found = {}
    for seed, (name, rank) in enumerate(RANKS.items()):
        source = torch.Generator().manual_seed(seed)
        tensors = {
            f"transformer.{module}.lora_{letter}.weight": (torch.randn(shape, generator=source) * 1e-3).bfloat16()
            for module, (out, into) in wanted.items()
            for letter, shape in (("A", (rank, into)), ("B", (out, rank)))
        }
        file = lorafiles.folder(at.config.paths.models) / f"bench-{name}.safetensors"
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, file)
        found[name] = lorafiles.find(Lora(name=file.stem), at.config.paths.models)
    return found


def _of_precision(
    at: Place, model: str, precision: str, loras: dict[str, Lora], budget: Budget
) -> list[dict[str, Any]]:
    """Run the jobs of one precision; print a line for each, and return the bars: none where time was up before."""
    a, b = loras["a"], loras["b"]
    runs: dict[str, dict[str, Any]] = {}
    order: Sequence[tuple[str, tuple[Lora, ...]]] = (
        ("first", ()), ("without", ()), ("first with one", (a,)), ("the same", (a,)), ("another", (b,)),
        ("the same again", (b,)), ("another again", (a,)), ("both", (a, b)), ("without again", ()),
    )  # fmt: skip
    for name, used in order:
        if budget.is_spent():
            return []
        line = _run(at, model, precision, used, learn=name.startswith("first"))
        runs[name] = line
        print(json.dumps({"precision": precision, "job": name, **line}), flush=True)
    times = min(runs[name]["step_s"] for name in ("the same", "another", "the same again", "another again", "both"))
    times /= min(runs[name]["step_s"] for name in ("without", "without again"))
    more_s = [runs[f"another{i}"]["seconds"] - runs[f"the same{i}"]["seconds"] for i in ("", " again")]
    graphs = sum(line["graphs"] for name, line in runs.items() if name not in ("first", "without"))
    return [
        _bar(
            f"{precision}: another LoRA, more than the same, s",
            round(sum(more_s) / len(more_s), 2),
            ANOTHER_SECONDS_MAX,
        ),
        _bar(f"{precision}: graphs compiled for LoRAs", graphs, 0),
        _bar(f"{precision}: a step with a LoRA by one without", round(times, 4), STEP_TIMES_MAX),
    ]


def _bar(name: str, measured: float, bound: float) -> dict[str, Any]:
    return {"bar": name, "measured": measured, "bound": bound, "ok": measured <= bound}


def _run(at: Place, model: str, precision: str, loras: tuple[Lora, ...], *, learn: bool) -> dict[str, Any]:
    side = 256 if model == TINY else 1024
    spec: JobSpec = at.spec(model, width=side, height=side, num_inference_steps=STEPS)
    asked = {"loras": loras, "precision": precision, "prompt": "a red fox in the snow"}
    if model != TINY:  # left open, what the first jobs teach could change the way between two that are compared
        asked["compile"] = "on" if precision in COMPILED_EFFICIENCY else "off"
    spec = spec.model_copy(update=asked)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    began = time.monotonic()
    receipt: Receipt = at.run(spec, learn=learn)
    seconds = time.monotonic() - began
    assert receipt.plan is not None
    return {
        "rung": receipt.plan.rung,
        "seconds": round(seconds, 2),
        "load_s": receipt.phases["denoise"].load_seconds,
        "step_s": receipt.seconds_per_step,
        "graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"] - graphs,
    }


def _arguments() -> argparse.Namespace:
    parser = options.full_size(__doc__)
    parser.add_argument("--precision", action="append", choices=PRECISIONS, help="this one alone (repeatable)")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
