"""Wan 2.2 TI2V-5B on a 16 GB card: a step, a whole clip and its decode, beside stock diffusers.

    python -m bench.video                      # 1280x704x121, 50 steps: four minutes on an H100
    python -m bench.video --steps 8            # a step and the decode alone mean something then
    python -m bench.video --tiny               # the same path in seconds, on the CPU

Random weights of full size (bench/fullsize.py, 22 GB of disk below --folder). Our figures are from the receipt of a
real job: loop, decode and MP4, loading and text encoding left out; it runs twice, and the second one counts, so that
code is compiled. Theirs: `WanPipeline` with block group offload, kept from the same memory, a few steps of it; and its
VAE in float32 and in tiles, as its documentation has it. Prints a JSON object for each, then one for each bar; exits 1
where a bar is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import torch

from bench import fullsize
from bench.measured import Place, place
from safelight import models
from safelight.machine import GIB
from safelight.receipt import Receipt
from safelightd import device
from safelightd.loading import model_folder

MODEL, TINY = "wan-ti2v-5b", "tiny-wan-ti2v"
CAP = 16
SIZE = (1280, 704, 121)
STOCK_STEPS = 3

OFFICIAL_STEP_S, OFFICIAL_REST_S = 2.75, 10.3
"""A step, and decode with the MP4, of Wan's own program at 1280x704x121 with no limit on memory (Wan-Video/Wan2.2 @
42bf4cf, H100 80GB, torch 2.11, 2026-11-22)."""

STEP_SHARE, CLIP_SHARE, DECODE_SHARE = 0.70, 0.72, 0.40


class _EnoughSteps(Exception):
    """Raised out of the stock pipeline: its step is known."""


def main() -> int:
    arguments = _arguments()
    shown = TINY if arguments.tiny else MODEL
    folders = {} if arguments.tiny else {MODEL: arguments.folder / MODEL}
    if folders:
        fullsize.build("wan", models.load()[MODEL], folders[MODEL], "cuda", tiny=False)
    lines = []
    with place("cpu" if arguments.tiny else "cuda", folders, arguments.folder / "compiled") as at:
        at.become(CAP)
        for line in (
            _ours(at, shown, arguments),
            _stock_step(at, shown, arguments),
            _stock_decode(at, shown, arguments),
        ):
            print(json.dumps(line), flush=True)
            lines.append(line)
    found = _bars(*lines, steps=arguments.steps)
    for bar in found:
        print(json.dumps(bar), flush=True)
    return 0 if arguments.tiny or all(bar["ok"] for bar in found) else 1


def _size(arguments: argparse.Namespace) -> dict[str, int]:
    width, height, num_frames = (256, 256, 9) if arguments.tiny else SIZE
    return {"width": width, "height": height, "num_frames": num_frames}


def _ours(at: Place, model: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the job twice as the daemon does, and return what its second receipt says."""
    receipt: Receipt | None = None
    for _ in range(2):
        spec = at.spec(model, num_inference_steps=arguments.steps, **_size(arguments))
        receipt = at.run(spec, learn=True)
    assert receipt is not None
    assert receipt.plan is not None
    denoise, decode = receipt.phases["denoise"], receipt.phases["decode"]
    loop_s = denoise.seconds - (denoise.load_seconds or 0.0)
    rest_s = decode.seconds - (decode.load_seconds or 0.0)
    gib = {
        phase: [round(told.device_bytes / GIB, 2), round(receipt.phases[phase].device_peak_bytes / GIB, 2)]
        for phase, told in receipt.plan.predicted.items()
    }
    return {
        "name": "safelight", "rung": receipt.plan.rung, "step_s": receipt.seconds_per_step,
        "loop_s": round(loop_s, 2), "decode_and_mp4_s": round(rest_s, 2), "clip_s": round(loop_s + rest_s, 2),
        "first_step_s": denoise.first_step_seconds,
        "device_gib": gib, "host_gib": round(max(phase.host_peak_bytes for phase in receipt.phases.values()) / GIB, 2),
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
    device.release()
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
        return {"name": "WanPipeline, block group offload", "step_s": round(step_s, 4)}
    except torch.OutOfMemoryError as error:
        return {"name": "WanPipeline, block group offload", "step_s": None, "error": str(error)[:200]}
    finally:
        del pipe, embeds
        device.release()
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
    return {"name": "AutoencoderKLWan, float32 in tiles", "decode_s": round(time.perf_counter() - began, 3)}


def _bars(ours: dict[str, Any], stock: dict[str, Any], decode: dict[str, Any], *, steps: int) -> list[dict[str, Any]]:
    official_s = steps * OFFICIAL_STEP_S + OFFICIAL_REST_S
    pairs = [
        ("a step / block group offload's", ours["step_s"], stock["step_s"], STEP_SHARE),
        (
            f"a clip of {steps} steps / the official program's {official_s:.1f} s",
            ours["clip_s"],
            official_s,
            CLIP_SHARE,
        ),
        ("decode and MP4 / float32 in tiles", ours["decode_and_mp4_s"], decode["decode_s"], DECODE_SHARE),
    ]
    return [
        {"bar": name, "measured": share, "bound": bound, "ok": share is not None and share <= bound}
        for name, took, theirs, bound in pairs
        for share in [round(took / theirs, 4) if theirs else None]
    ]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/safelight-bench"))
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--tiny", action="store_true", help="the project's tiny model on the CPU")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
