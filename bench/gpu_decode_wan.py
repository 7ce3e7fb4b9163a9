"""Wan's VAEs at full size with random weights: a clip whole, strip by strip, and in diffusers' own tiles.

    python -m bench.gpu_decode_wan                               # 2 to 4 minutes on an H100
    python -m bench.gpu_decode_wan --cases wan-ti2v-5b:832x480 --rows 64 128
    python -m bench.gpu_decode_wan --tiny                        # the same path in seconds, on the CPU

Prints a JSON object for each case and way: seconds a latent frame after the first (of tiles, which are joined before
they give any, of all of them), what torch reserves above the weights beside what the planner counts, and the mean
difference from a whole decode in float32, in grey levels. Then one a bar, those of bench/gpu_decode.py; exits 1 where
one is missed. With --tiny only the difference is judged, in float32.
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
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

from bench import shapes
from bench.fullsize import FULL, spec_of, synchronise
from bench.gpu_decode import GREY_LEVELS, emptied, judged, name_of, ways
from safelight import footprint, models
from safelight.footprint import Decoding
from safelight.machine import GIB
from safelight.models import ModelFacts
from safelightd.pipelines import frames_of, wan, wan_vae
from safelightd.pipelines.wan_strips import in_strips

CASES = ("wan-ti2v-5b:1280x704", "wan-ti2v-5b:704x1280", "wan-t2v-a14b:832x480")
TINY_CASES = ("wan-ti2v-5b:256x256", "wan-t2v-a14b:256x256")
RUNS = 2
"""The first of which loads kernels."""


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _arguments(argv)
    table = models.load()
    lines = []
    with torch.no_grad():
        for case in arguments.cases or (TINY_CASES if arguments.tiny else CASES):
            key, _, size = case.partition(":")
            for line in _decoded(table[key], size, arguments):
                print(json.dumps(line), flush=True)
                lines.append(line)
    return judged(lines, judge_memory=not arguments.tiny)


def _decoded(facts: ModelFacts, size: str, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    width, height = map(int, size.split("x"))
    exact = _vae(facts, tiny=arguments.tiny)
    dtype = torch.float32 if arguments.tiny else torch.bfloat16
    side = exact.config.scale_factor_spatial
    shape = (1, exact.config.z_dim, arguments.latent_frames, height // side, width // side)
    latents = torch.randn(shape, generator=torch.Generator(exact.device).manual_seed(2), device=exact.device)
    with torch.backends.cudnn.flags(allow_tf32=False):
        right = _shown(exact, latents)
    exact.cpu()
    for how in ways(arguments.rows):
        vae = copy.deepcopy(exact).to(latents.device, dtype)
        if how.strip_rows:
            in_strips(vae, how.strip_rows)
        if how.tile_pixels:
            wan.tile(vae, how.tile_pixels)
        wan_vae.lighten(vae)
        emptied()
        before = torch.cuda.memory_reserved() if torch.cuda.is_available() else 0
        seconds = [_seconds(vae, latents.to(dtype)) for _ in range(RUNS)]
        reserved = torch.cuda.max_memory_reserved() - before if torch.cuda.is_available() else 0
        off = (_shown(vae, latents.to(dtype)) - right).abs() * GREY_LEVELS
        yield {
            "size": f"{facts.key} {size}", "way": name_of(how), "seconds_a_latent_frame": round(seconds[-1], 4),
            "reserved_gib": round(reserved / GIB, 3), "bytes_a_pixel": round(reserved / (width * height)),
            "counted_gib": round(_counted(facts, width, height, how, arguments.latent_frames) / GIB, 3),
            "mean_grey_levels_off": round(float(off.mean()), 4), "largest": round(float(off.max()), 2),
        }  # fmt: skip
        del vae


def _vae(facts: ModelFacts, *, tiny: bool) -> Any:
    torch.manual_seed(1)
    with torch.device("cpu" if tiny else "cuda"):
        vae = AutoencoderKLWan(**shapes.config(facts, "vae", shapes.SMALLER if tiny else FULL))
    return vae.eval().requires_grad_(requires_grad=False)


def _parts(vae: Any, latents: torch.Tensor) -> Iterator[torch.Tensor]:
    if vae.use_tiling:
        return iter(vae.decode(latents, return_dict=False)[0].split(wan.FRAMES_PER_LATENT, dim=2))
    return wan._decoded_parts(vae, latents)


def _shown(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    return torch.cat([part.float().cpu() for part in _parts(vae, latents)], dim=2)


def _seconds(vae: Any, latents: torch.Tensor) -> float:
    """Decode to frames, as a job does, and return the seconds of a latent frame."""
    synchronise()
    began, count = time.perf_counter(), latents.shape[2]
    for i, part in enumerate(_parts(vae, latents)):
        for _frame in frames_of(part[0].permute(1, 0, 2, 3)):
            pass
        if i == 0 and not vae.use_tiling and count > 1:
            began, count = time.perf_counter(), count - 1  # the first has one frame, where others have four
    return (time.perf_counter() - began) / count


def _counted(facts: ModelFacts, width: int, height: int, how: Decoding, latent_frames: int) -> int:
    frames = (latent_frames - 1) * wan.FRAMES_PER_LATENT + 1
    spec = spec_of(facts, tiny=False, width=width, height=height, num_frames=frames)
    return footprint.decode_bytes(spec, facts, how, 2) + footprint.SLACK_BYTES


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", metavar="MODEL:WIDTHxHEIGHT")
    parser.add_argument("--rows", type=int, nargs="+", default=list(footprint.STRIP_ROWS["wan"]))
    parser.add_argument("--latent-frames", type=int, default=5, metavar="N")
    parser.add_argument("--tiny", action="store_true", help="on the CPU")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
