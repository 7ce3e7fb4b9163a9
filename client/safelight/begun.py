"""How a job was begun of which a part is done already: what goes on with that part, and whether it pays. Pure."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from safelight.jobspec import JobSpec
from safelight.plan import Dtype, Plan, Precision


class Begun(BaseModel):
    """What a job's checkpoint says of the plan that made it: the fields that decide bits and that planning chooses."""

    model_config = ConfigDict(frozen=True)

    step: int = Field(ge=1)
    """Steps that are done."""
    dtype: Dtype
    precision: Precision
    compiled: bool
    text_encoder_precision: Precision | None
    text_encoder_device: Literal["cuda", "cpu"]

    def asked(self, spec: JobSpec) -> JobSpec:
        """Return the job as if it had asked for this way. Where weights lie is left to the planner."""
        plain: Precision = "fp16" if self.dtype == "float16" else "bf16"
        on_gpu = self.text_encoder_device == "cuda"
        return spec.model_copy(
            update={
                "precision": self.precision,
                "compile": "on" if self.compiled else "off",
                "text_encoder_device": "gpu" if on_gpu else "cpu",
                "text_encoder_precision": self.text_encoder_precision or (plain if on_gpu else "auto"),
            }
        )

    def is_sooner(self, going_on: Plan, anew: Plan) -> bool:
        """Whether going on ends no later than beginning anew, which may be free to take a much faster way."""
        if going_on.seconds is None or going_on.seconds_per_step is None or anew.seconds is None:
            return True
        return going_on.seconds - self.step * going_on.seconds_per_step <= anew.seconds
