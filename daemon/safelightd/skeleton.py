"""Modules without memory: built as their config.json says, every parameter on the meta device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import accelerate
import torch
from torch import nn

from safelightd.weights import BadModelFolder


def build(component_class: Any, folder: Path, library: str) -> nn.Module:
    """Return a module of this class, as a `from_pretrained` of its library would build it.

    What it computes for itself, such as Wan's rotary frequencies, is real and on the CPU.

    Raises:
        BadModelFolder: config.json says what the class does not know.
    """
    try:
        return (
            _of_diffusers(component_class, folder)
            if library == "diffusers"
            else _of_transformers(component_class, folder)
        )
    except (OSError, ValueError, TypeError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's own words; the libraries' have no number
        raise BadModelFolder(f"{folder}: cannot be loaded. {error}") from error


def _of_diffusers(component_class: Any, folder: Path) -> nn.Module:
    from diffusers.models.modeling_utils import no_init_weights

    config = component_class.load_config(str(folder), local_files_only=True)
    with no_init_weights(), accelerate.init_empty_weights(include_buffers=False):
        module = component_class.from_config(config)
    assert isinstance(module, nn.Module)
    return module


def _of_transformers(component_class: Any, folder: Path) -> nn.Module:
    config = component_class.config_class.from_pretrained(str(folder), local_files_only=True)
    with torch.device("meta"):
        module = component_class(config)
    assert isinstance(module, nn.Module)
    return module
