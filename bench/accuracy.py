"""How often a demo model draws what it is told, and what each way to hold and move its weights costs.

    python -m bench.accuracy                                     # demo-flux in float32, 500 held-out prompts
    python -m bench.accuracy --model demo-wan --prompts 200      # clips, from text and from a picture
    python -m bench.accuracy --plan bf16 --plan nf4 "bf16 leaf"  # those, beside float32
    python -m bench.accuracy --plan all --prompts 2000 --device cuda
    python -m bench.accuracy --list                              # the plans

Held-out prompts are combinations that training never saw (bench/drawings/world.py); the same prompts and seeds go
through every plan. Stock pipelines run them, many at a time, with modules as the daemon's loader holds and moves them;
that the daemon's own loop gives the bits of the stock one is tested elsewhere. Prints a JSON object for each plan: the
share of prompts with each attribute right, the difference from float32 in prompts that are right (with its standard
error) and in grey levels, and the largest difference from the first plan of the same precision: 0 where moving weights
changes nothing. Exits 1 where a bar is missed. These are figures of a toy.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.pool import Pool
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from diffusers.pipelines.wan.pipeline_wan import WanPipeline
from diffusers.pipelines.wan.pipeline_wan_i2v import WanImageToVideoPipeline
from PIL import Image

from bench.drawings.drawing import clips
from bench.drawings.flux import LATENT_CHANNELS, LATENT_SIDE, patches
from bench.drawings.training import accuracy, as_bytes, clip_verdict, decibels, verdict
from bench.drawings.world import Scene, World, texts
from bench.gpu_techniques import Technique, techniques
from safelight import caches, models
from safelight.models import ModelFacts
from safelight.plan import Plan
from safelightd import device as held_by
from safelightd.caching import caching
from safelightd.loading import Loader
from safelightd.modelfolder import model_folder
from safelightd.pinnedset import PinnedSet
from safelightd.pipelines import flux_vae, wan

SEED = 20_000
AT_ONCE = {"flux": 100, "wan": 20}
READ_AT_ONCE = 16
IN_PARTS = {
    "flux": {"VAE in strips of 64": {"vae_strip_rows": 64}, "VAE in strips of 32": {"vae_strip_rows": 32},
             "VAE in tiles of 256": {"vae_tiling": True, "vae_tile_pixels": 256}},
    "wan": {"VAE in strips of 32": {"vae_strip_rows": 32},
            "VAE in tiles of 256": {"vae_tiling": True, "vae_tile_pixels": 256}},
}  # fmt: skip
"""The smallest that the planner takes; of strips half of it, too. A tile of 256 holds a whole picture."""
EXACT = {"dtype": "float32", "precision": "fp32"}
CACHES = ("first-block:threshold=0.08", "first-block:threshold=0.4", "taylorseer:cache_interval=2")
BARS = {"demo-flux": {"one": 95.0, "two": 85.0}, "demo-wan": {"asked": 85.0}}
"""Percent of held-out prompts, in float32."""
FIRST_FRAME_DB = 25.0
ROUNDED_LEVELS, ROUNDED_TIMES = 1, 1.05
"""By how much sums in another order may differ: in float32 by a grey level anywhere; in bf16 they are, on the mean, as
far from float32 as the whole is."""
LOST_MAX = 2.0
"""Points of percent that a precision may lose which the planner chooses by itself."""
CHOSEN_BY_AUTO = ("bf16", "fp16", "fp8-dynamic", "fp8-weight-only", "int8-weight-only", "nf4", "int8-dynamic")
MOVED = ("partial", "streamed", "from file", "leaf", "leaf low_cpu_mem_usage", "block", "sequential")
"""How a plan's name ends that moves weights and changes none: asked for after the resident one of its precision."""

NO_PATHS: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True)
class Asked:
    """What is asked for."""

    scenes: list[Scene]
    prompts: list[str]
    pictures: list[Any]
    """The first frames, for clips of pictures; else empty."""


