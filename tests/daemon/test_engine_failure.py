"""Whose fault an error in the engine is: what the worker counts, and what it does not; and when memory ran out."""

from __future__ import annotations

import errno
import mmap
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pynvml
import pytest
import torch

from safelight.errors import Fault, InvalidJob, NoUsableGpu, SafelightError
from safelight.plan import Overrun, PhasePrediction, Plan
from safelight.planner import DoesNotFit
from safelight.receipt import Phase
from safelightd.engine import circumstances_of
from safelightd.failure import exhausted, failure
from safelightd.outputs import OutboxUnwritable
from safelightd.pipelines import BrokenResult
from safelightd.progress import Cancelled, Watch
from safelightd.room import NoRoom
from safelightd.verify import Refused
from safelightd.video import FfmpegKilled

GIB = 2**30

ON_GPU = Plan(
    model="flux-dev",
    device="cuda",
    dtype="bfloat16",
    precision="fp8-dynamic",
    offload="model",
    text_encoder_device="cuda",
    vae_tiling=False,
    predicted={
        phase: PhasePrediction(device_bytes=12 * GIB, host_bytes=5 * GIB) for phase in ("encode", "denoise", "decode")
    },
)
ON_CPU = ON_GPU.model_copy(update={"device": "cpu", "precision": "fp32", "offload": "none"})

REFUSED_BY_TORCH = (
    "CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has a total capacity of 15.60 GiB of which 512.00 MiB is "
    "free. Including non-PyTorch memory, this process has 14.90 GiB memory in use."
)


class Held:
    """A meter that read 14 GiB on the device and 3 in RAM."""

    def reset(self) -> None: ...

    def settle(self) -> None: ...

    def peaks(self) -> tuple[int, int]:
        return 14 * GIB, 3 * GIB


def watch_of(plan: Plan | None, phase: Phase) -> Watch:
    watch = Watch(lambda _told: None, threading.Event(), Held())
    watch.plan, watch.current = plan, phase
    return watch


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
        (DoesNotFit([Fault("a", "b", "c")]), "too-large"),
        (NoRoom("others have it"), "no-room"),
        (SafelightError("no such LoRA"), "job"),
        (ValueError("a bug"), "job"),
        (FileNotFoundError(errno.ENOENT, "No such file", "lora.safetensors"), "job"),
        (NoUsableGpu("GPU 0: GPU is lost"), "engine"),
        (pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST), "engine"),
        (RuntimeError("CUDA error: device-side assert triggered"), "engine"),
        (torch.AcceleratorError("an illegal memory access was encountered"), "engine"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), "engine"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_MAPPING_ERROR"), "engine"),
        (FfmpegKilled(Path("output.mp4"), signal.SIGKILL, ""), "machine"),
        (FfmpegKilled(Path("output.mp4"), signal.SIGSEGV, ""), "engine"),
        (OSError(errno.EMFILE, "Too many open files"), "spent"),
        (BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"), "spent"),
        (RuntimeError("can't start new thread"), "spent"),
        (torch.OutOfMemoryError(REFUSED_BY_TORCH), "oom"),
        (MemoryError(), "oom"),
        (Refused("The picture is black."), "refused"),
        (BrokenResult("The latents hold NaN"), "refused"),
    ],
)
def test_an_error_is_the_jobs_the_machines_the_engines_or_its_plans(error: BaseException, kind: str) -> None:
    found = failure(error, watch_of(ON_GPU, "denoise"))

    assert found["kind"] == kind
    assert found["message"]
    assert found["phase"] == "denoise"
    assert ("overrun" in found) == (kind == "oom")
    assert found.get("precision") == ("fp8-dynamic" if kind == "refused" else None)


@pytest.mark.parametrize("phase", ["plan", "verify", "publish"])
def test_running_out_where_no_other_plan_would_help_breaks_the_engine(phase: Phase) -> None:
    found = failure(torch.OutOfMemoryError(REFUSED_BY_TORCH), watch_of(ON_GPU, phase))

    assert found["kind"] == "engine"


def test_an_overrun_says_what_was_held_and_asked_for() -> None:
    found = failure(torch.OutOfMemoryError(REFUSED_BY_TORCH), watch_of(ON_GPU, "decode"))

    assert found["memory"] == "device"
    assert Overrun.model_validate(found["overrun"]) == Overrun(
        phase="decode",
        memory="device",
        rung=ON_GPU.rung,
        predicted_bytes=12 * GIB,
        reached_bytes=14 * GIB + GIB * 3 // 2,
    )


def test_running_out_while_loading_counts_for_the_phase_about_to_begin() -> None:
    assert failure(MemoryError(), watch_of(ON_GPU, "load"))["overrun"]["phase"] == "encode"


@pytest.mark.parametrize(
    ("message", "memory"),
    [
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", "device"),
        ("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported", "device"),
        ("cuDNN error: CUDNN_STATUS_ALLOC_FAILED", "device"),
        ("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED", "device"),
        ("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED", "host"),
        ("Triton Error [CUDA]: out of memory", "device"),
        ("std::bad_alloc", "host"),
        ("unable to mmap 9 bytes from file </m/a.safetensors>: Cannot allocate memory (12)", "host"),
        ("CUDA error: device-side assert triggered", None),
        ("mat1 and mat2 shapes cannot be multiplied", None),
    ],
)
def test_errors_without_a_class_of_their_own_are_told_by_what_they_say(message: str, memory: str | None) -> None:
    assert exhausted(RuntimeError(message), ON_GPU) == memory


def test_where_nothing_runs_on_a_gpu_all_memory_is_the_hosts() -> None:
    assert failure(torch.OutOfMemoryError("out"), watch_of(ON_CPU, "decode"))["memory"] == "host"


@pytest.mark.parametrize(
    "ask",
    [lambda: torch.empty(2**52), lambda: np.empty(2**52), lambda: bytearray(2**52), lambda: mmap.mmap(-1, 2**52)],
    ids=["torch", "numpy", "python", "mmap"],
)
def test_ram_that_is_really_not_there_is_the_hosts_memory(ask: Any) -> None:
    with pytest.raises((RuntimeError, MemoryError, OSError)) as raised:
        ask()

    assert exhausted(raised.value, ON_GPU) == "host"


def test_ram_that_cuda_could_not_pin_is_the_hosts_memory() -> None:
    """CUDA says the same of both; where it was asked tells."""

    def pin_memory() -> None:
        raise RuntimeError("CUDA error: out of memory")

    with pytest.raises(RuntimeError) as raised:
        pin_memory()
    pinning = raised.value

    assert exhausted(RuntimeError("CUDA error: out of memory"), ON_GPU) == "device"
    assert exhausted(pinning, ON_GPU) == "host"


def test_a_plan_heeds_what_the_worker_knows_of_the_job() -> None:
    overrun = Overrun(phase="denoise", memory="device", rung="bf16", predicted_bytes=3)
    found = circumstances_of(
        {"waiting": 7, "overruns": [overrun.model_dump(mode="json")], "refused": ["nf4"], "again": True, "attempt": 2}
    )

    assert (found.waiting, found.overruns, found.refused) == (7, (overrun,), ("nf4",))
