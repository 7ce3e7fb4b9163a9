"""How long it takes to register and to list weights that are on disk already. Real programs, real headers, no GPU.

    python -m bench.register [--times 5]

A folder of FLUX.1-schnell in bfloat16, 34 GB in shards as it is published, and its transformer as one file of
23.8 GB. The files are sparse: names, shapes and sizes are those of the real classes, weights are a hole, which takes no
part in it, since registering reads headers. Prints JSON and exits 1 when a bar is missed: 2 s for each, programs'
start included.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from bench.scratch import Scratch, scratch
from safelight import models
from safelightd.shards import Entry, Shard, split

SECONDS_MAX = 2.0

SHARD_BYTES = 10 * 10**9
"""As diffusers and transformers save: the transformer becomes three files, T5 one."""

CLASSES = {
    "transformer": ("diffusers", "FluxTransformer2DModel", "diffusion_pytorch_model"),
    "vae": ("diffusers", "AutoencoderKL", "diffusion_pytorch_model"),
    "text_encoder": ("transformers", "CLIPTextModel", "model"),
    "text_encoder_2": ("transformers", "T5EncoderModel", "model"),
}


def modules() -> dict[str, nn.Module]:
    """Return the four components of FLUX.1-schnell, without memory."""
    with torch.device("meta"):
        return {
            "transformer": FluxTransformer2DModel(guidance_embeds=False),
            "vae": AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                block_out_channels=(128, 256, 512, 512),
                layers_per_block=2,
                latent_channels=16,
                use_quant_conv=False,
                use_post_quant_conv=False,
            ),
            "text_encoder": CLIPTextModel(
                CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12)
            ),
            "text_encoder_2": T5EncoderModel(
                T5Config(d_model=4096, d_ff=10240, num_layers=24, num_heads=64, d_kv=64, feed_forward_proj="gated-gelu")
            ),
        }


def write(folder: Path, stem: str, module: nn.Module) -> int:
    """Write a component's weights as holes, in shards with an index where they are large; return their bytes."""
    folder.mkdir(parents=True)
    entries = [Entry(name, tuple(each.shape), torch.bfloat16) for name, each in module.state_dict().items()]
    shards = split(([entry] for entry in entries), SHARD_BYTES)
    names = [f"{stem}.safetensors"]
    if len(shards) > 1:
        names = [f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
        weight_map = {entry.name: name for name, part in zip(names, shards, strict=True) for entry in part}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps({"_class_name": type(module).__name__}))
    return sum(hole(folder / name, part) for name, part in zip(names, shards, strict=True))


def hole(file: Path, entries: list[Entry]) -> int:
    """Write the header of a file and leave its weights a hole; return its size."""
    with Shard(file, entries) as shard:
        os.truncate(file, shard.nbytes)
        return shard.nbytes


def model(folder: Path) -> tuple[int, int]:
    """Put a model at `folder`/model and its transformer as one file beside it; return the bytes of both."""
    index: dict[str, Any] = {"_class_name": "FluxPipeline", "_diffusers_version": "0.42.1"}
    size = 0
    for name, module in modules().items():
        library, kind, stem = CLASSES[name]
        index[name] = [library, kind]
        size += write(folder / "model" / name, stem, module)
        if name == "transformer":
            entries = [Entry(key, tuple(each.shape), torch.bfloat16) for key, each in module.state_dict().items()]
            alone = hole(folder / "flux1-schnell.safetensors", entries)
    (folder / "model/model_index.json").write_text(json.dumps(index))
    return size, alone


def timed(place: Scratch, *words: str) -> float:
    begun = time.monotonic()
    place.client("models", *words)
    return time.monotonic() - begun


def measure(place: Scratch, times: int) -> dict[str, Any]:
    folder = place.root / "disk"
    size, alone = model(folder)
    adds, files, lists = [], [], []
    for number in range(times):
        adds.append(timed(place, "add", str(folder / "model"), "--as", f"folder-{number}"))
        files.append(timed(place, "add", str(folder / "flux1-schnell.safetensors"), "--as", f"file-{number}",
                           "--with", str(folder / "model")))  # fmt: skip
        lists.append(timed(place, "list"))
        here = json.loads(place.client("models", "list", "--json").stdout)
        states = {row["key"]: row["here"] for row in here if row["registered"]}
        if states != {f"folder-{number}": "present", f"file-{number}": "present"}:
            raise SystemExit(f"Not registered: {states}")
        for key in states:
            place.client("models", "rm", key)
    return {
        "folder_bytes": size,
        "file_bytes": alone,
        "register_folder_s": round(statistics.median(adds), 2),
        "register_file_s": round(statistics.median(files), 2),
        "list_s": round(statistics.median(lists), 2),
        "largest_s": round(max(*adds, *files), 2),
    }


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--times", type=int, default=5)
    arguments = parser.parse_args()
    counted = models.load()["flux-schnell"].components["transformer"]
    with scratch() as place:
        figures = measure(place, arguments.times)
    figures |= {"transformer_parameters": counted, "bar_s": SECONDS_MAX, "python": platform.python_version()}
    figures |= {"cpus": os.cpu_count(), "torch": torch.__version__, "times": arguments.times}
    print(json.dumps(figures, indent=1))
    return 0 if max(figures["register_folder_s"], figures["register_file_s"]) <= SECONDS_MAX else 1


if __name__ == "__main__":
    sys.exit(main())