def main() -> int:
    arguments = _arguments()
    facts = models.load()[arguments.model]
    plans = {plan.name: plan for plan in _plans(facts)}
    if arguments.list:
        print("\n".join(plans))
        return 0
    asked = [f"{name} resident" if f"{name} resident" in plans else name for name in arguments.plan]
    unknown = [name for name in asked if name not in plans and name != "all"]
    if unknown:
        print(f"No such plan: {', '.join(unknown)}. Known: {', '.join(plans)}.", file=sys.stderr)
        return 2
    chosen = list(plans) if "all" in asked else asked
    # Forked before anything is on the GPU, which a forked process could not use; they only look at pictures.
    with get_context("fork").Pool() as readers, tempfile.TemporaryDirectory() as made:
        folder = model_folder(facts, Path(made))
        lines = list(_compared(facts, folder, [plans[name] for name in chosen], arguments, readers))
    missed = [bar for bar in _bars(facts, lines) if not bar["ok"]]
    for bar in _bars(facts, lines):
        print(json.dumps(bar), flush=True)
    return 1 if missed else 0


def _compared(
    facts: ModelFacts, folder: Path, others: list[Technique], arguments: argparse.Namespace, readers: Pool
) -> Iterator[dict[str, Any]]:
    asked = ask(facts, arguments.prompts)
    exact: Any = None
    resident: dict[str, Any] = {}
    right: list[bool] = []
    for technique in [Technique("float32", EXACT), *others]:
        began = time.perf_counter()
        try:
            shown = rendered(facts, folder, technique, asked, arguments.device)
        except Exception as error:  # noqa: BLE001 - a technique that fails is a result
            line: dict[str, Any] = {"plan": technique.name, "error": f"{type(error).__name__}: {error}"[:300]}
        else:
            answers = verdicts(facts, asked, shown, readers)
            exact, right = (shown, [answer["all"] for answer in answers]) if exact is None else (exact, right)
            line = _line(technique.name, asked, answers, right, shown, exact)
            same = resident.setdefault(plan_of(facts, technique, arguments.device).precision, shown)
            line["differs_from_resident"] = int(np.abs(shown.astype(np.int16) - same.astype(np.int16)).max())
            line["seconds"] = round(time.perf_counter() - began, 1)
        print(json.dumps(line), flush=True)
        yield line
        if time.perf_counter() - arguments.began > arguments.limit_s:
            print(json.dumps({"stopped": f"after {arguments.limit_s:.0f} s"}), flush=True)
            return
    if facts.family == "wan":
        line = _from_pictures(facts, folder, asked, arguments, readers)
        print(json.dumps(line), flush=True)
        yield line


def ask(facts: ModelFacts, count: int) -> Asked:
    clip = facts.kind == "video"
    world = World("cpu", SEED)
    scenes = world.scenes(count, "held out", clip=clip)
    prompts = texts(world.captions(scenes, plain=True, clip=clip))
    pictures: list[Any] = []
    if clip:
        first = clips(scenes, 2, torch.Generator().manual_seed(SEED))[:, :, 0]
        pictures = [Image.fromarray(picture) for picture in as_bytes(first)]
    return Asked(scenes.each(), prompts, pictures)


def _plans(facts: ModelFacts) -> list[Technique]:
    """Return every way of bench/gpu_techniques.py, those of the text encoder, and of the VAE."""
    text = "text_encoder_2" if facts.family == "flux" else "text_encoder"
    every = {text: tuple(range(sum(part.count for part in facts.blocks[text])))}
    return [
        *techniques(facts, tiny=False),
        Technique("bf16 text encoder streamed", {"streamed": every}),
        *(
            Technique(f"bf16 text encoder {precision}", {"text_encoder_precision": precision})
            for precision in ("nf4", "int8-bnb", "fp8-weight-only")
        ),
        *(
            Technique(f"{name} {part}", {**part_changes, **changes})
            for part, part_changes in IN_PARTS[facts.family].items()
            for name, changes in (("float32", EXACT), ("bf16", {}))
        ),
        *(Technique(f"bf16 resident, {cache}", {"cache": cache}) for cache in CACHES),
    ]


