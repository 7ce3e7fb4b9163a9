"""What the trainings of both demo models share: the device, the clock, random numbers, eyes, and what is kept."""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import get_context
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.drawings import analyser
from bench.drawings.fitting import Batch, Fit, save_state, saved_state, told, write_json
from bench.drawings.taking import VAE_ENCODER
from bench.drawings.tokens import TokenTables
from bench.drawings.world import Scene, Scenes, World

UNPROMPTED = 0.1
"""Share of captions that are left out, so that guidance has something to guide away from."""
CAPTIONS = 4
"""Of each scene in a pool."""
SEEN_AT_ONCE = 32


class Training:
    """The state of one run of a training."""

    def __init__(self, arguments: argparse.Namespace, readers: Pool, *, clip: bool) -> None:
        self.arguments, self.readers, self.clip = arguments, readers, clip
        self.device = str(arguments.device)
        self.until = time.monotonic() + arguments.limit_s
        torch.manual_seed(arguments.seed)
        self.world = World(self.device, arguments.seed + 1)
        # Drawn once: to leave the held-out ones away waits for the GPU.
        self.scenes = self.world.scenes(arguments.pool, "training", clip=clip)
        self.stream = torch.Generator(self.device).manual_seed(arguments.seed + 2)
        self.tables = TokenTables.of(self.device)
        self.state = saved_state(arguments.to / STATE)
        self.found: dict[str, Any] = {"card": torch.cuda.get_device_name() if self.device == "cuda" else "CPU"}

    @property
    def goes_on(self) -> bool:
        return bool(time.monotonic() < self.until)

    @property
    def keeps_latents(self) -> bool:
        """Whether the VAE's encoder is another pipeline's, and the decoder alone learns."""
        return bool(self.arguments.begin) and VAE_ENCODER in self.arguments.keep

    def autocast(self) -> Any:
        return torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda", cache_enabled=False)

    def whole(self, below: int, count: int) -> Tensor:
        return torch.randint(below, (count,), generator=self.stream, device=self.device)

    def uniform(self, count: int) -> Tensor:
        return torch.rand(count, generator=self.stream, device=self.device)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.stream, device=self.device)

    def same_stream(self) -> torch.Generator:
        """Return random numbers that are the same each time: what is measured must not depend on what came before."""
        return torch.Generator(self.device).manual_seed(self.arguments.seed + 3)

    def some_captions(self, scenes: Scenes) -> Tensor:
        """Return (B, CAPTIONS, words): a few ways to ask for each scene."""
        ways = [self.world.captions(scenes, clip=self.clip).to(torch.int16) for _ in range(CAPTIONS)]
        return torch.stack(ways, 1)

    def sometimes_unprompted(self, captions: Tensor) -> Tensor:
        return torch.where(self.unprompted(len(captions))[:, None], 0, captions)

    def unprompted(self, count: int) -> Tensor:
        """Return (count,) whose captions are left out."""
        return self.uniform(count) < UNPROMPTED

    def verdicts(self, scenes: Scenes, decoded: Tensor) -> list[dict[str, bool]]:
        """Return what the analyser says of pictures (B, 3, H, W) or clips (B, 3, T, H, W), -1 to 1."""
        read = clip_verdict if self.clip else verdict
        return self.readers.starmap(read, zip(scenes.each(), as_bytes(decoded), strict=True), chunksize=SEEN_AT_ONCE)

    def go_on(self, fit: Fit, batches: Callable[[], Callable[[], Batch]], *before: Fit) -> Fit:
        """Go on with a fit where the ones before it are done and there is time; its average is in place afterwards.

        `batches` makes what gives its batches, and is asked for only where they are needed.
        """
        fit.restore(self.state)
        if not fit.is_done and all(each.is_done for each in before) and self.goes_on:
            fit.run(batches(), self.until)
            self.keep(*before, fit)
        fit.use_average()
        return fit

    def keep(self, *fits: Fit) -> None:
        """Write what another run goes on from."""
        save_state(self.arguments.to / STATE, {name: part for fit in fits for name, part in fit.state().items()})
        self.tell(*fits)

    def tell(self, *fits: Fit) -> None:
        """Write what was done so far."""
        self.found["steps"] = {fit.name: fit.steps for fit in fits}
        self.found["seconds"] = {fit.name: round(fit.spent_s) for fit in fits}
        write_json(self.arguments.to / "trained.json", self.found)


