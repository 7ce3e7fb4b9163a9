"""The waiting line on a real server: its order, its races, and what happens when the server has forgotten things."""

from __future__ import annotations

import json
import resource
import signal
import socket
import socketserver
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import redis

from safelight import jobqueue, queueserver
from safelight.calibration import NOTHING_LEARNED, Calibration
from safelight.errors import BadConfig, InvalidJob, QueueUnreachable
from safelight.ids import job_id
from safelight.jobqueue import JobQueue
from safelight.jobspec import JobSpec
from safelight.lora import Lora
from safelight.machine import Machine
from safelight.place import Place
from safelight.queueserver import AWAY
from safelight.receipt import Output, Receipt
from safelightd import redis_server
from tests.conftest import Installation
from tests.integration.making import clip_spec, image_spec

NIGHT = "20261122-210000-000abcd"
ALL = [0, 1, 2, 3]
NOW = time.time()


def jobs(count: int, **fields: object) -> list[JobSpec]:
    return [image_spec(id=job_id(NIGHT, n), index=n, **fields) for n in range(1, count + 1)]


def receipt(spec: JobSpec, state: str = "done") -> Receipt:
    output = Output(path="2026-11-22/night/0001_a.png", sha256="0" * 64, bytes=1, width=64, height=48)
    return Receipt.model_validate(
        {"id": spec.id, "state": state, "spec": spec, "attempts": 2, "error": None if state == "done" else "so it is",
         "outputs": (output,) if state == "done" else (), "finished_at": "2026-11-23T06:00:00+01:00"}
    )  # fmt: skip


def take(queue: JobQueue, worker: str, classes: list[int] = ALL, *, call: str = "") -> str | None:
    """Take the next due job as a worker does; returns its id."""
    where, _ = queue.next_due(classes, time.time())
    if where is None:
        return None
    place = Place.parse(where)
    assert place is not None
    rq_job = call or f"{place.id}_{time.monotonic_ns()}"
    fields = {"status": "queued"}
    moved = queue.dispatch(worker, place, f"rq:queue:{worker}", rq_job, f"rq:job:{rq_job}", fields)
    return place.id if moved else None


def nothing_is_lost(queue: JobQueue, specs: list[JobSpec]) -> bool:
    """Every job is in exactly one place."""
    places = [*queue.waiting_ids(), *queue.running(), *queue.ended_ids()]
    return sorted(places) == sorted(spec.id for spec in specs)


# -- the line ----------------------------------------------------------------------------------------------------------


def test_jobs_leave_the_line_by_priority_then_time_then_submission(queue: JobQueue) -> None:
    past = "2026-11-22T21:00:00+01:00"
    made = jobs(6)
    written = [{"priority": "low"}, {}, {"priority": "night"}, {"not_before": past}, {"priority": "high"}, {}]
    queue.submit(spec.model_copy(update=fields) for spec, fields in zip(made, written, strict=True))
    expected = [made[n].id for n in (4, 1, 5, 3, 0, 2)]

    assert expected == queue.waiting_ids()
    assert expected == [take(queue, "w") for _ in made]


def test_a_job_is_queued_once_however_often_it_is_submitted_and_in_whatever_state(queue: JobQueue) -> None:
    (spec,) = jobs(1)

    assert [spec.id] == queue.submit([spec])
    assert queue.submit([spec, spec]) == []

    take(queue, "w")

    assert queue.submit([spec]) == []

    queue.conclude(receipt(spec), "w")

    assert queue.submit([spec]) == []
    assert nothing_is_lost(queue, [spec])


def test_more_jobs_than_one_call_carries_all_arrive_in_order(queue: JobQueue) -> None:
    specs = jobs(jobqueue.SUBMIT_CHUNK * 2 + 1)

    assert [spec.id for spec in specs] == queue.submit(specs)
    assert [spec.id for spec in specs] == queue.waiting_ids()
    assert queue.counts() == {"queued": len(specs), "running": 0, "ended": 0}
    assert [row.prompt for row in queue.rows([spec.id for spec in specs])] == ["a red fox"] * len(specs)


