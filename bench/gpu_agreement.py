"""Our Wan loop and decode beside those of diffusers' pipelines, on CUDA in bfloat16: how far they are apart.

    python -m bench.gpu_agreement                     # all models, from text and from pictures: two minutes on an H100
    python -m bench.gpu_agreement --only wan-ti2v-5b
    python -m bench.gpu_agreement --tiny              # the same path in seconds, on the CPU in float32: equal bits

The transformers have their true width and a few of their blocks; the text encoder a few of its own, and the VAE is
whole. 5 GB of disk below --folder at a time, gone afterwards. Prints a JSON object for each job, ours eager and
compiled, and one for each VAE; exits 1 where latents are further from the stock pipeline than bfloat16 rounds, or
frames further from those of float32 than diffusers' own in bfloat16.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import numpy as np
import torch
from PIL import Image

from bench import fullsize, options
from bench.fullsize import Meter
from bench.measured import Budget
from bench.shapes import SMALLER
from safelight import models
from safelight.jobspec import JobSpec
from safelight.models import ModelFacts
from safelight.plan import Plan
from safelightd import device, pipelines
from safelightd.loading import Loader
from safelightd.progress import Watch

FEW: dict[str, Any] = {"num_layers": 3, "vocab_size": 1024}
"""What is changed of the true configurations."""

SIZE = {"width": 832, "height": 480, "num_frames": 17}
TINY_SIZE = {"width": 256, "height": 256, "num_frames": 5}
STEPS = 3
"""With three, the two experts of A14B run both."""

ASKED = (
    "prompt", "negative_prompt", "width", "height", "num_inference_steps", "num_frames", "guidance_scale",
    "guidance_scale_2", "max_sequence_length",
)  # fmt: skip

ROUNDING = 2e-2
"""Relative to the stock latents: one forward of bfloat16 in another order of sums is off by 1e-3 to 7e-3 (H100,
2026-11-23), and guidance multiplies that."""

GREY_LEVELS = 0.01
"""More of 255 than diffusers' own, on average of all pixels, is another picture."""

JOBS: tuple[tuple[str, str, dict[str, str]], ...] = (
    ("wan-ti2v-5b", "text", {}),
    ("wan-ti2v-5b", "a picture", {"image": "0" * 64}),
    ("wan-t2v-a14b", "text", {}),
    ("wan-i2v-a14b", "a picture", {"image": "0" * 64}),
    ("wan-i2v-a14b", "two pictures", {"image": "0" * 64, "last_image": "1" * 64}),
)


def main() -> int:
    arguments = _arguments()
    budget = Budget(arguments.limit_s)
    table = models.load()
    good = True
    for key in dict.fromkeys(key for key, _, _ in JOBS if key in (arguments.only or [key])):
        folder = arguments.folder / "agreement" / key
        shutil.rmtree(folder, ignore_errors=True)  # of a call that was cut off
        try:
            where = "cpu" if arguments.tiny else "cuda"
            fullsize.build(table[key], folder, where, changed=SMALLER if arguments.tiny else FEW)
            for _, name, pictures in (job for job in JOBS if job[0] == key):
                if budget.is_spent():
                    return 1
                for line in _compared(table[key], folder, name, pictures, tiny=arguments.tiny):
                    print(json.dumps(line), flush=True)
                    good = good and line.get("ok", False)
            line = _decodes_compared(table[key], folder, tiny=arguments.tiny)
            print(json.dumps(line), flush=True)
            good = good and line.get("ok", False)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    return 0 if good else 1


def _compared(
    facts: ModelFacts, folder: Path, name: str, pictures: dict[str, str], *, tiny: bool
) -> Iterator[dict[str, Any]]:
    """Yield a line for our loop eager, and one for it compiled."""
    size = TINY_SIZE if tiny else SIZE
    spec = fullsize.spec_of(facts, tiny=False, num_inference_steps=STEPS, **size, **pictures)
    image, last_image = (_picture(spec, turned) if given else None for given, turned in _given(spec))
    try:
        stock = _stock(spec, folder, image, last_image, tiny=tiny)
        for compiled in (False,) if tiny else (False, True):
            began = time.perf_counter()
            ours = _ours(spec, facts, folder, image, last_image, compiled=compiled, tiny=tiny)
            error = float((ours.float() - stock).norm() / stock.norm())
            yield {
                "name": f"{facts.key} from {name}{', compiled' if compiled else ''}",
                "bit_equal": torch.equal(ours.float(), stock), "relative_error": round(error, 6),
                "bound": 0.0 if tiny else ROUNDING, "ok": error <= (0.0 if tiny else ROUNDING),
                "seconds": round(time.perf_counter() - began, 1),
            }  # fmt: skip
    except Exception as error:  # noqa: BLE001 - what fails is a result
        traceback.print_exc(limit=-4)
        yield {"name": f"{facts.key} from {name}", "error": f"{type(error).__name__}: {error}"[:400], "ok": False}
    finally:
        device.release()


def _given(spec: JobSpec) -> tuple[tuple[str | None, int], tuple[str | None, int]]:
    return (spec.image, 0), (spec.last_image, 180)


