"""Caches that answer some of a transformer's forwards from earlier ones: faster, and another result. Pure.

Names and arguments are diffusers' own (hooks/first_block_cache.py and hooks/taylorseer_cache.py, 0.42). Others of
diffusers' caches are not offered: pyramid attention broadcast, FasterCache and full TaylorSeer keep every block's
attention, 10 to 40 GiB of TI2V-5B at 1280x704x121; MagCache wants figures of each checkpoint that nobody publishes for
Wan.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

CacheKind = Literal["first-block", "taylorseer"]

ARGUMENTS: dict[str, tuple[str, ...]] = {
    "first-block": ("threshold",),
    "taylorseer": ("cache_interval", "disable_cache_before_step", "disable_cache_after_step", "max_order"),
}

EXPECTED = (
    "first-block or taylorseer with its arguments, as first-block:threshold=0.08 "
    "or {kind: taylorseer, cache_interval: 3}"
)


class Cache(BaseModel):
    """What is asked of a cache; its arguments' defaults are diffusers'."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: CacheKind
    """first-block runs the first block, and the others only where its change differs from the last time's by more than
    `threshold`. taylorseer computes one step of `cache_interval` and extrapolates the others from the last ones."""
    threshold: float | None = Field(default=None, ge=0, le=1)
    cache_interval: int | None = Field(default=None, ge=2, le=20)
    disable_cache_before_step: int | None = Field(default=None, ge=1)
    disable_cache_after_step: int | None = Field(default=None, ge=1)
    max_order: int | None = Field(default=None, ge=0, le=3)

    @model_validator(mode="after")
    def _has_its_own_arguments(self) -> Cache:
        others = [name for name in self.given if name not in ARGUMENTS[self.kind]]
        if others:
            raise ValueError(f"{self.kind} has no {', '.join(others)}")
        return self

    @property
    def given(self) -> dict[str, Any]:
        """The arguments that were written."""
        return {name: value for name, value in self.model_dump(exclude={"kind"}).items() if value is not None}


def read(value: object) -> Cache:
    """Return the cache that a mapping, or text such as `first-block:threshold=0.08`, asks for; one is itself.

    Raises:
        ValueError: it asks for none.
    """
    if isinstance(value, Cache):
        return value
    if isinstance(value, str):
        kind, _, rest = value.strip().partition(":")
        pairs = [pair.partition("=") for pair in rest.split(",") if pair.strip()]
        value = {"kind": kind.strip()} | {name.strip(): number.strip() for name, _, number in pairs}
    if not isinstance(value, Mapping):
        raise ValueError(EXPECTED)
    return Cache.model_validate(dict(value))


def kept_bytes(cache: Cache | None, tokens: int, width: int, contexts: int) -> int:
    """Return what a cache keeps of a forward over so many tokens in 16 bit, and what it compares them with.

    first-block: the first block's output, its change, and what the other blocks made of it, for each of the two
    prompts of a guided step; three more while it compares. taylorseer keeps what leaves the last layer alone.

    Args:
        contexts: forwards of a step.
    """
    return (3 * contexts + 3) * tokens * width * 2 if cache and cache.kind == "first-block" else 0