def test_a_dated_job_is_not_due_before_its_time_and_its_class_says_when(queue: JobQueue) -> None:
    later = image_spec(id=job_id(NIGHT, 1), not_before="2026-11-22T21:00:30+00:00")
    at = 1_795_381_200.0  # 2026-11-22T21:00:00+00:00
    queue.submit([later, image_spec(id=job_id(NIGHT, 2), priority="night")])

    assert queue.next_due([0, 1, 2], at) == (None, 30.0)
    assert queue.next_due([0, 1, 2], at + 30)[0] == str(Place.of(later))
    assert queue.next_due([3], at)[0] is not None
    assert queue.next_due([0], at) == (None, None)


def test_two_workers_never_take_the_same_job(queue: JobQueue, installation: Installation) -> None:
    specs = jobs(120)
    queue.submit(specs)

    def drain(worker: str) -> list[str]:
        own = JobQueue(queueserver.connect(installation.config.url))
        taken = []
        while own.counts()["queued"]:
            if job := take(own, worker):
                taken.append(job)
        own.server.close()
        return taken

    with ThreadPoolExecutor(4) as pool:
        taken = list(pool.map(drain, "abcd"))

    assert sorted(job for one in taken for job in one) == [spec.id for spec in specs]
    assert queue.running() == {job: worker for worker, one in zip("abcd", taken, strict=True) for job in one}


def test_a_dispatch_sent_again_after_a_lost_reply_is_the_same_dispatch(queue: JobQueue) -> None:
    (spec,) = jobs(1)
    queue.submit([spec])
    place, fields = Place.of(spec), {"status": "queued"}
    call = ("w", place, "rq:queue:w", "x_1", "rq:job:x_1", fields)

    assert queue.dispatch(*call)
    assert queue.dispatch(*call)
    assert not queue.dispatch("v", place, "rq:queue:v", "x_2", "rq:job:x_2", fields)
    assert queue.server.lrange("rq:queue:w", 0, -1) == [b"x_1"]


def test_a_held_worker_gets_nothing_and_another_does(queue: JobQueue) -> None:
    queue.submit(jobs(1))
    queue.set_holds("w", {"disk": "full"})

    assert take(queue, "w") is None
    assert take(queue, "v") == job_id(NIGHT, 1)

    queue.submit(jobs(2))
    queue.set_holds("w", {})

    assert take(queue, "w") == job_id(NIGHT, 2)


def test_nobody_gets_a_job_once_a_person_has_paused(queue: JobQueue) -> None:
    """Also a worker that looked at its holds a moment before."""
    queue.submit(jobs(1))
    queue.set_holds("w", {})
    queue.set_user_hold("dinner")

    assert take(queue, "w") is None
    assert queue.waiting_ids() == [job_id(NIGHT, 1)]

    queue.lift_user_hold()

    assert take(queue, "w") == job_id(NIGHT, 1)


# -- ends --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["done", "failed", "quarantined", "cancelled"])
def test_an_ended_job_is_listed_as_it_ended_and_leaves_after_its_days(queue: JobQueue, state: str) -> None:
    (spec,) = jobs(1)
    queue.submit([spec])
    take(queue, "w")
    queue.server.zadd("safelight:ended", {"long-ago": NOW - 15 * 86_400, "lately": NOW - 13 * 86_400})

    assert queue.conclude(receipt(spec, state), "w")
    assert queue.server.zrem("safelight:ended", "long-ago", "lately") == 1

    (row,) = queue.rows([spec.id])
    assert (row.state, row.attempts, row.batch, row.model) == (state, 2, "night", "tiny-flux-schnell")
    assert (row.error, row.outputs) == (("", ("2026-11-22/night/0001_a.png",)) if state == "done" else ("so it is", ()))
    assert 13 * 86_400 < queue.server.ttl(f"safelight:job:{spec.id}") <= 14 * 86_400
    assert nothing_is_lost(queue, [spec])


def test_only_the_worker_that_runs_a_job_can_end_it(queue: JobQueue) -> None:
    (spec,) = jobs(1)
    queue.submit([spec])

    assert not queue.conclude(receipt(spec), "w")

    take(queue, "w")

    assert not queue.conclude(receipt(spec), "v")
    assert not queue.give_back(spec.id, "v", 1)
    assert queue.conclude(receipt(spec), "w")
    assert not queue.conclude(receipt(spec), "w")


