"""A ControlNet as a job names it: which one, the picture that leads it, how much and how long. Pure.

Knows no file and no tensor; which ControlNets a model has, its row of the table says.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict

KEYS = ("model", "image", "scale", "start", "end")


class ControlNet(BaseModel):
    """What leads a picture beside its prompt."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    model: str
    """A key of the model's `controlnets`."""
    image: str
    """Edges, depth or a pose, as the ControlNet was trained on: the sha256 of a picture in state/inputs."""
    scale: float = 1.0
    """diffusers' controlnet_conditioning_scale."""
    start: float = 0.0
    end: float = 1.0
    """Shares of the steps between which it leads: diffusers' control_guidance_start and _end."""

    def scale_at(self, step: int, steps: int) -> float:
        """Return how much it leads in a step, counted from 0 (FluxControlNetPipeline, diffusers 0.42)."""
        leads_not = step / steps < self.start or (step + 1) / steps > self.end
        return 0.0 if leads_not else self.scale


def read(value: object) -> ControlNet:
    """Return the ControlNet that a value of a prompt file names; its picture is still a name there.

    Args:
        value: text, `MODEL:IMAGE[:SCALE[:START[:END]]]`, or a mapping of those in small letters.

    Raises:
        ValueError: it is neither; the message says what is wrong.
    """
    if isinstance(value, ControlNet):
        return value
    if isinstance(value, str):
        words = [word.strip() for word in value.split(":")]
        if not 2 <= len(words) <= len(KEYS):
            raise ValueError(f"{value!r} is not MODEL:IMAGE:SCALE:START:END, of which the last three may be left out")
        value = {key: word for key, word in zip(KEYS, words, strict=False) if word}
    if not isinstance(value, Mapping):
        raise ValueError("write model: and image:")
    if unknown := [str(key) for key in value if key not in KEYS]:
        raise ValueError(f"it has no {', '.join(unknown)}; {', '.join(KEYS)} are known")
    model, image = (value.get(key) for key in ("model", "image"))
    if not (isinstance(model, str) and model and isinstance(image, str) and image):
        raise ValueError("write model: and image:, a key and the name of a picture")
    given = {name: _number(name, value[name]) for name in KEYS[2:] if value.get(name) is not None}
    return ControlNet(model=model, image=image, **given)


def _number(name: str, value: object) -> float:
    if isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if math.isfinite(number):
            return number
    raise ValueError(f"{name} {value!r} is not a number")
