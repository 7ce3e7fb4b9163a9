"""Which kernels a transformer's attention runs on: asked of the card once for each kind of shape, and remembered.

    state/attention.json         what was measured and chosen, by card, torch and shape

All that are chosen among compute the same within the rounding of 16 bits, in another order of sums: so the choice
changes bits. It is in the plan, and what was chosen once stays chosen until card, driver's torch or shape are others.
"""

from __future__ import annotations

import functools
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import nn

from safelight import durable, footprint, models, prepared
from safelight.config import Config
from safelight.errors import SafelightError
from safelight.jobspec import JobSpec
from safelight.models import ModelFacts
from safelight.plan import Attention, Plan
from safelightd.logs import Log

NATIVE: Attention = "native"

SAME_RESULT: tuple[Attention, ...] = (NATIVE, "_native_cudnn", "_native_flash", "flash", "_flash_3")
"""What `auto` chooses among. sage is not: it multiplies in 8 bit."""

PACKAGES: Mapping[Attention, str] = {"flash": "flash_attn", "_flash_3": "flash_attn_interface", "sage": "sageattention"}
"""What must be installed; the others are torch's own."""

ROUNDING = 1e-2
"""How far the result may be from torch's own choice, relative: 16-bit rounding of it is 2e-3 to 4e-3."""

FASTER = 0.97
"""What another must take of the time of torch's own choice to be worth other bits than everybody's."""

PROBED_TOKENS_MAX = 16_384
"""More tokens change no order among kernels, and 75,600 of 40 heads would not fit a small card beside themselves."""

TURNS = 4

log = Log("safelight.attention")


@dataclass(frozen=True)
class Shape:
    """What a step's self-attention computes on."""

    tokens: int
    heads: int
    head_dim: int
    dtype: str

    @property
    def name(self) -> str:
        """What shapes share that are answered by one probe: tokens to the next half power of two."""
        tokens = round(2 ** (round(2 * math.log2(min(self.tokens, PROBED_TOKENS_MAX))) / 2))
        return f"{tokens} tokens, {self.heads} heads of {self.head_dim}, {self.dtype}"


class Probed(BaseModel):
    """What a probe showed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    chosen: Attention
    milliseconds: dict[str, float] = Field(default_factory=dict)
    """Of one call; the least of several."""
    apart: dict[str, float] = Field(default_factory=dict)
    """How far from torch's own choice, relative."""
    unusable: dict[str, str] = Field(default_factory=dict)
    """Why others could not be asked."""


UNFINISHED = Probed(chosen=NATIVE, unusable={"all": "the process ended while they were tried"})


class Known(BaseModel):
    """The file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    v: int = 1
    probed: dict[str, Probed] = Field(default_factory=dict)


def planned(plan: Plan, spec: JobSpec, facts: ModelFacts, config: Config, gpu: str) -> Plan:
    """Return the plan with the kernels that its transformer's attention runs on.

    Args:
        gpu: the card's name.

    Raises:
        SafelightError: the settings insist on what this machine has not.
    """
    wanted = config.settings.worker.attention
    if wanted != "auto":
        if reason := unusable(wanted, plan.device):
            raise SafelightError(f'{config.source}: [worker] attention = "{wanted}": {reason}. Set it to "auto".')
        return plan.model_copy(update={"attention": wanted})
    if plan.device == "cpu":
        return plan
    models_folder = config.paths.models
    published = prepared.component_folder(facts, models_folder, "transformer")
    if published.is_file():  # a single file's config.json is in the model's own folder
        published = models.folder(facts, models_folder) / "transformer"
    made = prepared.folder(models_folder, plan.model, plan.precision, "transformer")
    told = json.loads(((made if "transformer" in plan.prepared else published) / "config.json").read_bytes())
    tokens = footprint.tokens(facts, spec.width, spec.height, spec.num_frames, spec.max_sequence_length)
    shape = Shape(tokens, told["num_attention_heads"], told["attention_head_dim"], plan.dtype)
    where = f"{gpu}, torch {torch.__version__}"
    try:
        found = remembered(shape, where, config.paths.state, functools.partial(probe, shape, plan.device))
    except torch.OutOfMemoryError as error:
        log.warning("attention.no_room", shape=shape.name, error=error, remedy="the next such job asks again")
        return plan
    return plan.model_copy(update={"attention": found.chosen})


def unusable(name: str, device: str) -> str | None:
    """Return why these kernels cannot be used, None where they can."""
    if device == "cpu" and name != NATIVE:
        return "it is for CUDA, and the device is the CPU"
    package = {str(known): package for known, package in PACKAGES.items()}.get(name)
    return f"{package} is not installed" if package and find_spec(package) is None else None


def remembered(shape: Shape, where: str, state: Path, ask: Callable[[], Probed]) -> Probed:
    """Return what was chosen for such a shape on such a card before; else what `ask` says, and remember it.

    Without the file everything is asked again.

    Args:
        where: card and version of torch.
    """
    file = state / "attention.json"
    name = f"{where}: {shape.name}"
    if found := _load(file).probed.get(name):
        return found
    # Kernels that end the process, or break CUDA for it, are asked once: its successor finds torch's own chosen.
    _save(file, name, UNFINISHED)
    try:
        found = ask()
    except torch.OutOfMemoryError:
        _save(file, name, None)
        raise
    _save(file, name, found)
    log.info("attention.probed", shape=shape.name, chosen=found.chosen)
    return found


def _save(file: Path, name: str, found: Probed | None) -> None:
    """Change what is known under one name; the rest is read again, since another GPU's engine writes there, too."""
    others = {other: probed for other, probed in _load(file).probed.items() if other != name}
    known = Known(probed=others | ({name: found} if found else {}))
    durable.write(file, known.model_dump_json(indent=1).encode())


