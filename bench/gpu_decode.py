"""FLUX's VAE at full size with random weights: a picture whole, strip by strip, and in diffusers' own tiles.

    python -m bench.gpu_decode                                   # a minute on an H100
    python -m bench.gpu_decode --sizes 1536x1536 --rows 64 128
    python -m bench.gpu_decode --tiny                            # the same path in seconds, on the CPU

Prints a JSON object for each size and way: seconds, what torch reserves above the weights beside what the planner
counts, and the mean difference from a whole decode in float32, in grey levels. Then one a bar; exits 1 where one is
missed: strips are no further from float32 than the whole is in 16 bit, take at most half of its memory, and no more
than is counted. With --tiny only the first is judged, in float32.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

from bench import shapes
from bench.fullsize import FULL, spec_of, synchronise
from safelight import footprint, models
from safelight.footprint import Decoding
from safelight.machine import GIB
from safelight.models import ModelFacts
from safelightd.pipelines.flux_vae import in_strips, in_tiles

SIZES = ("512x512", "1024x1024", "1536x1024", "1024x1536", "2048x1024", "1536x1536")
TINY_SIZES = ("272x256",)
MEMORY_SHARE = 0.5
"""Of a whole decode's, at 1024x1024 and above: below that its workspace counts for more than pictures do."""
ERROR_TIMES = 1.05
RUNS = 3
GREY_LEVELS = 127.5


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _arguments(argv)
    facts = models.load()["flux-schnell"]
    device = torch.device("cpu" if arguments.tiny else "cuda")
    lines = []
    with torch.no_grad():
        vae = _vae(facts, device, tiny=arguments.tiny)
        for size in arguments.sizes or (TINY_SIZES if arguments.tiny else SIZES):
            for line in _decoded(facts, vae, size, arguments):
                print(json.dumps(line), flush=True)
                lines.append(line)
    return judged(lines, judge_memory=not arguments.tiny)


def _vae(facts: ModelFacts, device: torch.device, *, tiny: bool) -> Any:
    torch.manual_seed(1)
    with device:
        vae = AutoencoderKL(**shapes.config(facts, "vae", shapes.SMALLER if tiny else FULL))
    return vae.eval().requires_grad_(requires_grad=False)


def _decoded(facts: ModelFacts, exact: Any, size: str, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    width, height = map(int, size.split("x"))
    device, dtype = exact.device, torch.float32 if arguments.tiny else torch.bfloat16
    stream = torch.Generator(device).manual_seed(2)
    latents = torch.randn(1, exact.config.latent_channels, height // 8, width // 8, generator=stream, device=device)
    right = exact.decode(latents).sample.cpu()
    for how in ways(arguments.rows):
        vae = copy.deepcopy(exact).to(dtype)
        if how.strip_rows:
            in_strips(vae, how.strip_rows)
        if how.tile_pixels:
            in_tiles(vae, how.tile_pixels)
        emptied()
        before = torch.cuda.memory_reserved() if device.type == "cuda" else 0
        shown, seconds = torch.empty(0), []
        for _ in range(RUNS):
            shown = torch.empty(0)  # of the run before nothing is held
            began = time.perf_counter()
            shown = vae.decode(latents.to(dtype)).sample
            synchronise()
            seconds.append(time.perf_counter() - began)
        reserved = torch.cuda.max_memory_reserved() - before if device.type == "cuda" else 0
        off = (shown.cpu().float() - right).abs() * GREY_LEVELS
        yield {
            "size": size, "way": name_of(how), "seconds_first": round(seconds[0], 4), "seconds": round(min(seconds), 4),
            "reserved_gib": round(reserved / GIB, 3), "bytes_a_pixel": round(reserved / (width * height)),
            "counted_gib": round(_counted(facts, width, height, how) / GIB, 3),
            "mean_grey_levels_off": round(float(off.mean()), 4), "largest": round(float(off.max()), 2),
        }  # fmt: skip
        del vae, shown


def ways(strip_rows: Sequence[int]) -> list[Decoding]:
    strips = [Decoding(strip_rows=rows) for rows in strip_rows]
    return [Decoding(), *strips, Decoding(tile_pixels=footprint.TILES[0])]


def name_of(how: Decoding) -> str:
    if how.tile_pixels:
        return f"tiles of {how.tile_pixels}"
    return f"strips of {how.strip_rows}" if how.strip_rows else "whole"


def _counted(facts: ModelFacts, width: int, height: int, how: Decoding) -> int:
    spec = spec_of(facts, tiny=False, width=width, height=height)
    return footprint.decode_bytes(spec, facts, how, 2) + footprint.SLACK_BYTES


def emptied() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def judged(lines: list[dict[str, Any]], *, judge_memory: bool) -> int:
    """Print the bars, and return the exit code."""
    bars = _bars(lines, judge_memory=judge_memory)
    for bar in bars:
        print(json.dumps(bar))
    return 0 if all(bar["ok"] for bar in bars) else 1


def _bars(lines: list[dict[str, Any]], *, judge_memory: bool) -> list[dict[str, Any]]:
    found = []
    for whole in (line for line in lines if line["way"] == "whole"):
        strips = [line for line in lines if line["size"] == whole["size"] and "strips" in line["way"]]
        for line in strips:
            name = f"{line['size']}, {line['way']}"
            bound = max(ERROR_TIMES * whole["mean_grey_levels_off"], 0.01)
            found.append(_bar(f"{name}: mean grey levels from float32", line["mean_grey_levels_off"], bound))
            if judge_memory:
                found.append(_bar(f"{name}: reserved, GiB", line["reserved_gib"], line["counted_gib"]))
        if judge_memory and strips and whole["reserved_gib"] > 2:
            least = min(line["reserved_gib"] for line in strips)
            name = f"{whole['size']}, the lowest strips: of the whole's memory, GiB"
            found.append(_bar(name, least, MEMORY_SHARE * whole["reserved_gib"]))
    return found


def _bar(name: str, measured: float, bound: float) -> dict[str, Any]:
    return {"bar": name, "measured": measured, "bound": round(bound, 4), "ok": measured <= bound}


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", metavar="WIDTHxHEIGHT")
    parser.add_argument("--rows", type=int, nargs="+", default=list(footprint.STRIP_ROWS["flux"]))
    parser.add_argument("--tiny", action="store_true", help="on the CPU")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
