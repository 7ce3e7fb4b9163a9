"""What happened: one frozen, versioned value an ended job. The ledger keeps it; a copy lies beside the output."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from safelight.jobspec import JobSpec
from safelight.machine import Machine
from safelight.plan import Overrun, Plan

EndState = Literal["done", "failed", "quarantined", "cancelled"]
Phase = Literal["plan", "load", "encode", "denoise", "decode", "verify", "publish"]


class Poster(BaseModel):
    """A picture out of a clip, for people who look through the outbox. `path` is relative to it, as the clip's."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    sha256: str
    bytes: int


class Output(BaseModel):
    """One published file, or the folder of a clip's frames. `path` is relative to the outbox as it was then."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    sha256: str
    """As `safelight.content.digest` says."""
    bytes: int
    width: int
    height: int
    num_frames: int | None = None
    """Of the file; where it was interpolated, not the model's."""
    fps: int | None = None
    interpolated_by: str | None = None
    """What made the frames between the model's own."""
    poster: Poster | None = None


class PhaseRecord(BaseModel):
    """What one phase took: seconds, and the peak it held on the device and in host RAM."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seconds: float
    load_seconds: float | None = None
    """Of them, until what computes was in place; None where the phase does not tell."""
    first_step_seconds: float | None = None
    """From then to the end of the first step, or of the decode: compiling is in it."""
    swap_seconds: float | None = None
    """Of `load_seconds`, from the last step of one expert until the next one was in place; None without a second."""
    device_peak_bytes: int = 0
    host_peak_bytes: int = 0


class CacheRecord(BaseModel):
    """How often a cache answered."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str
    forwards: int
    """That the job asked the transformers for, over all attempts whose steps are in the result."""
    skipped: int
    """Of them, those that did not run."""
    restarted_after_step: int | None = None
    """Of receipts from before checkpoints held caches: where an earlier attempt's steps were kept, and not what its
    cache held. It began anew, so that the result is not quite that of an undisturbed job, and the counts are of the
    last attempt alone."""


class Receipt(BaseModel):
    """The record of one ended job. `done` means: verified, fsynced, and this receipt in the ledger."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    v: Literal[1] = 1
    id: str
    state: EndState
    spec: JobSpec
    plan: Plan | None = None
    outputs: tuple[Output, ...] = ()
    error: str | None = None
    phase: Phase | None = None
    """Where it failed."""
    attempts: int = 0
    overruns: tuple[Overrun, ...] = ()
    """Rungs that ran out of memory before `plan` did not."""
    started_at: str | None = None
    finished_at: str
    resumed_after_step: int | None = None
    """What an earlier attempt had denoised before it was killed or stopped."""
    began_anew: str | None = None
    """Where an attempt had left a checkpoint, and it was of no use to the next: why. Later ones may have gone on."""
    cache: CacheRecord | None = None
    phases: dict[str, PhaseRecord] = Field(default_factory=dict)
    seconds_per_step: float | None = None
    device_bytes_after: int | None = None
    """What the device still held for this process after everything was given back."""
    machine: Machine | None = None
    versions: dict[str, str] = Field(default_factory=dict)
    stored: dict[str, str] = Field(default_factory=dict)
    """By large component, what most of its weights were stored as: a picture is no better than bf16, Q4_K and so on."""
