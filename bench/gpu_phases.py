"""Seconds and memory of encode, denoise and decode at full size, through our own functions, beside the stock pipeline.

    python bench/gpu_phases.py flux                      # FLUX.1-schnell, 1024x1024, 4 steps
    python bench/gpu_phases.py wan --steps 3             # Wan 2.2 TI2V-5B, 1280x704x121
    python bench/gpu_phases.py flux --cap-gib 14.8       # as a 16 GB card with a desktop on it
    python bench/gpu_phases.py flux --tiny               # the same path in seconds, on the CPU

The weights are random, so memory and time are true to size and the picture means nothing. They are written below
--folder first, component by component (33 GB for FLUX, 23 GB for Wan), and removed at the end unless --keep.
Prints one JSON object a line.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import numpy as np
import torch

from safelight import jobspec, models
from safelight.jobspec import JobSpec
from safelight.machine import GIB
from safelight.models import ModelFacts
from safelight.plan import Plan
from safelightd import pipelines
from safelightd.loading import Loader, give_back
from safelightd.progress import Cancelled, Watch

FLUX_CONFIGS: dict[str, dict[str, Any]] = {
    "transformer": {
        "num_layers": 19,
        "num_single_layers": 38,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "in_channels": 64,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 768,
        "guidance_embeds": False,
        "axes_dims_rope": (16, 56, 56),
    },
    "text_encoder": {
        "vocab_size": 49408,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "projection_dim": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 77,
        "eos_token_id": 513,  # of the tiny tokenizer, which reads the prompts here
    },
    "text_encoder_2": {
        "vocab_size": 32128,
        "d_model": 4096,
        "d_kv": 64,
        "d_ff": 10240,
        "num_layers": 24,
        "num_heads": 64,
        "feed_forward_proj": "gated-gelu",
    },
    "vae": {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (128, 256, 512, 512),
        "layers_per_block": 2,
        "latent_channels": 16,
        "sample_size": 1024,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
}

WAN_CONFIGS: dict[str, dict[str, Any]] = {
    "transformer": {
        "num_layers": 30,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "in_channels": 48,
        "out_channels": 48,
        "text_dim": 4096,
        "freq_dim": 256,
        "ffn_dim": 14336,
    },
    "text_encoder": FLUX_CONFIGS["text_encoder_2"] | {"vocab_size": 256384},
    "vae": {
        "base_dim": 160,
        "decoder_base_dim": 256,
        "z_dim": 48,
        "dim_mult": [1, 2, 4, 4],
        "num_res_blocks": 2,
        "temperal_downsample": [False, True, True],
        "is_residual": True,
        "in_channels": 12,
        "out_channels": 12,
        "patch_size": 2,
        "scale_factor_spatial": 16,
        "latents_mean": [0.0] * 48,
        "latents_std": [1.0] * 48,
    },
}

SMALLER: dict[str, Any] = {
    "num_layers": 1,
    "num_single_layers": 1,
    "num_attention_heads": 2,
    "joint_attention_dim": 64,
    "pooled_projection_dim": 64,
    "hidden_size": 64,
    "intermediate_size": 128,
    "projection_dim": 64,
    "num_hidden_layers": 1,
    "d_model": 64,
    "d_ff": 128,
    "num_heads": 1,
    "text_dim": 64,
    "ffn_dim": 128,
    "vocab_size": 1024,
    "block_out_channels": (32, 32, 32, 32),
    "layers_per_block": 1,
    "base_dim": 8,
    "decoder_base_dim": 8,
    "num_res_blocks": 1,
}
"""What --tiny makes of the figures above."""

CLASSES = {
    "flux": {
        "transformer": "diffusers.FluxTransformer2DModel",
        "text_encoder": "transformers.CLIPTextModel",
        "text_encoder_2": "transformers.T5EncoderModel",
        "vae": "diffusers.AutoencoderKL",
    },
    "wan": {
        "transformer": "diffusers.WanTransformer3DModel",
        "text_encoder": "transformers.UMT5EncoderModel",
        "vae": "diffusers.AutoencoderKLWan",
    },
}

RELATIVE_ERROR_MAX = 2e-2
"""What counts as bfloat16 rounding over a few steps: one forward of an exact reimplementation is bit-equal, quantised
ones differ by 8e-3 to 2e-2 (H100 80GB, 2026-11-22)."""


class Meter:
    """Peaks on the device and in host RAM since `reset`; host RAM counts mapped files too."""

    def reset(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        with contextlib.suppress(OSError):  # a container may forbid it: the peak is then of the whole run
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # proc(5): resets VmHWM

    def peaks(self) -> tuple[int, int]:
        device = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        return device, _status("VmHWM")


def main() -> int:
    """Measure one family and say whether it agrees with the stock pipeline."""
    arguments = _arguments()
    facts = models.load()[{"flux": "flux-schnell", "wan": "wan-ti2v-5b"}[arguments.family]]
    device = "cpu" if arguments.tiny else "cuda"
    say("start", torch=torch.__version__, device=torch.cuda.get_device_name() if device == "cuda" else "cpu")
    folder = arguments.folder / facts.key
    try:
        build(arguments.family, facts, folder, device, tiny=arguments.tiny)
        if arguments.cap_gib and device == "cuda":
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(arguments.cap_gib * GIB / total)
        agrees = measure(_spec(facts, arguments), facts, folder, device, arguments)
    finally:
        if not arguments.keep:
            shutil.rmtree(folder, ignore_errors=True)
    return 0 if agrees else 1


def measure(spec: JobSpec, facts: ModelFacts, folder: Path, device: Any, arguments: argparse.Namespace) -> bool:
    """Run the three phases as often as asked, then cancel one, then ask the stock pipeline."""
    dtype = "float32" if arguments.tiny else "bfloat16"
    plan = Plan(
        model=spec.model,
        device=device,
        dtype=dtype,
        precision="fp32" if arguments.tiny else "bf16",
        offload="model",
        vae_tiling=arguments.tiled,
        text_encoder_device=device,
    )
    with timed("import"):
        family = pipelines.family(facts.family)
    loader = Loader(folder, plan)
    for run in range(arguments.runs):
        watch = Watch(lambda _told: None, threading.Event(), Meter())
        with phase("encode", watch, run):
            embeddings = family.encode(spec, plan, loader, watch)
        with phase("denoise", watch, run):
            latents = family.denoise(spec, plan, loader, embeddings, watch)
        with phase("decode", watch, run):
            frames = list(family.decode(spec, plan, loader, latents, watch))
    cancel_within_a_step(family, spec, plan, loader, embeddings)
    if arguments.skip_stock:
        return True
    return compare(spec, folder, plan, latents, frames)


@contextmanager
def phase(name: Any, watch: Watch, run: int) -> Iterator[None]:
    """Measure one phase and print what it took and what it left behind."""
    with watch.phase(name):
        yield
        synchronise()
    record = watch.records[name]
    say(
        name,
        run=run,
        seconds=record.seconds,
        seconds_per_step=watch.seconds_per_step if name == "denoise" else None,
        device_peak_gib=round(record.device_peak_bytes / GIB, 3),
        host_peak_gib=round(record.host_peak_bytes / GIB, 3),
        **held(),
    )


def cancel_within_a_step(family: Any, spec: JobSpec, plan: Plan, loader: Loader, embeddings: Any) -> None:
    """Cancel in the second step, and print how soon it ended and what was still held."""
    stop = threading.Event()
    asked_at = 0.0

    def told(message: dict[str, Any]) -> None:
        nonlocal asked_at
        if message["type"] == "step" and message["i"] == 1:
            asked_at = time.monotonic()
            stop.set()

    watch = Watch(told, stop, Meter())
    try:
        with watch.phase("denoise"):
            family.denoise(spec, plan, loader, embeddings, watch)
    except Cancelled:
        give_back()
        say("cancel", seconds=round(time.monotonic() - asked_at, 3), **held())


def compare(spec: JobSpec, folder: Path, plan: Plan, ours: torch.Tensor, frames: list[Any]) -> bool:
    """Print how far the stock pipeline's latents and pixels are from ours; whether that is rounding."""
    from diffusers import DiffusionPipeline

    if plan.device == "cuda":
        torch.cuda.set_per_process_memory_fraction(1.0)  # it holds all components at once
    with timed("stock load"):
        pipe = DiffusionPipeline.from_pretrained(
            folder, dtype=getattr(torch, plan.dtype), local_files_only=True, use_safetensors=True
        ).to(plan.device)
        pipe.set_progress_bar_config(disable=True)
        if spec.flow_shift is not None:
            pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, flow_shift=spec.flow_shift)
    names = ("prompt", "negative_prompt", "width", "height", "num_inference_steps", "num_frames", "guidance_scale")
    wanted = {name: value for name in (*names, "max_sequence_length") if (value := getattr(spec, name)) is not None}
    steps: list[torch.Tensor] = []

    def keep(_pipe: Any, _i: int, _t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        steps.append(tensors["latents"])
        return tensors

    meter = Meter()
    meter.reset()
    with timed("stock run"):
        answer = pipe(
            **wanted, generator=torch.Generator().manual_seed(spec.seed), output_type="np", callback_on_step_end=keep
        )[0]
        synchronise()
    stock = steps[-1].cpu().float()
    error = float((ours.float() - stock).norm() / stock.norm())
    pixels = (answer if spec.kind == "image" else answer[0]) * 255
    difference = np.abs(np.stack(frames) - pixels)
    say(
        "compare",
        bit_equal_latents=torch.equal(ours.float(), stock),
        relative_error=error,
        grey_levels_mean=float(difference.mean()),
        grey_levels_max=float(difference.max()),
        stock_device_peak_gib=round(meter.peaks()[0] / GIB, 3),
    )
    return error <= RELATIVE_ERROR_MAX


def build(family: str, facts: ModelFacts, folder: Path, device: str, *, tiny: bool) -> None:
    """Write a diffusers folder of the model's true size with random weights, unless it is there."""
    if (folder / "model_index.json").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    configs = FLUX_CONFIGS if family == "flux" else WAN_CONFIGS
    for name, config in configs.items():
        if tiny:
            config = {key: SMALLER.get(key, value) for key, value in config.items()}  # noqa: PLW2901 - the smaller one
        with timed(f"build {name}"):
            module = _random(_on_meta(CLASSES[family][name], config), device)
            count = sum(parameter.numel() for parameter in module.parameters())
            if not tiny and count != facts.components[name]:
                raise SystemExit(f"{name}: {count:,} parameters, models.toml says {facts.components[name]:,}.")
            module.save_pretrained(folder / name, max_shard_size="5GB", safe_serialization=True)
            del module
            give_back()
    _write_the_rest(family, folder)


def _on_meta(path: str, config: dict[str, Any]) -> Any:
    import importlib

    library, _, name = path.partition(".")
    wanted = getattr(importlib.import_module(library), name)
    with torch.device("meta"):
        return wanted(wanted.config_class(**config)) if library == "transformers" else wanted(**config)


@torch.no_grad()
def _random(module: Any, device: str) -> Any:
    """Give a module on the meta device bfloat16 weights on `device`: uniform, variance 1 / fan_in, norms 1."""
    module = module.to(torch.bfloat16).to_empty(device=device)
    if hasattr(module, "tie_weights"):
        module.tie_weights()
    for path, parameter in module.named_parameters():
        if path.endswith(".gamma") or (parameter.ndim == 1 and path.endswith("weight")):
            parameter.fill_(1.0)
        else:
            bound = 0.1 if parameter.ndim == 1 else math.sqrt(3 / (parameter.numel() // parameter.shape[0]))
            parameter.uniform_(-bound, bound)
    return module


def _write_the_rest(family: str, folder: Path) -> None:
    """Write tokenizers, scheduler and index; the tiny model's tokenizers do, their words are few."""
    from safelightd.tiny import flux, tokens, wan

    classes = {name: path.split(".") for name, path in CLASSES[family].items()}
    if family == "flux":
        parts = {"tokenizer": tokens.clip_tokenizer(), "tokenizer_2": tokens.t5_tokenizer()}
        parts["scheduler"] = flux.scheduler(dynamic=False)
        index: dict[str, Any] = {"_class_name": "FluxPipeline"}
    else:
        parts = {"tokenizer": tokens.t5_tokenizer(), "scheduler": wan.scheduler(flow_shift=5.0)}
        index = {"_class_name": "WanPipeline", "expand_timesteps": True, "transformer_2": [None, None]}
    for name, part in parts.items():
        part.save_pretrained(folder / name)
        library = "diffusers" if name == "scheduler" else "transformers"
        classes[name] = [library, type(part).__name__]
    (folder / "model_index.json").write_text(json.dumps(index | classes, indent=2), encoding="utf-8")


def _spec(facts: ModelFacts, arguments: argparse.Namespace) -> JobSpec:
    written: dict[str, object] = {"model": facts.key, "prompt": "a red fox in the snow", "seed": 7}
    chosen = (("num_inference_steps", arguments.steps), ("num_frames", arguments.frames))
    written |= {name: value for name, value in chosen if value is not None}
    if arguments.size:
        written["width"], written["height"] = arguments.size.split("x")
    spec = jobspec.check(written, models.load(), "arguments", image_model=facts.key, video_model=facts.key)
    if isinstance(spec, list):
        raise SystemExit("\n".join(str(fault) for fault in spec))
    if arguments.tiny:
        few = {"width": 256, "height": 256, "num_inference_steps": 2}
        spec = spec.model_copy(update=few | ({"num_frames": 5} if facts.kind == "video" else {}))
    return spec


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=("flux", "wan"))
    parser.add_argument("--folder", type=Path, default=Path("/tmp/safelight-bench"))
    parser.add_argument("--keep", action="store_true", help="leave the weights for the next run")
    parser.add_argument("--runs", type=int, default=2, help="the second finds the files in memory")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--frames", type=int)
    parser.add_argument("--size", help="WIDTHxHEIGHT")
    parser.add_argument("--tiled", action="store_true", help="decode in tiles")
    parser.add_argument("--cap-gib", type=float, help="let torch have no more of the card's memory")
    parser.add_argument("--skip-stock", action="store_true", help="the stock pipeline holds all components at once")
    parser.add_argument("--tiny", action="store_true", help="the same configurations, shrunk, on the CPU")
    return parser.parse_args()


@contextmanager
def timed(name: str) -> Iterator[None]:
    """Print what the block took."""
    started = time.monotonic()
    yield
    synchronise()
    say(name, seconds=round(time.monotonic() - started, 3), **held())


def held() -> dict[str, int | float]:
    """Return what the process holds now: device bytes in use and kept back, host RAM that no file backs."""
    host = {"host_anon_gib": round(_status("RssAnon") / GIB, 3)}
    if not torch.cuda.is_available():
        return host
    device = {"device_bytes": torch.cuda.memory_allocated(), "device_reserved_bytes": torch.cuda.memory_reserved()}
    return device | host


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def say(what: str, **figures: object) -> None:
    print(json.dumps({"phase": what} | {k: v for k, v in figures.items() if v is not None}), flush=True)


if __name__ == "__main__":
    sys.exit(main())
