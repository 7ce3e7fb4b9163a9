"""Models of their true size with random weights, for the benches: memory and time are right, pictures mean nothing.

FLUX takes 33 GB of disk, Wan 2.2 TI2V-5B 23 GB. flux-dev shares flux-schnell's files: its transformer differs by one
small layer, which has a shard of its own.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from safelight import jobspec, models
from safelight.jobspec import JobSpec
from safelight.machine import GIB
from safelight.models import ModelFacts
from safelightd.loading import give_back
from safelightd.shards import Entry, Shard, split

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


GAIN = 0.5
SHARD_BYTES = 2**30
WRITERS = 6


class Meter:
    """Peaks on the device and in host RAM since `reset`; host RAM counts mapped files too."""

    def reset(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        with contextlib.suppress(OSError):  # a container may forbid it: the peak is then of the whole run
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # proc(5): resets VmHWM

    def settle(self) -> None:
        synchronise()

    def peaks(self) -> tuple[int, int]:
        device = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        return device, status("VmHWM")


def build(family: str, facts: ModelFacts, folder: Path, device: str, *, tiny: bool) -> None:
    """Write a diffusers folder of the model's true size with random weights, unless it is there."""
    if (folder / "model_index.json").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    configs = FLUX_CONFIGS if family == "flux" else WAN_CONFIGS
    for name in configs:
        config = _config(family, name, tiny=tiny)
        with timed(f"build {name}"):
            module = on_meta(CLASSES[family][name], config)
            count = sum(parameter.numel() for parameter in module.parameters())
            if not tiny and count != facts.components[name]:
                raise SystemExit(f"{name}: {count:,} parameters, models.toml says {facts.components[name]:,}.")
            write(module, folder / name, device)
            give_back()
    _write_the_rest(family, folder)
    os.sync()  # what is measured next should not share the disk with these 33 GB


@torch.no_grad()
def build_dev(schnell: Path, facts: ModelFacts, folder: Path, *, tiny: bool) -> None:
    """Write a folder of flux-dev beside one of flux-schnell, unless it is there: links to its files, and in one more
    shard the layers that schnell's transformer has not."""
    if (folder / "model_index.json").is_file():
        return
    (folder / "transformer").mkdir(parents=True)
    for name in ("text_encoder", "text_encoder_2", "vae", "tokenizer", "tokenizer_2"):
        (folder / name).symlink_to(schnell.absolute() / name)
    transformer = on_meta(
        CLASSES["flux"]["transformer"], _config("flux", "transformer", tiny=tiny) | {"guidance_embeds": True}
    )
    count = sum(parameter.numel() for parameter in transformer.parameters())
    if not tiny and count != facts.components["transformer"]:
        raise SystemExit(f"transformer: {count:,} parameters, models.toml says {facts.components['transformer']:,}.")
    weight_map: dict[str, str] = {}
    for shard in sorted((schnell / "transformer").glob("*.safetensors")):
        (folder / "transformer" / shard.name).symlink_to(shard.absolute())
        with safe_open(shard, framework="pt") as stored:
            weight_map |= dict.fromkeys(stored.keys(), shard.name)
    more = {
        name: random_weight(name, tuple(parameter.shape), "cpu")
        for name, parameter in transformer.named_parameters()
        if name not in weight_map
    }
    own = "diffusion_pytorch_model-guidance.safetensors"
    save_file(more, folder / "transformer" / own, metadata={"format": "pt"})
    index = {"metadata": {"total_size": 2 * count}, "weight_map": weight_map | dict.fromkeys(more, own)}
    (folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    transformer.save_config(folder / "transformer")
    from safelightd.tiny import flux

    flux.scheduler(dynamic=True).save_pretrained(folder / "scheduler")
    shutil.copy(schnell / "model_index.json", folder)


def _config(family: str, name: str, *, tiny: bool) -> dict[str, Any]:
    config = (FLUX_CONFIGS if family == "flux" else WAN_CONFIGS)[name]
    return {key: SMALLER.get(key, value) for key, value in config.items()} if tiny else config


def on_meta(path: str, config: dict[str, Any]) -> Any:
    """Return a module without memory."""
    import importlib

    library, _, name = path.partition(".")
    wanted = getattr(importlib.import_module(library), name)
    with torch.device("meta"):
        return wanted(wanted.config_class(**config)) if library == "transformers" else wanted(**config)


def write(module: Any, folder: Path, device: str) -> None:
    """Write a module of the meta device with random weights, several files at a time: one would take minutes."""
    folder.mkdir(parents=True)
    of_transformers = module.__module__.startswith("transformers")
    (module.config.save_pretrained if of_transformers else module.save_config)(folder)
    stem = "model" if of_transformers else "diffusion_pytorch_model"
    entries = [Entry(name, tuple(value.shape), torch.bfloat16) for name, value in module.named_parameters()]
    shards = split([[entry] for entry in entries], SHARD_BYTES)
    names = [f"{stem}-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    with ThreadPoolExecutor(WRITERS) as threads:
        list(threads.map(lambda name, own: _write_shard(folder / name, own, device), names, shards))
    weight_map = {entry.name: name for name, own in zip(names, shards, strict=True) for entry in own}
    index = {"metadata": {"total_size": sum(entry.nbytes for entry in entries)}, "weight_map": weight_map}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))


