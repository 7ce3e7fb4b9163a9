"""Modules of a saved pipeline as a training's beginning."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

VAE_ENCODER = "vae encoder"
"""Of a VAE what makes latents, without what shows them: a decoder can learn anew, and of another width, beside a
transformer that stays as it is."""


def take(demo: Any, folder: Path, kinds: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Put a saved pipeline's weights in the place of a demo model's; return the modules they came from, by name.

    Args:
        kinds: the class of each module.
        names: of them, and VAE_ENCODER.
    """
    taken: dict[str, Any] = {}
    for name in names:
        part = "vae" if name == VAE_ENCODER else name
        if part not in taken:
            taken[part] = kinds[part].from_pretrained(
                folder, subfolder=part, dtype=torch.float32, local_files_only=True
            )
        weights = taken[part].state_dict()
        if name == VAE_ENCODER:
            own = getattr(demo, part).state_dict()
            weights = own | {key: weights[key] for key in own if key.startswith(("encoder.", "quant_conv."))}
        getattr(demo, part).load_state_dict(weights)
    return taken
