"""Worker and engine talk over a socketpair: whole messages, dead ends, and processes that end when told."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from safelight.machine import Machine
from safelightd import link, torchversion
from safelightd.link import MESSAGE_BYTES_MAX, EngineGone, EngineProcess, Link, engine_env
from tests.conftest import Installation
from tests.daemon.test_worker import eventually, gone

CPU = Machine(device="cpu", ram_total_bytes=1, ram_available_bytes=1, cpus=1)
GPU = Machine(device="cuda", uuid="GPU-1", ram_total_bytes=1, ram_available_bytes=1, cpus=1)


@pytest.fixture
def ends() -> Iterator[tuple[Link, Link]]:
    one, other = socket.socketpair()
    links = Link(one), Link(other)
    yield links
    for end in links:
        end.close()


# -- messages ----------------------------------------------------------------------------------------------------------


def test_a_message_arrives_as_it_was_sent_with_its_execution_and_number(ends: tuple[Link, Link]) -> None:
    ours, theirs = ends
    ours.send("run", "x", spec={"prompt": 'Füchse 🦊 "\n'}, attempt=1)
    ours.send("cancel", "x")

    assert theirs.receive() == {"v": 1, "type": "run", "execution": "x", "seq": 1,
                                "spec": {"prompt": 'Füchse 🦊 "\n'}, "attempt": 1}  # fmt: skip
    assert theirs.receive() == {"v": 1, "type": "cancel", "execution": "x", "seq": 2}


def test_messages_of_many_threads_do_not_mix(ends: tuple[Link, Link]) -> None:
    ours, theirs = ends
    texts = [str(n) * 50_000 for n in range(8)]
    with ThreadPoolExecutor(9) as pool:
        received = pool.submit(lambda: [theirs.receive() for _ in range(80)])
        list(pool.map(lambda n: ours.send("step", "x", text=texts[n % 8]), range(80)))
        messages = received.result(20)

    assert sorted(message["seq"] for message in messages if message) == list(range(1, 81))
    assert all(message and message["text"] in texts for message in messages)


def test_a_message_that_arrives_in_pieces_is_put_together(ends: tuple[Link, Link]) -> None:
    ours, theirs = ends
    line = json.dumps({"v": 1, "type": "alive", "execution": "x", "seq": 1}).encode() + b"\n"
    ours.end.sendall(line[:10])

    assert theirs.receive(0.01) is None

    ours.end.sendall(line[10:] + line + line[:5])

    assert [theirs.receive(1) is not None for _ in range(2)] == [True, True]
    assert theirs.receive(0.01) is None


def test_a_descriptor_wakes_the_receiver(ends: tuple[Link, Link]) -> None:
    read, write = os.pipe()
    timer = threading.Timer(0.05, os.write, [write, b"x"])
    timer.start()
    began = time.monotonic()

    assert ends[0].receive(120, wakeup=read) is None
    assert time.monotonic() - began < 60

    timer.join()
    os.close(read)
    os.close(write)


@pytest.mark.parametrize(
    "written",
    [b"nonsense\n", b"\xff\xfe\n", b"[1]\n", b"{}\n", b'{"v": 2, "type": "run"}\n', b"\n", b"null\n"],
)
def test_what_is_no_message_of_ours_ends_the_link(ends: tuple[Link, Link], written: bytes) -> None:
    ends[0].end.sendall(written)
    with pytest.raises(EngineGone, match=r"no message|another version"):
        ends[1].receive(1)


def test_an_endless_line_ends_the_link_and_not_the_memory(ends: tuple[Link, Link]) -> None:
    def flood() -> None:
        while True:
            ends[0].end.sendall(b"x" * 65_536)

    thread = threading.Thread(target=swallow, args=(flood,))
    thread.start()
    with pytest.raises(EngineGone, match="no message"):
        ends[1].receive(20)

    assert len(ends[1]._received) < MESSAGE_BYTES_MAX + 2 * 65_536
    ends[1].close()
    thread.join(120)


def swallow(act: Callable[[], None]) -> None:
    """The flood ends when its reader has gone."""
    try:
        act()
    except OSError:
        return


def test_a_closed_end_is_noticed_by_reader_and_writer(ends: tuple[Link, Link]) -> None:
    ours, theirs = ends
    theirs.send("done", "x", receipt={})
    theirs.close()

    assert ours.receive(1) == {"v": 1, "type": "done", "execution": "x", "seq": 1, "receipt": {}}
    with pytest.raises(EngineGone, match=r"closed|broke"):
        ours.receive(1)
    with pytest.raises(EngineGone, match="broke while sending run"):
        ours.send("run", "x")


# -- the process -------------------------------------------------------------------------------------------------------

ENGINE = """
import os, signal, socket, subprocess, sys
from safelightd.link import EngineGone, Link
link = Link(socket.socket(fileno=int(sys.argv[-1])))
if "stubborn" in sys.argv:
    child = subprocess.Popen(["sleep", "60"])
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    link.send("alive", str(child.pid))
    signal.pause()
open_files = sorted(os.path.basename(os.readlink(f"/proc/self/fd/{n}")) for n in os.listdir("/proc/self/fd")
                    if n not in "012" and os.path.exists(f"/proc/self/fd/{n}"))
link.send("alive", "x", session=os.getsid(0) == os.getpid(), arguments=sys.argv[1:], files=open_files)
try:
    link.receive()
except EngineGone:
    sys.exit(7)
