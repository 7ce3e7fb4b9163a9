"""Specs, plans, frames and receipts for the tests of outputs: real values, small sizes."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from safelight.jobspec import JobSpec
from safelight.plan import Plan
from safelight.receipt import Output, Receipt

PLAN = Plan(
    model="tiny-flux-schnell",
    device="cpu",
    dtype="float32",
    precision="fp32",
    offload="none",
    vae_tiling=False,
    text_encoder_device="cpu",
    passed_over=("bf16: no GPU",),
)


def image_spec(**changes: Any) -> JobSpec:
    """A picture of 64 x 48, submitted at noon UTC."""
    fields: dict[str, Any] = {
        "id": "20261122-210000-000abcd-00001",
        "batch": "night",
        "submitted_at": "2026-11-22T12:00:00+00:00",
        "kind": "image",
        "model": "tiny-flux-schnell",
        "prompt": "a red fox",
        "width": 64,
        "height": 48,
        "num_inference_steps": 4,
        "max_sequence_length": 256,
        "seed": 7,
        "output_format": "png",
    }
    return JobSpec.model_validate(fields | changes)


def clip_spec(**changes: Any) -> JobSpec:
    """A clip of nine frames of 96 x 64."""
    fields: dict[str, Any] = {
        "kind": "video",
        "model": "tiny-wan-ti2v",
        "width": 96,
        "height": 64,
        "num_frames": 9,
        "fps": 24,
        "output_format": "mp4",
    }
    return image_spec(**(fields | changes))


def published(what: str) -> JobSpec:
    """A picture, a clip with its poster, or a clip as a folder of frames."""
    if what == "picture":
        return image_spec()
    return clip_spec(num_frames=5, output_format={"clip": "mp4", "frames": "png"}[what])


def frames(spec: JobSpec) -> Iterator[NDArray[np.uint8]]:
    """What the model made: noise, or a clip that moves."""
    yield from moving(spec) if spec.kind == "video" else [noise(spec)]


def noise(spec: JobSpec, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (spec.height, spec.width, 3), dtype=np.uint8)


def colour(spec: JobSpec, rgb: tuple[int, int, int] = (0, 0, 0)) -> NDArray[np.uint8]:
    return np.full((spec.height, spec.width, 3), rgb, np.uint8)


def gradient(spec: JobSpec, low: int, high: int) -> NDArray[np.uint8]:
    row = np.linspace(low, high, spec.width).round().astype(np.uint8)
    return np.broadcast_to(row[None, :, None], (spec.height, spec.width, 3)).copy()


def moving(spec: JobSpec, count: int | None = None) -> Iterator[NDArray[np.uint8]]:
    """A gradient that moves to the right, one frame at a time."""
    for number in range(spec.num_frames or 1 if count is None else count):
        yield np.roll(gradient(spec, 20, 230), 3 * number, axis=1)


def receipt(spec: JobSpec, outputs: tuple[Output, ...], plan: Plan = PLAN) -> Receipt:
    return Receipt(
        id=spec.id,
        state="done",
        spec=spec,
        plan=plan,
        outputs=outputs,
        attempts=1,
        finished_at="2026-11-22T13:00:00+00:00",
        versions={"safelight": "0"},
    )


@contextmanager
def file_size_limit(size_bytes: int) -> Iterator[None]:
    """Let the kernel refuse larger files (EFBIG) in this process and its children."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
