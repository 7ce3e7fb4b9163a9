"""Which ways of diffusers to hold and to move weights go together on CUDA, and which are broken or silently wrong.

    python -m bench.gpu_combinations                  # a minute; a FLUX of full width with three blocks
    python -m bench.gpu_combinations --device cpu     # what of it runs there

Each combination has a process of its own, since some end CUDA for theirs. It computes twice, the second time with the
weights having left and come back, and is compared with the same weights resident. Prints a JSON object for each:
`relative_error`, or the error it ended with. What the planner refuses of these says docs/memory.md; exits 1 where one
that it offers is not exact.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import product
from pathlib import Path
from typing import Any

import torch

from bench.fullsize import on_meta, write
from bench.shapes import FLUX_CONFIGS
from safelightd.device import give_back

FEW = {"num_layers": 1, "num_single_layers": 2}
SMALL = {"attention_head_dim": 32, "num_attention_heads": 2, "axes_dims_rope": (8, 12, 12), "joint_attention_dim": 64}
TOKENS, TEXT_TOKENS = 1024, 256
AT_ONCE = 8

OFFERED = ("bf16", "leaf"), ("bf16", "block"), ("bf16", "sequential")

Move = Callable[[Any, torch.device], None]


def _group(kind: str, *, stream: bool, low_cpu_mem_usage: bool = False) -> Move:
    def move(model: Any, device: torch.device) -> None:
        model.enable_group_offload(
            onload_device=device,
            offload_type=f"{kind}_level",
            num_blocks_per_group=1 if kind == "block" else None,
            use_stream=stream,
            low_cpu_mem_usage=low_cpu_mem_usage,
        )

    return move


def _sequential(model: Any, device: torch.device) -> None:
    import accelerate

    accelerate.cpu_offload(model, device)


MOVES: dict[str, Move] = {
    "leaf": _group("leaf", stream=False),
    "leaf, stream": _group("leaf", stream=True),
    "leaf, stream, low_cpu_mem_usage": _group("leaf", stream=True, low_cpu_mem_usage=True),
    "block": _group("block", stream=False),
    "block, stream": _group("block", stream=True),
    "sequential": _sequential,
}


def precisions() -> dict[str, Any]:
    """Return diffusers' own settings for each way to hold the weights."""
    from diffusers import BitsAndBytesConfig, TorchAoConfig
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig

    four = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
    return {
        "bf16": None,
        "nf4": BitsAndBytesConfig(load_in_4bit=True, **four),
        "nf4, double quantisation": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=True, **four),
        "int8-bnb": BitsAndBytesConfig(load_in_8bit=True),
        "int8-weight-only": TorchAoConfig(Int8WeightOnlyConfig(version=2, set_inductor_config=False)),
        "fp8-weight-only": TorchAoConfig(Float8WeightOnlyConfig(set_inductor_config=False)),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--one", nargs=3, metavar=("FOLDER", "PRECISION", "MOVED"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if arguments.one:
        folder, precision, moved = arguments.one
        print(json.dumps(_one(Path(folder), precision, moved, device)))
        return 0
    folder = Path(tempfile.mkdtemp(prefix="slb-"))
    try:
        config = FLUX_CONFIGS["transformer"] | FEW | (SMALL if device.type == "cpu" else {})
        write(on_meta("diffusers.FluxTransformer2DModel", config), folder / "transformer", str(device))
        every = [*product(precisions(), MOVES), *(("bf16", special) for special in SPECIAL)]
        with ThreadPoolExecutor(AT_ONCE) as threads:
            found = [
                threads.submit(_elsewhere, folder / "transformer", precision, moved, arguments.device)
                for precision, moved in every
            ]
            lines = []
            for each in as_completed(found):
                lines.append(each.result())
                print(json.dumps(lines[-1]), flush=True)
    finally:
        shutil.rmtree(folder)
    wrong = [line for line in lines if (line["precision"], line["moved"].split(",")[0]) in OFFERED and _is_wrong(line)]
    return 1 if wrong and device.type == "cuda" else 0