"""


@pytest.fixture
def start(installation: Installation) -> Iterator[Callable[..., EngineProcess]]:
    started: list[EngineProcess] = []

    def make(*arguments: str, machine: Machine = CPU) -> EngineProcess:
        engine = EngineProcess(installation.config, machine, [sys.executable, "-c", ENGINE, *arguments])
        engine._env["PYTHONPATH"] = ":".join(sys.path)
        started.append(engine)
        return engine

    yield make
    for engine in started:
        engine.kill()


def heard(engine: EngineProcess) -> dict[str, object]:
    assert engine.link is not None
    message = engine.link.receive(20)
    assert message is not None
    return message


def test_an_engine_is_started_once_knows_its_gpu_and_inherits_nothing_else(
    start: Callable[..., EngineProcess], tmp_path: Path
) -> None:
    secret = (tmp_path / "secret").open("w")
    engine = start(machine=GPU)
    engine.ensure()
    pid = engine.pid
    engine.ensure()
    message = heard(engine)

    assert engine.pid == pid
    assert message["session"] is True
    arguments = message["arguments"]
    assert isinstance(arguments, list)
    assert arguments[:3] == ["--gpu", "GPU-1", "--link"]
    assert "secret" not in str(message["files"])
    secret.close()


def test_an_idle_engine_ends_by_itself_when_the_link_closes(start: Callable[..., EngineProcess]) -> None:
    engine = start()
    engine.ensure()
    heard(engine)
    assert engine.pid is not None
    process = psutil.Process(engine.pid)
    engine.stop(timeout_s=20)

    assert gone(process)
    assert (engine.running(), engine.pid, engine.link) == (False, None, None)
    engine.stop(timeout_s=1)
    assert engine.kill() is None


def test_an_engine_that_will_not_end_is_killed_with_what_it_started(start: Callable[..., EngineProcess]) -> None:
    for end in (lambda engine: engine.stop(timeout_s=0.1), lambda engine: engine.kill()):
        engine = start("stubborn")
        engine.ensure()
        child = psutil.Process(int(str(heard(engine)["execution"])))
        end(engine)

        assert not engine.running()
        eventually(lambda child=child: gone(child))


def test_a_dead_engine_is_replaced_by_a_new_one_with_a_new_link(start: Callable[..., EngineProcess]) -> None:
    engine = start()
    engine.ensure()
    heard(engine)
    first = engine.pid
    assert first is not None
    os.kill(first, signal.SIGKILL)
    eventually(lambda: not engine.running())
    engine.ensure()

    assert heard(engine)["seq"] == 1
    assert engine.pid != first
    assert engine.kill() == -signal.SIGKILL


def test_an_engine_dies_with_its_worker_however_that_dies(installation: Installation) -> None:
    program = (
        "import time\nfrom safelight import config\nfrom safelight.machine import Machine\n"
        "from safelightd.link import EngineProcess\n"
        "cpu = Machine(device='cpu', ram_total_bytes=1, ram_available_bytes=1, cpus=1)\n"
        "engine = EngineProcess(config.load(), cpu, ['sh', '-c', 'exec sleep 60', '#'])\n"
        "engine.ensure(); print(engine.pid, flush=True); time.sleep(60)\n"
    )
    env = {**installation.env, "PYTHONPATH": ":".join(sys.path)}
    worker = subprocess.Popen([sys.executable, "-c", program], env=env, stdout=subprocess.PIPE, text=True)
    assert worker.stdout is not None
    engine = psutil.Process(int(worker.stdout.readline()))
    worker.kill()
    worker.wait()
    worker.stdout.close()
    eventually(lambda: gone(engine))


def test_the_engine_sees_its_gpu_alone_reaches_no_network_and_does_not_speak_to_systemd(
    installation: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", "/run/notify")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    on_gpu, on_cpu = engine_env(installation.config, GPU), engine_env(installation.config, CPU)

    assert (on_gpu["CUDA_VISIBLE_DEVICES"], on_cpu["CUDA_VISIBLE_DEVICES"]) == ("GPU-1", "")
    assert on_gpu["HF_HUB_OFFLINE"] == "1"
    assert "NOTIFY_SOCKET" not in on_gpu
    assert on_gpu["SAFELIGHT_CONFIG"] == str(installation.config.source)
    assert link.ENGINE[1:] == ("-m", "safelightd.engine")


@pytest.mark.parametrize(
    ("torch", "exact"),
    [
        ("2.11.0+cu128", False), ("2.12.1", False), ("2.13.0+cpu", True), ("2.13.0a0+git1", True), ("3.0.0.dev2", True),
        ("", False),
    ],
)  # fmt: skip
def test_torch_is_told_to_pin_exactly_where_it_knows_the_word(torch: str, exact: bool) -> None:
    """An older one refuses the key, and CUDA with it; a plan counts on what it is told."""
    assert torchversion.pins_exactly(torch) == exact
    assert ("pinned_max_round_threshold_mb:1" in link.alloc_conf(torch)) == exact
    assert "expandable_segments:True" in link.alloc_conf(torch)


def test_the_installed_torch_takes_the_engines_environment(installation: Installation) -> None:
    env = engine_env(installation.config, CPU)
    parse = "import torch; print(torch.__version__)"
    done = subprocess.run([sys.executable, "-W", "error", "-c", parse], env=env, capture_output=True, text=True)

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() in env["TORCHINDUCTOR_CACHE_DIR"]


def test_compiled_code_is_kept_apart_by_torch_and_card(installation: Installation) -> None:
    card = GPU.model_copy(update={"gpu": "NVIDIA GeForce RTX 4080 SUPER"})
    folders = [Path(engine_env(installation.config, machine)["TORCHINDUCTOR_CACHE_DIR"]) for machine in (CPU, card)]

    assert {folder.parent for folder in folders} == {installation.paths.state / "compiled"}
    assert folders[0].name.endswith("-cpu")
    assert folders[1].name.endswith("-nvidia-geforce-rtx-4080-super")
    assert Path(engine_env(installation.config, card)["TRITON_CACHE_DIR"]).parent == folders[1]
