"""What is kept of LoRAs in fewer bits, on a 16 GB card: what keeping costs one job, and what it spares those after it.

    python -m bench.gpu_fused                       # fp8-dynamic and nf4: some five minutes, two to write weights
    python -m bench.gpu_fused --precision int8-weight-only
    python -m bench.gpu_fused --tiny                # the same path in seconds, on the CPU, where nothing is kept

Random weights of full size (bench/fullsize.py, 33 GB below --folder) and the LoRA of rank 16 of bench/gpu_lora.py.
Of each precision, in one warm process: a first that compiles, one that makes its weights, one that keeps them, too, two
that read them. Before each, the files of weights are dropped from the page cache, as on a machine with 32 GB of RAM.
Prints a JSON object a job and a bar: all pictures have the same pixels, what is read takes less than 0.7 times as long
to load as what is made, keeping takes at most 1.5 times as long as predicted, and memory stays below what the plan
says. Exits 1 where a bar is missed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

from PIL import Image

from bench import fullsize
from bench.gpu_lora import written
from bench.measured import Place, place
from safelight import footprint, fused
from safelight.lora import Lora
from safelight.pace import COMPILED_EFFICIENCY

MODEL, TINY = "flux-schnell", "tiny-flux-schnell"
CAP = 16
FUSED_GIB = 32
JOBS = ("first", "makes", "keeps", "reads", "reads again")
READ_SHARE_MAX, KEEP_TIMES_MAX = 0.7, 1.5


def main() -> int:
    arguments = _arguments()
    model = TINY if arguments.tiny else MODEL
    folders = {} if arguments.tiny else {MODEL: arguments.folder / MODEL}
    if folders:
        fullsize.build_elsewhere(folders)
    held = True
    with place("cpu" if arguments.tiny else "cuda", folders, arguments.folder / "compiled") as at:
        lora = written(at, model)["a"]
        for precision in ("auto",) if arguments.tiny else arguments.precision or ("fp8-dynamic", "nf4"):
            for bar in _of_precision(at, model, precision, lora, folders):
                print(json.dumps(bar), flush=True)
                held = held and bar["ok"]
    return 0 if arguments.tiny or held else 1


def _of_precision(at: Place, model: str, precision: str, lora: Lora, folders: dict[str, Path]) -> list[dict[str, Any]]:
    lines = {}
    for name in JOBS:
        at.fused_gib = FUSED_GIB if name not in JOBS[:1] else 0
        at.become(CAP)
        for folder in (*folders.values(), at.config.paths.models / fused.FOLDER):
            _drop_from_page_cache(folder)
        lines[name] = line = _run(at, model, precision, lora)
        print(json.dumps({"precision": precision, "job": name, **line}), flush=True)
    makes, keeps, reads = (lines[name] for name in ("makes", "keeps", "reads"))
    return [
        _bar(f"{precision}: different pictures", len({line["pixels"] for line in lines.values()}) - 1, 0),
        _bar(f"{precision}: load of what is read by what is made", reads["load_s"] / makes["load_s"], READ_SHARE_MAX),
        _bar(f"{precision}: load while keeping by its prediction", keeps["load_s"] / keeps["told_s"], KEEP_TIMES_MAX),
        _bar(f"{precision}: device by prediction", max(line["device"] for line in lines.values()), 1.0),
        _bar(f"{precision}: RAM by prediction", max(line["host"] for line in lines.values()), 1.0),
    ]


def _bar(name: str, measured: float, bound: float) -> dict[str, Any]:
    return {"bar": name, "measured": round(measured, 3), "bound": bound, "ok": measured <= bound}


def _run(at: Place, model: str, precision: str, lora: Lora) -> dict[str, Any]:
    side = 256 if model == TINY else 1024
    asked = {"loras": (lora,), "precision": precision, "prompt": "a red fox in the snow", "seed": 7}
    if model != TINY:
        asked["compile"] = "on" if precision in COMPILED_EFFICIENCY else "off"
    spec = at.spec(model, width=side, height=side, num_inference_steps=4).model_copy(update=asked)
    began = time.monotonic()
    receipt = at.run(spec, learn=False)
    seconds = time.monotonic() - began
    assert receipt.plan is not None
    record, told = receipt.phases["denoise"], receipt.plan.predicted["denoise"]
    assert told.shipped is not None or model == TINY
    with Image.open(at.config.paths.outbox / receipt.outputs[0].path) as picture:
        pixels = hashlib.sha256(picture.tobytes()).hexdigest()[:16]
    return {
        "rung": receipt.plan.rung,
        "fused": receipt.plan.fused,
        "keeping": receipt.plan.keeping,
        "seconds": round(seconds, 2),
        "load_s": record.load_seconds or 0.0,
        "told_s": told.shipped.load_seconds + told.shipped.pin_seconds if told.shipped else 0.0,
        "device": record.device_peak_bytes / max(told.device_bytes, footprint.CONTEXT_BYTES),
        "host": record.host_peak_bytes / told.host_bytes,
        "pixels": pixels,
    }


def _drop_from_page_cache(folder: Path) -> None:
    for file in folder.rglob("*.safetensors"):
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/safelight-bench"))
    parser.add_argument("--precision", action="append", help="this one alone (repeatable)")
    parser.add_argument("--tiny", action="store_true", help="the project's tiny model on the CPU")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
