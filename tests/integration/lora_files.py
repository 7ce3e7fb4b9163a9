"""LoRA files of random factors for the tiny models, in the layouts that people have."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from bench.layouts import wan_of_authors
from safetensors.torch import load_file, save_file

from safelight.lora import Lora
from safelightd.modelfolder import model_folder
from tests.integration.rendering import MODELS

RANK = 4

ATTENTION = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0")
FLUX_MODULES = (
    *(f"transformer_blocks.{i}.{part}" for i in range(2) for part in ATTENTION),
    "transformer_blocks.0.ff.net.0.proj",
    "single_transformer_blocks.1.proj_out",
    "context_embedder",
)
WAN_MODULES = (
    *(f"blocks.{i}.attn{j}.{part}" for i in range(2) for j in (1, 2) for part in ("to_q", "to_out.0")),
    "blocks.0.ffn.net.2",
    "patch_embedding",
    "condition_embedder.time_embedder.linear_1",
)


def weights_of(model: str, models_folder: Path, component: str = "transformer") -> dict[str, torch.Tensor]:
    """Return what a tiny model has on disk."""
    folder = model_folder(MODELS[model], models_folder) / component
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def factors(shapes: Mapping[str, Sequence[int]], seed: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return up and down of each module, large enough to be seen."""
    source = torch.Generator().manual_seed(seed)
    found = {}
    for module, (out, *into) in shapes.items():
        up = torch.randn(out, RANK, generator=source) * 0.2
        down = torch.randn(RANK, *into, generator=source) * 0.2
        found[module] = up.view(out, RANK, *[1] * (len(into) - 1)), down
    return found


def write(
    file: Path, tensors: Mapping[str, torch.Tensor], scale: float = 1.0, metadata: dict[str, str] | None = None
) -> tuple[Lora, Path]:
    """Write a LoRA file; return it as the loader takes it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata=metadata)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return Lora(name=file.stem, scale=scale, sha256=digest, size_bytes=file.stat().st_size), file


def random_lora(
    file: Path, model: str, models_folder: Path, *, seed: int = 1, scale: float = 1.0,
    modules: Sequence[str] | None = None,
) -> tuple[Lora, Path]:  # fmt: skip
    """Write a LoRA in diffusers' own layout."""
    weights = weights_of(model, models_folder)
    modules = modules or (FLUX_MODULES if "flux" in model else WAN_MODULES)
    made = factors({module: weights[f"{module}.weight"].shape for module in modules}, seed)
    return write(file, peft(made), scale)


def peft(made: Mapping[str, tuple[torch.Tensor, torch.Tensor]], prefix: str = "transformer") -> dict[str, torch.Tensor]:
    return {
        f"{prefix}.{module}.lora_{letter}.weight": factor
        for module, pair in made.items()
        for letter, factor in zip("BA", pair, strict=True)
    }


def rescaled(lora: tuple[Lora, Path], scale: float, expert: str = "both") -> tuple[Lora, Path]:
    return lora[0].model_copy(update={"scale": scale, "expert": expert}), lora[1]


def step_distilled(
    file: Path, model: str, models_folder: Path, component: str, *, seed: int
) -> tuple[tuple[Lora, Path], dict[str, torch.Tensor]]:
    """Write a LoRA as the step-distilled ones of Wan A14B are, for one expert; return it and what it adds.

    In Wan's own names and bfloat16: factors with an alpha for every projection of the blocks, whole differences for
    their biases and norms.
    """
    source = torch.Generator().manual_seed(seed)
    own = weights_of(model, models_folder, component)
    tensors: dict[str, torch.Tensor] = {}
    added: dict[str, torch.Tensor] = {}
    for name, theirs in zip(own, wan_of_authors(own), strict=True):
        module, _, end = f"diffusion_model.{theirs}".rpartition(".")
        shape = own[name].shape
        if not name.startswith("blocks.") or end not in ("weight", "bias"):
            continue
        if len(shape) == 2:
            up, down = (
                (torch.randn(*pair, generator=source) * 0.2).bfloat16() for pair in ((shape[0], RANK), (RANK, shape[1]))
            )
            tensors |= {f"{module}.lora_up.weight": up, f"{module}.lora_down.weight": down}
            tensors |= {f"{module}.alpha": torch.tensor(RANK / 2).bfloat16()}
            added[name] = 0.5 * up.double() @ down.double()
        else:
            difference = (torch.randn(shape, generator=source) * 0.05).bfloat16()
            tensors[f"{module}.{'diff' if end == 'weight' else 'diff_b'}"] = difference
            added[name] = difference.double()
    return write(file, tensors), added
