"""Worker and engine talk in JSON lines over a socketpair. Knows no job; both ends use it.

To the engine: `run {spec, attempt, waiting, again, overruns, refused}`, `cancel {reason}`. From it: `phase {phase,
plan}` (the plan once, when it is new), `step {phase, i, n, seconds_left}`, `alive` each second of a job (proves the
process, not progress), and one verdict: `done {receipt}` or `failed {kind, message, phase}`, of kind `oom` with
{memory, overrun} and of kind `refused` with {precision}. Every message carries `v`, `execution` and `seq`; one of
another execution is dropped. End of file tells the engine to exit and the worker that the engine is gone.
"""

from __future__ import annotations

import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import Any

from safelight.config import Config
from safelight.machine import Machine
from safelightd import linux, torchversion

VERSION = 1
ENGINE = (sys.executable, "-m", "safelightd.engine")
"""The program on the other end."""

READ_BYTES = 65_536
MESSAGE_BYTES_MAX = 4 * 2**20
"""A spec holds at most three texts of 20,000 characters; a receipt a little more."""


class EngineGone(Exception):
    """The other end closed the link, or wrote what no end of ours writes."""


class Link:
    """One end. `send` may be called from any thread; `receive` from one."""

    def __init__(self, end: socket.socket) -> None:
        self.end = end
        self._received = b""
        self._seq = 0
        self._sending = threading.Lock()

    def send(self, kind: str, execution: str, /, **fields: Any) -> None:
        """Send one message.

        Raises:
            EngineGone: nobody is there any more.
        """
        with self._sending:
            self._seq += 1
            message = {"v": VERSION, "type": kind, "execution": execution, "seq": self._seq, **fields}
            try:
                self.end.sendall(json.dumps(message, separators=(",", ":")).encode() + b"\n")
            except OSError as error:
                raise EngineGone(f"the link broke while sending {kind}: {error}") from error

    def receive(self, timeout_s: float | None = None, wakeup: int | None = None) -> dict[str, Any] | None:
        """Return the next message; None when the time is over or the descriptor `wakeup` became readable.

        Raises:
            EngineGone: the other end closed, or did not write messages.
        """
        while b"\n" not in self._received:
            watched: list[Any] = [self.end] if wakeup is None else [self.end, wakeup]
            readable, _, _ = select.select(watched, [], [], timeout_s)
            if self.end not in readable:
                return None
            self._read()
        line, _, self._received = self._received.partition(b"\n")
        return _message(line)

    def _read(self) -> None:
        try:
            chunk = self.end.recv(READ_BYTES)
        except OSError as error:
            raise EngineGone(f"the link broke: {error}") from error
        if not chunk:
            raise EngineGone("the link was closed")
        self._received += chunk
        if len(self._received) > MESSAGE_BYTES_MAX:
            raise EngineGone("the link carries something that is no message")

    def close(self) -> None:
        self.end.close()


def _message(line: bytes) -> dict[str, Any]:
    try:
        message = json.loads(line)
    except ValueError as error:
        raise EngineGone(f"the link carries something that is no message: {line[:80]!r}") from error
    if not isinstance(message, dict) or message.get("v") != VERSION:
        raise EngineGone(f"the link speaks another version: {line[:80]!r}")
    return message


class EngineProcess:
    """The engine as the worker's child: started in a session of its own, killed whole, dead with the worker."""

    def __init__(self, config: Config, machine: Machine, command: Sequence[str] = ENGINE) -> None:
        self._command = [*command, "--gpu", machine.uuid]
        self._env = engine_env(config, machine)
        self._process: subprocess.Popen[bytes] | None = None
        self.link: Link | None = None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def ensure(self) -> None:
        """Have an engine: the one that runs, else a new one. Call it from the main thread only (see linux)."""
        if self.running():
            return
        self.kill()
        ours, theirs = socket.socketpair()
        self._process = subprocess.Popen(
            [*self._command, "--link", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env=self._env,
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr,
            start_new_session=True,
            preexec_fn=linux.die_with_parent(os.getpid()),
        )
        theirs.close()
        self.link = Link(ours)

    def kill(self) -> int | None:
        """End the engine now, whatever it does; everything it held on the GPU is free when this returns.

        Returns:
            its exit status, None when there was none.
        """
        if self.link:
            self.link.close()
            self.link = None
        if self._process is None:
            return None
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        status = self._process.wait()
        self._process = None
        return status

    def stop(self, timeout_s: float) -> None:
        """Let an idle engine exit by itself (it does at end of file), and make sure that it did."""
        if self._process is None:
            return
        if self.link:
            self.link.close()
            self.link = None
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._process = None


def engine_env(config: Config, machine: Machine) -> dict[str, str]:
    """Return the engine's environment: this GPU only, nothing from the network, memory given back when freed."""
    torch = torchversion.installed()
    compiled = config.paths.state / "compiled" / f"{torch or 'no-torch'}-{_slug(machine.gpu) or 'cpu'}"
    env = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TQDM_DISABLE": "1",  # progress goes over the link
        "DIFFUSERS_VERBOSITY": "error",
        "TRANSFORMERS_VERBOSITY": "error",
        "MALLOC_ARENA_MAX": "2",
        # idle threads sleep instead of spinning: beside other work on 2 cores a tiny job took 0.2 to 0.8 s instead of
        # 2 to 7 (CPU, 2026-11-22)
        "OMP_WAIT_POLICY": "PASSIVE",
        "PYTORCH_ALLOC_CONF": alloc_conf(torch),
        # code that was compiled for another torch or card is no use to this one
        "TORCHINDUCTOR_CACHE_DIR": str(compiled),
        "TRITON_CACHE_DIR": str(compiled / "triton"),
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        # "" hides every GPU: a CPU worker beside a GPU worker must not touch its card
        "CUDA_VISIBLE_DEVICES": machine.uuid,
    }
    if config.source.exists():
        env["SAFELIGHT_CONFIG"] = str(config.source)
    env.pop("NOTIFY_SOCKET", None)  # the worker alone speaks to systemd
    return env


def alloc_conf(torch: str) -> str:
    """Return what torch's allocators are told. A key that this torch does not know ends CUDA for the process: 2.11
    refuses pinned_max_round_threshold_mb, which 2.13 has (H100, 2026-11-22)."""
    keys = "expandable_segments:True"
    return f"{keys},pinned_max_round_threshold_mb:1" if torchversion.pins_exactly(torch) else keys


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
