"""Wan 2.2 TI2V-5B on a 16 GB card: a step, a whole clip and its decode, beside stock diffusers.

    python -m bench.gpu_video                  # 1280x704x121, 50 steps: some 250 s on an H100, 40 to write weights
    python -m bench.gpu_video --steps 12       # the clip's bar is then reckoned from so many steps, and says so: 180 s
    python -m bench.gpu_video --limit-s 290    # begins nothing after so many seconds
    python -m bench.gpu_video --tiny           # the same path in seconds, on the CPU

Random weights of full size (bench/fullsize.py, 22 GB of disk below --folder). Our figures are from the receipt of a
real job in bf16, compiled: loop, decode and MP4, loading and text encoding left out. A short job comes first, which
compiles: its step counts from the end of the first. Then theirs: the VAE in float32 and in tiles, as diffusers'
documentation has it, and `WanPipeline` with block group offload, kept from the same memory, a few steps of it. The
whole clip comes last, its compiled code there; the official program's figures are those of OFFICIAL_STEP_S. Prints a
JSON object for each as soon as it is there, and each bar as soon as both of its sides are, those of the whole clip in
the place of the short job's; exits 1 where one is missed or nothing could tell.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import torch

from bench import fullsize, options
from bench.measured import Budget, Place, place
from safelight.machine import GIB
from safelightd import device
from safelightd.modelfolder import model_folder

MODEL, TINY = "wan-ti2v-5b", "tiny-wan-ti2v"
CAP = 16
SIZE = (1280, 704, 121)
STOCK_STEPS = 3
SHORT_STEPS = 4
"""Of the job that compiles: the last three are its figure."""

CLIP_STEPS = 50
"""Of the clip that the official program is compared by."""

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
    ours: dict[str, Any] = {}
    theirs: dict[str, Any] = {}
    found: dict[str, dict[str, Any]] = {}
    with place("cpu" if arguments.tiny else "cuda", folders, arguments.folder / "compiled") as at:
        at.attention = arguments.attention
        at.become(CAP)
        for name, side, measure in (
            ("safelight, a short job that compiles", ours, lambda: _ours(at, shown, SHORT_STEPS, arguments)),
            ("AutoencoderKLWan, float32 in tiles", theirs, lambda: _stock_decode(at, shown, arguments)),
            ("WanPipeline, block group offload", theirs, lambda: _stock_step(at, shown, arguments)),
            ("safelight", ours, lambda: _ours(at, shown, arguments.steps, arguments)),
        ):
            if budget.is_spent():
                print(json.dumps({"name": name, "left_out": "the limit came before"}), flush=True)
                continue
            told = _told(measure)
            print(json.dumps({"name": name, **told}), flush=True)
            side.update(told if "error" not in told else {})
            for bar in _bars(ours, theirs):
                if found.get(bar["bar"]) != bar:
                    print(json.dumps(bar), flush=True)
                found[bar["bar"]] = bar
    return 0 if arguments.tiny or (found and all(bar["ok"] for bar in found.values())) else 1


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
    # Said, and nothing learned: else what the first job teaches could change the way of the second.
    how = {} if arguments.tiny else {"precision": "bf16", "compile": "on"}
    receipt = at.run(at.spec(model, num_inference_steps=steps, **_size(arguments), **how), learn=False)
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
    with torch.no_grad():
        vae.decode(latents[:, :, :1], return_dict=False)  # what is loaded at the first call is not its time
        fullsize.synchronise()
        began = time.perf_counter()
        vae.decode(latents, return_dict=False)
    fullsize.synchronise()
    return {"decode_s": round(time.perf_counter() - began, 3)}


def _bars(ours: dict[str, Any], theirs: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the bars of which both sides were measured."""
    official_s = CLIP_STEPS * OFFICIAL_STEP_S + OFFICIAL_REST_S
    pairs = [
        ("decode and MP4 / float32 in tiles", ours.get("decode_and_mp4_s"), theirs.get("decode_s"), DECODE_SHARE),
        ("a step / block group offload's", ours.get("step_s"), theirs.get("step_s"), STEP_SHARE),
        (f"a clip of {CLIP_STEPS} steps / the official program's", _clip_s(ours), official_s, CLIP_SHARE),
    ]
    return [
        {
            "bar": name, "measured": round(took / other, 4), "bound": bound, "ok": took <= bound * other,
            "seconds": [round(took, 2), round(other, 2)], "of_steps": ours["steps"],
        }
        for name, took, other, bound in pairs
        if took and other
    ]  # fmt: skip


def _clip_s(ours: dict[str, Any]) -> float | None:
    """Return what the whole clip took, or would have: of a shorter one the step goes on, and none was its first."""
    if not ours or ours["steps"] == CLIP_STEPS:
        return ours.get("clip_s")
    return float(CLIP_STEPS * ours["step_s"] + ours["decode_and_mp4_s"])


def _arguments() -> argparse.Namespace:
    parser = options.full_size(__doc__)
    parser.add_argument("--attention", default="auto", help="[worker] attention")
    parser.add_argument("--steps", type=int, default=50)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
