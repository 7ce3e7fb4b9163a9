"""FLUX.1-dev on a 16 GB card, led by a ControlNet and started from a picture: predicted against measured.

    python -m bench.pictures           # eight jobs of two steps: some six minutes on an H100, three to write weights
    python -m bench.pictures --tiny    # the same path in seconds, on the CPU

Random weights of full size (bench/fullsize.py, 33 GB of disk below --folder, and 4 GB for a ControlNet of the size of
union-pro-2). Each job runs twice, and the second one counts. Prints a JSON object a job, then those bars of
bench/memory.py that tell of cases; exits 1 where one is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

from PIL import Image

from bench import fullsize, memory
from bench.cases import described
from bench.measured import Place, place
from safelight import inputs, models
from safelight.controlnet import ControlNet

MODEL, TINY = "flux-dev", "tiny-flux-dev"
CAP = 16
NET, NET_CONFIG = "union-pro-2", {"num_layers": 6, "num_single_layers": 0, "guidance_embeds": True}

CASES: dict[str, dict[str, Any]] = {
    "led, 1024x1024": {"controlnet": 1.0},
    "led, bf16, 1024x1024": {"controlnet": 1.0, "precision": "bf16", "compile": "off"},
    "from a picture, 1024x1024": {"strength": 0.5},
    "from a picture, 1536x1536": {"strength": 0.5, "width": 1536, "height": 1536},
}
STEPS = 4
"""Of which a strength of a half leaves two."""


def main() -> int:
    arguments = _arguments()
    folders = {} if arguments.tiny else _build(arguments.folder)
    lines = []
    with place("cpu" if arguments.tiny else "cuda", folders, arguments.folder / "compiled") as at:
        at.become(CAP)
        if not arguments.tiny:
            _link(at, arguments.folder / NET)
        for name, asked in CASES.items():
            for is_first in (True, False):
                line = {"part": "cases", "name": name, "first_of_kind": is_first, **_run(at, asked, arguments)}
                print(json.dumps(line), flush=True)
                lines += [] if is_first else [line]
    found = memory.bars(lines)
    for bar in found:
        print(json.dumps(bar), flush=True)
    return 0 if arguments.tiny or all(bar["ok"] for bar in found) else 1


def _build(folder: Path) -> dict[str, Path]:
    table = models.load()
    fullsize.build(table["flux-schnell"], folder / "flux-schnell", "cuda")
    fullsize.build_dev(folder / "flux-schnell", table[MODEL], folder / MODEL, tiny=False)
    if not (folder / NET).is_dir():
        net = fullsize.on_meta("diffusers.FluxControlNetModel", NET_CONFIG)
        fullsize.write(net, folder / NET, "cuda")
    return {MODEL: folder / MODEL}


def _link(at: Place, net: Path) -> None:
    there = models.controlnet_folder(at.models[MODEL], NET, at.config.paths.models)
    there.parent.mkdir(parents=True, exist_ok=True)
    there.symlink_to(net.absolute())


def _run(at: Place, asked: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """Run one job from a picture of its own; return what its receipt says."""
    source = at.config.paths.state / "picture.png"
    source.parent.mkdir(parents=True, exist_ok=True)
    Image.effect_mandelbrot((768, 768), (-2, -1, 1, 1), 50).convert("RGB").save(source)
    digest = inputs.store(source, at.config.paths.inputs)
    size = {name: asked.get(name, 1024) // (8 if arguments.tiny else 1) for name in ("width", "height")}
    more = {name: value for name, value in asked.items() if name not in ("width", "height", "controlnet")}
    if "controlnet" in asked:
        more["controlnet"] = ControlNet(model="tiny" if arguments.tiny else NET, image=digest)
    else:
        more["image"] = digest
    if arguments.tiny:
        more = {name: value for name, value in more.items() if name not in ("precision", "compile")}
    spec = at.spec(TINY if arguments.tiny else MODEL, num_inference_steps=STEPS, **size, **more)
    return described(at.run(spec, learn=True))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/safelight-bench"))
    parser.add_argument("--tiny", action="store_true", help="the project's tiny model on the CPU")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
