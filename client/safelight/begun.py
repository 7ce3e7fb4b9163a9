"""How a job was begun of which a part is done already: what goes on with that part, and whether it pays. Pure."""

from __future__ import annotations

from pydantic import Field

from safelight.computed import Computed
from safelight.jobspec import JobSpec
from safelight.plan import Plan


class Begun(Computed):
    """What a job's checkpoint says of the plan that made it."""

    step: int = Field(ge=1)
    """Steps that are done."""

    def held_to(self, spec: JobSpec) -> JobSpec:
        """Return the job as if it had asked for this way. Where weights lie is left to the planner."""
        return spec.model_copy(update=self.settings)

    def is_sooner(self, going_on: Plan, anew: Plan) -> bool:
        """Whether going on ends no later than beginning anew, which may be free to take a much faster way."""
        if going_on.seconds is None or going_on.seconds_per_step is None or anew.seconds is None:
            return True
        return going_on.seconds - self.step * going_on.seconds_per_step <= anew.seconds
