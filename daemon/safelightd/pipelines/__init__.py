"""What every family of models does alike: its three phases, its noise, its way to stop and to pixels.

A family is a module with `encode`, `denoise` and `decode`. Each loads what it needs, and gives it back before it
returns: the device never holds two phases at once.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from numpy.typing import NDArray
from PIL.Image import Image
from torch import nn

from safelight.errors import SafelightError
from safelight.jobspec import JobSpec
from safelight.plan import Plan
from safelightd.checkpoint import NOWHERE, Checkpoint
from safelightd.loading import Loader
from safelightd.preview import Values
from safelightd.progress import Watch

NOTHING_KNOWN: Mapping[str, torch.Tensor] = MappingProxyType({})

Frame = NDArray[np.uint8]
"""One picture: (height, width, 3), red green blue, 0 to 255."""


class BrokenResult(SafelightError):
    """The model computed numbers that are no picture: NaN or infinity."""


class Family(Protocol):
    """What a module of this package offers. All tensors between the phases are on the CPU."""

    def is_guided(self, spec: JobSpec) -> bool:
        """Whether each step runs twice, led away from the negative prompt."""
        ...

    def encode(
        self,
        spec: JobSpec,
        plan: Plan,
        loader: Loader,
        watch: Watch,
        image: Image | None = None,
        known: Mapping[str, torch.Tensor] = NOTHING_KNOWN,
    ) -> Any:
        """Return what the text encoders make of the prompts: the family's own Embeddings.

        `known` are fields of them from an earlier job; where all are, nothing is loaded.
        """
        ...

    def denoise(
        self,
        spec: JobSpec,
        plan: Plan,
        loader: Loader,
        embeddings: Any,
        watch: Watch,
        image: Image | None = None,
        last_image: Image | None = None,
        checkpoint: Checkpoint = NOWHERE,
        control_image: Image | None = None,
    ) -> torch.Tensor:
        """Return latents without noise, `watch.step` told after each step; what takes long is kept in `checkpoint`."""
        ...

    def first_frame(self, spec: JobSpec, latents: torch.Tensor) -> torch.Tensor:
        """Return of the family's latents those of the picture or first frame, (channels, height, width)."""
        ...

    def encoded_pictures(self, pictures: Sequence[Frame], plan: Plan, loader: Loader, watch: Watch) -> list[Values]:
        """Return what the VAE makes of small pictures, as `first_frame` has it."""
        ...

    def decode(self, spec: JobSpec, plan: Plan, loader: Loader, latents: torch.Tensor, watch: Watch) -> Iterator[Frame]:
        """Yield the frames in order, one for an image; the VAE is gone when the iterator ends or is closed.

        Raises:
            BrokenResult: there are NaN or infinities, before the frame that holds them is yielded.
        """
        ...


@cache
def family(name: str) -> Family:
    """Return the module that runs the models of a family; `ModelFacts.family` names it.

    The first call takes seconds: it imports diffusers and transformers. What they leave behind, half a million
    objects, is then set aside for good: a collection, and there is one after each component, took 0.3 s with them and
    6 ms without (2 cores, torch 2.13, 2026-11-22).
    """
    module = _import_family(name)
    gc.collect()
    gc.freeze()
    return module


def _import_family(name: str) -> Family:
    match name:
        case "flux":
            from safelightd.pipelines import flux

            return flux
        case "wan":
            from safelightd.pipelines import wan

            return wan
    raise SafelightError(f"{name}: no such family of models. Known: flux, wan.")


def dtype_of(plan: Plan) -> torch.dtype:
    """Return what a plan computes in. A module's own `dtype` may be that of its quantised weights, or of those kept in
    float32."""
    dtype = getattr(torch, plan.dtype)
    assert isinstance(dtype, torch.dtype)
    return dtype


def values(latents: torch.Tensor) -> Values:
    """Return latents as a preview takes them."""
    array: Values = latents.float().cpu().numpy()
    return array


def noise_source(spec: JobSpec) -> torch.Generator:
    """Return the one stream of random numbers of a job: on the CPU, so that every device draws the same."""
    return torch.Generator("cpu").manual_seed(spec.seed)


def refuse_other_images(spec: JobSpec, **given: Image | None) -> None:
    """Raise where `image` or `last_image` at hand is not what the spec names: the result would be of another job."""
    for name, picture in given.items():
        wanted = getattr(spec, name)
        if (wanted is None) != (picture is None):
            found = "none was loaded" if picture is None else "one was loaded"
            raise SafelightError(f"{spec.id or spec.model}: the job names {name} {wanted}, and {found}.")


def stop_between_blocks(module: nn.Module, watch: Watch) -> None:
    """Make a transformer or text encoder ask before each of its repeated blocks whether to stop: a step may take a
    minute.

    Before each of the outermost ones: what lies inside of a block may be compiled, and no graph can ask. The hooks
    change no number, and die with the module.
    """
    for part in module.children():
        if isinstance(part, nn.ModuleList):
            _ask_before(part, watch)
        else:
            stop_between_blocks(part, watch)


def stop_inside(vae: nn.Module, watch: Watch) -> None:
    """Make a VAE ask before each of its layers: it has four blocks, one of which may take most of a minute."""
    for part in vae.modules():
        if isinstance(part, nn.ModuleList):
            _ask_before(part, watch)


def _ask_before(parts: nn.ModuleList, watch: Watch) -> None:
    def ask(_module: nn.Module, _arguments: Any) -> None:
        watch.check()

    for part in parts:
        part.register_forward_pre_hook(ask)


def refuse_broken(numbers: torch.Tensor, what: str) -> None:
    """Raise BrokenResult where `numbers` hold NaN or infinity."""
    if not bool(torch.isfinite(numbers).all()):
        raise BrokenResult(f"{what} hold NaN or infinity. Another precision may help; the weights may be damaged.")


def pixels_of(frame: Frame, vae: Any) -> torch.Tensor:
    """Return a frame as a VAE takes it: (1, 3, H, W), -1 to 1, where the VAE is."""
    pixels = torch.from_numpy(frame.copy()).permute(2, 0, 1)[None].float()
    return (pixels / 127.5 - 1).to(vae.device, vae.dtype)


def frames_of(pictures: torch.Tensor) -> Iterator[Frame]:
    """Yield decoded pictures (N, 3, H, W), -1 to 1, as frames.

    In float32: between 0.5 and 1, bfloat16 has a step of one grey level. They become bytes where they are: a core
    took 0.29 s for four frames of 1280x704 (2026-11-26), and the GPU waited for it.

    Raises:
        BrokenResult: there are NaN or infinities in any of them.
    """
    refuse_broken(pictures, "The decoded pixels")
    scaled = VaeImageProcessor.denormalize(pictures.float()) * 255
    yield from scaled.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()
