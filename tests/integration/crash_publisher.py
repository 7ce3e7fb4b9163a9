"""Run by test_outputs: publishes one job again and again, killed with SIGKILL one step later each time.

    python crash_publisher.py ROOT {renameat2|link} {picture|clip|frames}

A step is a call that changes a folder or syncs a file; the kill comes before it. Each round has a folder of its own
below ROOT, in which `finish` is killed, too. Prints the number of rounds. `link` runs under a kernel that refuses
renameat2, as NFS does.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import signal
import struct
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import FrameType

from safelight import config as settings
from safelight.config import Config
from safelight.jobspec import JobSpec
from safelight.ledger import Ledger
from safelight.rename import rename_new
from safelightd import outputs
from tests.integration import making

STEPS = {"mkdir", "fsync", "rename", "replace", "link", "symlink", "unlink", "remove", "rmdir"}
FINISH_STEPS = 25
"""Kills of `finish` are spread over so many steps; it takes fewer."""


def main(root: Path, how: str, what: str) -> None:
    spec = making.published(what)
    if how == "link":
        refuse_renameat2()
    base = settings.load({"SAFELIGHT_CONFIG": str(root / "safelight.toml")})
    rounds = 0
    killed = True
    while killed:
        rounds += 1
        config = below(root / str(rounds), base)
        killed = killed_at(rounds, lambda config=config: publish(spec, config))
        killed_at(1 + (7 * rounds) % FINISH_STEPS, lambda config=config: finish(spec, config))
    sys.stdout.write(f"{rounds}\n")


def below(folder: Path, base: Config) -> Config:
    folder.mkdir()
    return replace(base, paths=replace(base.paths, outbox=folder / "outbox", state=folder / "state"))


def publish(spec: JobSpec, config: Config) -> None:
    file = outputs.write(spec, making.PLAN, making.frames(spec), config)
    outputs.publish(lambda published: making.receipt(spec, published), file, spec, Ledger(config.paths), config.paths)


def finish(spec: JobSpec, config: Config) -> None:
    outputs.finish(spec.id, Ledger(config.paths), config.paths)


def killed_at(step: int, act: Callable[[], None]) -> bool:
    """Run `act` in a child that kills itself at its `step`; False when it ended before that many."""
    child = os.fork()
    if child == 0:
        arm(step)
        act()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return True
    assert status == 0, f"the child failed with {status}"
    return False


def arm(step: int) -> None:
    left = step

    def count(frame: FrameType, event: str, called: object) -> None:
        nonlocal left
        native = event == "c_call" and getattr(called, "__name__", "") in STEPS
        if native or (event == "call" and frame.f_code is rename_new.__code__):
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(count)


def refuse_renameat2() -> None:
    """Let the kernel answer EINVAL to renameat2, by a seccomp filter (seccomp(2), linux/filter.h)."""
    number = {"x86_64": 316, "aarch64": 276}[platform.machine()]
    load_number, jump_if_equal, give = 0x20, 0x15, 0x06
    refuse, allow = 0x00050000 | errno.EINVAL, 0x7FFF0000
    filters = [(load_number, 0, 0, 0), (jump_if_equal, 0, 1, number), (give, 0, 0, refuse), (give, 0, 0, allow)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *one) for one in filters))
    program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(filters), ctypes.addressof(code)))
    libc = ctypes.CDLL(None, use_errno=True)
    set_no_new_privileges, set_seccomp, filter_mode = 38, 22, 2
    assert libc.prctl(set_no_new_privileges, 1, 0, 0, 0) == 0
    assert libc.prctl(set_seccomp, filter_mode, program, 0, 0) == 0, os.strerror(ctypes.get_errno())


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
