"""What the tests of the model families share: a job in, the stock pipeline's answer beside ours."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from safelight import jobspec, models
from safelight.jobspec import JobSpec
from safelight.lora import Lora
from safelight.models import ModelFacts
from safelight.plan import Plan
from safelightd import pipelines
from safelightd.checkpoint import NOWHERE, Checkpoint
from safelightd.fused import Results
from safelightd.loading import Loader
from safelightd.modelfolder import controlnet_folder, model_folder
from safelightd.pinnedset import PinnedSet
from safelightd.pipelines import Frame, flux_vae, wan
from safelightd.progress import Watch

torch.set_num_threads(1)  # the tiny models have no work for two, and waiting for the second takes longer

MODELS = models.load()

COMPONENTS = (
    "AutoencoderKL",
    "AutoencoderKLWan",
    "CLIPTextModel",
    "FluxControlNetModel",
    "FluxTransformer2DModel",
    "T5EncoderModel",
    "UMT5EncoderModel",
    "WanTransformer3DModel",
)


HALF = {"dtype": "float16", "precision": "fp16", "vae_dtype": "float32"}
"""The plan of a GPU without bfloat16."""

PLACEMENTS: dict[str, dict[str, Any]] = {
    "resident": {},
    "quantised": {"dtype": "bfloat16", "precision": "nf4"},
    "streamed from the file": {
        "dtype": "bfloat16", "offload": "partial", "streamed": {"transformer": (0, 1)}, "streamed_from": "file",
    },
    "streamed from RAM": {
        "dtype": "bfloat16", "offload": "partial", "streamed": {"transformer": (1,)}, "streamed_from": "pinned",
    },
    "leaf": {"dtype": "bfloat16", "offload": "leaf"},
    "sequential": {"dtype": "bfloat16", "offload": "sequential"},
}  # fmt: skip
"""Plans that hold and move a tiny transformer in every way that reads its file differently."""


class NoMeter:
    """Reads nothing: these tests look at results, not at peaks."""

    def reset(self) -> None: ...

    def settle(self) -> None: ...

    def peaks(self) -> tuple[int, int]:
        return 0, 0


class StopAt(threading.Event):
    """Somebody cancels just before the `at`-th time a job asks; 0 means nobody does. Counts the questions."""

    def __init__(self, at: int = 0) -> None:
        super().__init__()
        self.at = at
        self.asked = 0

    def is_set(self) -> bool:
        self.asked += 1
        return self.asked == self.at


@dataclass
class Run:
    """One job on its way through the three phases."""

    spec: JobSpec
    models_folder: Path
    plan_changes: dict[str, Any] = field(default_factory=dict)
    component_paths: dict[str, str] = field(default_factory=dict)
    image: Image.Image | None = None
    last_image: Image.Image | None = None
    stop: StopAt = field(default_factory=StopAt)
    sent: list[dict[str, Any]] = field(default_factory=list)
    checkpoint: Checkpoint = NOWHERE
    loras: Sequence[tuple[Lora, Path]] = ()
    pinned: PinnedSet | None = None
    control_image: Image.Image | None = None
    controlnet: Path | None = None
    """The folder of the ControlNet, where it is not the table's."""
    fused: Results | None = None

    def __post_init__(self) -> None:
        facts = MODELS[self.spec.model]
        self.family = pipelines.family(facts.family)
        self.plan = plan_for(self.spec.model, **self.plan_changes)
        self.loader = Loader(
            model_folder(facts, self.models_folder),
            self.plan,
            self.component_paths,
            blocks=facts.blocks,
            models_folder=self.models_folder,
            pinned=self.pinned,
            loras=self.loras,
            fused=self.fused,
            controlnet=self._controlnet(facts),
        )
        self.watch = Watch(self.sent.append, self.stop, NoMeter())

    def _controlnet(self, facts: ModelFacts) -> Path | None:
        if self.spec.controlnet is None or self.controlnet is not None:
            return self.controlnet
        return controlnet_folder(facts, self.spec.controlnet.model, self.models_folder)

    def encode(self) -> Any:
        with self.watch.phase("encode"):
            return self.family.encode(self.spec, self.plan, self.loader, self.watch, self.image)

    def denoise(self, embeddings: Any) -> torch.Tensor:
        with self.watch.phase("denoise"):
            return self.family.denoise(
                self.spec,
                self.plan,
                self.loader,
                embeddings,
                self.watch,
                self.image,
                self.last_image,
                self.checkpoint,
                self.control_image,
            )

    def decode(self, latents: torch.Tensor) -> list[Frame]:
        with self.watch.phase("decode"):
            return list(self.family.decode(self.spec, self.plan, self.loader, latents, self.watch))

    def latents(self) -> torch.Tensor:
        return self.denoise(self.encode())

    def frames(self) -> list[Frame]:
        return self.decode(self.latents())

    def steps(self, phase: str) -> list[tuple[int, int]]:
        return [(told["i"], told["n"]) for told in self.sent if told["type"] == "step" and told["phase"] == phase]


