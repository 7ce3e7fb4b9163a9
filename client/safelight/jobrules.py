"""What a model takes: the rules of sizes, frames, guidance and pictures; faults name the nearest legal value. Pure."""

from __future__ import annotations

from typing import Any

from safelight.controlnet import ControlNet
from safelight.faults import Faults, near, shown
from safelight.lora import Lora
from safelight.models import ModelFacts

INTERPOLATIONS = (2, 4)

LORAS_MAX = 16
"""Of one job: people use one to four."""

STRENGTH = 0.6
"""Of a picture that starts from another, where none is written: FluxImg2ImgPipeline's own."""

CONTROL_SCALE_MAX = 2
"""Of a ControlNet; their authors advise 0.3 to 0.9."""

SCALE_MAX = 10
"""Of a LoRA; sliders are used up to about 5, and backwards."""

CLIP_FPS_MAX = 120

GIF_FPS = (1, 2, 4, 5, 10, 20, 25, 50)
"""A frame of a GIF lasts whole hundredths of a second; browsers show those of one hundredth ten times as long."""


def check_size(fields: dict[str, Any], facts: ModelFacts, faults: Faults) -> None:
    """Note a width or height that the model was not made for."""
    width, height = fields.get("width", facts.defaults.width), fields.get("height", facts.defaults.height)
    for name, other in (("width", height), ("height", width)):
        side = fields.get(name)
        if side is None:
            continue
        if side % facts.size_multiple:
            low = side // facts.size_multiple * facts.size_multiple
            high = low + facts.size_multiple
            legal = [n for n in (low, high) if facts.size_min <= n <= facts.size_max]
            legal = [n for n in legal if n * other <= facts.pixels_max] or legal
            faults.of(name).add(
                f"{name} {side} is not a multiple of {facts.size_multiple}",
                f"Use {' or '.join(map(str, legal)) or facts.side_near(side)}.",
            )
        elif not facts.size_min <= side <= facts.size_max:
            faults.of(name).add(
                f"{name} {side} is outside {facts.size_min} to {facts.size_max} of {facts.key}",
                f"Use {facts.side_near(side)}.",
            )
    sides_are_legal = all(facts.size_min <= side <= facts.size_max for side in (width, height))
    if width * height > facts.pixels_max and sides_are_legal:
        tallest = max(facts.pixels_max // width // facts.size_multiple * facts.size_multiple, facts.size_min)
        faults.of("width", "height").add(
            f"{width}x{height} is more than the {facts.pixels_max:,} pixels of {facts.key}",
            f"Use {width}x{tallest}.",
        )


def check_frames(fields: dict[str, Any], facts: ModelFacts, faults: Faults) -> None:
    """Note a length or rate that the model, or the file, cannot have."""
    if facts.kind == "image":
        for name in ("num_frames", "fps", "interpolate", "flow_shift"):
            if name in fields:
                faults.of(name, "model", "kind").add(
                    f"{name} means nothing to {facts.key}, which makes images", "Leave it out."
                )
        return
    frames = fields.get("num_frames")
    if frames is not None:
        if (frames - 1) % facts.frames_multiple:
            faults.of("num_frames").add(
                f"num_frames {frames} is not {facts.frames_multiple}n + 1",
                f"Use {facts.frames_near(frames)}.",
            )
        elif not facts.frames_min <= frames <= facts.frames_max:
            faults.of("num_frames").add(
                f"num_frames {frames} is outside {facts.frames_min} to {facts.frames_max} of {facts.key}",
                f"Use {facts.frames_near(frames)}.",
            )
    within(fields, "fps", 1, CLIP_FPS_MAX, faults)
    within(fields, "flow_shift", 0.1, 100.0, faults)
    _check_rate(fields, facts, faults)


def _check_rate(fields: dict[str, Any], facts: ModelFacts, faults: Faults) -> None:
    """What the finished clip is shown at: the model's frames a second, times what is put between them."""
    times = fields.get("interpolate", 1)
    if "interpolate" in fields and times not in INTERPOLATIONS:
        faults.of("interpolate").add(f"interpolate {times} is not 2 or 4", "Use one of them, or leave it out.")
        return
    fps: int = fields.get("fps") or facts.defaults.fps or 0
    if fps * times > CLIP_FPS_MAX >= fps:
        faults.of("interpolate", "fps").add(
            f"fps {fps} interpolated by {times} is {fps * times} frames a second",
            f"At most {CLIP_FPS_MAX}: use fps {CLIP_FPS_MAX // times}, or leave interpolate out.",
        )
    elif fields.get("output_format") == "gif" and fps * times not in GIF_FPS and 1 <= fps <= CLIP_FPS_MAX:
        legal = [rate // times for rate in GIF_FPS if not rate % times]
        nearest = f"Use fps {min(legal, key=lambda rate: (abs(rate - fps), -rate))}, or another output_format."
        own_program = fields.get("backend") == "wan-cli"  # which has one rate
        faults.of("output_format", "fps", "interpolate").add(
            f"a gif cannot show {fps * times} frames a second: its frames last whole hundredths of one",
            "Use webp." if own_program else nearest,
        )


def within(fields: dict[str, Any], name: str, low: float, high: float, faults: Faults) -> None:
    """Note a number outside of its range."""
    value = fields.get(name)
    if value is not None and not low <= value <= high:
        nearest = min(max(value, low), high)
        faults.of(name).add(f"{name} {value} is outside {low} to {high}", f"Use {nearest}.")


def guides(guidance_scale: float | None) -> bool:
    """Whether a step of a model with two forwards a step takes both. The first expert's scale decides, as in diffusers'
    WanPipeline."""
    return (guidance_scale or 0.0) > 1


def check_steps_and_guidance(fields: dict[str, Any], facts: ModelFacts, faults: Faults) -> None:
    """Note steps and guidance that are out of range, or would be ignored."""
    within(fields, "num_inference_steps", facts.steps_min, facts.steps_max, faults)
    within(fields, "max_sequence_length", 1, facts.max_sequence_length, faults)
    scale = fields.get("guidance_scale", facts.defaults.guidance_scale)
    if facts.guidance == "none":
        for name in ("guidance_scale", "guidance_scale_2"):
            if name in fields:
                faults.of(name, "model").add(
                    f"{name} would be ignored: {facts.key} is distilled and takes no guidance",
                    "Leave it out.",
                )
    else:
        within(fields, "guidance_scale", 1.0 if facts.guidance == "cfg" else 0.0, 30.0, faults)  # less would mean 1
        within(fields, "guidance_scale_2", 0.0, 30.0, faults)
        if "guidance_scale_2" in fields and facts.experts == 1:
            faults.of("guidance_scale_2", "model").add(
                f"guidance_scale_2 would be ignored: {facts.key} has one expert", "Leave it out."
            )
        elif "guidance_scale_2" in fields and fields["guidance_scale_2"] != scale and not guides(scale):
            faults.of("guidance_scale_2", "guidance_scale").add(
                f"guidance_scale_2 would be ignored at guidance_scale {scale:g}, where a step is one forward",
                "Leave it out, or raise guidance_scale.",
            )
    if "true_cfg_scale" in fields and not facts.true_cfg:
        faults.of("true_cfg_scale", "model").add(f"true_cfg_scale would be ignored by {facts.key}", "Leave it out.")
    else:
        within(fields, "true_cfg_scale", 1.0, 30.0, faults)
    _check_negative(fields, facts, faults)


def _check_negative(fields: dict[str, Any], facts: ModelFacts, faults: Faults) -> None:
    negative, true_cfg = fields.get("negative_prompt"), fields.get("true_cfg_scale", 1.0)
    if facts.guidance == "cfg":
        if negative and not guides(fields.get("guidance_scale", facts.defaults.guidance_scale)):
            faults.of("negative_prompt", "guidance_scale").add(
                "negative_prompt would be ignored at guidance_scale 1",
                "Raise guidance_scale, or leave it out.",
            )
    elif not facts.true_cfg:
        if negative:
            faults.of("negative_prompt", "model").add(
                f"negative_prompt would be ignored by {facts.key}", "Leave it out."
            )
    elif negative and true_cfg <= 1:
        faults.of("negative_prompt", "true_cfg_scale", "model").add(
            f"negative_prompt would be ignored by {facts.key} without true_cfg_scale above 1",
            "Add true_cfg_scale: 4 (twice the time), or leave it out.",
        )
    elif true_cfg > 1 and negative is None:
        faults.of("true_cfg_scale").add(
            "true_cfg_scale would be ignored without a negative_prompt", "Add one, or leave it out."
        )


def check_loras(fields: dict[str, Any], facts: ModelFacts, faults: Faults) -> None:
    """Note LoRAs that the model has no place for, or that are named twice."""
    loras: tuple[Lora, ...] = fields.get("loras", ())
    if len(loras) > LORAS_MAX:
        faults.of("loras").add(f"{len(loras)} LoRAs are named", f"At most {LORAS_MAX}.")
    seen = set()
    for lora in loras:
        if not -SCALE_MAX <= lora.scale <= SCALE_MAX:
            nearest = min(max(lora.scale, -SCALE_MAX), SCALE_MAX)
            faults.of("loras").add(
                f"LoRA {lora.label}: scale {lora.scale:g} is outside -{SCALE_MAX} to {SCALE_MAX}", f"Use {nearest}."
            )
        if lora.expert != "both" and facts.experts == 1:
            faults.of("loras", "model").add(
                f"LoRA {lora.label}: {facts.key} has one expert, not a {lora.expert} one", "Leave expert out."
            )
        for expert in ("high", "low") if lora.expert == "both" else (lora.expert,):
            if (lora.label, expert) in seen:
                faults.of("loras").add(f"LoRA {lora.label} is named twice", "Name it once, with one scale.")
                break
            seen.add((lora.label, expert))


def check_controlnet(fields: dict[str, Any], facts: ModelFacts, faults: Faults) -> None:
    """Note a ControlNet that the model has not, and figures that would make nothing of it."""
    wanted: ControlNet | None = fields.get("controlnet")
    if wanted is None:
        return
    if not facts.controlnets:
        faults.of("controlnet", "model").add(
            f"{facts.key} has no ControlNet", "Leave controlnet out, or use a model that has one: flux-dev."
        )
    elif wanted.model not in facts.controlnets:
        faults.of("controlnet", "model").add(
            f"{facts.key} has no ControlNet {shown(wanted.model)}", near(wanted.model, list(facts.controlnets))
        )
    if "cache" in fields:
        faults.of("cache", "controlnet").add(
            "cache and controlnet do not go together: the ControlNet's part is added between the blocks that a cache "
            "leaves out; first-block counts it twice, and taylorseer not at all",
            "Leave one of them out.",
        )
    if not 0 < wanted.scale <= CONTROL_SCALE_MAX:
        problem = f"controlnet scale {wanted.scale:g} is not above 0 and at most {CONTROL_SCALE_MAX}"
        faults.of("controlnet").add(problem, "Use 0.7, or leave controlnet out.")
    if not 0 <= wanted.start < wanted.end <= 1:
        faults.of("controlnet").add(
            f"controlnet leads from {wanted.start:g} to {wanted.end:g} of the steps",
            "Use a start and a later end between 0 and 1.",
        )


def check_images(fields: dict[str, Any], facts: ModelFacts, faults: Faults) -> None:
    """Note pictures that the model cannot use, or the want of one."""
    if "image" in fields and facts.image == "never":
        faults.of("image", "model").add(
            f"image would be ignored by {facts.key}", "Leave it out, or use a model that animates pictures."
        )
    if "strength" in fields and facts.kind == "video":
        faults.of("strength", "model").add(
            f"strength would be ignored by {facts.key}, which animates a picture as it is", "Leave it out."
        )
    elif "strength" in fields and "image" not in fields:
        faults.of("strength").add("strength would be ignored without an image", "Add image: NAME, or leave it out.")
    elif not 0 < fields.get("strength", STRENGTH) <= 1:
        nearest = 1 if fields["strength"] > 1 else STRENGTH
        faults.of("strength").add(f"strength {fields['strength']:g} is not above 0 and at most 1", f"Use {nearest}.")
    if "image" not in fields and facts.image == "required":
        faults.add(f"{facts.key} animates a picture and none was given", "Add image: NAME.")
    if "last_image" in fields and not facts.last_image:
        faults.of("last_image", "model").add(f"last_image would be ignored by {facts.key}", "Leave it out.")
    if "prompt_2" in fields and facts.family != "flux":
        faults.of("prompt_2", "model").add(f"prompt_2 would be ignored by {facts.key}", "Leave it out.")
