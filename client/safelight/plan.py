"""What is decided: how one job runs on one machine. The values alone; `safelight.planner` makes them."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Precision = Literal[
    "fp32", "bf16", "fp16", "fp8-dynamic", "fp8-weight-only", "fp8-quanto", "int8-dynamic", "int8-weight-only",
    "int8-bnb", "nf4",
]  # fmt: skip
"""How the Linear weights of a component's repeated blocks are held. dynamic and weight-only are torchao's (dynamic
multiplies in 8 bit, too), quanto is optimum-quanto's qfloat8, int8-bnb and nf4 are bitsandbytes'."""

Dtype = Literal["bfloat16", "float16", "float32"]
Placement = Literal["none", "model", "partial", "block", "leaf", "sequential"]
Attention = Literal["native", "_native_cudnn", "_native_flash", "_native_efficient", "flash", "_flash_3", "sage"]
"""As diffusers names them (attention_dispatch.py, 0.42): torch's own choice, three that it chooses among, and
kernels of packages of their own. sage is the only one that rounds to 8 bit."""
PhaseName = Literal["encode", "denoise", "decode"]


class Shipped(BaseModel):
    """The seconds of a phase by the shipped figures alone, in its parts."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    load_seconds: float
    """Until everything is in place, and until it has been given back."""
    pin_seconds: float = 0.0
    """What pinning takes besides."""
    compile_seconds: float = 0.0
    compute_seconds: float = 0.0
    """All steps, or the decode."""
    copy_seconds: float = 0.0
    """What passes meanwhile."""


def plain_precision(dtype: Dtype) -> Precision:
    """Return the precision whose weights are held in as many bits as a GPU computes with."""
    return "fp16" if dtype == "float16" else "bf16"


class PhasePrediction(BaseModel):
    """What one phase is expected to take at its peak, and for how long."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    device_bytes: int
    """Of the device, above what it held before the engine started: context and libraries included."""
    host_bytes: int
    """Anonymous and pinned memory of the engine. Mapped files are not in it: the kernel may drop them."""
    seconds: float | None = None
    """Loading and compiling included; None in plans of before it was predicted by phase."""
    once_seconds: float = 0.0
    """Of them, what later jobs of this shape will not take again: compiling, and pinning."""
    shipped: Shipped | None = None
    """What this machine's calibration has corrected, and learns from; None in older plans."""


