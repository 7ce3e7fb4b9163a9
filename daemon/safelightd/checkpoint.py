"""A clip's denoising on disk, so that one that was killed goes on where it stood. Knows tensors and schedulers.

    state/checkpoints/<id>       latents, conditions, everything the scheduler remembers, and what the job's cache holds
                                 (safelightd.packed)

No random numbers are in it: they are all drawn before the first step, and what became of them is in the latents.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from safelight import durable
from safelight.begun import Begun
from safelight.computed import Computed
from safelight.jobspec import JobSpec
from safelight.machine import GIB
from safelight.plan import Plan
from safelightd import packed
from safelightd.logs import Log

DECIDES_THE_BITS = frozenset({"model", "attention", *Computed.model_fields})
"""Of a plan. Where its weights lie changes no bit: another plan of these goes on with what this one computed. The
planner is told which they were (`begun`): a night later fewer jobs may wait, or a game may run, and it would choose
otherwise."""

SCHEDULER_KEEPS = frozenset({"_internal_dict"})
"""What a scheduler was made from. It is made from the same again."""

SHARE_OF_TIME = 0.02
"""That saving may take: a checkpoint with a cache has gigabytes, and nothing is denoised while it is written."""

SELDOM = 10
"""Times `every_s` that lie between two at the most, however long one takes."""

REMEDY = "the job starts from its first step"

log = Log("safelight.checkpoint")


def _untold(_reason: str) -> None: ...


@dataclass(frozen=True)
class Saved:
    """What was there after some step."""

    step: int
    tensors: Mapping[str, torch.Tensor]
    """On the CPU, by the names they were saved by."""
    scheduler: Mapping[str, Any]
    cache: Any = None
    """As packed.pack returned it."""

    def restore(self, scheduler: Any, device: torch.device) -> None:
        """Give a scheduler of the same settings back what it remembered."""
        for name, value in self.scheduler.items():
            setattr(scheduler, name, packed.unpack(value, self.tensors, device))

    def cache_on(self, device: torch.device) -> Any:
        """Return what a cache told when this was saved, its tensors on `device`; None where there was none."""
        return packed.unpack(self.cache, self.tensors, device)


@dataclass(frozen=True)
class Checkpoint:
    """The place of one job's."""

    file: Path | None
    """None: nothing is kept."""
    made_by: str = ""
    """What `digest` says. Another spec, plan or model starts anew."""
    every_s: float = math.inf
    leave_bytes: int = 0
    """Of the disk, that stay free of it."""
    plan: Plan | None = None
    """Of the job that saves, for `begun` to tell."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Of what computes it: with others there is nothing to go on with, and `begun` tells nothing."""

    def load(self, tell: Callable[[str], None] = _untold) -> Saved | None:
        """Return what an earlier attempt left; None where there is nothing, or nothing of use, which the log says.

        Args:
            tell: gets, of what is of no use, the reason; and the one that an earlier attempt had for beginning anew.
        """
        if self.file is None:
            return None
        try:
            told, tensors = packed.read(self.file)
        except FileNotFoundError:
            return None
        except OSError as error:
            log.warning("checkpoint.unread", file=self.file, error=error, remedy=REMEDY)
            tell(f"its checkpoint cannot be read ({error.strerror})")
            return None
        except packed.Damaged as error:
            log.warning("checkpoint.damaged", file=self.file, error=error, remedy=REMEDY)
            tell("its checkpoint is damaged")
            return None
        if told.get("made_by") != self.made_by:
            log.warning("checkpoint.of_another_plan", file=self.file, remedy=REMEDY)
            tell("its checkpoint is of another plan, other weights or another version")
            return None
        if "began_anew" in told:
            tell(told["began_anew"])
        cache = json.loads(told.get("cache", "null"))
        return Saved(int(told["step"]), tensors, json.loads(told["scheduler"]), cache)

    def keeper(self, step: int = 0, began_anew: str | None = None) -> Keeper:
        """Return what saves, from now on; what there is after so many steps is saved already.

        Args:
            began_anew: why the job did, for the attempts that go on with this one.
        """
        return Keeper(self, step, began_anew)