@contextmanager
def _pipeline(
    facts: ModelFacts, folder: Path, plan: Plan, component_paths: Mapping[str, str] = NO_PATHS
) -> Iterator[Any]:
    """Have the stock pipeline with modules as the loader holds and moves them for this plan."""
    pinned = PinnedSet(limit_bytes=2**30)
    loader = Loader(folder, plan, component_paths, blocks=facts.blocks, pinned=pinned)
    names = list(facts.components)
    with ExitStack() as held:
        parts = {name: held.enter_context(loader.component(name, plan.device)) for name in names}
        (flux_vae if facts.family == "flux" else wan).lessen(parts["vae"], plan)
        if facts.family == "flux":
            parts["vae"].use_slicing = plan.vae_strip_rows > 0  # strips are of one picture
        parts |= {name: loader.tokenizer(name) for name in ("tokenizer", "tokenizer_2") if (folder / name).is_dir()}
        if facts.family == "flux":
            yield FluxPipeline(scheduler=loader.scheduler(), **parts)
        else:
            yield WanPipeline(scheduler=loader.scheduler(), expand_timesteps=True, **parts)
    pinned.drop_unless([])
    held_by.release()


def plan_of(facts: ModelFacts, technique: Technique, device: str) -> Plan:
    """Return the plan of a technique: in bf16 with everything on the device, but for what it changes."""
    base = Plan(
        model=facts.key, device=device, dtype="bfloat16", precision="bf16", offload="model",
        vae_tiling=False, text_encoder_device=device,
    )  # fmt: skip
    return base.model_copy(update=technique.plan)


@torch.no_grad()
def rendered(
    facts: ModelFacts, folder: Path, technique: Technique, asked: Asked, device: str,
    component_paths: Mapping[str, str] = NO_PATHS,
) -> Any:  # fmt: skip
    """Return (prompts, [T,] H, W, 3) uint8; `component_paths` as the daemon's loader takes them."""
    plan = plan_of(facts, technique, device)
    size = {"width": facts.defaults.width, "height": facts.defaults.height}
    steps = {"num_inference_steps": facts.defaults.num_inference_steps, "output_type": "np"}
    shown = []
    cache = caches.read(plan.cache) if plan.cache else None
    # first-block decides by all that a forward sees: one prompt, as in a job.
    at_once = 1 if cache and cache.kind == "first-block" else AT_ONCE[facts.family]
    with _pipeline(facts, folder, plan, component_paths) as pipe:
        pipe.set_progress_bar_config(disable=True)
        for first in range(0, len(asked.prompts), at_once):
            prompts = asked.prompts[first : first + at_once]
            common = {"prompt": prompts, "generator": _generators(first, len(prompts)), **size, **steps}
            common["max_sequence_length"] = facts.max_sequence_length
            with caching(pipe.transformer, cache, pipe.transformer.dtype, lambda _asked, _skipped: None):
                if facts.family == "flux":
                    made = pipe(guidance_scale=0.0, latents=_noise(first, len(prompts)), **common).images
                else:
                    guidance = facts.defaults.guidance_scale
                    made = pipe(guidance_scale=guidance, num_frames=facts.defaults.num_frames, **common).frames
            shown.append((made * 255).round().astype(np.uint8))
    return np.concatenate(shown)


@torch.no_grad()
def _from_pictures(
    facts: ModelFacts, folder: Path, asked: Asked, arguments: argparse.Namespace, readers: Pool
) -> dict[str, Any]:
    """Animate each clip's true first frame, one at a time: the stock pipeline takes one picture for a batch."""
    plan = plan_of(facts, Technique("float32", EXACT), arguments.device)
    count = min(len(asked.prompts), arguments.from_pictures)
    shown = []
    with _pipeline(facts, folder, plan) as pipe:
        parts = {
            name: part for name, part in pipe.components.items() if name not in ("image_encoder", "image_processor")
        }
        animate = WanImageToVideoPipeline(expand_timesteps=True, **parts)
        animate.set_progress_bar_config(disable=True)
        for i in range(count):
            made = animate(
                image=asked.pictures[i], prompt=asked.prompts[i], generator=_generators(i, 1)[0],
                width=facts.defaults.width, height=facts.defaults.height, num_frames=facts.defaults.num_frames,
                num_inference_steps=facts.defaults.num_inference_steps, guidance_scale=facts.defaults.guidance_scale,
                max_sequence_length=facts.max_sequence_length, output_type="np",
            ).frames  # fmt: skip
            shown.append((made[0] * 255).round().astype(np.uint8))
    some = Asked(asked.scenes[:count], asked.prompts[:count], asked.pictures[:count])
    kept = [decibels(clip[0], np.asarray(picture)) for clip, picture in zip(shown, some.pictures, strict=True)]
    return {
        "plan": "float32, from pictures", "prompts": count,
        "first_frame_psnr_db": round(float(np.mean(kept)), 2), "first_frame_psnr_db_min": round(min(kept), 2),
        **accuracy(some.scenes, verdicts(facts, some, shown, readers)),
    }  # fmt: skip


