"""How this machine differs from what is predicted: the value. `safelightd.calibration` learns and keeps it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from safelight.plan import PhaseName, Plan


class Calibration(BaseModel):
    """What receipts of this machine have shown. Ratios are measured to predicted, by the functions below."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    v: Literal[3] = 3
    load: dict[str, float] = Field(default_factory=dict)
    """By `load_key`: reading, quantising, giving back."""
    pin: dict[str, float] = Field(default_factory=dict)
    """Of `PIN` alone."""
    compile: dict[str, float] = Field(default_factory=dict)
    """By `work_key`."""
    work: dict[str, float] = Field(default_factory=dict)
    """By `work_key`: computing."""
    link: dict[str, float] = Field(default_factory=dict)
    """By `link_key`: what passes while others compute."""
    device: dict[str, float] = Field(default_factory=dict)
    """By `memory_key`: the device's memory."""
    room_bytes: int | None = None
    """GPU memory that was left in the middle of a job when other programs took some: the next ones count on no more."""
    host_room_bytes: int | None = None
    """RAM, likewise, after the kernel ended an engine for want of it."""

    def knows(self, model: str) -> bool:
        """Whether a job of this model has run here."""
        return any(key.startswith(f"{model}/") for key in self.load)


NOTHING_LEARNED = Calibration()

PIN = "pinned"
CACHED = " cached by "


def ratio(ratios: Mapping[str, float], key: str, alike: str = "") -> float:
    """Return how much longer something takes here than the shipped figures say.

    What has not run is taken to be as slow as what has, of keys with `alike` in them: else a slow disk would make every
    untried way look fast. Jobs with a cache tell nothing of those without.
    """
    if key in ratios:
        return ratios[key]
    known = [value for name, value in ratios.items() if alike in name and (CACHED in name) == (CACHED in key)]
    return math.exp(sum(map(math.log, known)) / len(known)) if known else 1.0


def load_key(plan: Plan, phase: PhaseName) -> str:
    """Return what plans share whose phase loads alike.

    A transformer's blocks are read once, wherever they then lie. Those of a streamed text encoder are read for each
    prompt, and never all held: 1.2 s where the same files took 2.5 s to be held (H100, 11.3 GiB in the page cache,
    2026-11-27).
    """
    match phase:
        case "encode":
            held = (plan.text_encoder_precision or plan.dtype) + _made(plan, "text_encoder")
            streamed = " streamed" if any(name.startswith("text_encoder") for name in plan.streamed) else ""
            return f"{plan.model}/encode/{held} on {plan.text_encoder_device}{streamed}"
        case "denoise":
            fused = f" fused{' before' if plan.fused else ' and kept' if plan.keeping else ''}" if plan.loras else ""
            return f"{plan.model}/denoise/{plan.precision}{_made(plan, 'transformer')}{fused}"
        case "decode":
            return work_key(plan, phase)


def _made(plan: Plan, component: str) -> str:
    return " prepared" if any(name.startswith(component) for name in plan.prepared) else ""


def work_key(plan: Plan, phase: PhaseName) -> str:
    """Return what plans share whose phase computes alike."""
    match phase:
        case "encode":
            return load_key(plan, phase)
        case "denoise":
            led = f" with {plan.controlnet}" if plan.controlnet else ""
            return f"{plan.model}/denoise/{plan.precision}{' compiled' if plan.compiled else ''}{led}{_cached(plan)}"
        case "decode":
            how = "tiled" if plan.vae_tiling else "in strips" if plan.vae_strip_rows else "whole"
            return f"{plan.model}/decode/{how}"


def link_key(plan: Plan) -> str:
    """Return what plans share whose transformers are copied alike."""
    return (plan.streamed_from if plan.offload == "partial" else plan.offload) + _cached(plan)


def _cached(plan: Plan) -> str:
    """Jobs with a cache neither compute nor copy what others do."""
    return f"{CACHED}{plan.cache}" if plan.cache else ""


def memory_key(plan: Plan, phase: PhaseName) -> str:
    """Return what plans share whose phase is predicted as well: however many blocks are streamed."""
    match phase:
        case "encode" | "decode":
            return work_key(plan, phase)
        case "denoise":
            return f"{work_key(plan, phase)} {plan.offload}"