def _load(file: Path) -> Known:
    try:
        return Known.model_validate_json(file.read_bytes())
    except FileNotFoundError:
        return Known()
    except ValidationError as error:
        log.warning("attention.damaged", file=file, error=error)  # it is asked again
        return Known()


@torch.no_grad()
def probe(shape: Shape, device: str, candidates: Sequence[Attention] = SAME_RESULT) -> Probed:
    """Run one self-attention of this shape on each of the candidates that are there, and choose.

    Raises:
        torch.OutOfMemoryError: others hold the memory that it takes, 2 GiB at most.
    """
    tokens = min(shape.tokens, PROBED_TOKENS_MAX)
    size = (1, tokens, shape.heads, shape.head_dim)
    drawn = torch.Generator(device).manual_seed(1)
    made = [torch.randn(size, generator=drawn, device=device, dtype=getattr(torch, shape.dtype)) for _ in range(3)]
    milliseconds: dict[str, float] = {}
    apart: dict[str, float] = {}
    missing: dict[str, str] = {}
    exact: torch.Tensor | None = None
    for name in candidates:
        if reason := unusable(name, "cuda"):
            missing[name] = reason
            continue
        try:
            found, seconds = _timed(made, name)
        except torch.OutOfMemoryError:
            raise  # it says nothing of the kernels
        except (RuntimeError, ValueError) as error:  # this card or shape is not for these kernels
            missing[name] = str(error)[:200]
            continue
        exact = found if exact is None else exact
        apart[name] = round(float((found.float() - exact.float()).norm() / exact.float().norm()), 6)
        milliseconds[name] = round(1000 * seconds, 4)
    del made, exact
    if device == "cuda":
        torch.cuda.empty_cache()
    return Probed(chosen=fastest(milliseconds, apart), milliseconds=milliseconds, apart=apart, unusable=missing)


def _timed(made: Sequence[torch.Tensor], name: Attention) -> tuple[torch.Tensor, float]:
    """Return the result, and the least seconds of several calls after one that may have prepared something."""
    took = []
    for _ in range(TURNS):
        _settle(made[0])
        began = time.perf_counter()
        found = dispatch_attention_fn(*made, backend=AttentionBackendName(name))
        _settle(made[0])
        took.append(time.perf_counter() - began)
    return found, min(took[1:])


def _settle(tensor: torch.Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


def fastest(milliseconds: Mapping[str, float], apart: Mapping[str, float]) -> Attention:
    """Return the fastest of those whose result is the same within rounding; torch's own where it is nearly as fast."""
    same = {name: took for name, took in milliseconds.items() if apart[name] <= ROUNDING}
    best = min(same, key=same.__getitem__, default=NATIVE)
    if NATIVE in same and same[best] > FASTER * same[NATIVE]:
        best = NATIVE
    return next(name for name in SAME_RESULT if name == best)


def use(transformer: nn.Module, name: Attention) -> None:
    """Make a transformer's attention run on these kernels.

    Not by its own `set_attention_backend`: that makes them every later model's, too (modeling_utils.py, diffusers
    0.42).
    """
    if name == NATIVE:
        return
    for module in transformer.modules():
        processor = getattr(module, "processor", None)
        if hasattr(processor, "_attention_backend"):
            setattr(processor, "_attention_backend", AttentionBackendName(name))  # noqa: B010 - mypy knows no processor
