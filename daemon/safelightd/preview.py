"""A small picture of what a job has denoised so far: each colour is a sum of the latent's channels. Knows no torch.

The weights of these sums are learned here, one set a VAE: before a first job that takes long from what it makes of two
charts of colours, and from each finished job, its last latents and what the VAE made of them. Models that share one
learn for each other.

    state/previews/<id>.jpg      what `safelight watch` shows, while the job runs
    state/previews/<VAE>.json    what was learned
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from safelight import durable
from safelight.paths import Paths
from safelightd.logs import Log

EVERY_S = 2.0
"""Between two pictures of a job: each makes the GPU wait for a copy of a few hundred kilobytes."""

WORTH_S = 10.0
"""A job that takes less is over before a person looks: it is not worth the half second that charts take on a CPU."""

SIDE_PIXELS_MAX = 256
WEIGHT_OF_LAST = 0.5
RIDGE = 1e-4
"""Of the mean square of the latents: what a job of one colour says little of stays small."""

CHART_SIDE_PIXELS = 256
PATCHES = (4, 8, 16, 32)
"""Along a side of a chart: soft ones and hard ones. What they teach is off by 17 grey levels on average of other
pictures with demo-flux's VAE and 12 with demo-wan's, where a finished picture in their place taught 18 and 16
(2026-11-27)."""

Values = NDArray[np.float32]
"""A latent frame (channels, height, width)."""

log = Log("safelight.preview")


@dataclass(frozen=True)
class Factors:
    """What was learned: the normal equations of colours as sums of channels and a constant."""

    gram: NDArray[np.float64]
    """(channels + 1, channels + 1)"""
    moment: NDArray[np.float64]
    """(channels + 1, 3)"""

    def colours(self, latents: Values) -> NDArray[np.uint8]:
        """Return (height, width, 3)."""
        size = len(self.gram)
        damped = self.gram + RIDGE * np.trace(self.gram) / size * np.eye(size)
        weights = np.linalg.solve(damped, self.moment)
        shown = _rows(latents) @ weights
        return np.clip(np.rint(shown), 0, 255).astype(np.uint8).reshape(*latents.shape[1:], 3)


def learned(before: Factors | None, latents: Values, frame: NDArray[np.uint8]) -> Factors:
    """Return what one more picture shows, which counts as much as all before it.

    Args:
        frame: (height, width, 3), a whole number of times larger than the latents.
    """
    height, width = latents.shape[1:]
    small = np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BOX), dtype=np.float64)
    rows = _rows(latents)
    gram, moment = rows.T @ rows / len(rows), rows.T @ small.reshape(-1, 3) / len(rows)
    if before is None or before.gram.shape != gram.shape:
        return Factors(gram, moment)
    old, new = 1 - WEIGHT_OF_LAST, WEIGHT_OF_LAST
    return Factors(old * before.gram + new * gram, old * before.moment + new * moment)


def _rows(latents: Values) -> NDArray[np.float64]:
    channels = latents.reshape(len(latents), -1).T.astype(np.float64)
    return np.hstack([channels, np.ones((len(channels), 1))])


def charts() -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return two pictures (height, width, 3) of many colours, always the same: patches in patches, and plain ones."""
    random = np.random.default_rng(0)
    size = (CHART_SIDE_PIXELS, CHART_SIDE_PIXELS)
    layers = []
    for count in PATCHES:
        colours = Image.fromarray(random.integers(0, 256, (count, count, 3), dtype=np.uint8))
        soft = Image.Resampling.BICUBIC if count < PATCHES[-2] else Image.Resampling.NEAREST
        layers.append(np.asarray(colours.resize(size, soft), dtype=np.float64))
    mixed = np.mean(layers, axis=0)
    contrasted = (mixed - mixed.mean()) / mixed.std() * 70 + 128
    plain = Image.fromarray(random.integers(0, 256, (PATCHES[1], PATCHES[1], 3), dtype=np.uint8))
    return (
        np.clip(np.rint(contrasted), 0, 255).astype(np.uint8),
        np.asarray(plain.resize(size, Image.Resampling.NEAREST)),
    )


class Preview:
    """One job's. A disk that takes no preview costs the job nothing."""

    def __init__(self, paths: Paths, job: str, vae: str) -> None:
        self._picture = picture(paths, job)
        self._file = paths.previews / f"{vae}.json"
        self._factors = _load(self._file)
        self._shown_at = time.monotonic()

    def begin(self, seconds: float | None, encoded: Callable[[Sequence[NDArray[np.uint8]]], Sequence[Values]]) -> None:
        """Learn from charts, where no job has taught anything yet: a first clip may take an hour.

        Args:
            seconds: that the job is expected to take; None: nobody knows.
            encoded: returns what the VAE makes of pictures.
        """
        if self._factors is None and (seconds is None or seconds >= WORTH_S):
            pictures = charts()
            for latents, picture_of in zip(encoded(pictures), pictures, strict=True):
                self._learn(latents, picture_of)

    def show(self, latents_of: Callable[[], Values]) -> None:
        """Put a picture of the latents in the place of the last one, where it is time and there is something to see."""
        now = time.monotonic()
        if self._factors is None or now - self._shown_at < EVERY_S:
            return
        self._shown_at = now
        latents = latents_of()
        if len(latents) + 1 != len(self._factors.gram) or not np.isfinite(latents).all():
            return
        shown = Image.fromarray(self._factors.colours(latents))
        shown.thumbnail((SIDE_PIXELS_MAX, SIDE_PIXELS_MAX))
        unfinished = self._picture.with_name(f".{self._picture.name}.part")
        try:
            unfinished.parent.mkdir(parents=True, exist_ok=True)
            shown.save(unfinished, "JPEG", quality=90, subsampling="4:4:4")
            unfinished.replace(self._picture)
        except OSError as error:
            log.warning("preview.unwritten", file=self._picture, error=error)

    def learning(self, frames: Iterator[NDArray[np.uint8]], latents: Values) -> Iterator[NDArray[np.uint8]]:
        """Yield `frames`, and learn from the first of them what `latents` look like."""
        for i, frame in enumerate(frames):
            if i == 0:
                self._learn(latents, frame)
            yield frame

    def _learn(self, latents: Values, frame: NDArray[np.uint8]) -> None:
        if not np.isfinite(latents).all():
            return  # what such a VAE decodes is refused where it is decoded
        self._factors = learned(self._factors, latents, frame)
        told = {"gram": self._factors.gram.tolist(), "moment": self._factors.moment.tolist()}
        try:
            durable.write(self._file, json.dumps(told).encode())
        except OSError as error:
            log.warning("preview.unlearned", file=self._file, error=error)


def picture(paths: Paths, job: str) -> Path:
    """Return where the preview of a job lies, if there is one."""
    return paths.previews / f"{job}.jpg"


def _load(file: Path) -> Factors | None:
    try:
        told = json.loads(file.read_bytes())
        factors = Factors(np.asarray(told["gram"], np.float64), np.asarray(told["moment"], np.float64))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("preview.damaged", file=file, error=error)  # it is learned again
        return None
    colours = factors.moment.shape[1:]
    return factors if factors.gram.shape == factors.moment.shape[:1] * 2 and colours == (3,) else None