def parameters_of(model: str, folder: Path) -> dict[str, int]:
    """Return how many parameters each component has that the table of facts names."""
    loader = Loader(folder, plan_for(model))
    built = {}
    for name in MODELS[model].components:
        with loader.component(name, "cpu") as module:
            built[name] = sum(parameter.numel() for parameter in module.parameters())
    return built


def plan_for(model: str, **changes: Any) -> Plan:
    """The plan of a machine without a GPU."""
    return Plan(
        model=model,
        **{
            "device": "cpu",
            "dtype": "float32",
            "precision": "fp32",
            "offload": "none",
            "vae_tiling": False,
            "text_encoder_device": "cpu",
            **changes,
        },
    )


def spec_for(model: str, **fields: Any) -> JobSpec:
    written = {"model": model, "prompt": "a red fox", "seed": 7, **fields}
    spec = jobspec.check(written, MODELS, "test", image_model="tiny-flux-schnell", video_model="tiny-wan-ti2v")
    assert isinstance(spec, JobSpec), spec
    return spec


def picture(width: int = 80, height: int = 60) -> Image.Image:
    return Image.effect_mandelbrot((width, height), (-2, -1, 1, 1), 50).convert("RGB")


def stock_pipeline(run: Run) -> Any:
    """Return diffusers' own pipeline of the run's model, as its authors' page says to set it up."""
    import diffusers

    facts = MODELS[run.spec.model]
    from_picture = {"flux": "FluxImg2ImgPipeline", "wan": "WanImageToVideoPipeline"}
    name = from_picture[facts.family] if run.image else facts.pipeline
    more = {}
    if run.control_image is not None:
        name = "FluxControlNetImg2ImgPipeline" if run.image else "FluxControlNetPipeline"
        more["controlnet"] = diffusers.FluxControlNetModel.from_pretrained(str(run._controlnet(facts)))
    folder = model_folder(facts, run.models_folder)
    pipe = getattr(diffusers, name).from_pretrained(folder, local_files_only=True, **more)
    if run.spec.flow_shift is not None:
        scheduler = pipe.scheduler
        pipe.scheduler = type(scheduler).from_config(scheduler.config, flow_shift=run.spec.flow_shift)
    pipe.set_progress_bar_config(disable=True)
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            _align(component)
    return pipe


def _align(module: torch.nn.Module) -> None:
    """Put each tensor where torch's own allocations begin: in a mapped file they lie anywhere, and BLAS rounds so."""
    for parameter in module.parameters():
        parameter.data = parameter.data.clone()


def stock(run: Run, pipe: Any, output_type: str) -> Any:
    """Return what `pipe` makes of the run's job."""
    names = ("prompt", "prompt_2", "negative_prompt", "width", "height", "num_inference_steps", "num_frames")
    scales = ("guidance_scale", "guidance_scale_2", "true_cfg_scale", "max_sequence_length", "strength")
    wanted = {name: value for name in names + scales if (value := getattr(run.spec, name)) is not None}
    if run.image is not None:
        wanted["image"] = run.image
    if run.last_image is not None:
        wanted["last_image"] = run.last_image
    if run.spec.controlnet is not None:
        wanted["control_image"] = run.control_image
        wanted["controlnet_conditioning_scale"] = run.spec.controlnet.scale
        wanted["control_guidance_start"] = run.spec.controlnet.start
        wanted["control_guidance_end"] = run.spec.controlnet.end
    generator = torch.Generator().manual_seed(run.spec.seed)
    return pipe(**wanted, generator=generator, output_type=output_type)[0]


def stock_answer(run: Run, *, tiled: bool = False) -> tuple[torch.Tensor, list[Frame]]:
    """Return the stock pipeline's latents and frames for the run's job."""
    pipe = stock_pipeline(run)
    if tiled:
        (wan.tile if run.spec.kind == "video" else flux_vae.in_tiles)(pipe.vae, run.plan.vae_tile_pixels)
    latents = stock(run, pipe, "latent")
    pictures = stock(run, pipe, "pil")
    if run.spec.kind == "video":
        pictures = pictures[0]
    return latents, [np.asarray(picture) for picture in pictures]


def alive() -> list[str]:
    """Return the class names of all components that are in memory, after a collection."""
    gc.collect()
    return sorted(name for name in map(_class_name, gc.get_objects()) if name in COMPONENTS)


def _class_name(value: object) -> str:
    return type(value).__name__


def moments_to_stop(asked: int) -> Iterator[int]:
    """Yield the second, a middle and the last question of a phase that asks `asked` times; the first is its start."""
    yield from sorted({2, asked // 2, asked})