def test_a_job_given_back_stands_where_it_stood(queue: JobQueue) -> None:
    specs = jobs(3)
    queue.submit(specs)
    take(queue, "w")
    queue.progress(specs[0].id, {"phase": "denoise", "i": 1})

    assert queue.give_back(specs[0].id, "w", 1)
    assert [spec.id for spec in specs] == queue.waiting_ids()
    assert {"progress", "worker"} & set(queue.fields(specs[0].id)) == set()


def test_a_job_given_back_to_a_later_place_lets_others_go_first_and_ends_like_any(queue: JobQueue) -> None:
    specs = first, second, third = jobs(3)
    queue.submit(specs)
    later = [Place.of(spec, 1_795_381_200.5) for spec in (first, second)]
    for where in later:
        taken = take(queue, "w")
        assert taken is not None
        assert queue.give_back(taken, "w", 1, where)

    assert later[0].not_before == 1_795_381_201
    assert queue.waiting_ids() == [third.id, first.id, second.id]
    assert queue.next_due([1], 1_795_381_200)[0] == str(Place.of(third))

    queue.cancel([first.id])
    queue.restore(receipt(second))

    assert queue.waiting_ids() == [third.id]
    assert nothing_is_lost(queue, list(specs))


def test_cancel_answers_for_each_job_what_became_of_it(queue: JobQueue) -> None:
    running, waiting, done = specs = jobs(3)
    queue.submit([done])
    take(queue, "w")
    queue.conclude(receipt(done), "w")
    queue.submit([running])
    take(queue, "w")
    queue.submit([waiting])
    ids = [spec.id for spec in specs]

    assert queue.cancel([*ids, "nobody"]) == ["asked", "cancelled", "done", "unknown"]
    assert queue.cancel(ids) == ["asked", "cancelled", "done"]
    assert queue.waiting_ids() == []
    assert nothing_is_lost(queue, specs)


def test_a_cancellation_is_heard_at_once_and_again_by_whoever_runs_the_job_next(queue: JobQueue) -> None:
    (spec,) = jobs(1)
    queue.submit([spec])
    take(queue, "w")

    assert not queue.wait_for_cancel(spec.id, 0.01)

    timer = threading.Timer(0.1, queue.cancel, [[spec.id]])
    timer.start()
    began = time.monotonic()

    assert queue.wait_for_cancel(spec.id, 120)
    assert time.monotonic() - began < 60

    timer.join()
    queue.give_back(spec.id, "w", 1)
    take(queue, "w")

    assert queue.wait_for_cancel(spec.id, 0.01)


def test_a_retried_job_starts_afresh(queue: JobQueue) -> None:
    (spec,) = jobs(1)
    queue.submit([spec])

    assert not queue.requeue(spec.id)

    take(queue, "w")
    queue.cancel([spec.id])

    assert not queue.requeue(spec.id)

    queue.conclude(receipt(spec, "cancelled"), "w")

    assert queue.requeue(spec.id)
    assert not queue.requeue(spec.id)
    fields = queue.fields(spec.id)
    assert (fields["state"], fields["attempts"]) == ("queued", "0")
    assert {"cancel", "error", "outputs"} & set(fields) == set()
    assert queue.server.ttl(f"safelight:job:{spec.id}") == -1
    assert take(queue, "w") == spec.id
    assert not queue.wait_for_cancel(spec.id, 0.01)


# -- a server that has forgotten ---------------------------------------------------------------------------------------


def test_a_receipt_restores_a_job_the_server_has_forgotten_or_remembers_wrongly(queue: JobQueue) -> None:
    _forgotten, waiting, running = specs = jobs(3)
    queue.submit([running])
    take(queue, "w")
    queue.submit([waiting])
    for spec in specs:
        queue.restore(receipt(spec))

    assert {spec.id for spec in specs} == set(queue.ended_ids())
    assert [row.state for row in queue.rows([spec.id for spec in specs])] == ["done"] * 3
    assert nothing_is_lost(queue, specs)
    assert set(queue.batch_ids("night")) == {spec.id for spec in specs}