def _is_wrong(line: dict[str, Any]) -> bool:
    return line.get("relative_error") != 0.0


def _elsewhere(folder: Path, precision: str, moved: str, device: str) -> dict[str, Any]:
    """Return what a process of its own finds of a combination."""
    one = ["--one", str(folder), precision, moved]
    command = [sys.executable, "-m", "bench.gpu_combinations", "--device", device, *one]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        last = done.stderr.strip().splitlines()[-1:] or [""]
        found = {"precision": precision, "moved": moved, "error": f"exit {done.returncode}: {last[0]}"}
    return found


def _one(folder: Path, precision: str, moved: str, device: torch.device) -> dict[str, Any]:
    """Return what this process finds of a combination."""
    line: dict[str, Any] = {"precision": precision, "moved": moved}
    setting = precisions()[precision]
    inputs = _inputs(json.loads((folder / "config.json").read_text()), device)
    try:
        exact = _twice(_load(folder, setting, device), inputs)
        give_back()
        model = _load(folder, setting, device)
        found = SPECIAL[moved](model, inputs, device) if moved in SPECIAL else _moved(model, inputs, device, moved)
        line["relative_error"] = round(float((found - exact).norm() / exact.norm()), 6)
    except Exception as error:  # noqa: BLE001 - a combination that fails is a result
        line["error"] = f"{type(error).__name__}: {error}".split("\n")[0][:300]
    return line


def _moved(model: Any, inputs: dict[str, torch.Tensor], device: torch.device, moved: str) -> torch.Tensor:
    MOVES[moved](model, device)
    return _twice(model, inputs)


def _load(folder: Path, setting: Any, device: torch.device) -> Any:
    from diffusers import FluxTransformer2DModel

    placed = {} if setting is None else {"quantization_config": setting, "device_map": {"": device}}
    model = FluxTransformer2DModel.from_pretrained(folder, dtype=torch.bfloat16, **placed)
    return model.to(device) if setting is None else model


@torch.no_grad()
def _twice(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    model(**inputs, return_dict=False)
    answer: torch.Tensor = model(**inputs, return_dict=False)[0]
    return answer.float().cpu()


class _Stop(Exception):
    """What a cancelled job raises between two blocks."""


def _stopped(model: Any, inputs: dict[str, torch.Tensor], device: torch.device) -> torch.Tensor:
    """Stop a forward before its last block, with a copy under way, and compute again with the same hooks."""
    MOVES["leaf, stream"](model, device)
    _twice(model, inputs)

    def stop(*_call: Any) -> None:
        raise _Stop

    handle = model.single_transformer_blocks[-1].register_forward_pre_hook(stop)
    try:
        _twice(model, inputs)
    except _Stop:
        handle.remove()
    return _twice(model, inputs)


def _compiled(model: Any, inputs: dict[str, torch.Tensor], device: torch.device) -> torch.Tensor:
    MOVES["block, stream"](model, device)
    model.compile_repeated_blocks(fullgraph=True)
    return _twice(model, inputs)


SPECIAL = {"leaf, stream, after a stop inside": _stopped, "compiled, block, stream": _compiled}


def _inputs(config: dict[str, Any], device: torch.device) -> dict[str, torch.Tensor]:
    torch.manual_seed(7)
    side = int(TOKENS**0.5)
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    ids = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3)
    given = {
        "hidden_states": torch.randn(1, TOKENS, config["in_channels"]),
        "encoder_hidden_states": torch.randn(1, TEXT_TOKENS, config["joint_attention_dim"]),
        "pooled_projections": torch.randn(1, config["pooled_projection_dim"]),
        "timestep": torch.tensor([0.5]),
        "img_ids": ids.float(),
        "txt_ids": torch.zeros(TEXT_TOKENS, 3),
    }
    return {name: value.to(device, torch.bfloat16) for name, value in given.items()}


if __name__ == "__main__":
    sys.exit(main())
