"""What is asked for: one frozen, versioned value a job, and the rules that make one from what a person wrote.

Names are diffusers' own. Every default is filled in here, at submission, so that a later change of the model table
does not alter a job that waits. Nothing is corrected: what a model would ignore or refuse is a fault that names the
value and the nearest legal one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

from safelight import caches, controlnet, lora, sizes, wan_cli
from safelight.caches import Cache
from safelight.controlnet import ControlNet
from safelight.errors import Fault
from safelight.faults import NOWHERE, Faults, Places, near, shown
from safelight.jobrules import (
    STRENGTH,
    check_controlnet,
    check_frames,
    check_images,
    check_loras,
    check_size,
    check_steps_and_guidance,
    guides,
    within,
)
from safelight.lora import Lora
from safelight.models import ModelFacts, Models
from safelight.sizes import Size

PRIORITIES = ("high", "normal", "low", "night")
SEED_MAX = 2**32 - 1
PROMPT_CHARACTERS_MAX = 20_000
UNKNOWN_WORDS_SHOWN = 8

Kind = Literal["image", "video"]
Priority = Literal["high", "normal", "low", "night"]
Precision = Literal[
    "auto", "bf16", "fp16", "fp8", "fp8-dynamic", "fp8-weight-only", "fp8-quanto", "int8", "int8-dynamic",
    "int8-weight-only", "int8-bnb", "nf4",
]  # fmt: skip
"""fp8 and int8 leave it to the planner which of their kinds."""
Offload = Literal["auto", "none", "model", "partial", "block", "leaf", "sequential"]
OutputFormat = Literal["png", "jpg", "webp", "mp4", "gif"]
"""png of a video is a folder of numbered pictures."""
Interpolate = Literal[2, 4]
Backend = Literal["diffusers", "wan-cli"]


class JobSpec(BaseModel):
    """One picture or one clip, asked for completely: the same spec and the same Plan give the same bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    v: Literal[1] = 1
    id: str = ""
    """`<submission>-<index>`; unique for ever; only [A-Za-z0-9-]."""
    batch: str
    """The folder of its outputs, and what `--batch` selects."""
    index: int = Field(default=1, ge=1)
    """Place in its submission, from 1."""
    submitted_at: str = ""
    """ISO 8601 with zone."""

    kind: Kind
    model: str
    backend: Backend = "diffusers"
    prompt: str
    template: str | None = None
    """What was written, where wildcards made `prompt` of it."""
    prompt_2: str | None = None
    negative_prompt: str | None = None
    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float | None = None
    guidance_scale_2: float | None = None
    true_cfg_scale: float | None = None
    max_sequence_length: int
    num_frames: int | None = None
    fps: int | None = None
    """Frames a second that the model makes; `clip_fps` is the file's."""
    interpolate: Interpolate | None = None
    """So many times the frames a second: what lies between the model's frames is made by ffmpeg."""
    flow_shift: float | None = None
    image: str | None = None
    """sha256 of an input image in state/inputs."""
    last_image: str | None = None
    strength: float | None = None
    """Of a picture that starts from `image`: the share of the steps that are run, and of the noise that covers it."""
    loras: tuple[Lora, ...] = Field(default=(), strict=False)
    """What is added to the model's weights, all of them together."""
    controlnet: ControlNet | None = None
    """What leads the picture beside the prompt."""
    seed: int

    precision: Precision = "auto"
    offload: Offload = "auto"
    vae_tiling: Literal["auto", "on", "off", "strips"] = "auto"
    text_encoder_device: Literal["auto", "gpu", "cpu"] = "auto"
    text_encoder_precision: Precision = "auto"
    """Of the large text encoder."""
    compile: Literal["auto", "on", "off"] = "auto"
    low_cpu_mem_usage: Literal["auto", "on", "off"] = "auto"
    """Of offload leaf."""
    cache: Cache | None = Field(default=None, strict=False)
    """What some forwards are answered from: faster, and another result."""
    output_format: OutputFormat
    priority: Priority = "normal"
    not_before: str | None = None
    """ISO 8601 with zone."""
    tags: tuple[str, ...] = Field(default=(), strict=False)
    axes: dict[str, str | int | float] = Field(default_factory=dict)
    """This job's values of a sweep or matrix."""

    @property
    def encodes_picture(self) -> bool:
        """Whether the VAE reads a picture before a picture is denoised."""
        return self.kind == "image" and (self.image is not None or self.controlnet is not None)

    @property
    def steps_run(self) -> int:
        """Steps that are left when those are skipped that `strength` spares (FluxImg2ImgPipeline.get_timesteps)."""
        steps = self.num_inference_steps
        return steps - int(max(steps - steps * (1.0 if self.strength is None else self.strength), 0))

    @property
    def clip_fps(self) -> int | None:
        """Frames a second of the finished clip."""
        return self.fps and self.fps * (self.interpolate or 1)

    @property
    def clip_frames(self) -> int | None:
        """Frames of the finished clip: the first and the last are the model's own, interpolated or not."""
        return self.num_frames and (self.num_frames - 1) * (self.interpolate or 1) + 1