def test_what_a_running_job_says_after_a_wipe_leaves_no_half_job(queue: JobQueue) -> None:
    (spec,) = jobs(1)
    queue.submit([spec])
    take(queue, "w")
    queue.server.flushall()
    queue.progress(spec.id, {"i": 1})

    assert queue.fields(spec.id) == {}
    assert not queue.give_back(spec.id, "w", 1)
    assert queue.submit([spec]) == [spec.id]


def test_a_job_whose_fields_are_gone_is_forgotten_and_can_be_submitted_again(queue: JobQueue) -> None:
    (spec,) = jobs(1)
    queue.submit([spec])
    take(queue, "w")
    queue.server.delete(f"safelight:job:{spec.id}")

    assert not queue.give_back(spec.id, "w", 1)
    assert queue.running() == {}
    assert queue.submit([spec]) == [spec.id]
    assert take(queue, "w") == spec.id


def test_accepted_jobs_survive_a_server_that_is_killed(queue: JobQueue, installation: Installation) -> None:
    specs = jobs(700)
    queue.submit(specs)
    take(queue, "w")
    pid = int(queue.server.info("server")["process_id"])
    subprocess.run(["kill", "-9", str(pid)], check=True)
    paths = installation.paths
    again = subprocess.Popen(
        redis_server.command(redis_server.find_binary(), paths.socket, paths.redis), stdout=subprocess.DEVNULL
    )
    try:
        eventually(lambda: answers(queue))

        assert nothing_is_lost(queue, specs)
        assert queue.running() == {specs[0].id: "w"}
        assert queue.wait_durable()
    finally:
        again.kill()
        again.wait()


def answers(queue: JobQueue) -> bool:
    try:
        return bool(queue.server.ping())
    except AWAY:
        return False


def eventually(true: Callable[[], object], timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def fill(queue: JobQueue) -> None:
    for n in range(2, 5_000):
        queue.submit([image_spec(id=job_id(NIGHT, n))])


def test_a_server_whose_disk_is_full_counts_as_away(installation: Installation) -> None:
    """RLIMIT_FSIZE stops the append-only file from growing, as a full disk does."""
    paths = installation.paths
    paths.redis.mkdir(parents=True)
    paths.socket.parent.mkdir(parents=True)
    command = redis_server.command(redis_server.find_binary(), paths.socket, paths.redis)
    server = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, preexec_fn=lambda: signal.signal(signal.SIGXFSZ, signal.SIG_IGN),
        restore_signals=False,
    )  # fmt: skip
    try:
        eventually(paths.socket.exists)
        queue = JobQueue(queueserver.connect(installation.config.url))
        queue.submit(jobs(1))
        resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (2_000, 2_000))
        with pytest.raises(AWAY):
            fill(queue)
        with pytest.raises(AWAY):
            queue.server.set("plain", 1)
        assert queue.counts()["queued"] >= 1
        queue.server.close()
    finally:
        server.kill()
        server.wait()


# -- what others wrote -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "written", ["", "nonsense", "[]", '{"v": 1}', image_spec(id=job_id(NIGHT, 2)).model_dump_json(), b"\xff"]
)
def test_a_spec_that_is_no_job_or_another_one_is_named(queue: JobQueue, written: str | bytes) -> None:
    (spec,) = jobs(1)
    queue.submit([spec])
    queue.server.hset(f"safelight:job:{spec.id}", "spec", written)
    with pytest.raises(InvalidJob, match=f"{spec.id}: .*Submit it again"):
        queue.spec(spec.id)
    take(queue, "w")

    assert queue.reject(spec.id, "w", "it is no job")
    assert queue.fields(spec.id)["error"] == "it is no job"
    assert queue.ended_ids() == [spec.id]


def test_specs_come_back_as_they_were_written(queue: JobQueue) -> None:
    specs = [clip_spec(id=job_id(NIGHT, 1), prompt='Füchse 🦊 "\\ \n', axes={"seed": 1, "steps": 2.5}), *jobs(2)[1:]]
    queue.submit(specs)

    assert specs == [queue.spec(spec.id) for spec in specs]
    assert queue.spec("nobody") is None
    assert queue.state("nobody") is None