STATE = "state.safetensors"


def verdict(scene: Scene, picture: analyser.Picture) -> dict[str, bool]:
    """Return what the analyser says of a picture."""
    return analyser.verdict(scene, analyser.read(picture))


def clip_verdict(scene: Scene, clip: Any) -> dict[str, bool]:
    """Return what the analyser says of a clip (T, H, W, 3)."""
    return analyser.clip_verdict(scene, list(clip))


def as_bytes(decoded: Tensor) -> Any:
    """Return (B, [T,] H, W, 3) uint8 of (B, 3, [T,] H, W), -1 to 1."""
    return ((decoded.float().clamp(-1, 1) + 1) * 127.5).round().byte().movedim(1, -1).cpu().numpy()


def accuracy(scenes: Sequence[Scene], answers: Sequence[dict[str, bool]]) -> dict[str, float]:
    """Return the share that has each attribute right, in percent; `one` and `two` are those with all, by shapes."""
    found = {name: share([answer[name] for answer in answers]) for name in answers[0]}
    for count, name in ((1, "one"), (2, "two")):
        chosen = [answer["all"] for answer, scene in zip(answers, scenes, strict=True) if scene.count == count]
        if chosen:
            found[name] = share(chosen)
    return found


def share(values: list[bool]) -> float:
    """Return the share that is true, in percent."""
    return round(100 * float(np.mean(values)), 1)


def psnr_db(one: Tensor, other: Tensor) -> float:
    """Return the peak signal-to-noise ratio of pictures from -1 to 1."""
    return round(10 * torch.log10(4 / ((one - other) ** 2).mean()).item(), 2)


def decibels(one: Any, other: Any) -> float:
    """Return the same of pictures in uint8."""
    off = np.mean((one.astype(float) - other.astype(float)) ** 2)
    return 10 * math.log10(255**2 / max(off, 1e-9))


def run(
    train: Callable[[argparse.Namespace, Pool], None], parser: argparse.ArgumentParser, tiny: Mapping[str, float],
    *, needs_card: bool = True, kept: Sequence[str] = (),
) -> int:  # fmt: skip
    """Read the command line and train; `tiny` is what it says instead for a try on the CPU.

    Args:
        kept: the modules that another pipeline can give, all of them unless the command line says which.
    """
    parser.add_argument("--to", type=Path, required=True, metavar="FOLDER")
    if kept:
        parser.add_argument("--begin", type=Path, metavar="FOLDER", help="with modules of this pipeline: --keep")
        parser.add_argument(
            "--keep", nargs="+", choices=(*kept, VAE_ENCODER), default=list(kept),
            help=f"modules to begin with; they learn on unless their seconds are 0. With '{VAE_ENCODER}' latents stay"
            " as they are: of the VAE the decoder alone learns. Without --begin it says nothing",
        )  # fmt: skip
    parser.add_argument("--limit-s", type=float, default=float("inf"), help="of this run; the same command goes on")
    parser.add_argument("--measured", type=int, default=1000, help="held-out prompts to say what it came to")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, help="compile what is learnt often; so it is on a card"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--tiny", action="store_true", help="a minute on the CPU: it learns nothing, all parts run")
    arguments = parser.parse_args()
    if arguments.tiny:
        vars(arguments).update(tiny)
    arguments.device = "cuda" if torch.cuda.is_available() and not arguments.tiny else "cpu"
    if needs_card and arguments.device == "cpu" and not arguments.tiny:
        print("There is no CUDA device here. Train on a machine that has one, or try --tiny.", file=sys.stderr)
        return 5
    if arguments.compile is None:
        arguments.compile = arguments.device == "cuda"
    arguments.to.mkdir(parents=True, exist_ok=True)
    # Forked before anything is on the GPU, which a forked process could not use; they only look at pictures.
    with get_context("fork").Pool() as readers:
        if arguments.device == "cuda":
            # Its backward pass reads past its memory for heads of 32: torch 2.11.0+cu130, H100, 2026-11-22.
            torch.backends.cuda.enable_cudnn_sdp(enabled=False)
            torch.backends.cudnn.benchmark = True
            torch.set_float32_matmul_precision("high")
        train(arguments, readers)
    told("done")
    return 0
