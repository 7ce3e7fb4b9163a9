"""What diffusers' caches save at full size: seconds of a loop, forwards left out, and how far the pixels are from none.

    python -m bench.gpu_cache                        # Wan 2.2 TI2V-5B, 832x480x49, 20 steps: three minutes on an H100
    python -m bench.gpu_cache --model flux-dev       # 1024x1024, 28 steps: 33 GB of disk
    python -m bench.gpu_cache --only none first-block:threshold=0.08 taylorseer
    python -m bench.gpu_cache --tiny                 # the same path in seconds, on the CPU

The weights are random (bench/fullsize.py): what a forward costs that is left out is true, and so are taylorseer's
counts, which are fixed; how often first-block leaves one out at a threshold, and how far the pixels are, says nothing
of trained weights. Real jobs on a card of 16 GB, compiled, the first of them twice, so that code is there. Prints a
JSON object a cache, with the share of the loop's seconds that it took beside the share of forwards.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bench import fullsize, options
from bench.measured import Budget, Place, place
from safelight.receipt import Receipt
from safelightd import video

NONE = "none"
CACHES = (
    NONE, "first-block:threshold=0.05", "first-block:threshold=0.08", "first-block:threshold=0.12",
    "first-block:threshold=1", "taylorseer:cache_interval=2", "taylorseer:cache_interval=3",
)  # fmt: skip
"""With a threshold of 1 nearly every forward is left out: what that costs."""

JOBS: dict[str, dict[str, Any]] = {
    "wan-ti2v-5b": {
        "width": 832, "height": 480, "num_frames": 49, "num_inference_steps": 20, "precision": "bf16", "compile": "on",
    },
    "flux-dev": {"width": 1024, "height": 1024, "num_inference_steps": 28},
}  # fmt: skip
TINY: dict[str, dict[str, Any]] = {
    "wan-ti2v-5b": {"model": "tiny-wan-ti2v", "num_inference_steps": 8},
    "flux-dev": {"model": "tiny-flux-dev", "num_inference_steps": 8},
}
CAP = 16


def main() -> int:
    arguments = _arguments()
    budget = Budget(arguments.limit_s)
    needed = [*(["flux-schnell"] if arguments.model == "flux-dev" else []), arguments.model]
    folders = {} if arguments.tiny else {key: arguments.folder / key for key in needed}
    if folders:
        fullsize.build_elsewhere(folders)
    job = TINY[arguments.model] if arguments.tiny else {"model": arguments.model, **JOBS[arguments.model]}
    lines: dict[str, dict[str, Any]] = {}
    exact: NDArray[Any] | None = None
    with place("cpu" if arguments.tiny else "cuda", folders, arguments.folder / "compiled") as at:
        at.attention = arguments.attention
        at.become(CAP)
        for name in (NONE, *arguments.only):  # the first compiles, and is told of by the second
            if budget.is_spent():
                break
            try:
                receipt = _run(at, job, name)
                pixels = _pixels(at, receipt)
            except Exception as error:  # noqa: BLE001 - what fails is a result
                traceback.print_exc(limit=-4)
                print(json.dumps({"name": name, "error": f"{type(error).__name__}: {error}"[:400]}), flush=True)
                continue
            exact = pixels if exact is None else exact
            line = _line(receipt, name, pixels, exact)
            if name != NONE and line["forwards"] and NONE in lines:
                line["loop_share"] = round(line["loop_s"] / lines[NONE]["loop_s"], 4)
                line["forward_share"] = round(1 - line["skipped"] / line["forwards"], 4)
            lines[name] = line
            print(json.dumps(line), flush=True)
    return 0 if len(lines) == len({NONE, *arguments.only}) else 1


def _run(at: Place, job: dict[str, Any], name: str) -> Receipt:
    cache = {} if name == NONE else {"cache": name}
    written = {key: value for key, value in job.items() if key != "model"}
    # Nothing learned: what one job teaches could change the way of the next, which is compared with it.
    return at.run(at.spec(job["model"], prompt="a red fox in the snow", **written, **cache), learn=False)


def _pixels(at: Place, receipt: Receipt) -> NDArray[Any]:
    """Return the frames of what was published, (frames, height, width, 3)."""
    file = at.config.paths.outbox / receipt.outputs[0].path
    if file.suffix == ".mp4":
        return np.stack(list(video.read_frames(file)))
    return np.asarray(Image.open(file))[None]


def _line(receipt: Receipt, name: str, pixels: NDArray[Any], exact: NDArray[Any]) -> dict[str, Any]:
    denoise = receipt.phases["denoise"]
    assert receipt.plan is not None
    return {
        "name": name, "rung": receipt.plan.rung, "step_s": receipt.seconds_per_step,
        "loop_s": round(denoise.seconds - (denoise.load_seconds or 0.0), 3),
        "forwards": receipt.cache.forwards if receipt.cache else None,
        "skipped": receipt.cache.skipped if receipt.cache else None,
        "grey_levels_from_none": round(float(np.abs(pixels.astype(int) - exact).mean()), 3),
        "device_gib": [
            round(size / 2**30, 2)
            for size in (receipt.plan.predicted["denoise"].device_bytes, denoise.device_peak_bytes)
        ],
    }  # fmt: skip


def _arguments() -> argparse.Namespace:
    parser = options.full_size(__doc__)
    parser.add_argument("--model", choices=tuple(JOBS), default="wan-ti2v-5b")
    parser.add_argument("--only", nargs="+", default=list(CACHES), metavar="CACHE")
    parser.add_argument("--attention", default="auto", help="[worker] attention")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