def test_a_part_of_an_id_finds_the_jobs_that_have_it(queue: JobQueue) -> None:
    specs = jobs(11)
    queue.submit(specs)

    assert queue.containing("00010") == [specs[9].id]
    assert queue.containing("0001") == [specs[0].id, specs[9].id, specs[10].id]
    assert queue.containing("none of these") == []


def test_the_line_tells_whether_another_job_has_the_same_loras(queue: JobQueue) -> None:
    style = Lora(name="style", sha256="a" * 64)
    scales = (1.0, 0.5, None, 1.0)
    own, other, plain, same = (
        spec.model_copy(update={"loras": (style.model_copy(update={"scale": scale}),) if scale else ()})
        for spec, scale in zip(jobs(4), scales, strict=True)
    )
    queue.submit([other, plain])

    assert not queue.share_loras(own, 50)
    queue.submit([same])
    assert queue.share_loras(own, 50)
    assert not queue.share_loras(own, 1)
    assert not queue.share_loras(own.model_copy(update={"model": "tiny-flux-dev"}), 50)


def test_scripts_get_valid_json_for_any_prompt_and_error(queue: JobQueue) -> None:
    specs = [image_spec(id=job_id(NIGHT, n), prompt=text) for n, text in enumerate(['"', "\\", "\n\t\x7f", "🦊"], 1)]
    queue.submit(specs)
    take(queue, "w")
    queue.conclude(receipt(specs[0], "failed").model_copy(update={"error": 'with "quotes"\n'}), "w")
    found = [json.loads(line) for line in queue.objects([spec.id for spec in specs], lambda _job, outputs: [*outputs])]

    assert [spec.prompt for spec in specs] == [one["prompt"] for one in found]
    assert (found[0]["error"], found[0]["state"], found[1]["error"]) == ('with "quotes"\n', "failed", None)


# -- workers -----------------------------------------------------------------------------------------------------------


def test_workers_are_seen_with_their_holds_until_they_are_silent(queue: JobQueue) -> None:
    machine = Machine(device="cpu", ram_total_bytes=1, ram_available_bytes=1, cpus=1)
    queue.publish_worker("w", 1, device="cpu", machine=machine.model_dump_json(), engine="not running")
    queue.set_holds("w", {"user": "dinner"})
    (row,) = queue.workers()

    assert (row.name, row.device, row.job, row.holds, row.machine) == ("w", "cpu", None, {"user": "dinner"}, machine)

    eventually(lambda: queue.workers() == [])


def test_a_submission_a_retry_and_a_lifted_hold_wake_every_worker(queue: JobQueue) -> None:
    for name in ("v", "w"):
        queue.publish_worker(name, 60, device="cpu")
    (spec,) = jobs(1)

    def wakes(act: Callable[[], object]) -> bool:
        act()
        return all(queue.server.lpop(f"safelight:wake:{name}") for name in ("v", "w"))

    assert wakes(lambda: queue.submit([spec]))
    queue.cancel([spec.id])
    assert wakes(lambda: queue.requeue(spec.id))
    assert wakes(lambda: queue.set_user_hold("dinner"))
    assert queue.user_hold() == "dinner"
    assert wakes(queue.lift_user_hold)
    assert queue.user_hold() is None

    queue.forget_worker("v")

    assert queue.server.smembers("safelight:workers") == {b"w"}


def test_what_this_machine_has_shown_is_there_for_clients(queue: JobQueue) -> None:
    shown = Calibration(work={"flux-dev/decode/whole": 0.5}, room_bytes=7)

    assert queue.calibration() == NOTHING_LEARNED

    queue.set_calibration(shown)

    assert shown == queue.calibration()

    queue.server.set("safelight:calibration", b'{"v":2,"seconds":{"flux-dev/decode/whole":0.5}}')

    assert queue.calibration() == NOTHING_LEARNED  # an older version's, until a worker writes its own


