"""What is asked for: one frozen, versioned value a job, and the rules that make one from what a person wrote.

Names are diffusers' own. Every default is filled in here, at submission, so that a later change of the model table
does not alter a job that waits. Nothing is corrected: what a model would ignore or refuse is a fault that names the
value and the nearest legal one.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

from safelight import caches, wan_cli
from safelight.caches import Cache
from safelight.errors import Fault
from safelight.models import ModelFacts, Models

PRIORITIES = ("high", "normal", "low", "night")
SEED_MAX = 2**32 - 1
PROMPT_CHARACTERS_MAX = 20_000

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
    seed: int

    precision: Precision = "auto"
    offload: Offload = "auto"
    vae_tiling: Literal["auto", "on", "off"] = "auto"
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
    "seed": (_to_int, _WHOLE),
    "precision": (_to_text, "auto or one of " + ", ".join(get_args(Precision)[1:])),
    "offload": (_to_text, "auto or one of " + ", ".join(get_args(Offload)[1:])),
    "vae_tiling": (_to_text, "auto, on or off"),
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
    "vae_tiling": ("auto", "on", "off"),
    "text_encoder_device": ("auto", "gpu", "cpu"),
    "text_encoder_precision": get_args(Precision),
    "compile": ("auto", "on", "off"),
    "low_cpu_mem_usage": ("auto", "on", "off"),
    "priority": PRIORITIES,
}

_FORMATS: dict[str, tuple[str, ...]] = {"image": ("png", "jpg", "webp"), "video": ("mp4", "gif", "webp", "png")}

CLIP_FPS_MAX = 120

GIF_FPS = (1, 2, 4, 5, 10, 20, 25, 50)
"""A frame of a GIF lasts whole hundredths of a second; browsers show those of one hundredth ten times as long."""


class Faults:
    """Collects what is wrong with one job or one file, so that a person sees all of it at once."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.found: list[Fault] = []

    def at(self, where: str) -> Faults:
        """Return what collects for another place into the same list."""
        other = Faults(where)
        other.found = self.found
        return other

    def add(self, problem: str, remedy: str = "") -> None:
        self.found.append(Fault(self.where, problem, remedy))


def near(word: str, known: tuple[str, ...] | list[str] | dict[str, Any]) -> str:
    """Return "Did you mean x?" for the known word most like `word`, else the whole list."""
    match = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"Did you mean {match[0]}?" if match else f"Known: {', '.join(known)}."


def check(
    written: Mapping[str, object], models: Models, where: str, *, image_model: str, video_model: str
) -> JobSpec | list[Fault]:
    """Return the job that `written` asks for, with the model's defaults filled in, or everything wrong with it.

    Args:
        written: the fields of FIELDS as text or as typed values; `image` and `last_image` are digests already.
        where: file:line or whatever else tells a person which job this is.
        image_model: the model of an image job that names none; `video_model` likewise.
    """
    faults = Faults(where)
    fields = _read_fields(written, faults)
    if written.get("seed") is None:
        faults.add("it has no seed", "Write one.")
    facts = _model_of(fields, models, faults, image_model=image_model, video_model=video_model)
    if facts is None:
        return faults.found
    _check_prompt(fields, faults)
    if fields.get("backend") == "wan-cli":
        faults.found += [Fault(where, *refusal) for refusal in wan_cli.refusals(fields, facts)]
    else:
        _check_size(fields, facts, faults)
    _check_frames(fields, facts, faults)
    _check_steps_and_guidance(fields, facts, faults)
    _check_images(fields, facts, faults)
    _check_rest(fields, facts, faults)
    if faults.found:
        return faults.found
    return _filled(fields, facts)


def _read_fields(written: Mapping[str, object], faults: Faults) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in written.items():
        if name not in FIELDS:
            faults.add(f"unknown key {shown(name)}", near(name, list(FIELDS)))
            continue
        if value is None:
            continue
        read, expected = FIELDS[name]
        try:
            fields[name] = read(value)
        except (ValueError, OverflowError):
            faults.add(f"{name} {shown(value)} is not {expected}")
            continue
        if name in _CHOICES and fields[name] not in _CHOICES[name]:
            faults.add(f"{name} {shown(value)} is not {expected}", near(str(value), _CHOICES[name]))
            del fields[name]
    return fields


