"""A clip's denoising on disk, so that one that was killed goes on where it stood. Knows tensors and schedulers.

    state/checkpoints/<id>       the sha256 of all that follows, in hex, a newline, and a safetensors file of latents,
                                 conditions and everything the scheduler remembers

No random numbers are in it: they are all drawn before the first step, and what became of them is in the latents.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from safelight import durable
from safelight.jobspec import JobSpec
from safelight.plan import Plan
from safelightd.logs import Log

DECIDES_THE_BITS = (
    "model",
    "device",
    "dtype",
    "precision",
    "compiled",
    "attention",
    "text_encoder_precision",
    "text_encoder_device",
)
"""Of a plan. Where its weights lie changes no bit: another plan of these goes on with what this one computed."""

SCHEDULER_KEEPS = frozenset({"_internal_dict"})
"""What a scheduler was made from. It is made from the same again."""

log = Log("safelight.checkpoint")


@dataclass(frozen=True)
class Saved:
    """What was there after some step."""

    step: int
    tensors: Mapping[str, torch.Tensor]
    """On the CPU, by the names they were saved by."""
    scheduler: Mapping[str, Any]

    def restore(self, scheduler: Any, device: torch.device) -> None:
        """Give a scheduler of the same settings back what it remembered."""
        for name, value in self.scheduler.items():
            setattr(scheduler, name, _unpacked(value, self.tensors, device))


@dataclass(frozen=True)
class Checkpoint:
    """The place of one job's."""

    file: Path | None
    """None: nothing is kept."""
    made_by: str = ""
    """What `digest` says. Another spec, plan or model starts anew."""
    every_s: float = math.inf

    def load(self) -> Saved | None:
        """Return what an earlier attempt left; None where there is nothing, or nothing of use, which the log says."""
        if self.file is None:
            return None
        try:
            content = self.file.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            log.warning("checkpoint.unread", file=self.file, error=error)
            return None
        digest, _, rest = content.partition(b"\n")
        if digest != hashlib.sha256(rest).hexdigest().encode():
            log.warning("checkpoint.damaged", file=self.file, remedy="the job starts from its first step")
            return None
        try:
            told = _metadata(rest)
            tensors = load_tensors(rest)
        except (SafetensorError, KeyError, ValueError) as error:
            log.warning("checkpoint.unknown", file=self.file, error=error, remedy="the job starts from its first step")
            return None
        if told["made_by"] != self.made_by:
            log.warning("checkpoint.of_another_plan", file=self.file, remedy="the job starts from its first step")
            return None
        return Saved(int(told["step"]), tensors, json.loads(told["scheduler"]))

    def keeper(self) -> Keeper:
        """Return what saves, from now on."""
        return Keeper(self)


class Keeper:
    """Saves every so many seconds while a loop runs."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._saved_at = time.monotonic()
        self._step = 0

    def is_due(self) -> bool:
        return time.monotonic() - self._saved_at >= self._checkpoint.every_s

    def save(self, step: int, tensors: Mapping[str, torch.Tensor | None], scheduler: Any) -> None:
        """Put what there is after so many steps in the place of what was saved before: whole, and synced.

        A disk that takes it not, or a scheduler of one's own that remembers what no file can hold, costs the job
        nothing but what it would have saved; the log says so.
        """
        if self._checkpoint.file is None or step == self._step:
            return
        self._saved_at = time.monotonic()
        self._step = step
        packed = {name: _packed_tensor(tensor) for name, tensor in tensors.items() if tensor is not None}
        try:
            state = {
                name: _packed(value, f"scheduler.{name}", packed)
                for name, value in vars(scheduler).items()
                if name not in SCHEDULER_KEEPS
            }
        except TypeError as error:
            log.warning("checkpoint.impossible", error=error)
            return
        told = {"made_by": self._checkpoint.made_by, "step": str(step), "scheduler": json.dumps(state)}
        content = save_tensors(packed, metadata=told)
        try:
            durable.write(self._checkpoint.file, hashlib.sha256(content).hexdigest().encode() + b"\n" + content)
        except OSError as error:
            log.warning("checkpoint.unwritten", file=self._checkpoint.file, error=error)


NOWHERE = Checkpoint(None)


def digest(spec: JobSpec, plan: Plan, weights: object, versions: Mapping[str, str]) -> str:
    """Return what decides a job's latents from any step on, as one word.

    What a VAE made of a given picture is in the checkpoint itself: a plan with other tiles goes on with it.

    Args:
        weights: what tells the model's files from others, as JSON can say it.
    """
    told = {
        "spec": spec.model_dump(mode="json"),
        "plan": plan.model_dump(mode="json", include=set(DECIDES_THE_BITS)),
        "weights": weights,
        "versions": dict(versions),
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _metadata(content: bytes) -> dict[str, str]:
    """Return the text that a safetensors file carries (the format's README: a length, then JSON)."""
    length = int.from_bytes(content[:8], "little")
    told: dict[str, str] = json.loads(content[8 : 8 + length])["__metadata__"]
    return told


def _packed_tensor(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def _packed(value: object, name: str, tensors: dict[str, torch.Tensor]) -> object:
    """Return a value as JSON can hold it; its tensors go into `tensors`.

    Raises:
        TypeError: it is of a kind that nobody knows how to give back.
    """
    if isinstance(value, torch.Tensor):
        tensors[name] = _packed_tensor(value)
        return {"tensor": name, "on": value.device.type}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_packed(part, f"{name}.{i}", tensors) for i, part in enumerate(value)]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a scheduler's {name} is a {type(value).__name__}: no checkpoint can hold it")


def _unpacked(value: Any, tensors: Mapping[str, torch.Tensor], device: torch.device) -> Any:
    if isinstance(value, dict):
        tensor = tensors[value["tensor"]].clone()
        return tensor if value["on"] == "cpu" else tensor.to(device)
    if isinstance(value, list):
        return [_unpacked(part, tensors, device) for part in value]
    return value
