"""Whose fault an error in the engine is: what the worker counts, and what it does not."""

from __future__ import annotations

import errno

import pytest
import torch

from safelight.errors import Fault, InvalidJob, SafelightError
from safelightd.engine import failure
from safelightd.outputs import OutboxUnwritable
from safelightd.progress import Cancelled


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (Cancelled(), "cancelled"),
        (OSError(errno.ENOSPC, "No space left on device", "/out"), "machine"),
        (OSError(errno.EIO, "Input/output error"), "machine"),
        (OSError(errno.EROFS, "Read-only file system"), "machine"),
        (OutboxUnwritable(errno.EACCES, "outputs cannot be written", "/out"), "machine"),
        (OutboxUnwritable(errno.ENOTDIR, "outputs cannot be written", "/out"), "machine"),
        (InvalidJob([Fault("a", "b", "c")]), "job"),
        (SafelightError("the picture is black"), "job"),
        (ValueError("a bug"), "job"),
        (FileNotFoundError(errno.ENOENT, "No such file", "lora.safetensors"), "job"),
        (torch.OutOfMemoryError("CUDA out of memory"), "engine"),
        (RuntimeError("CUDA error: device-side assert triggered"), "engine"),
        (MemoryError(), "engine"),
    ],
)
def test_an_error_is_the_jobs_the_machines_or_the_engines(error: BaseException, kind: str) -> None:
    found = failure(error)

    assert found["kind"] == kind
    assert found["message"]
    assert found["oom"] == isinstance(error, (torch.OutOfMemoryError, MemoryError))
