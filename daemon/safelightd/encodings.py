"""Weights that are packed in a file: 8-bit floats with scales, and GGUF's blocks. Decoded while they are read."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from importlib.util import find_spec

import torch

from safelight.tensorfile import GGUF_TYPES
from safelightd.weights import BadModelFolder

_BLOCKS = {name: (number, items, nbytes) for number, (name, items, nbytes) in GGUF_TYPES.items()}


@dataclass(frozen=True)
class Scaled:
    """Numbers of one byte each that a scale multiplies: one for all of them, or one a row."""

    dtype: torch.dtype
    scales: tuple[float, ...]
    row_items: int

    @property
    def block_bytes(self) -> int:
        """With one scale a block is one number, else a row."""
        return self.block_items

    @property
    def block_items(self) -> int:
        return 1 if len(self.scales) == 1 else self.row_items

    def decode(self, raw: torch.Tensor, first: int) -> torch.Tensor:
        """Return the numbers, multiplied in float32.

        By a table of all 256: torch's own conversion of 8-bit floats takes a CPU five times as long (0.22 against 1.0
        billion a second and thread; torch 2.13, 2026-11-26).
        """
        table = torch.arange(256, dtype=torch.uint8, device=raw.device).view(self.dtype).float()
        if len(self.scales) == 1:
            return table.mul_(self.scales[0]).index_select(0, raw.int())
        rows = table.index_select(0, raw.int()).view(-1, self.row_items)
        scales = torch.tensor(self.scales[first : first + len(rows)], device=raw.device)
        return rows.mul_(scales[:, None]).view(-1)


@dataclass(frozen=True)
class Ggml:
    """Blocks of ggml, by their type's name."""

    name: str

    @property
    def block_bytes(self) -> int:
        return _BLOCKS[self.name][2]

    @property
    def block_items(self) -> int:
        return _BLOCKS[self.name][1]

    def decode(self, raw: torch.Tensor, first: int) -> torch.Tensor:  # noqa: ARG002 - its scales are in the blocks
        """Return the numbers, as diffusers decodes them but in float32 throughout."""
        number, items, nbytes = _BLOCKS[self.name]
        ggml = importlib.import_module("diffusers.quantizers.gguf.utils")
        decode = ggml.dequantize_functions[number]
        numbers: torch.Tensor = decode(raw.view(-1, nbytes), items, nbytes, dtype=torch.float32)
        return numbers.reshape(-1)


def check_gguf() -> None:
    """Raise BadModelFolder where what decodes GGUF is not installed."""
    if find_spec("gguf") is None:
        raise BadModelFolder("GGUF files need gguf, which is not installed. Install it: pip install 'safelight[gguf]'")
