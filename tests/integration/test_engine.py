"""What the engine answers when the GPU breaks under a job."""

from __future__ import annotations

import socket

import pytest
import torch

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


def test_an_error_that_breaks_cuda_is_told_in_its_own_words(breaks: None, installation: Installation) -> None:
    (spec,) = specs_of(installation, ["a fox"])
    ours, theirs = (Link(end) for end in socket.socketpair())
    asked = {"attempt": 1, "waiting": 1, "again": False, "overruns": [], "refused": []}
    message = {"spec": spec.model_dump(mode="json"), **asked}

    goes_on = Engine(installation.config, theirs)._answer({"execution": "job_1", **message}, setting_of(installation))
    theirs.close()

    told = []
    while not told or told[-1]["type"] not in ("done", "failed"):
        if received := ours.receive(5):
            told.append(received)
    ours.close()
    assert not goes_on
    assert (told[-1]["kind"], BROKEN in told[-1]["message"]) == ("engine", True)
