"""Wan 2.2 TI2V-5B on a 16 GB card: a step, a whole clip and its decode, beside stock diffusers.

    python -m bench.video                      # 1280x704x121, 50 steps: five minutes on an H100
    python -m bench.video --steps 8            # a step and the decode alone mean something then
    python -m bench.video --limit-s 500        # begins nothing after so many seconds
    python -m bench.video --tiny               # the same path in seconds, on the CPU

Random weights of full size (bench/fullsize.py, 22 GB of disk below --folder). Our figures are from the receipt of a
real job: loop, decode and MP4, loading and text encoding left out; another of two steps runs before it, so that code is
compiled. Theirs: `WanPipeline` with block group offload, kept from the same memory, a few steps of it; and its VAE in
float32 and in tiles, as its documentation has it. Prints a JSON object for each as soon as it is there, then one for
each bar that they can tell of; exits 1 where one is missed or nothing could tell.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import torch

from bench import fullsize
from bench.measured import Budget, Place, place
from safelight.machine import GIB
from safelightd import device
from safelightd.loading import model_folder

MODEL, TINY = "wan-ti2v-5b", "tiny-wan-ti2v"
CAP = 16
SIZE = (1280, 704, 121)
STOCK_STEPS = 3
FIRST_STEPS = 2
"""Of the job before the one that counts."""

OFFICIAL_STEP_S, OFFICIAL_REST_S = 2.75, 10.3
"""A step, and decode with the MP4, of Wan's own program at 1280x704x121 with no limit on memory (Wan-Video/Wan2.2 @
42bf4cf, H100 80GB, torch 2.11, 2026-11-22)."""

STEP_SHARE, CLIP_SHARE, DECODE_SHARE = 0.70, 0.72, 0.40


class _EnoughSteps(Exception):
    """Raised out of the stock pipeline: its step is known."""


def main() -> int:
    arguments = _arguments()
    budget = Budget(arguments.limit_s)
    shown = TINY if arguments.tiny else MODEL
    folders = {} if arguments.tiny else {MODEL: arguments.folder / MODEL}
    if folders:
        fullsize.build_elsewhere(folders)
    told: dict[str, dict[str, Any]] = {}
    with place("cpu" if arguments.tiny else "cuda", folders, arguments.folder / "compiled") as at:
        at.attention = arguments.attention
        at.become(CAP)
        for name, measure in (
            ("safelight, the job before", lambda: _ours(at, shown, FIRST_STEPS, arguments)),
            ("safelight", lambda: _ours(at, shown, arguments.steps, arguments)),
            ("WanPipeline, block group offload", lambda: _stock_step(at, shown, arguments)),
            ("AutoencoderKLWan, float32 in tiles", lambda: _stock_decode(at, shown, arguments)),
        ):
            if not budget.is_spent():
                told[name] = _told(measure)
                print(json.dumps({"name": name, **told[name]}), flush=True)
    found = _bars(*list(told.values())[1:], steps=arguments.steps)
    for bar in found:
        print(json.dumps(bar), flush=True)
    return 0 if arguments.tiny or (found and all(bar["ok"] for bar in found)) else 1


def _told(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what was measured, or what went wrong: the others may still tell something."""
    try:
        return measure()
    except Exception as error:  # noqa: BLE001 - what fails is a result
        traceback.print_exc(limit=-4)
        return {"error": f"{type(error).__name__}: {error}"[:400]}
    finally:
        device.release()


def _size(arguments: argparse.Namespace) -> dict[str, int]:
    width, height, num_frames = (256, 256, 9) if arguments.tiny else SIZE
    return {"width": width, "height": height, "num_frames": num_frames}


