"""RQ jobs that can call one function of ours and nothing else, whatever is in Redis."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from rq import Queue
from rq.job import Job
from rq.serializers import JSONSerializer

JOB_FUNCTION = "safelight.job"
RESULT_TTL_S = 2 * 86_400
"""RQ's copy of a result, for whoever looks with RQ's tools; the record is on disk."""


class SafeJob(Job):
    """A job that can call one function and nothing else, whatever Redis holds (RQ imports any dotted name)."""

    allowed: ClassVar[dict[str, Callable[..., Any]]] = {}

    @classmethod
    def of(cls, job: str, execution: str, queue: Queue) -> SafeJob:
        """Return the RQ job of one execution of ours; it is not in the queue yet."""
        return cls.create(
            JOB_FUNCTION,
            args=(job, execution),
            id=execution,
            connection=queue.connection,
            serializer=JSONSerializer,
            timeout=-1,
            result_ttl=RESULT_TTL_S,
            failure_ttl=RESULT_TTL_S,
            origin=queue.name,
            status="queued",
            description=job,
        )

    @property
    def func(self) -> Callable[..., Any]:
        if self.func_name not in self.allowed or self.instance is not None:
            raise PermissionError(f"{self.func_name!r} is no job of safelight")
        return self.allowed[self.func_name]

    @property
    def success_callback(self) -> None:
        return None

    @property
    def failure_callback(self) -> None:
        return None

    @property
    def stopped_callback(self) -> None:
        return None

    def send_webhooks(self, *_status: Any, **_details: Any) -> None:
        """Call nobody: a URL in a job is a stranger's."""


class SafeQueue(Queue):
    """A queue of SafeJobs."""

    job_class = SafeJob
