"""What the engine answers when the GPU breaks under a job, and what it keeps of one that it is asked to end."""

from __future__ import annotations

import socket
import threading
from typing import Any

import pytest
import torch

from safelight.jobspec import JobSpec
from safelightd import checkpoint, metadata
from safelightd.engine import Engine
from safelightd.link import Link
from tests.conftest import Installation
from tests.daemon.test_worker import specs_of
from tests.integration.warm_engine import setting_of

BROKEN = "CUDA error: an illegal memory access was encountered"


@pytest.fixture
def breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA as torch has it after an illegal access: the first call that finds out says so, and every later one."""
    found_out = []

    def refuse(*_sizes: object, **_how: object) -> None:
        found_out.append(True)
        raise torch.AcceleratorError(BROKEN)

    monkeypatch.setattr(torch, "randn", refuse)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: bool(found_out))
    monkeypatch.setattr(torch.cuda, "empty_cache", refuse)


def message_of(spec: JobSpec) -> dict[str, Any]:
    asked = {"attempt": 1, "waiting": 1, "again": False, "overruns": [], "refused": []}
    return {"execution": "job_1", "spec": spec.model_dump(mode="json"), **asked}


def test_an_error_that_breaks_cuda_is_told_in_its_own_words(breaks: None, installation: Installation) -> None:
    (spec,) = specs_of(installation, ["a fox"])
    ours, theirs = (Link(end) for end in socket.socketpair())

    goes_on = Engine(installation.config, theirs)._answer(message_of(spec), setting_of(installation))
    theirs.close()

    told: list[dict[str, Any]] = []
    while not told or told[-1]["type"] not in ("done", "failed"):
        if received := ours.receive(5):
            told.append(received)
    ours.close()
    assert not goes_on
    assert (told[-1]["kind"], BROKEN in told[-1]["message"]) == ("engine", True)


@pytest.mark.parametrize("reason", ["cancel", "stop"])
def test_a_clip_is_kept_when_the_worker_stops_and_not_when_it_is_cancelled(
    reason: str, installation: Installation
) -> None:
    (spec,) = specs_of(installation, ["waves"], model="tiny-wan-ti2v")
    spec = spec.model_copy(update={"num_inference_steps": 1000})
    ours, theirs = (Link(end) for end in socket.socketpair())
    engine = Engine(installation.config, theirs)
    reading = threading.Thread(target=engine._read, daemon=True)
    reading.start()
    told: list[dict[str, Any]] = []

    def ask() -> None:
        while not told or told[-1]["type"] != "failed":
            if received := ours.receive(5):
                told.append(received)
                if received["type"] == "step" and received["i"] == 2:
                    ours.send("cancel", "job_1", reason=reason)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    assert engine._answer(message_of(spec), setting_of(installation))
    asking.join(120)
    ours.close()
    reading.join(120)
    theirs.close()

    assert told[-1]["kind"] == "cancelled"
    file = installation.paths.checkpoints / spec.id
    assert file.exists() == (reason == "stop")
    begun = checkpoint.begun(file, metadata.versions())
    assert (begun and begun.precision) == ("fp32" if reason == "stop" else None)
