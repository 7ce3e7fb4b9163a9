"""FLUX.1-dev on a 16 GB card, led by a ControlNet and started from a picture: predicted against measured.

    python -m bench.gpu_pictures                  # eight jobs of two steps: some six minutes, three to write weights
    python -m bench.gpu_pictures --limit-s 300    # begins no job after so many seconds
    python -m bench.gpu_pictures --tiny           # the same path in seconds, on the CPU

Random weights of full size (bench/fullsize.py, 33 GB of disk below --folder, and 4 GB for a ControlNet of the size of
union-pro-2). Each job runs twice, and the second one counts; where it runs in another way than the first, having
learned from it, its seconds do not. The minutes are those of an H100. Prints a JSON object a job, then those bars of
bench/gpu_memory.py that tell of cases; exits 1 where one is missed, or where the limit came before.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

from bench import fullsize, gpu_memory, options
from bench.cases import described
from bench.measured import Budget, Place, place
from safelight import models
from safelight.controlnet import ControlNet

MODEL, TINY = "flux-dev", "tiny-flux-dev"
CAP = 16
NET, NET_CONFIG = "union-pro-2", {"num_layers": 6, "num_single_layers": 0, "guidance_embeds": True}

CASES: dict[str, dict[str, Any]] = {
    "led, 1024x1024": {"controlnet": 1.0},
    "led, fp8, 1024x1024": {"controlnet": 1.0, "precision": "fp8-dynamic"},
    "from a picture, 1024x1024": {"strength": 0.5},
    "from a picture, 1536x1536": {"strength": 0.5, "width": 1536, "height": 1536},
}
STEPS = 4
"""Of which a strength of a half leaves two."""


def main() -> int:
    arguments = options.full_size(__doc__).parse_args()
    budget = Budget(arguments.limit_s)
    folders = {} if arguments.tiny else _build(arguments.folder)
    lines: list[dict[str, Any]] = []
    with place("cpu" if arguments.tiny else "cuda", folders, arguments.folder / "compiled") as at:
        at.become(CAP)
        if not arguments.tiny:
            _link(at, arguments.folder / NET)
        for name, asked in CASES.items():
            known = ""
            for counts in (False, True):
                if budget.is_spent():
                    break
                found = _run(at, asked, arguments)
                is_first = not known or found.get("rung") != known
                line = {"part": "cases", "name": name, "first_of_kind": is_first, **found}
                known = found.get("rung", "")
                print(json.dumps(line), flush=True)
                lines += [line] if counts else []
    bars = gpu_memory.bars(lines)
    for bar in bars:
        print(json.dumps(bar), flush=True)
    return 0 if arguments.tiny or (len(lines) == len(CASES) and all(bar["ok"] for bar in bars)) else 1


def _build(folder: Path) -> dict[str, Path]:
    folders = {"flux-schnell": folder / "flux-schnell", MODEL: folder / MODEL}
    fullsize.build_elsewhere(folders)
    if not (folder / NET).is_dir():
        fullsize.elsewhere(_write_net, folder / NET)
    return {MODEL: folders[MODEL]}


def _write_net(folder: Path) -> None:
    fullsize.write(fullsize.on_meta("diffusers.FluxControlNetModel", NET_CONFIG), folder, "cuda")


def _link(at: Place, net: Path) -> None:
    there = models.controlnet_folder(at.models[MODEL], NET, at.config.paths.models)
    there.parent.mkdir(parents=True, exist_ok=True)
    there.symlink_to(net.absolute())


def _run(at: Place, asked: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """Run one job from a picture of its own; return what its receipt says, or why it failed."""
    digest = at.picture()
    size = {name: asked.get(name, 1024) // (8 if arguments.tiny else 1) for name in ("width", "height")}
    more = {name: value for name, value in asked.items() if name not in ("width", "height", "controlnet")}
    if "controlnet" in asked:
        more["controlnet"] = ControlNet(model="tiny" if arguments.tiny else NET, image=digest)
    else:
        more["image"] = digest
    if arguments.tiny:
        more = {name: value for name, value in more.items() if name not in ("precision", "compile")}
    spec = at.spec(TINY if arguments.tiny else MODEL, num_inference_steps=STEPS, **size, **more)
    try:
        return described(at.run(spec, learn=True))
    except Exception as error:  # noqa: BLE001 - a job that fails is a result
        traceback.print_exc(limit=-4)
        return {"error": f"{type(error).__name__}: {error}"[:400]}


if __name__ == "__main__":
    sys.exit(main())
