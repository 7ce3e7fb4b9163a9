"""The way in which a job is, or was, computed: what decides its bits, and holds a planner to them again. Pure."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from safelight.plan import Dtype, Plan, Precision, plain_precision


class Computed(BaseModel):
    """What planning chooses and the bits of a result hang on, besides the attention back end. Where weights lie does
    not."""

    model_config = ConfigDict(frozen=True, from_attributes=True)

    device: Literal["cuda", "cpu"]
    dtype: Dtype
    precision: Precision
    compiled: bool
    text_encoder_precision: Precision | None
    text_encoder_device: Literal["cuda", "cpu"]

    @classmethod
    def of(cls, plan: Plan) -> Computed:
        return Computed.model_validate(plan)

    @property
    def settings(self) -> dict[str, str]:
        """A job's settings, by their names, with which a planner for this device has no other choice. A CPU computes in
        one way only."""
        if self.device == "cpu":
            return {}
        on_gpu = self.text_encoder_device == "cuda"
        unquantised = plain_precision(self.dtype) if on_gpu else "auto"
        return {
            "precision": self.precision,
            "compile": "on" if self.compiled else "off",
            "text_encoder_device": "gpu" if on_gpu else "cpu",
            "text_encoder_precision": self.text_encoder_precision or unquantised,
        }
