"""Wan's own program at work: a child that is followed, can be stopped at any time, and leaves no process behind."""

from __future__ import annotations

import os
import select
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from safelight.errors import SafelightError
from safelightd import shortage
from safelightd.logs import Log
from safelightd.progress import Watch
from safelightd.wan_cli import keeper
from safelightd.wan_cli.transcript import Stage, Transcript

LOOK_EVERY_S = 0.1
"""How often it is looked whether somebody wants the job stopped."""

READ_BYTES = 1 << 16
KILLED = 128 + 9
INSTEAD = "It has no smaller way: close other programs that use the memory, or leave backend out"

log = Log("safelight.wan_cli")


class ProgramFailed(SafelightError):
    """Wan's own program ended without the clip."""


class ProgramBroke(Exception):
    """A signal or CUDA ended Wan's own program: the GPU may be at fault, and is asked before the job is blamed."""


class Program:
    """One run of it."""

    def __init__(self, process: subprocess.Popen[bytes], steps: int) -> None:
        assert process.stdout is not None
        self._process = process
        self._output = process.stdout.fileno()
        self._transcript = Transcript(steps)
        self._steps = steps
        self._step = 0
        self._ended = False
        self._oom_kills_before = shortage.oom_kills()
        self.host_peak_bytes = 0
        """What it held of RAM at most; known once it has ended."""

    def follow(self, stage: Stage, watch: Watch) -> None:
        """Return when it is past this stage, or has ended well; its steps are told meanwhile.

        Raises:
            Cancelled: somebody wants the job stopped.
            ProgramFailed, ProgramBroke: it ended with an error.
        """
        while not self._ended and not self._transcript.is_past(stage):
            watch.check()
            if select.select([self._output], [], [], LOOK_EVERY_S)[0]:
                self._read()
            if self._ended:
                self._check(stage)
            if stage == "denoise":
                self._tell_step(watch)
        if stage == "denoise":
            self._tell_step(watch)

    @property
    def words(self) -> str:
        """The last that it said."""
        return self._transcript.words

    def _read(self) -> None:
        piece = os.read(self._output, READ_BYTES)
        if piece:
            self._transcript.feed(piece)
            return
        self._transcript.close()
        self._ended = True
        _, status, usage = os.wait4(self._process.pid, 0)  # of the keeper and of all that it waited for
        self._process.returncode = os.waitstatus_to_exitcode(status)
        self.host_peak_bytes = usage.ru_maxrss * 1024

    def _tell_step(self, watch: Watch) -> None:
        if self._transcript.step > self._step:
            self._step = self._transcript.step
            watch.step(self._step, self._steps)

    def _check(self, stage: Stage) -> None:
        status, words = self._process.returncode, self.words
        if status == 0:
            return
        said = "\n".join(self._transcript.unlogged)
        log.debug("wan_cli.said", lines=said)
        if shortage.DEVICE_IS_FULL.search(said):
            raise ProgramFailed(f"Wan's own program ran out of GPU memory in {stage}: {words}. {INSTEAD}.")
        if shortage.HOST_IS_FULL.search(said) or (status == KILLED and shortage.oom_kills() > self._oom_kills_before):
            raise ProgramFailed(f"Wan's own program ran out of RAM in {stage}: {words}. {INSTEAD}.")
        ended = f"was ended by signal {status - 128}" if status > 128 else f"ended with exit status {status}"
        failed = ProgramBroke if status > 128 or "CUDA" in words else ProgramFailed
        raise failed(f"Wan's own program {ended} in {stage}: {words}.")


@contextmanager
def at_work(command: Sequence[str], folder: Path, env: Mapping[str, str], steps: int) -> Iterator[Program]:
    """Run the program for the length of the block. Afterwards, or when this process dies, nothing of it is left.

    Args:
        folder: in which it runs.
        steps: how many of denoising it was told to make.
    """
    kept = [sys.executable, "-I", "-S", str(Path(keeper.__file__)), *command]
    process = subprocess.Popen(
        kept,
        cwd=folder,
        env=dict(env),
        stdin=subprocess.PIPE,  # its end is the keeper's word to kill
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,  # as it happened: which bar follows which line tells what the bar is of
        process_group=0,  # who kills the engine's group leaves the keeper to do its work
        bufsize=0,
    )
    try:
        yield Program(process, steps)
    finally:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.close()
        process.wait()
        process.stdout.close()