class Keeper:
    """Saves every so many seconds while a loop runs."""

    def __init__(self, checkpoint: Checkpoint, step: int, began_anew: str | None) -> None:
        self._checkpoint = checkpoint
        self._began_anew = {"began_anew": began_anew} if began_anew else {}
        self._step = step
        self._saved_at = time.monotonic()
        self._pause_s = checkpoint.every_s

    def is_due(self) -> bool:
        return time.monotonic() - self._saved_at >= self._pause_s

    def save(self, step: int, tensors: Mapping[str, torch.Tensor | None], scheduler: Any, cache: object = None) -> None:
        """Put what there is after so many steps in the place of what was saved before: whole, and synced.

        A disk that takes it not, or a scheduler of one's own that remembers what no file can hold, costs the job
        nothing but what it would have saved; the log says so.
        """
        if self._checkpoint.file is None or step == self._step:
            return
        began = time.monotonic()
        self._step = step
        self._write(self._checkpoint.file, step, tensors, scheduler, cache)
        self._saved_at = time.monotonic()
        self._pause_s = pause_s(self._checkpoint.every_s, self._saved_at - began)

    def _write(
        self, file: Path, step: int, tensors: Mapping[str, torch.Tensor | None], scheduler: Any, cache: object
    ) -> None:
        held = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        remembered = {name: value for name, value in vars(scheduler).items() if name not in SCHEDULER_KEEPS}
        try:
            told = {
                "made_by": self._checkpoint.made_by,
                "step": str(step),
                "scheduler": json.dumps(
                    {name: packed.pack(value, f"scheduler.{name}", held) for name, value in remembered.items()}
                ),
                "cache": json.dumps(packed.pack(cache, "cache.of", held)),
                **self._began_anew,
                **_way(self._checkpoint),
            }
        except TypeError as error:
            log.warning("checkpoint.impossible", error=error)
            return
        try:
            durable.sweep(file.parent)  # gigabytes of an engine that was killed while it wrote
            self._refuse_to_fill_the_disk(file, packed.size_bytes(held))
            with durable.writing(file) as stream:
                packed.write(stream, held, told)
        except OSError as error:
            log.warning("checkpoint.unwritten", file=file, error=error)

    def _refuse_to_fill_the_disk(self, file: Path, needed_bytes: int) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(file.parent).free
        if free - needed_bytes < self._checkpoint.leave_bytes:
            says = f"{needed_bytes / GIB:.1f} GiB are needed and {free / GIB:.1f} free"
            raise OSError(errno.ENOSPC, f"{says}, of which {self._checkpoint.leave_bytes / GIB:g} stay", str(file))


def pause_s(every_s: float, took_s: float) -> float:
    """Return the seconds from one checkpoint to the next."""
    return min(max(every_s, took_s / SHARE_OF_TIME), SELDOM * every_s)


NOWHERE = Checkpoint(None)


def _way(checkpoint: Checkpoint) -> dict[str, str]:
    if checkpoint.plan is None:
        return {}
    plan = checkpoint.plan.model_dump_json(include=set(DECIDES_THE_BITS))
    return {"plan": plan, "versions": json.dumps(dict(checkpoint.versions))}


def begun(file: Path, versions: Mapping[str, str]) -> Begun | None:
    """Return the way that a job's checkpoint was made in; None where there is none, or nothing goes on with it.

    What is wrong with a file is found, and told, by `Checkpoint.load`.

    Args:
        versions: of what would compute the rest. A checkpoint of others is of no use, and binds no plan.
    """
    try:
        told = packed.peek(file)
        if json.loads(told["versions"]) != dict(versions):
            return None
        return Begun.model_validate({**json.loads(told["plan"]), "step": int(told["step"])})
    except (OSError, packed.Damaged, KeyError, ValueError):  # a ValidationError is a ValueError
        return None


def digest(spec: JobSpec, plan: Plan, weights: object, versions: Mapping[str, str]) -> str:
    """Return what decides a job's latents from any step on, as one word.

    What a VAE made of a given picture is in the checkpoint itself: a plan with other tiles goes on with it.

    Args:
        weights: what tells the model's files from others, as JSON can say it.
    """
    told = {
        **({"holds": "its cache, too"} if spec.cache else {}),  # what was saved before there was that is of no use
        "spec": spec.model_dump(mode="json"),
        "plan": plan.model_dump(mode="json", include=set(DECIDES_THE_BITS)),
        "weights": weights,
        "versions": dict(versions),
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
