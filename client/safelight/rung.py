"""One way to run one phase of a job, with what it takes; and what the planner knows besides job and machine. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from safelight import pace
from safelight.begun import Begun
from safelight.footprint import Decoding
from safelight.plan import Dtype, Overrun, PhaseName, Precision, Shipped


@dataclass(frozen=True)
class Pinned:
    """The blocks that the job before has left in pinned RAM."""

    model: str
    component: str
    precision: Precision
    dtype: Dtype
    blocks: tuple[int, ...]
    loras: tuple[tuple[str, float, str], ...] = ()
    """What is in the weights: sha256, scale and expert of each LoRA."""


@dataclass(frozen=True)
class Circumstances:
    """What the planner should know besides the job and the machine."""

    waiting: int = 1
    """Jobs of this shape that wait, this one included: what is compiled once serves them all."""
    overruns: tuple[Overrun, ...] = ()
    refused: tuple[str, ...] = ()
    """Precisions whose result was refused."""
    compiled_here: frozenset[str] = frozenset()
    compiled_before: frozenset[str] = frozenset()
    """Kinds, "family/precision", that this process has compiled, and those whose code is on disk."""
    pinned: Pinned | None = None
    again: bool = False
    """Other jobs of the same LoRAs wait."""
    seen: frozenset[str] = frozenset()
    """Names of sets, as `safelight.fused` has them: LoRAs that earlier jobs have used, in a precision."""
    without_fused: bool = False
    """Nothing that is kept is used, and nothing is kept: it could not be read."""
    begun: Begun | None = None
    """The way that an earlier attempt has begun the job in, and left a checkpoint of."""


@dataclass(frozen=True)
class Rung:
    """One way to run one phase."""

    phase: PhaseName
    words: str
    device_bytes: int
    host_bytes: int
    load_seconds: float
    """Until everything is in place, and until it has been given back."""
    compute_seconds: float = 0.0
    """All steps, or the decode. What is encoded is counted as loading: the weights pass once."""
    changes: dict[str, Any] = field(default_factory=dict)
    """The fields of the plan that say so."""
    copy_seconds: float = 0.0
    """What passes meanwhile, in all steps."""
    steps: int = 1
    read_once_seconds: float = 0.0
    """Loading what then stays pinned: no later job of the shape reads it."""
    pin_seconds: float = 0.0
    """What pinning takes besides."""
    compile_seconds: float = 0.0
    shipped: Shipped | None = None
    """The seconds before they were corrected."""
    last_resort: int = 0
    """Above 0 it is taken only where nothing of a lower number fits, however fast it looks: it changes pixels, or reads
    again at every step what there would be room for."""
    changes_pixels: bool = False
    """Beyond rounding: others' memory, which may be free again, is no reason to take it."""

    @property
    def work_seconds(self) -> float:
        return pace.overlapped(self.compute_seconds, self.copy_seconds)

    @property
    def seconds(self) -> float:
        return self.load_seconds + self.once_seconds + self.work_seconds

    @property
    def once_seconds(self) -> float:
        """Of `seconds`, what later jobs of the shape will not take again."""
        return self.read_once_seconds + self.pin_seconds + self.compile_seconds


def decode_rung(how: Decoding, device_bytes: int, host_bytes: int, seconds: float) -> Rung:
    """Return a way to decode, which takes so many seconds, loading included."""
    name, resort = "VAE whole", 0
    changes: dict[str, Any] = {"vae_tiling": bool(how.tile_pixels), "vae_strip_rows": how.strip_rows}
    if how.strip_rows:
        name, resort = f"VAE in strips of {how.strip_rows}", 1  # the same sums, and other last bits
    if how.tile_pixels:
        name, resort = f"VAE in tiles of {how.tile_pixels}", 2
        changes["vae_tile_pixels"] = how.tile_pixels
    return Rung(
        "decode",
        name,
        device_bytes,
        host_bytes,
        0.0,
        seconds,
        changes,
        last_resort=resort,
        changes_pixels=how.tile_pixels > 0,
    )