# -- the server --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    ["unix:///run/x.sock", "redis://:secret@localhost:6379", "redis://u:secret@127.0.0.1/1", "redis://:s@[::1]:1",
     "rediss://:secret@gpu.example:6380"],
)  # fmt: skip
def test_a_url_that_nobody_else_can_read_is_allowed(url: str) -> None:
    queueserver.check_url(url)


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("redis://:secret@gpu.example", "without TLS"),
        ("redis://:secret@192.168.1.2", "without TLS"),
        ("redis:///0", "without TLS"),
        ("redis://localhost", "no password"),
        ("rediss://gpu.example", "no password"),
        ("http://:secret@localhost", "unknown scheme"),
        ("localhost:6379", "unknown scheme"),
        ("", "unknown scheme"),
        ("redis://:secret@localhost:port", "[Pp]ort"),
        ("redis://:secret@[::1", "IPv6"),
        ("unix:///run/x.sock?db=many", "invalid literal|Invalid value"),
    ],
)
def test_a_url_that_others_can_read_or_nobody_can_is_refused_without_its_password(url: str, problem: str) -> None:
    with pytest.raises(BadConfig, match=problem) as refused:
        queueserver.connect(url, timeout_s=0.1, retries=0)

    assert "secret" not in str(refused.value)


def test_an_absent_server_is_unreachable_and_the_message_says_how_to_start_it(tmp_path: Path) -> None:
    with pytest.raises(QueueUnreachable, match="safelight up"):
        queueserver.connect(f"unix://{tmp_path}/none.sock", timeout_s=0.1, retries=0)


def test_a_server_that_wants_another_password_is_a_matter_of_the_settings(
    queue: JobQueue, installation: Installation
) -> None:
    queue.server.config_set("requirepass", "right")
    url = installation.config.url
    for wrong in (url, url.replace("unix://", "unix://:wrong@")):
        with pytest.raises(BadConfig, match="refused the password"):
            queueserver.connect(wrong, timeout_s=1.0, retries=0)
    queueserver.connect(url.replace("unix://", "unix://:right@"), timeout_s=1.0, retries=0).close()


def test_the_embedded_server_is_safe_and_one_that_evicts_or_forgets_is_refused(queue: JobQueue) -> None:
    queueserver.check_server(queue.server)
    queue.server.config_set("maxmemory-policy", "allkeys-lru")
    queue.server.config_set("appendonly", "no")
    with pytest.raises(BadConfig) as refused:
        queueserver.check_server(queue.server)

    assert "allkeys-lru, which deletes jobs: set noeviction" in str(refused.value)
    assert "set appendonly yes" in str(refused.value)


@contextmanager
def server_that_says(info: str) -> Iterator[int]:
    """A server of another age, as far as INFO shows: there is none to install here."""

    class Answers(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            while line := self.rfile.readline():
                words = [self.rfile.read(int(self.rfile.readline()[1:]) + 2).strip() for _ in range(int(line[1:]))]
                body = info.encode()
                said = b"$%d\r\n%s\r\n" % (len(body), body) if words[0] == b"INFO" else b"+PONG\r\n"
                self.wfile.write(said)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


@pytest.mark.parametrize(
    ("info", "said"),
    [
        ("redis_version:6.0.16\r\naof_enabled:1\r\nmaxmemory_policy:noeviction\r\n", "redis 6.0.16 is older than 6.2"),
        (
            "redis_version:7.2.4\r\nserver_name:valkey\r\nvalkey_version:7.1.9\r\naof_enabled:1\r\n",
            "valkey 7.1.9 is older than 7.2",
        ),
        ("redis_version:6.2.0\r\naof_enabled:1\r\nmaxmemory_policy:noeviction\r\n", ""),
        ("redis_version:10.0.0\r\naof_enabled:1\r\nmaxmemory_policy:noeviction\r\n", ""),
    ],
)
def test_a_server_too_old_for_the_reliable_path_is_refused(info: str, said: str) -> None:
    with server_that_says(info) as port:
        server = redis.Redis(port=port, protocol=2)
        if said:
            with pytest.raises(BadConfig, match=said):
                queueserver.check_server(server)
        else:
            queueserver.check_server(server)
        server.close()


def test_a_server_that_hangs_is_unreachable_within_the_time_given(tmp_path: Path) -> None:
    path = str(tmp_path / "deaf.sock")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as deaf:
        deaf.bind(path)
        deaf.listen()
        began = time.monotonic()
        with pytest.raises(QueueUnreachable):
            queueserver.connect(f"unix://{path}", timeout_s=0.2, retries=1)

    assert time.monotonic() - began < 30
