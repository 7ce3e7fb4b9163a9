"""Real processes of a test: started with this interpreter and its paths, and none left behind."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

Start = Callable[..., "subprocess.Popen[str]"]


@contextmanager
def programs(env: Mapping[str, str]) -> Iterator[Start]:
    """Have what starts Python with these words, and variables besides; what still runs at the end is killed."""
    started: list[subprocess.Popen[str]] = []

    def start(*words: str, **more: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, *words],
            env={**env, "PYTHONPATH": ":".join(sys.path), **more},
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()
