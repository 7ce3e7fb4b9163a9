"""The real engine, in a process where one phase asks for memory that is not there, the first so many times; or where
(PHASE `broken`) the decoded pixels are no numbers.

    python starving_engine.py PHASE TIMES FOLDER ARGUMENTS-OF-THE-ENGINE...

What is patched is the model of the phase, a class of diffusers or transformers; torch's own error is raised. Each time
leaves a file in FOLDER, since every process begins anew.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from safelightd import engine

CALLS = {
    "encode": (transformers.T5EncoderModel, "forward"),
    "denoise": (diffusers.FluxTransformer2DModel, "forward"),
    "decode": (diffusers.AutoencoderKL, "decode"),
    "broken": (diffusers.AutoencoderKL, "decode"),
}


def starve(phase: str, times: int, folder: Path) -> None:
    model, name = CALLS[phase]
    whole = getattr(model, name)

    def call(self: Any, *arguments: Any, **named: Any) -> Any:
        before = len(list(folder.iterdir()))
        if before < times:
            (folder / f"{phase}-{before + 1}").touch()
            if phase == "broken":
                return (whole(self, *arguments, **named)[0] * torch.nan,)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return whole(self, *arguments, **named)

    setattr(model, name, call)


if __name__ == "__main__":
    phase, times, folder, *rest = sys.argv[1:]
    starve(phase, int(times), Path(folder))
    sys.argv[1:] = rest
    sys.exit(engine.main())
