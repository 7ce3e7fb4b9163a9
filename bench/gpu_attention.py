"""What the engine's probe of attention kernels finds on this card, for the shapes of every model.

    python -m bench.gpu_attention            # seconds on an H100
    python -m bench.gpu_attention --tiny     # one small shape on the CPU, of the kernels that run there

Prints a JSON object a shape: milliseconds of one self-attention, how far each is from torch's own choice, what cannot
run here, and what would be chosen.
"""

from __future__ import annotations

import argparse
import json
import sys

import torch

from bench import shapes
from safelight import footprint, models
from safelightd import attention
from safelightd.attention import Shape

JOBS = (
    ("flux-schnell", 512, 512, None),
    ("flux-schnell", 1024, 1024, None),
    ("wan-ti2v-5b", 832, 480, 49),
    ("wan-ti2v-5b", 1280, 704, 121),
    ("wan-t2v-a14b", 832, 480, 81),
)


def main() -> int:
    arguments = _arguments()
    if arguments.tiny:
        found = attention.probe(Shape(256, 2, 32, "float32"), "cpu", ("native", "_native_cudnn"))
        print(json.dumps({"name": "tiny", **found.model_dump()}), flush=True)
        return 0
    table = models.load()
    for key, width, height, frames in JOBS:
        facts = table[key]
        config = shapes.config(facts, "transformer", {})
        tokens = footprint.tokens(facts, width, height, frames, facts.max_sequence_length)
        shape = Shape(tokens, config["num_attention_heads"], config["attention_head_dim"], "bfloat16")
        found = attention.probe(shape, "cuda")
        size = f"{key} {width}x{height}" + (f"x{frames}" if frames else "")
        line = {"name": size, "asked_as": shape.name, "device": torch.cuda.get_device_name(), **found.model_dump()}
        print(json.dumps(line), flush=True)
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="on the CPU")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