class Overrun(BaseModel):
    """A plan that ran out of memory all the same."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    phase: PhaseName
    memory: Literal["device", "host"]
    rung: str
    """The plan in words, as `Plan.rung` says it."""
    predicted_bytes: int
    """What that plan expected to take of this memory in this phase."""
    reached_bytes: int = 0
    """What it held, and had asked for, when it was refused; 0 where the process died before it could say."""


class Plan(BaseModel):
    """How a job runs. With its spec it determines the bytes that come out."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    v: Literal[1] = 1
    model: str
    backend: Literal["diffusers", "wan-cli"] = "diffusers"
    device: Literal["cuda", "cpu"]
    dtype: Dtype
    """Of the computation, and of the weights that are not quantised."""
    precision: Precision
    """Of the transformers."""
    compiled: bool = False
    """The transformer's repeated blocks run compiled."""
    offload: Placement
    """Where the transformer is while it denoises. none: on the CPU. model: wholly on the GPU, for its own phase.
    partial: the blocks of `streamed` pass through a staging ring. block, leaf: diffusers' group offload with streams.
    sequential: accelerate's."""
    low_cpu_mem_usage: bool = False
    """For leaf: pin each group on its way and not all of them before."""
    streamed: dict[str, tuple[int, ...]] = Field(default_factory=dict)
    """By component, the places of those repeated blocks, counted in the order they run in, that are not on the GPU
    all the time."""
    streamed_from: Literal["pinned", "file"] = "pinned"
    """Where the transformer's come from: a pinned copy in RAM, or the file at every step. A text encoder's, which run
    once, always come from the file."""
    pinned_before: bool = False
    """The pinned copy is there already, from the job before."""
    cache: str | None = None
    """The kind of cache that answers some forwards; its arguments are the spec's."""
    attention: Attention = "native"
    """What the transformer's attention runs on."""
    embeddings_known: bool = False
    """The prompts were encoded by an earlier job, in the way this plan says; the text encoders are not loaded."""
    text_encoder_device: Literal["cuda", "cpu"]
    text_encoder_precision: Precision | None = None
    """Of the large text encoder; None: as `dtype` says."""
    prepared: tuple[str, ...] = ()
    """Components that are loaded from the folder `safelight models prepare` made in their precision; any other is
    quantised on its way to the GPU."""
    loras: int = 0
    """So many are in the transformers' weights; a prepared folder in fewer bits is not used then."""
    fused: tuple[str, ...] = ()
    """Components that are loaded from what an earlier job has kept: the LoRAs are in them, in this precision. To others
    LoRAs are added on their way."""
    keeping: bool = False
    """What this job makes of its LoRAs in this precision is kept on disk for those after it."""
    controlnet: str = ""
    """The ControlNet that is on the device beside the transformer, whole and in `dtype`."""
    vae_dtype: Dtype | None = None
    """None: as `dtype` says."""
    vae_tiling: bool
    vae_tile_pixels: int = 512
    """Side of a tile, where there are tiles."""
    vae_strip_rows: int = 0
    """Above 0 a picture or clip goes through the VAE strip by strip, from edge to edge and so many of its rows high: no
    tiles, and the numbers of the whole within rounding. Of Wan it is decoded so, and encoded whole."""
    predicted: dict[str, PhasePrediction] = Field(default_factory=dict)
    seconds: float | None = None
    """Expected run time; None in plans that could not tell."""
    seconds_per_step: float | None = None
    warnings: tuple[str, ...] = ()
    """What a person should know before hundreds of these run."""
    passed_over: tuple[str, ...] = ()
    """Faster rungs that were not taken, each with its reason."""

    def seconds_of(self, jobs: int) -> float | None:
        """Return what so many jobs of this shape take, one after the other: what is done once is counted once."""
        if self.seconds is None:
            return None
        once = sum(phase.once_seconds for phase in self.predicted.values())
        return jobs * self.seconds - (jobs - 1) * once

    def longest_silence_s(self, phase: str) -> float:
        """Return the seconds that a phase is expected to take from one sign of progress to the next: a step of
        denoising, or the whole of another phase; 0 where nothing is expected."""
        if phase == "denoise":
            return self.seconds_per_step or 0.0
        expected = self.predicted.get(phase)
        return (expected.seconds if expected else None) or 0.0

    @property
    def is_quantised(self) -> bool:
        """Whether the transformers are held in fewer bits than they are computed in."""
        return self.precision not in ("fp32", "bf16", "fp16")

    @property
    def rung(self) -> str:
        """The plan in a few words: what a receipt and a log line name it by."""
        words = ["Wan's own program"] if self.backend == "wan-cli" else []
        words += [self.precision + (" compiled" if self.compiled else ""), f"offload {self.offload}"]
        words += [
            f"{len(blocks)} blocks of {name} streamed"
            + (f" from {self.streamed_from}" if name.startswith("transformer") else "")
            for name, blocks in sorted(self.streamed.items())
        ]
        if self.loras:
            how = "fused before" if self.fused else "fused and kept" if self.keeping else "fused"
            words.append(f"{self.loras} LoRA{'s' if self.loras > 1 else ''} {how}")
        if self.controlnet:
            words.append(f"ControlNet {self.controlnet}")
        if self.cache:
            words.append(f"cache {self.cache}")
        if self.attention != "native":
            words.append(f"attention {self.attention}")
        if self.text_encoder_precision:
            words.append(f"text encoder {self.text_encoder_precision}")
        if self.text_encoder_device != self.device:
            words.append(f"text encoders on the {self.text_encoder_device}")
        if self.vae_tiling:
            words.append(f"VAE in tiles of {self.vae_tile_pixels}")
        if self.vae_strip_rows:
            words.append(f"VAE in strips of {self.vae_strip_rows}")
        return ", ".join(words)