def _noise(first: int, count: int) -> torch.Tensor:
    """Return the noise of pictures in float32, packed as FLUX packs it: left to itself a plan draws it in its own type,
    and pictures of other noise cannot be compared."""
    shape = (1, LATENT_CHANNELS, LATENT_SIDE, LATENT_SIDE)
    return patches(torch.cat([torch.randn(shape, generator=each) for each in _generators(first, count)]))


def _generators(first: int, count: int) -> list[torch.Generator]:
    return [torch.Generator("cpu").manual_seed(SEED + first + i) for i in range(count)]


def verdicts(facts: ModelFacts, asked: Asked, shown: Any, readers: Pool) -> list[dict[str, bool]]:
    read = clip_verdict if facts.kind == "video" else verdict
    return readers.starmap(read, zip(asked.scenes, shown, strict=True), chunksize=READ_AT_ONCE)


def _line(
    name: str, asked: Asked, answers: list[dict[str, bool]], right: list[bool], shown: Any, exact: Any
) -> dict[str, Any]:
    lost = np.array([float(was) - float(answer["all"]) for was, answer in zip(right, answers, strict=True)])
    line = {"plan": name, "prompts": len(answers), **accuracy(asked.scenes, answers)}
    line["lost_points"] = round(100 * float(lost.mean()), 2)
    line["lost_standard_error"] = round(100 * float(lost.std() / math.sqrt(len(lost))), 2)
    off = np.abs(shown.astype(np.int16) - exact.astype(np.int16))
    line["mean_pixel_difference"] = round(float(off.mean()), 4)
    line["largest_pixel_difference"] = int(off.max())
    return line


def _bars(facts: ModelFacts, lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    first = lines[0]
    means = {line["plan"]: line["mean_pixel_difference"] for line in lines if "mean_pixel_difference" in line}
    bars = []
    for name, bound in BARS[facts.key].items():
        measured = first.get(name, 0.0)
        bars.append(_bar(f"float32, {name}, percent", measured, bound, ok=measured >= bound))
    for line in lines[1:]:
        if "first_frame_psnr_db" in line:
            measured = line["first_frame_psnr_db"]
            bars.append(_bar("first frame, dB", measured, FIRST_FRAME_DB, ok=measured >= FIRST_FRAME_DB))
            continue
        differs = line.get("differs_from_resident")
        if line["plan"].endswith(MOVED) and "compiled" not in line["plan"] and differs is not None:
            bars.append(_bar(f"{line['plan']}: grey levels from resident", differs, 0, ok=differs == 0))
        if line["plan"].startswith("float32 VAE in") and differs is not None:
            ok = differs <= ROUNDED_LEVELS
            bars.append(_bar(f"{line['plan']}: grey levels from whole", differs, ROUNDED_LEVELS, ok=ok))
        if line["plan"].startswith("bf16 VAE in") and "bf16 resident" in means and line["plan"] in means:
            mean, bound = means[line["plan"]], round(ROUNDED_TIMES * means["bf16 resident"], 4)
            bars.append(_bar(f"{line['plan']}: mean grey levels from float32", mean, bound, ok=mean <= bound))
        if line["plan"].startswith(CHOSEN_BY_AUTO):
            lost = line.get("lost_points")
            bars.append(_bar(f"{line['plan']}: points lost", lost, LOST_MAX, ok=lost is not None and lost <= LOST_MAX))
    return bars


def _bar(name: str, measured: Any, bound: float, *, ok: bool) -> dict[str, Any]:
    return {"bar": name, "measured": measured, "bound": bound, "ok": ok}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo-flux", choices=list(BARS))
    parser.add_argument(
        "--plan", nargs="+", action="extend", default=[], metavar="PLAN",
        help="beside float32; nf4 is short for nf4 resident; all: every one of --list",
    )  # fmt: skip
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument("--from-pictures", type=int, default=50, help="clips of pictures, of demo-wan")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--limit-s", type=float, default=1e9, help="begin no plan after this")
    parser.add_argument("--list", action="store_true", help="name the plans")
    return parser.parse_args(namespace=argparse.Namespace(began=time.perf_counter()))


if __name__ == "__main__":
    sys.exit(main())
