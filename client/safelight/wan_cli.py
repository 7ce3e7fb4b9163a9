"""What Wan's own program (backend wan-cli: generate.py of Wan-Video/Wan2.2) can do of a job, and where it is. No torch.

Its options are those of @ 42bf4cf. What it would ignore or decide by itself is refused, like anywhere else.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safelight.config import Config
from safelight.errors import BadConfig, Fault, InvalidJob
from safelight.models import ModelFacts, Models

if TYPE_CHECKING:
    from safelight.jobspec import JobSpec  # which asks this module what the program refuses

OWN_NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指，"
    "画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
"""What it always takes (wan/configs/shared_config.py); no option changes it."""

OWN_SEQUENCE_LENGTH = 512

OFFERED: dict[str, tuple[str, ...]] = {
    "precision": ("auto", "bf16"),
    "offload": ("auto", "model"),
    "vae_tiling": ("auto", "off"),
    "text_encoder_precision": ("auto", "bf16"),
    "compile": ("auto", "off"),
    "low_cpu_mem_usage": ("auto", "off"),
}
"""What of these it has: it computes in bf16 (--convert_model_dtype), and moves whole models (--offload_model True)."""

TEXT_ENCODER = ("models_t5_umt5-xxl-enc-bf16.pth", "google/umt5-xxl")
CHECKPOINTS: dict[str, tuple[str, ...]] = {
    "ti2v-5B": (*TEXT_ENCODER, "Wan2.2_VAE.pth", "config.json"),
    "t2v-A14B": (*TEXT_ENCODER, "Wan2.1_VAE.pth", "high_noise_model", "low_noise_model"),
    "i2v-A14B": (*TEXT_ENCODER, "Wan2.1_VAE.pth", "high_noise_model", "low_noise_model"),
}
"""What lies in the folder of a task's checkpoints, besides shards of weights."""


def refusals(fields: Mapping[str, Any], facts: ModelFacts) -> Iterator[tuple[str, str, str]]:
    """Yield what the program would refuse, ignore or decide by itself of a job: the field, the problem, its remedy."""
    program = facts.wan_cli
    if program is None or facts.tiny:
        yield "backend", f"backend wan-cli does not run {facts.key}", "Leave backend out, or use one of Wan's models."
        return
    defaults = facts.defaults
    width, height = fields.get("width", defaults.width), fields.get("height", defaults.height)
    if (width, height) not in [(size.width, size.height) for size in program.sizes]:
        legal = ", ".join(f"{size.width}x{size.height}" for size in program.sizes)
        problem = f"{width}x{height} is not a size that Wan's own program makes of {facts.key}"
        yield "width" if "width" in fields else "height", problem, f"Use one of {legal}."
    if fields.get("negative_prompt", defaults.negative_prompt) != OWN_NEGATIVE_PROMPT:
        problem = "negative_prompt would be ignored by Wan's own program, which has its own"
        yield "negative_prompt", problem, "Leave it, or backend, out."
    if (fps := fields.get("fps", defaults.fps)) != program.fps:
        yield "fps", f"fps {fps} would be ignored by Wan's own program", f"Use {program.fps}, or leave backend out."
    if (length := fields.get("max_sequence_length", OWN_SEQUENCE_LENGTH)) != OWN_SEQUENCE_LENGTH:
        problem = f"max_sequence_length {length} would be ignored by Wan's own program"
        yield "max_sequence_length", problem, f"Use {OWN_SEQUENCE_LENGTH}."
    scale, scale_2 = (fields.get(name, getattr(defaults, name)) for name in ("guidance_scale", "guidance_scale_2"))
    if scale_2 not in (None, scale) and (scale, scale_2) != program.guidance:
        remedy = f"Write guidance_scale_2 {scale:g}, too, or leave both out."
        problem = f"guidance {scale:g} and {scale_2:g}: Wan's own program takes one for both experts"
        yield "guidance_scale", problem, remedy
    if fields.get("last_image") and facts.last_image:
        yield "last_image", "last_image would be ignored by Wan's own program", "Leave it, or backend, out."
    if fields.get("loras"):
        yield "loras", "LoRAs would be ignored by Wan's own program", "Leave them, or backend, out."
    if fields.get("cache") is not None:
        yield "cache", "cache would be ignored by Wan's own program", "Leave it, or backend, out."
    for name, offered in OFFERED.items():
        if (value := fields.get(name, "auto")) not in offered:
            yield name, f"{name} {value} is not offered by Wan's own program", f"Use {' or '.join(offered)}."


@dataclass(frozen=True)
class Installed:
    """Where the program is, and what it reads."""

    python: Path
    checkout: Path
    checkpoints: Path


def refuse_unconfigured(specs: Iterable[JobSpec], models: Models, config: Config) -> None:
    """Raise InvalidJob where the daemon of these settings has not been told where the program of such jobs is."""
    keys = dict.fromkeys(spec.model for spec in specs if spec.backend == "wan-cli")
    if faults := [fault for key in keys for fault in _unsaid(models[key], config)]:
        raise InvalidJob(list(dict.fromkeys(faults)))


def _unsaid(facts: ModelFacts, config: Config) -> Iterator[Fault]:
    """Yield what the settings do not say of the program and its checkpoints."""
    if not config.settings.wan_cli.checkout:
        remedy = 'Write checkout = "FOLDER" below [wan_cli], or leave backend out.'
        yield Fault("backend wan-cli", f"{config.source} does not say where Wan's own program is", remedy)
    if not facts.native:
        problem = f"{config.source} does not say where Wan's own checkpoints of {facts.key} are"
        remedy = f'Write native = "FOLDER" below [models.{facts.key}], or leave backend out.'
        yield Fault("backend wan-cli", problem, remedy)


def installed(facts: ModelFacts, config: Config) -> Installed:
    """Return where everything is that a job of this model needs.

    Raises:
        BadConfig: the settings do not say, or it is not there; everything that is wrong, a line each.
    """
    if unsaid := [*_unsaid(facts, config)]:
        raise BadConfig("\n".join(map(str, unsaid)))
    found = _named(facts, config)
    if lacks := [f"{problem}. {remedy}" for problem, remedy in missing(facts, config)]:
        raise BadConfig("\n".join(lacks))
    return found


def missing(facts: ModelFacts, config: Config) -> Iterator[tuple[str, str]]:
    """Yield what is not where the settings say, each with its remedy. They name the program, and checkpoints of it."""
    found, task = _named(facts, config), facts.wan_cli.task if facts.wan_cli else ""
    if not (found.checkout / "generate.py").is_file():
        yield f"{found.checkout} has no generate.py", "Set [wan_cli] checkout to a clone of Wan-Video/Wan2.2."
    if not (found.python.is_file() and os.access(found.python, os.X_OK)):
        remedy = "Set [wan_cli] python to that of the environment that has what Wan's own program needs."
        yield f"{found.python} is no Python", remedy
    if (found.checkpoints / "model_index.json").is_file():
        remedy = "Set native to the folder in the layout of Wan's own."
        yield f"{found.checkpoints} is in the layout of diffusers", remedy
    elif absent := [name for name in CHECKPOINTS.get(task, ()) if not (found.checkpoints / name).exists()]:
        yield f"{found.checkpoints} lacks {', '.join(absent)}", "Copy the checkpoints again, whole."


def _named(facts: ModelFacts, config: Config) -> Installed:
    return Installed(config.wan_python, config.wan_checkout, config.beside_settings(facts.native))