def _ours(at: Place, model: str, steps: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run a job as the daemon does, and return what its receipt says."""
    receipt = at.run(at.spec(model, num_inference_steps=steps, **_size(arguments)), learn=True)
    assert receipt.plan is not None
    denoise, decode = receipt.phases["denoise"], receipt.phases["decode"]
    loop_s = denoise.seconds - (denoise.load_seconds or 0.0)
    rest_s = decode.seconds - (decode.load_seconds or 0.0)
    gib = {
        phase: [round(told.device_bytes / GIB, 2), round(receipt.phases[phase].device_peak_bytes / GIB, 2)]
        for phase, told in receipt.plan.predicted.items()
    }
    return {
        "rung": receipt.plan.rung, "steps": steps, "step_s": receipt.seconds_per_step,
        "loop_s": round(loop_s, 2), "decode_and_mp4_s": round(rest_s, 2), "clip_s": round(loop_s + rest_s, 2),
        "first_step_s": denoise.first_step_seconds, "device_gib": gib,
        "host_gib": round(max(phase.host_peak_bytes for phase in receipt.phases.values()) / GIB, 2),
        "phases_s": {name: phase.seconds for name, phase in receipt.phases.items()},
    }  # fmt: skip


def _pipeline(at: Place, model: str, **more: Any) -> Any:
    from diffusers import AutoencoderKLWan, WanPipeline

    folder = model_folder(at.models[model], at.config.paths.models)
    dtype = torch.float32 if at.device == "cpu" else torch.bfloat16
    vae = AutoencoderKLWan.from_pretrained(folder, subfolder="vae", dtype=torch.float32, local_files_only=True)
    pipe = WanPipeline.from_pretrained(
        folder, vae=vae, text_encoder=None, tokenizer=None, dtype=dtype, local_files_only=True, **more
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _stock_step(at: Place, model: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the seconds of a step of the stock pipeline with block group offload."""
    pipe = _pipeline(at, model)
    if at.device == "cuda":
        pipe.transformer.enable_group_offload(
            onload_device=torch.device("cuda"), offload_type="block_level", num_blocks_per_group=1, use_stream=True
        )
    width = pipe.transformer.config.text_dim
    embeds = torch.randn(1, 512, width, generator=torch.Generator().manual_seed(1)).to(
        at.device, pipe.transformer.dtype
    )
    ends: list[float] = []

    def told(_pipe: Any, _i: int, _t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        fullsize.synchronise()
        ends.append(time.perf_counter())
        if len(ends) > STOCK_STEPS:
            raise _EnoughSteps
        return tensors

    try:
        pipe(
            prompt_embeds=embeds, negative_prompt_embeds=embeds, output_type="latent", callback_on_step_end=told,
            num_inference_steps=max(arguments.steps, STOCK_STEPS + 1), **_size(arguments),
        )  # fmt: skip
    except _EnoughSteps:
        step_s = (ends[-1] - ends[0]) / (len(ends) - 1)
        return {"step_s": round(step_s, 4)}
    raise AssertionError("the pipeline ended before its steps did")


def _stock_decode(at: Place, model: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the seconds of the stock VAE, float32 in tiles, for latents of that size."""
    from diffusers import AutoencoderKLWan

    folder = model_folder(at.models[model], at.config.paths.models)
    vae: Any = AutoencoderKLWan.from_pretrained(folder, subfolder="vae", dtype=torch.float32, local_files_only=True)
    vae.to(at.device).enable_tiling()
    size = _size(arguments)
    times = vae.config.scale_factor_spatial
    shape = (1, vae.config.z_dim, (size["num_frames"] - 1) // 4 + 1, size["height"] // times, size["width"] // times)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(at.device)
    fullsize.synchronise()
    began = time.perf_counter()
    with torch.no_grad():
        vae.decode(latents, return_dict=False)
    fullsize.synchronise()
    return {"decode_s": round(time.perf_counter() - began, 3)}


def _bars(*told: dict[str, Any], steps: int) -> list[dict[str, Any]]:
    """Return the bars of which both sides were measured: ours, the stock step, the stock decode, as far as they ran."""
    ours, stock, decode = (*told, {}, {}, {})[:3]
    official_s = steps * OFFICIAL_STEP_S + OFFICIAL_REST_S
    pairs = [
        ("a step / block group offload's", ours.get("step_s"), stock.get("step_s"), STEP_SHARE),
        (
            f"a clip of {steps} steps / the official program's {official_s:.1f} s",
            ours.get("clip_s"),
            official_s,
            CLIP_SHARE,
        ),
        ("decode and MP4 / float32 in tiles", ours.get("decode_and_mp4_s"), decode.get("decode_s"), DECODE_SHARE),
    ]
    return [
        {"bar": name, "measured": round(took / theirs, 4), "bound": bound, "ok": took <= bound * theirs}
        for name, took, theirs, bound in pairs
        if took and theirs
    ]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/safelight-bench"))
    parser.add_argument("--attention", default="auto", help="[worker] attention")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--limit-s", type=float, default=1e9, help="begin nothing after this")
    parser.add_argument("--tiny", action="store_true", help="the project's tiny model on the CPU")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