def _to_int(value: object) -> int:
    if isinstance(value, bool):
        raise ValueError
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, int):
        return value
    if isinstance(value, str):
        return int(value.strip().replace("_", ""))
    raise ValueError


def _to_float(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError
    number = float(value)
    if not math.isfinite(number):
        raise ValueError
    return number


def _to_text(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError
    text = str(value)
    text.encode()  # half a surrogate pair, as "\ud83d" in JSON, is no text
    return text


def _to_switch(value: object) -> str:
    """on and off, which YAML reads as true and false."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else _to_text(value)


def _to_tags(value: object) -> tuple[str, ...]:
    tags = value.split(",") if isinstance(value, str) else value
    if not isinstance(tags, list | tuple):
        raise ValueError
    return tuple(tag for tag in (_to_text(tag).strip() for tag in tags) if tag)


def _to_moment(value: object) -> str:
    """A moment as ISO 8601; a naive one is local wall clock and gets the local zone."""
    moment = value if isinstance(value, datetime) else datetime.fromisoformat(str(value))
    return moment.astimezone().isoformat(timespec="seconds")


_WHOLE = "a whole number"
_NUMBER = "a number"
_TEXT = "text"

FIELDS: dict[str, tuple[Callable[[object], Any], str]] = {
    "kind": (_to_text, "image or video"),
    "model": (_to_text, "a model key"),
    "backend": (_to_text, "diffusers or wan-cli"),
    "prompt": (_to_text, _TEXT),
    "prompt_2": (_to_text, _TEXT),
    "negative_prompt": (_to_text, _TEXT),
    "width": (_to_int, _WHOLE),
    "height": (_to_int, _WHOLE),
    "num_inference_steps": (_to_int, _WHOLE),
    "guidance_scale": (_to_float, _NUMBER),
    "guidance_scale_2": (_to_float, _NUMBER),
    "true_cfg_scale": (_to_float, _NUMBER),
    "max_sequence_length": (_to_int, _WHOLE),
    "num_frames": (_to_int, _WHOLE),
    "fps": (_to_int, _WHOLE),
    "interpolate": (_to_int, "2 or 4"),
    "flow_shift": (_to_float, _NUMBER),
    "image": (_to_text, "the name of a picture"),
    "last_image": (_to_text, "the name of a picture"),
    "strength": (_to_float, _NUMBER),
    "controlnet": (controlnet.read, 'a ControlNet such as "union-pro-2:pose.png:0.7"'),
    "loras": (lora.read, 'LoRAs such as "style:0.8, grain"'),
    "seed": (_to_int, _WHOLE),
    "precision": (_to_text, "auto or one of " + ", ".join(get_args(Precision)[1:])),
    "offload": (_to_text, "auto or one of " + ", ".join(get_args(Offload)[1:])),
    "vae_tiling": (_to_text, "auto, off, strips or on"),
    "text_encoder_device": (_to_text, "auto, gpu or cpu"),
    "text_encoder_precision": (_to_text, "auto or one of " + ", ".join(get_args(Precision)[1:])),
    "compile": (_to_switch, "auto, on or off"),
    "low_cpu_mem_usage": (_to_switch, "auto, on or off"),
    "cache": (caches.read, caches.EXPECTED),
    "output_format": (_to_text, "png, jpg, webp, mp4 or gif"),
    "priority": (_to_text, "high, normal, low or night"),
    "not_before": (_to_moment, "a date and time such as 2026-11-23T06:00"),
    "batch": (_to_text, "a folder name"),
    "tags": (_to_tags, "words separated by commas"),
}
"""What a person may write of one job, how it is read, and how to say what was expected."""

_CHOICES: dict[str, tuple[str, ...]] = {
    "kind": ("image", "video"),
    "backend": get_args(Backend),
    "precision": get_args(Precision),
    "offload": get_args(Offload),
    "vae_tiling": ("auto", "off", "strips", "on"),
    "text_encoder_device": ("auto", "gpu", "cpu"),
    "text_encoder_precision": get_args(Precision),
    "compile": ("auto", "on", "off"),
    "low_cpu_mem_usage": ("auto", "on", "off"),
    "priority": PRIORITIES,
}

_FORMATS: dict[str, tuple[str, ...]] = {"image": ("png", "jpg", "webp"), "video": ("mp4", "gif", "webp", "png")}


def check(
    written: Mapping[str, object],
    models: Models,
    where: str,
    *,
    image_model: str,
    video_model: str,
    picture: Size | None = None,
    places: Places = NOWHERE,
) -> JobSpec | list[Fault]:
    """Return the job that `written` asks for, with the model's defaults filled in, or everything wrong with it.

    Args:
        written: the fields of FIELDS as text or as typed values; `image` and `last_image` are digests already.
        where: file:line or whatever else tells a person which job this is.
        image_model: the model of an image job that names none; `video_model` likewise.
        picture: the size of the one whose shape the job gets where neither width nor height is written.
        places: where each of the fields is written.
    """
    faults = Faults(where).knowing(places)
    fields = _read_fields(written, faults)
    if written.get("seed") is None:
        faults.add("it has no seed", "Write one.")
    facts = _model_of(fields, models, faults, image_model=image_model, video_model=video_model)
    if facts is None:
        return faults.found
    if picture and written.get("width") is None and written.get("height") is None:
        fields |= sizes.of_picture(picture, facts, fields.get("backend"))._asdict()
    _check_prompt(fields, facts, faults)
    if fields.get("backend") == "wan-cli":
        for name, problem, remedy in wan_cli.refusals(fields, facts):
            faults.of(name).add(problem, remedy)
    else:
        check_size(fields, facts, faults)
    check_frames(fields, facts, faults)
    check_steps_and_guidance(fields, facts, faults)
    check_images(fields, facts, faults)
    check_controlnet(fields, facts, faults)
    check_loras(fields, facts, faults)
    _check_rest(fields, facts, faults)
    if faults.found:
        return faults.found
    return _filled(fields, facts)


def _read_fields(written: Mapping[str, object], faults: Faults) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in written.items():
        if name not in FIELDS:
            faults.of(name).add(f"unknown key {shown(name)}", near(name, list(FIELDS)))
            continue
        if value is None:
            continue
        read, expected = FIELDS[name]
        try:
            fields[name] = read(value)
        except (ValueError, OverflowError) as error:
            # What reads these says what is wrong with them, in words for a person; Python's own words are for nobody.
            says_it = name in ("controlnet", "loras")
            remedy = "Write it in digits." if expected in (_WHOLE, _NUMBER) else ""
            faults.of(name).add(f"{name}: {error}" if says_it else f"{name} {shown(value)} is not {expected}", remedy)
            continue
        if name in _CHOICES and fields[name] not in _CHOICES[name]:
            faults.of(name).add(f"{name} {shown(value)} is not {expected}", near(str(value), _CHOICES[name]))
            del fields[name]
    return fields


def _model_of(
    fields: dict[str, Any], models: Models, faults: Faults, *, image_model: str, video_model: str
) -> ModelFacts | None:
    animates = "image" in fields and "strength" not in fields
    wants_video = fields.get("kind") == "video" or ("kind" not in fields and animates)
    key = fields.setdefault("model", video_model if wants_video else image_model)
    if key not in models:
        known = f"Known: {', '.join(models.near(key))} (safelight models list)."
        faults.of("model").add(f"model {shown(key)} is not known", known)
        return None
    facts = models[key]
    if fields.get("kind", facts.kind) != facts.kind:
        faults.of("kind", "model").add(
            f"kind {fields['kind']!r} does not fit model {key}", f"{key} makes {facts.kind}s."
        )
    return facts


def _check_prompt(fields: dict[str, Any], facts: ModelFacts, faults: Faults) -> None:
    prompt = fields.get("prompt", "")
    if not prompt.strip():
        faults.of("prompt").add("the prompt is empty", "Write what the picture should show.")
    for name in ("prompt", "prompt_2", "negative_prompt"):
        text = fields.get(name, "")
        if len(text) > PROMPT_CHARACTERS_MAX:
            faults.of(name).add(f"{name} has {len(text)} characters", f"At most {PROMPT_CHARACTERS_MAX}.")
        if "\x00" in text:
            faults.of(name).add(f"{name} has a NUL character", "Remove it.")
        if unknown := facts.unknown_words(text):
            said = ", ".join(map(shown, unknown[:UNKNOWN_WORDS_SHOWN]))
            words = ", ".join(sorted(facts.vocabulary.split()))
            faults.of(name).add(f"{facts.key} does not know {said} of {name}", f"Its words, in small letters: {words}.")


def _check_rest(fields: dict[str, Any], facts: ModelFacts, faults: Faults) -> None:
    legal = _FORMATS[facts.kind]
    if fields.get("output_format", legal[0]) not in legal:
        faults.of("output_format", "model").add(
            f"output_format {shown(fields['output_format'])} is none for {facts.kind}s: {', '.join(legal)} are",
            f"Use {legal[0]}.",
        )
    if fields.get("vae_tiling") == "strips" and not facts.decodes_in_strips:
        faults.of("vae_tiling", "model").add(
            f"vae_tiling strips is not offered for {facts.key}", "Use auto, off or on."
        )
    within(fields, "seed", 0, SEED_MAX, faults)
    if "batch" in fields and not is_folder_name(fields["batch"]):
        faults.of("batch").add(
            f"batch {shown(fields['batch'])} cannot be a folder name", "Use letters, digits, spaces, . _ and -."
        )


def is_folder_name(name: str) -> bool:
    """Whether `name` is one plain folder below another: no separators, no dots alone, nothing hidden or control."""
    plain = name.isprintable() and bool(name.strip()) and name == name.strip() and len(name.encode()) <= 120
    return plain and not name.startswith((".", "-")) and "/" not in name


def _filled(fields: dict[str, Any], facts: ModelFacts) -> JobSpec:
    defaults = {name: value for name, value in facts.defaults.model_dump().items() if value is not None}
    given = {
        "kind": facts.kind,
        "max_sequence_length": facts.max_sequence_length,
        "output_format": _FORMATS[facts.kind][0],
        "batch": "single",
        **defaults,
        **fields,
    }
    if facts.kind == "image" and "image" in fields:
        given.setdefault("strength", STRENGTH)
    if facts.experts > 1 and not guides(given["guidance_scale"]):
        given["guidance_scale_2"] = given["guidance_scale"]  # the default's would not be heeded
    return JobSpec.model_validate(given)
