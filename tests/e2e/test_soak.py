"""The soak in short: a seeded night of forty jobs under every fault that this machine can bring, then its audit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from bench.soak_audit import Line

from tests.e2e.test_chaos import REPOSITORY

SEED = int(os.environ.get("SOAK_SEED", "20261125"))
JOBS = 40
OVER_S = 240
"""It takes half a minute; beside other tests on two busy cores, several times that."""


def soak(*words: str) -> subprocess.CompletedProcess[str]:
    folders = (REPOSITORY / "client", REPOSITORY / "daemon")
    env = {name: value for name, value in os.environ.items() if not name.startswith(("XDG_", "SAFELIGHT_"))}
    env |= {"PYTHONPATH": ":".join(map(str, folders)), "TMPDIR": "/tmp"}  # unix sockets need a short path
    command = [sys.executable, "-m", "bench.soak", "--seed", str(SEED), *words]
    return subprocess.run(
        command, cwd=REPOSITORY, env=env, stdout=subprocess.PIPE, text=True, timeout=OVER_S, check=False
    )


@pytest.mark.timeout(OVER_S + 60)
def test_a_short_soak_loses_doubles_and_leaves_nothing(tmp_path: Path) -> None:
    """SOAK_SEED repeats a run; what was wrong is said in words, and the installation is kept."""
    ran = soak("--jobs", str(JOBS), "--keep", str(tmp_path / "kept"))

    began, ended = map(json.loads, ran.stdout.splitlines())
    assert (ended["missed"], ended["found"]) == ([], {})
    assert ran.returncode == 0
    assert sum(ended["ends"].values()) == JOBS
    assert {"kill worker", "kill engine", "kill horse", "kill inbox", "kill valkey"} <= set(ended["struck"])
    assert set(began["left_out"]) <= {"fill"}, "everything but a disk of its own is possible on any machine"


def test_a_soak_without_faults_finds_nothing_and_restarts_nothing() -> None:
    """The audit's own check: what it calls wrong is not what a quiet night leaves."""
    ran = soak("--jobs", "12", "--faults", "none")

    ended = json.loads(ran.stdout.splitlines()[-1])
    assert (ended["missed"], ended["exits"]) == ([], {})
    assert sum(ended["ends"].values()) == 12


def test_the_audit_sees_who_was_overtaken() -> None:
    """Only a job that stood in the line while the other still did has been overtaken by it, and for two looks."""
    line = Line()
    line.look(["first", "second", "chosen"])
    line.look(["first", "second"])
    line.look(["first", "third"])

    assert line.stood_together("first", "second")
    assert line.stood_together("first", "third")
    assert not line.stood_together("third", "second")
    assert not line.stood_together("first", "chosen")
