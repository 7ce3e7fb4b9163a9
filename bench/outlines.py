"""Whether the LoRA that comes with safelight acts: outlines for filled shapes, by its scale, on and off in one engine.

    python -m bench.outlines                 # 100 held-out prompts of one shape: two minutes on two cores
    python -m bench.outlines --prompts 20

The prompts are combinations that neither demo-flux nor the LoRA was trained on; each goes through the engine's own path
in one warm process, with scale 1 and without, some with scale 0, 0.5 and again. Prints a JSON object of what came out,
then one a bar; exits 1 where a bar is missed. These are figures of a toy.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bench.drawings import analyser
from bench.drawings.training import accuracy
from bench.drawings.world import Scenes, World, texts
from bench.measured import Place, place
from safelight.lora import Lora

MODEL, NAME = "demo-flux", "outlines"
SEED = 30_000
SWITCHED = 10
"""Prompts that are drawn with other scales, and again, too."""
RIGHT_MIN = 90.0
"""Percent of the prompts that come out as an outline of the right shape and colour."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=100)
    count: int = parser.parse_args().prompts
    world = World("cpu", SEED)
    scenes = one_shape(world, count)
    prompts = texts(world.captions(scenes, plain=True))
    with tempfile.TemporaryDirectory() as compiled, place("cpu", {}, Path(compiled)) as at:
        without, whole = ([_drawn(at, prompt, i, scale) for i, prompt in enumerate(prompts)] for scale in (None, 1.0))
        few = list(enumerate(prompts))[:SWITCHED]
        zero, half, off, on = ([_drawn(at, prompt, i, scale) for i, prompt in few] for scale in (0.0, 0.5, None, 1.0))
    answers = [
        analyser.verdict(scene, analyser.read(picture), outline=True)
        for scene, picture in zip(scenes.each(), whole, strict=True)
    ]
    right = 100 * float(np.mean([answer["colour"] and answer["shape"] for answer in answers]))
    away = {"0": _off(zero, without), "0.5": _off(half, without), "1": _off(whole[:SWITCHED], without)}
    print(json.dumps({"prompts": count, **accuracy(scenes.each(), answers), "grey_levels_from_without": away}))
    again = max(_off(off, without), _off(on, whole))
    bars = [
        _bar("outlines of the right shape and colour, percent", right, RIGHT_MIN, ok=right >= RIGHT_MIN),
        _bar("scale 0, grey levels from no LoRA", away["0"], 0.0, ok=away["0"] == 0),
        _bar("scale 0.5, of what scale 1 changes", away["0.5"] / away["1"], 1.0, ok=0 < away["0.5"] < away["1"]),
        _bar("off and on again, grey levels from the first time", again, 0.0, ok=again == 0),
    ]
    for bar in bars:
        print(json.dumps(bar))
    return 0 if all(bar["ok"] for bar in bars) else 1


def one_shape(world: World, count: int) -> Scenes:
    """Return held-out scenes of one shape each."""
    scenes = world.scenes(6 * count, "held out")
    return scenes[scenes.count == 1][:count]


def _drawn(at: Place, prompt: str, seed: int, scale: float | None) -> Any:
    spec = at.spec(MODEL, prompt=prompt, seed=SEED + seed)
    loras = () if scale is None else (Lora(name=NAME, scale=scale),)
    receipt = at.run(spec.model_copy(update={"loras": loras}), learn=False)
    with Image.open(at.config.paths.outbox / receipt.outputs[0].path) as picture:
        return np.asarray(picture)


def _off(some: list[Any], others: list[Any]) -> float:
    return round(float(np.mean([np.abs(a.astype(int) - b).mean() for a, b in zip(some, others, strict=False)])), 3)


def _bar(name: str, measured: float, bound: float, *, ok: bool) -> dict[str, Any]:
    return {"bar": name, "measured": round(measured, 3), "bound": bound, "ok": ok}


if __name__ == "__main__":
    sys.exit(main())