def _write_shard(file: Path, entries: Sequence[Entry], device: str) -> None:
    with Shard(file, entries) as shard:
        for entry in entries:
            shard.write(entry.name, random_weight(entry.name, entry.shape, device))


@torch.no_grad()
def random_weight(name: str, shape: tuple[int, ...], device: str) -> torch.Tensor:
    """Return bfloat16 numbers such that a forward of 57 blocks stays in float16's range: uniform, half as far as those
    that would keep the variance; norms 1."""
    weight = torch.empty(shape, dtype=torch.bfloat16, device=device)
    if name.endswith(".gamma") or (len(shape) == 1 and name.endswith("weight")):
        return weight.fill_(1.0)
    bound = 0.1 if len(shape) == 1 else GAIN * math.sqrt(3 / math.prod(shape[1:]))
    return weight.uniform_(-bound, bound)


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


def spec_of(facts: ModelFacts, *, tiny: bool, **written: object) -> JobSpec:
    """Return a job of this model; what is None or left out is the model's default."""
    asked = {"model": facts.key, "prompt": "a red fox in the snow", "seed": 7}
    asked |= {name: value for name, value in written.items() if value is not None}
    spec = jobspec.check(asked, models.load(), "arguments", image_model=facts.key, video_model=facts.key)
    if isinstance(spec, list):
        raise SystemExit("\n".join(str(fault) for fault in spec))
    if tiny:
        few = {"width": 256, "height": 256, "num_inference_steps": 2}
        spec = spec.model_copy(update=few | ({"num_frames": 5} if facts.kind == "video" else {}))
    return spec


@contextmanager
def timed(name: str) -> Iterator[None]:
    """Print what the block took."""
    started = time.monotonic()
    yield
    synchronise()
    say(name, seconds=round(time.monotonic() - started, 3), **held())


def held() -> dict[str, int | float]:
    """Return what the process holds now: device bytes in use and kept back, host RAM that no file backs."""
    host = {"host_anon_gib": round(status("RssAnon") / GIB, 3)}
    if not torch.cuda.is_available():
        return host
    device = {"device_bytes": torch.cuda.memory_allocated(), "device_reserved_bytes": torch.cuda.memory_reserved()}
    return device | host


def status(field: str, pid: int | None = None) -> int:
    """Return a figure of a process's /proc/PID/status in bytes, this one's by default; 0 for one that has ended."""
    lines = Path(f"/proc/{pid or 'self'}/status").read_text(encoding="ascii").splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), 0)


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def say(what: str, **figures: object) -> None:
    print(json.dumps({"phase": what} | {k: v for k, v in figures.items() if v is not None}), flush=True)
