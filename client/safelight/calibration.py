"""How this machine differs from what is predicted: the value. `safelightd.calibration` learns and keeps it."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from safelight.plan import PhaseName, Plan


class Calibration(BaseModel):
    """What receipts of this machine have shown. Ratios are measured to predicted, by `key`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    v: Literal[2] = 2
    seconds: dict[str, float] = Field(default_factory=dict)
    step_seconds: dict[str, float] = Field(default_factory=dict)
    device: dict[str, float] = Field(default_factory=dict)
    """Of the device's memory."""
    room_bytes: int | None = None
    """GPU memory that was left in the middle of a job when other programs took some: the next ones count on no more."""


NOTHING_LEARNED = Calibration()


def memory_key(plan: Plan, phase: PhaseName) -> str:
    """Return what plans share whose phase is predicted as well: however many blocks are streamed."""
    return key(plan.model_copy(update={"streamed": {}}), phase)


def key(plan: Plan, phase: PhaseName) -> str:
    """Return what plans share whose phase takes as long: the model and how that phase runs."""
    match phase:
        case "encode":
            streamed = any(name.startswith("text_encoder") for name in plan.streamed)
            how = f"{plan.text_encoder_precision or plan.dtype} on {plan.text_encoder_device}"
            return f"{plan.model}/encode/{how}{' streamed' if streamed else ''}"
        case "denoise":
            count = max((len(blocks) for name, blocks in plan.streamed.items() if name.startswith("trans")), default=0)
            compiled = " compiled" if plan.compiled else ""
            some = f" {plan.streamed_from} {count // 10}0" if count else ""
            return f"{plan.model}/denoise/{plan.precision}{compiled} {plan.offload}{some}"
        case "decode":
            return f"{plan.model}/decode/{'tiled' if plan.vae_tiling else 'whole'}"