def _picture(spec: JobSpec, turned: int) -> Image.Image:
    return Image.effect_mandelbrot((spec.width, spec.height), (-2, -1, 1, 1), 50).convert("RGB").rotate(turned)


def _ours(
    spec: JobSpec, facts: ModelFacts, folder: Path, image: Image.Image | None, last_image: Image.Image | None, *,
    compiled: bool, tiny: bool,
) -> torch.Tensor:  # fmt: skip
    plan = _plan(facts, compiled=compiled, tiny=tiny)
    family = pipelines.family(facts.family)
    loader = Loader(folder, plan, blocks=facts.blocks)
    watch = _watch()
    with watch.phase("encode"):
        embeddings = family.encode(spec, plan, loader, watch, image)
    with watch.phase("denoise"):
        return family.denoise(spec, plan, loader, embeddings, watch, image, last_image)


def _plan(facts: ModelFacts, *, compiled: bool, tiny: bool) -> Plan:
    return Plan(
        model=facts.key,
        device="cpu" if tiny else "cuda",
        dtype="float32" if tiny else "bfloat16",
        precision="fp32" if tiny else "bf16",
        compiled=compiled,
        offload="model",
        vae_tiling=False,
        text_encoder_device="cpu" if tiny else "cuda",
    )


def _watch() -> Watch:
    return Watch(lambda _told: None, threading.Event(), Meter())


def _stock(
    spec: JobSpec, folder: Path, image: Image.Image | None, last_image: Image.Image | None, *, tiny: bool
) -> torch.Tensor:
    """Return what diffusers' own pipeline makes of the job, all components resident."""
    import diffusers

    made = diffusers.WanImageToVideoPipeline if image else diffusers.WanPipeline
    dtype = torch.float32 if tiny else torch.bfloat16
    pipe: Any = made.from_pretrained(folder, dtype=dtype, local_files_only=True, use_safetensors=True)
    pipe.to("cpu" if tiny else "cuda").set_progress_bar_config(disable=True)
    wanted = {name: value for name in ASKED if (value := getattr(spec, name)) is not None}
    wanted |= {name: value for name, value in (("image", image), ("last_image", last_image)) if value is not None}
    generator = torch.Generator().manual_seed(spec.seed)
    latents: torch.Tensor = pipe(**wanted, generator=generator, output_type="latent")[0]
    return latents.float().cpu()


@torch.no_grad()
def _decodes_compared(facts: ModelFacts, folder: Path, *, tiny: bool) -> dict[str, Any]:
    """Return how far frames of random latents are from those that diffusers' VAE decodes in float32, in grey levels:
    ours, and diffusers' own in the same 16 bit."""
    import diffusers

    size = TINY_SIZE if tiny else SIZE
    spec = fullsize.spec_of(facts, tiny=False, num_inference_steps=STEPS, **size)
    width, height, frames = size["width"], size["height"], size["num_frames"]
    shape = (1, facts.latent_channels, (frames - 1) // facts.frames_multiple + 1, height // facts.vae_scale,
             width // facts.vae_scale)  # fmt: skip
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    name = f"{facts.key}, decoded"
    try:
        stock = {}
        for dtype in (torch.float32, torch.float32 if tiny else torch.bfloat16):
            vae: Any = diffusers.AutoencoderKLWan.from_pretrained(
                folder, subfolder="vae", dtype=dtype, local_files_only=True, use_safetensors=True
            )
            vae.to("cpu" if tiny else "cuda")
            mean, deviation = (
                torch.tensor(row).view(1, -1, 1, 1, 1) for row in (vae.config.latents_mean, vae.config.latents_std)
            )
            decoded = vae.decode((latents * deviation + mean).to(vae.device, dtype), return_dict=False)[0]
            stock[dtype] = ((decoded[0].float() / 2 + 0.5).clamp(0, 1) * 255).round().permute(1, 2, 3, 0).cpu()
            del vae, decoded
            device.release()
        exact, *others = stock.values()
        plan = _plan(facts, compiled=False, tiny=tiny)
        family, loader = pipelines.family(facts.family), Loader(folder, plan, blocks=facts.blocks)
        watch = _watch()
        with watch.phase("decode"):
            ours = torch.from_numpy(np.stack(list(family.decode(spec, plan, loader, latents, watch)))).float()
        off = float((ours - exact).abs().mean())
        off_stock = float((others[0] - exact).abs().mean()) if others else 0.0
        return {
            "name": name, "grey_levels_from_float32": round(off, 4), "diffusers_own": round(off_stock, 4),
            "ok": off <= off_stock + GREY_LEVELS,
        }  # fmt: skip
    except Exception as error:  # noqa: BLE001 - what fails is a result
        traceback.print_exc(limit=-4)
        return {"name": name, "error": f"{type(error).__name__}: {error}"[:400], "ok": False}
    finally:
        device.release()


def _arguments() -> argparse.Namespace:
    parser = options.full_size(__doc__)
    parser.add_argument("--only", nargs="+", choices=tuple(dict.fromkeys(key for key, _, _ in JOBS)))
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