def shown(value: object) -> str:
    """Return a wrong value as a message can hold it: a whole file may stand in its place."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _model_of(
    fields: dict[str, Any], models: Models, faults: Faults, *, image_model: str, video_model: str
) -> ModelFacts | None:
    wants_video = fields.get("kind") == "video" or ("kind" not in fields and "image" in fields)
    key = fields.setdefault("model", video_model if wants_video else image_model)
    if key not in models:
        faults.add(f"model {shown(key)} is not known", f"Known: {', '.join(models.near(key))} (safelight models list).")
        return None
    facts = models[key]
    if fields.get("kind", facts.kind) != facts.kind:
        faults.add(f"kind {fields['kind']!r} does not fit model {key}", f"{key} makes {facts.kind}s.")
    return facts


def _check_prompt(fields: dict[str, Any], faults: Faults) -> None:
    prompt = fields.get("prompt", "")
    if not prompt.strip():
        faults.add("the prompt is empty", "Write what the picture should show.")
    for name in ("prompt", "prompt_2", "negative_prompt"):
        text = fields.get(name, "")
        if len(text) > PROMPT_CHARACTERS_MAX:
            faults.add(f"{name} has {len(text)} characters", f"At most {PROMPT_CHARACTERS_MAX}.")
        if "\x00" in text:
            faults.add(f"{name} has a NUL character", "Remove it.")


def _check_size(fields: dict[str, Any], facts: ModelFacts, faults: Faults) -> None:
    for name in ("width", "height"):
        side = fields.get(name)
        if side is None:
            continue
        if side % facts.size_multiple:
            low = side // facts.size_multiple * facts.size_multiple
            high = low + facts.size_multiple
            legal = [str(n) for n in (low, high) if facts.size_min <= n <= facts.size_max]
            faults.add(
                f"{name} {side} is not a multiple of {facts.size_multiple}",
                f"Use {' or '.join(legal) or facts.side_near(side)}.",
            )
        elif not facts.size_min <= side <= facts.size_max:
            faults.add(
                f"{name} {side} is outside {facts.size_min} to {facts.size_max} of {facts.key}",
                f"Use {facts.side_near(side)}.",
            )
    width, height = fields.get("width", facts.defaults.width), fields.get("height", facts.defaults.height)
    sides_are_legal = all(facts.size_min <= side <= facts.size_max for side in (width, height))
    if width * height > facts.pixels_max and sides_are_legal:
        tallest = max(facts.pixels_max // width // facts.size_multiple * facts.size_multiple, facts.size_min)
        faults.add(
            f"{width}x{height} is more than the {facts.pixels_max:,} pixels of {facts.key}",
            f"Use {width}x{tallest}.",
        )


def _check_frames(fields: dict[str, Any], facts: ModelFacts, faults: Faults) -> None:
    if facts.kind == "image":
        for name in ("num_frames", "fps", "interpolate", "flow_shift"):
            if name in fields:
                faults.add(f"{name} means nothing to {facts.key}, which makes images", "Leave it out.")
        return
    frames = fields.get("num_frames")
    if frames is not None:
        if (frames - 1) % facts.frames_multiple:
            faults.add(
                f"num_frames {frames} is not {facts.frames_multiple}n + 1",
                f"Use {facts.frames_near(frames)}.",
            )
        elif not facts.frames_min <= frames <= facts.frames_max:
            faults.add(
                f"num_frames {frames} is outside {facts.frames_min} to {facts.frames_max} of {facts.key}",
                f"Use {facts.frames_near(frames)}.",
            )
    _within(fields, "fps", 1, CLIP_FPS_MAX, faults)
    _within(fields, "flow_shift", 0.1, 100.0, faults)
    _check_rate(fields, facts, faults)


def _check_rate(fields: dict[str, Any], facts: ModelFacts, faults: Faults) -> None:
    """What the finished clip is shown at: the model's frames a second, times what is put between them."""
    times = fields.get("interpolate", 1)
    if "interpolate" in fields and times not in get_args(Interpolate):
        faults.add(f"interpolate {times} is not 2 or 4", "Use one of them, or leave it out.")
        return
    fps: int = fields.get("fps") or facts.defaults.fps or 0
    if fps * times > CLIP_FPS_MAX >= fps:
        faults.add(
            f"fps {fps} interpolated by {times} is {fps * times} frames a second",
            f"At most {CLIP_FPS_MAX}: use fps {CLIP_FPS_MAX // times}, or leave interpolate out.",
        )
    elif fields.get("output_format") == "gif" and fps * times not in GIF_FPS and 1 <= fps <= CLIP_FPS_MAX:
        legal = [rate // times for rate in GIF_FPS if not rate % times]
        faults.add(
            f"a gif cannot show {fps * times} frames a second: its frames last whole hundredths of one",
            f"Use fps {min(legal, key=lambda rate: (abs(rate - fps), -rate))}, or another output_format.",
        )


def _within(fields: dict[str, Any], name: str, low: float, high: float, faults: Faults) -> None:
    value = fields.get(name)
    if value is not None and not low <= value <= high:
        nearest = min(max(value, low), high)
        faults.add(f"{name} {value} is outside {low} to {high}", f"Use {nearest}.")


def _check_steps_and_guidance(fields: dict[str, Any], facts: ModelFacts, faults: Faults) -> None:
    _within(fields, "num_inference_steps", facts.steps_min, facts.steps_max, faults)
    _within(fields, "max_sequence_length", 1, facts.max_sequence_length, faults)
    if facts.guidance == "none":
        for name in ("guidance_scale", "guidance_scale_2"):
            if name in fields:
                faults.add(
                    f"{name} would be ignored: {facts.key} is distilled and takes no guidance",
                    "Leave it out.",
                )
    else:
        _within(fields, "guidance_scale", 0.0, 30.0, faults)
        _within(fields, "guidance_scale_2", 0.0, 30.0, faults)
        if "guidance_scale_2" in fields and facts.experts == 1:
            faults.add(f"guidance_scale_2 would be ignored: {facts.key} has one expert", "Leave it out.")
    if "true_cfg_scale" in fields and not facts.true_cfg:
        faults.add(f"true_cfg_scale would be ignored by {facts.key}", "Leave it out.")
    else:
        _within(fields, "true_cfg_scale", 1.0, 30.0, faults)
    _check_negative(fields, facts, faults)


def _check_negative(fields: dict[str, Any], facts: ModelFacts, faults: Faults) -> None:
    negative, true_cfg = fields.get("negative_prompt"), fields.get("true_cfg_scale", 1.0)
    if facts.guidance == "cfg":
        scales = (
            fields.get("guidance_scale", facts.defaults.guidance_scale),
            fields.get("guidance_scale_2", facts.defaults.guidance_scale_2),
        )
        if negative and all(scale is None or scale <= 1 for scale in scales):
            faults.add(
                "negative_prompt would be ignored at guidance_scale 1",
                "Raise guidance_scale, or leave it out.",
            )
    elif not facts.true_cfg:
        if negative:
            faults.add(f"negative_prompt would be ignored by {facts.key}", "Leave it out.")
    elif negative and true_cfg <= 1:
        faults.add(
            f"negative_prompt would be ignored by {facts.key} without true_cfg_scale above 1",
            "Add true_cfg_scale: 4 (twice the time), or leave it out.",
        )
    elif true_cfg > 1 and negative is None:
        faults.add("true_cfg_scale would be ignored without a negative_prompt", "Add one, or leave it out.")


def _check_images(fields: dict[str, Any], facts: ModelFacts, faults: Faults) -> None:
    if "image" in fields and facts.image == "never":
        faults.add(f"image would be ignored by {facts.key}", "Leave it out, or use a model that animates pictures.")
    if "image" not in fields and facts.image == "required":
        faults.add(f"{facts.key} animates a picture and none was given", "Add image: NAME.")
    if "last_image" in fields and not facts.last_image:
        faults.add(f"last_image would be ignored by {facts.key}", "Leave it out.")
    if "prompt_2" in fields and facts.family != "flux":
        faults.add(f"prompt_2 would be ignored by {facts.key}", "Leave it out.")


def _check_rest(fields: dict[str, Any], facts: ModelFacts, faults: Faults) -> None:
    legal = _FORMATS[facts.kind]
    if fields.get("output_format", legal[0]) not in legal:
        faults.add(
            f"output_format {shown(fields['output_format'])} is none for {facts.kind}s: {', '.join(legal)} are",
            f"Use {legal[0]}.",
        )
    _within(fields, "seed", 0, SEED_MAX, faults)
    if "batch" in fields and not is_folder_name(fields["batch"]):
        faults.add(f"batch {shown(fields['batch'])} cannot be a folder name", "Use letters, digits, spaces, . _ and -.")


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
    return JobSpec.model_validate(given)
