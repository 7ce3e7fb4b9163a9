"""diffusers' and accelerate's own ways to bring a module to the GPU leaf by leaf or block by block."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from safelight.plan import Plan


@contextmanager
def offloaded(module: nn.Module, device: torch.device, plan: Plan) -> Iterator[None]:
    """Have a module in RAM run on `device` as the plan's offload says, until the block ends."""
    try:
        if plan.offload == "sequential":
            importlib.import_module("accelerate").cpu_offload(module, device)
        else:
            group: Any = module
            group.enable_group_offload(
                onload_device=device,
                offload_type=f"{plan.offload}_level",
                num_blocks_per_group=1 if plan.offload == "block" else None,
                use_stream=device.type == "cuda",
                low_cpu_mem_usage=plan.low_cpu_mem_usage,
            )
        yield
    finally:
        _remove_hooks(module, plan.offload)


def _remove_hooks(module: Any, offload: str) -> None:
    """Take the library's hooks off: they hold what they moved, pinned."""
    if offload == "sequential":
        importlib.import_module("accelerate.hooks").remove_hook_from_module(module, recurse=True)
        return
    registry = importlib.import_module("diffusers.hooks").HookRegistry.check_if_exists_or_initialize(module)
    for hook in ("group_offloading", "layer_execution_tracker", "lazy_prefetch_group_offloading"):
        registry.remove_hook(hook, recurse=True)
