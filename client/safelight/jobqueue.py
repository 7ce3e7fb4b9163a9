"""The queue: one waiting line shared by all workers, in Redis. Its server is reached through queueserver.

Keys (all below `safelight:`): `job:<id>` a hash with the spec, state and verdict; `waiting` the line, a sorted set
ordered by place ("<priority>:<not_before>:<id>"); `running` id -> worker; `ended` id by time; `batch:<name>` ids;
`workers`, `worker:<name>`, `wake:<name>`, `holds:<name>`; `cancel:<id>`; `unwritten` ids that were cancelled while
they waited and may have no receipt yet; `ledger` set once a worker has filled the line from the ledger, absent after a
wipe; `paused` why a person has paused; `calibration` what workers have learned. Every change of state is one Lua script
(safelight/lua).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, cast

import redis
from pydantic import ValidationError

from safelight import lora
from safelight.calibration import NOTHING_LEARNED, Calibration
from safelight.errors import Fault, InvalidJob
from safelight.jobspec import JobSpec
from safelight.machine import Machine
from safelight.place import Place
from safelight.receipt import Receipt

SUBMIT_CHUNK = 500
"""Jobs a script call: 500 of 1.2 KB keep the server busy for about 10 ms."""

LIST_CHUNK = 2_000

DAY_S = 86_400


class Row(NamedTuple):
    """One job as a listing shows it."""

    id: str
    state: str
    attempts: int
    kind: str
    model: str
    batch: str
    prompt: str
    error: str
    outputs: tuple[str, ...]
    tags: tuple[str, ...]
    """None of a job that an older version has queued."""


@dataclass(frozen=True)
class WorkerRow:
    """One worker as `status` shows it."""

    name: str
    device: str
    seen_at: float
    job: str | None
    holds: dict[str, str]
    machine: Machine | None
    engine: str


@cache
def _script(name: str) -> str:
    return (Path(__file__).parent / "lua" / f"{name}.lua").read_text(encoding="utf-8")


BRIEF_SHAPE_END = ',"batch":'
"""What stands before it in a brief decides how long the job takes."""


def _brief(spec: JobSpec) -> str:
    shown = {"kind": spec.kind, "model": spec.model, "num_inference_steps": spec.num_inference_steps,
             "width": spec.width, "height": spec.height, "num_frames": spec.num_frames,
             "batch": spec.batch, "tags": spec.tags, "prompt": spec.prompt[:120]}  # fmt: skip
    return json.dumps(shown, ensure_ascii=False, separators=(",", ":"))


def _flat(fields: Mapping[str, Any]) -> list[Any]:
    """Return names and values in turn, as HSET takes them."""
    return [part for pair in fields.items() for part in pair]


class JobQueue:
    """The waiting line and what stands in it, as clients and workers use it."""

    def __init__(self, server: redis.Redis, *, keep_days: int = 14) -> None:
        self.server = server
        self.keep_s = keep_days * DAY_S

    def _run(self, script: str, *arguments: Any) -> Any:
        """Run a script by its digest; the server learns it again after a restart."""
        return self._registered(script)(args=arguments)

    @cache  # noqa: B019 - one queue object lives as long as its process
    def _registered(self, script: str) -> Any:
        return self.server.register_script(_script(script))

    # -- submitting -------------------------------------------------------------------------------------------

    def submit(self, specs: Iterable[JobSpec]) -> list[str]:
        """Put jobs into the line, each at most once, and return the ids that were new.

        The ledger must hold them already, or the AOF is their only record.
        """
        new: list[str] = []
        chunk: list[str] = []
        for spec in specs:
            text = spec.model_dump_json(exclude_none=True)
            chunk += [spec.id, str(Place.of(spec)), _brief(spec), text, spec.batch]
            if len(chunk) >= SUBMIT_CHUNK * 5:
                new += self._submit(chunk)
                chunk = []
        if chunk:
            new += self._submit(chunk)
        return new

    def _submit(self, chunk: list[str]) -> list[str]:
        return [bytes(item).decode() for item in self._run("submit", *chunk)]

    def wait_durable(self, timeout_ms: int = 5_000) -> bool:
        """Wait until what this connection wrote is in the server's append-only file; False when it does not say so.

        Valkey and Redis 7.2+ do; an older one does not know the command.
        """
        try:
            answer = cast("Sequence[int]", self.server.waitaof(1, 0, timeout_ms))
        except redis.ResponseError:
            return False
        return int(answer[0]) >= 1

    # -- looking ----------------------------------------------------------------------------------------------

    def waiting_ids(self, first: int = 0) -> list[str]:
        """Return the ids of the line in order: so many of the first, or all for 0."""
        places = cast("list[bytes]", self.server.zrange("safelight:waiting", 0, first - 1))
        return [item.decode(errors="replace").split(":", 2)[-1] for item in places]

    def waiting_places(self) -> Iterator[Place]:
        """Yield what the places of the line say, in order; what is none of a job is left out."""
        for item in cast("list[bytes]", self.server.zrange("safelight:waiting", 0, -1)):
            if place := Place.parse(item.decode(errors="replace")):
                yield place

    def running(self) -> dict[str, str]:
        """Return what runs: id -> worker."""
        pairs = cast("dict[bytes, bytes]", self.server.hgetall("safelight:running"))
        return {job.decode(): worker.decode() for job, worker in pairs.items()}

    def ended_ids(self, since: float = 0) -> list[str]:
        """Return the ids of ended jobs that the queue still lists, oldest first; of those that ended `since` then."""
        forgotten = time.time() - self.keep_s
        self.server.zremrangebyscore("safelight:ended", "-inf", forgotten)
        found = cast("list[bytes]", self.server.zrangebyscore("safelight:ended", since, "+inf"))
        return [item.decode() for item in found]

    def batch_ids(self, batch: str) -> list[str]:
        return sorted(item.decode() for item in cast("set[bytes]", self.server.smembers(f"safelight:batch:{batch}")))

    def counts(self) -> dict[str, int]:
        """Return how many jobs wait, run and have ended."""
        with self.server.pipeline(transaction=False) as pipe:
            pipe.zcard("safelight:waiting")
            pipe.hlen("safelight:running")
            pipe.zcard("safelight:ended")
            waiting, running, ended = pipe.execute()
        return {"queued": waiting, "running": running, "ended": ended}

    def rows(self, ids: Sequence[str]) -> Iterator[Row]:
        """Yield the listing rows of jobs in the order of `ids`; unknown ones are left out."""
        for job, state, attempts, brief, error, outputs in self._briefs(ids):
            shown = json.loads(brief)
            yield Row(job, state, int(attempts), shown["kind"], shown["model"], shown["batch"], shown["prompt"],
                      error, tuple(json.loads(outputs)), tuple(shown.get("tags", ())))  # fmt: skip

    def objects(
        self, ids: Sequence[str], whereabouts: Callable[[str, Sequence[str]], list[str]], *, state: str | None = None
    ) -> Iterator[str]:
        """Yield jobs as JSON objects for scripts, in the order of `ids`; `whereabouts` says where a job's outputs lie.

        The brief is JSON already and goes in as it is: 100,000 jobs took 1.0 s so and 2.7 s when each was taken apart
        and written again (2 cores, 2026-11-22).
        """
        for job, now, attempts, brief, error, outputs in self._briefs(ids):
            if state is None or now == state:
                paths = json.dumps(whereabouts(job, json.loads(outputs))) if outputs != "[]" else "[]"
                rest = f'"outputs":{paths},"error":{json.dumps(error) if error else "null"}'
                yield f'{{"id":"{job}","state":"{now}","attempts":{attempts},{brief[1:-1]},{rest}}}'

    def shapes(self, ids: Sequence[str]) -> dict[str, tuple[int, str]]:
        """Return how many jobs are of equal kind, model, steps, size and frames, and one of each: what time depends on.

        The server counts: 100,000 jobs take 0.5 s so and 2.1 s when their briefs come here (2 cores, 2026-11-22).
        """
        found: dict[str, tuple[int, str]] = {}
        for start in range(0, len(ids), LIST_CHUNK):
            for shape, jobs, job in self._run("shapes", BRIEF_SHAPE_END, *ids[start : start + LIST_CHUNK]):
                before, first = found.get(shape.decode(), (0, job.decode()))
                found[shape.decode()] = (before + jobs, first)
        return found

    def alike(self, spec: JobSpec, among: int) -> int:
        """Return how many of the next `among` jobs of the line are of the model, size and frames of `spec`."""
        wanted = {"model": spec.model, "width": spec.width, "height": spec.height, "num_frames": spec.num_frames}
        found = self.shapes(self.waiting_ids(among)).items()
        return sum(jobs for shape, (jobs, _) in found if json.loads(shape + "}").items() >= wanted.items())

    def share_loras(self, spec: JobSpec, among: int) -> bool:
        """Whether one of the next `among` jobs of the line has the model and the LoRAs of `spec`, in its order."""
        for job in self.waiting_ids(among):
            try:
                other = self.spec(job)
            except InvalidJob:
                continue  # the worker will refuse it and say so
            if other and other.model == spec.model and lora.same(other.loras, spec.loras):
                return True
        return False

    def _briefs(self, ids: Sequence[str]) -> Iterator[list[str]]:
        for start in range(0, len(ids), LIST_CHUNK):
            for raw in self._run("briefs", *ids[start : start + LIST_CHUNK]):
                yield [part.decode() for part in raw]

    def state(self, job: str) -> str | None:
        raw = cast("bytes | None", self.server.hget(f"safelight:job:{job}", "state"))
        return raw.decode() if raw else None

    def spec(self, job: str) -> JobSpec | None:
        """Return what was asked for under this id; None when the queue does not know it.

        Raises:
            InvalidJob: what stands there is no job of safelight, or another one's: someone else wrote it.
        """
        raw = cast("bytes | None", self.server.hget(f"safelight:job:{job}", "spec"))
        if raw is None:
            return None
        try:
            spec = JobSpec.model_validate(json.loads(raw), strict=False)
        except ValueError as error:
            raise InvalidJob([Fault(job, "what the queue holds is no job of safelight", "Submit it again.")]) from error
        if spec.id != job:
            raise InvalidJob([Fault(job, f"the queue holds the job {spec.id} under it", "Submit it again.")])
        return spec

    def fields(self, job: str) -> dict[str, str]:
        """Return all that the queue knows of one job, {} when it knows nothing."""
        raw = cast("dict[bytes, bytes]", self.server.hgetall(f"safelight:job:{job}"))
        return {name.decode(): value.decode(errors="replace") for name, value in raw.items()}

    def containing(self, part: str) -> list[str]:
        """Return the ids of the queue that have `part` in them: what runs, then the line, then what has ended."""
        return [job for job in (*self.running(), *self.waiting_ids(), *self.ended_ids()) if part in job]

    # -- changing ---------------------------------------------------------------------------------------------

    def cancel(self, ids: Sequence[str]) -> list[str]:
        """Cancel jobs and return for each `cancelled`, `asked` (it runs), its state, or `unknown`."""
        answers: list[str] = []
        for start in range(0, len(ids), LIST_CHUNK):
            chunk = ids[start : start + LIST_CHUNK]
            raw = self._run("cancel", int(time.time()), self.keep_s, *chunk)
            answers += [bytes(item).decode() for item in raw]
        return answers

    def ask_to_stop(self, job: str) -> None:
        """Ask whoever runs a job to stop, also where the server has lost what it knew of it."""
        with self.server.pipeline() as pipe:
            pipe.rpush(f"safelight:cancel:{job}", 1)
            pipe.expire(f"safelight:cancel:{job}", DAY_S)
            pipe.execute()

    def unwritten(self) -> list[str]:
        """Return the jobs that were cancelled while they waited, and may have no receipt yet."""
        return sorted(item.decode() for item in cast("set[bytes]", self.server.smembers("safelight:unwritten")))

    def forget_unwritten(self, ids: Sequence[str]) -> None:
        """Their receipts are written, or they are not cancelled any more."""
        self.server.srem("safelight:unwritten", *ids)

    def requeue(self, job: str) -> bool:
        """Put an ended job back into the line; its receipt must have been put aside."""
        return bool(self._run("requeue", job))

    # -- the worker's side ------------------------------------------------------------------------------------

    def next_due(self, classes: Sequence[int], now: float) -> tuple[str | None, float | None]:
        """Return the place of the next due job, or None and the seconds until one is due (None: none is)."""
        raw_place, due_in = self._run("next", int(now), *classes)
        found = bytes(raw_place).decode(errors="surrogateescape")
        return (found or None), (None if due_in < 0 else float(due_in))

    def drop(self, where: str) -> None:
        """Remove from the line what is no place of a job."""
        self.server.zrem("safelight:waiting", where.encode(errors="surrogateescape"))

    def dispatch(
        self, worker: str, place: Place, queue_key: str, rq_job_id: str, rq_job_key: str, rq_fields: Mapping[str, Any]
    ) -> bool:
        """Move the job at `place` into the worker's own RQ queue; False when it is gone or the worker may not."""
        arguments = (worker, str(place), place.id, queue_key, rq_job_key, rq_job_id)
        return bool(self._run("dispatch", *arguments, *_flat(rq_fields)))

    def conclude(self, receipt: Receipt, worker: str) -> bool:
        """Tell the queue how a running job ended; False when it was not this worker's."""
        fields = ["attempts", receipt.attempts, "error", receipt.error or "",
                  "outputs", json.dumps([output.path for output in receipt.outputs])]  # fmt: skip
        return bool(self._run("conclude", receipt.id, worker, receipt.state, int(time.time()), self.keep_s, *fields))

    def reject(self, job: str, worker: str, error: str) -> bool:
        """End a running job that nothing can be done with, because nobody knows what it was; it has no receipt."""
        return bool(self._run("conclude", job, worker, "failed", int(time.time()), self.keep_s, "error", error))

    def restore(self, receipt: Receipt) -> None:
        """Put an ended job among the ended ones, whatever the queue remembered of it."""
        spec = receipt.spec
        self._run(
            "restore",
            receipt.id,
            str(Place.of(spec)),
            _brief(spec),
            spec.model_dump_json(exclude_none=True),
            spec.batch,
            receipt.state,
            receipt.attempts,
            receipt.error or "",
            json.dumps([output.path for output in receipt.outputs]),
            int(datetime.fromisoformat(receipt.finished_at).timestamp()),
            self.keep_s,
        )

    def give_back(self, job: str, worker: str, attempts: int, later: Place | None = None) -> bool:
        """Put a running job back to its own place in the line, or from now on to a later one."""
        fields = ["attempts", attempts, *(("place", str(later)) if later else ())]
        return bool(self._run("conclude", job, worker, "queued", 0, self.keep_s, *fields))

    def hand_over(self, job: str, taker: str, runner: str) -> bool:
        """Say of a job that `taker` took that `runner` has it; False when it is not the taker's any more."""
        return bool(self._run("handover", job, taker, runner))

    def wait_for_wake(self, worker: str, timeout_s: float) -> None:
        """Block until something was submitted, a hold changed, or the time is over."""
        self.server.blpop([f"safelight:wake:{worker}"], timeout=max(timeout_s, 0.01))

    def wake(self, worker: str) -> None:
        self.server.lpush(f"safelight:wake:{worker}", 1)

    def wake_all(self) -> None:
        for worker in cast("set[bytes]", self.server.smembers("safelight:workers")):
            self.wake(worker.decode())

    def wait_for_cancel(self, job: str, timeout_s: float) -> bool:
        """Block until someone asks to cancel the job, or has before; False when the time is over.

        The wake-up can be lost with a connection, or with the process that read it; the job's own field cannot.
        """
        if self.server.hexists(f"safelight:job:{job}", "cancel"):
            return True
        return self.server.blpop([f"safelight:cancel:{job}"], timeout=max(timeout_s, 0.01)) is not None

    def progress(self, job: str, progress: dict[str, Any]) -> None:
        self._run("progress", job, json.dumps(progress))

    # -- workers and holds ------------------------------------------------------------------------------------

    def publish_worker(self, name: str, ttl_s: int, **fields: str) -> None:
        """Say that a worker lives and what it is; forgotten `ttl_s` after the last word from it."""
        with self.server.pipeline() as pipe:
            pipe.sadd("safelight:workers", name)
            pipe.hset(f"safelight:worker:{name}", items=_flat({"seen_at": str(time.time()), **fields}))
            pipe.expire(f"safelight:worker:{name}", ttl_s)
            pipe.execute()

    def heard_of(self, name: str) -> bool:
        """Whether a worker has said lately that it lives."""
        return bool(self.server.exists(f"safelight:worker:{name}"))

    def forget_worker(self, name: str) -> None:
        with self.server.pipeline() as pipe:
            pipe.srem("safelight:workers", name)
            pipe.delete(f"safelight:worker:{name}", f"safelight:wake:{name}", f"safelight:holds:{name}")
            pipe.execute()

    def set_holds(self, worker: str, holds: dict[str, str]) -> None:
        """Replace the named reasons for which a worker starts nothing."""
        key = f"safelight:holds:{worker}"
        with self.server.pipeline() as pipe:
            pipe.delete(key)
            if holds:
                pipe.hset(key, items=_flat(holds))
            pipe.execute()

    def workers(self) -> list[WorkerRow]:
        """Return the workers that have been heard of lately."""
        rows = []
        running = {worker: job for job, worker in self.running().items()}
        for raw in sorted(cast("set[bytes]", self.server.smembers("safelight:workers"))):
            name = raw.decode()
            fields = {k.decode(): v.decode() for k, v in
                      cast("dict[bytes, bytes]", self.server.hgetall(f"safelight:worker:{name}")).items()}  # fmt: skip
            if not fields:
                continue
            holds = {k.decode(): v.decode() for k, v in
                     cast("dict[bytes, bytes]", self.server.hgetall(f"safelight:holds:{name}")).items()}  # fmt: skip
            machine = Machine.model_validate_json(fields["machine"]) if "machine" in fields else None
            rows.append(WorkerRow(name, fields.get("device", ""), float(fields["seen_at"]), running.get(name),
                                  holds, machine, fields.get("engine", "")))  # fmt: skip
        return rows

    def set_user_hold(self, reason: str) -> None:
        self.server.set("safelight:paused", reason)
        self.wake_all()

    def lift_user_hold(self) -> None:
        self.server.delete("safelight:paused")
        self.wake_all()

    def user_hold(self) -> str | None:
        raw = cast("bytes | None", self.server.get("safelight:paused"))
        return raw.decode() if raw is not None else None

    # -- the ledger's mark, and the pace ----------------------------------------------------------------------

    def filled(self) -> bool:
        """Whether a worker has filled the line from the ledger since the server last lost everything."""
        return bool(self.server.exists("safelight:ledger"))

    def mark_filled(self) -> None:
        self.server.set("safelight:ledger", int(time.time()))

    def set_calibration(self, calibration: Calibration) -> None:
        self.server.set("safelight:calibration", calibration.model_dump_json())

    def calibration(self) -> Calibration:
        """Return what this machine has shown; nothing where an older version wrote it and no worker has since."""
        raw = cast("bytes | None", self.server.get("safelight:calibration"))
        try:
            return Calibration.model_validate_json(raw) if raw else NOTHING_LEARNED
        except ValidationError:
            return NOTHING_LEARNED
