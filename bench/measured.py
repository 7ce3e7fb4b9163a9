"""One job through the real path in this process, with what it holds of device and RAM measured from outside of it."""

from __future__ import annotations

import dataclasses
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from bench import fullsize
from bench.scratch import scratch
from safelight import inputs, models
from safelight.config import Config
from safelight.jobspec import JobSpec
from safelight.ledger import Ledger
from safelight.machine import GIB
from safelight.models import Models
from safelight.receipt import Receipt
from safelight.rung import Circumstances

SAMPLED_EVERY_S = 0.02

USABLE_GIB = {16: 14.8, 12: 10.8, 8: 6.8}
"""Of a card of so many GiB with a desktop on it."""

HOST_GIB = 26e9 / GIB
"""What 32 GB of RAM leave to a job: 26 GB."""

NIGHT = 100
"""Jobs of a shape that wait: what is compiled once serves them all."""

SUBMITTED_AT = "2026-11-22T20:00:00+00:00"


class Budget:
    """No case begins after its end: a lent machine's call ends then."""

    def __init__(self, limit_s: float) -> None:
        self._ends_at = time.monotonic() + limit_s

    def is_spent(self) -> bool:
        return time.monotonic() > self._ends_at


class Gauge:
    """Measures phases as `safelightd.progress.Meter`, by other ways than the engine's own.

    Device: what torch reserved at most, and what the card holds besides, less what it held before CUDA began here.
    Host: anonymous memory, sampled, and what CUDA pinned for torch where the kernel does not count it as such.
    """

    def __init__(self, device_bytes_before: int) -> None:
        self._device_before = device_bytes_before
        self.outside_bytes = 0
        """What the card held for this process besides torch's, at the last look: context, libraries, kernels."""
        self._host_peak = 0
        self._counts_pinned = False
        threading.Thread(target=self._sample, daemon=True).start()

    def reset(self) -> None:
        import torch

        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self._host_peak = host_bytes(pinned=self._counts_pinned)

    def settle(self) -> None:
        fullsize.synchronise()

    def peaks(self) -> tuple[int, int]:
        self._host_peak = max(self._host_peak, host_bytes(pinned=self._counts_pinned))
        device, self.outside_bytes = device_peak_bytes(self._device_before)
        return device, self._host_peak

    def learn_whether_pinned_is_counted(self) -> None:
        """Pin 64 MiB, and see whether the kernel calls them anonymous memory of this process."""
        import torch

        size = 64 * 2**20
        before = fullsize.status("RssAnon")
        pinned = torch.zeros(size, dtype=torch.uint8, pin_memory=True)
        self._counts_pinned = fullsize.status("RssAnon") - before < size // 2
        del pinned

    def _sample(self) -> None:
        while True:
            time.sleep(SAMPLED_EVERY_S)
            self._host_peak = max(self._host_peak, host_bytes(pinned=self._counts_pinned))


def host_bytes(*, pinned: bool) -> int:
    """Return what this process holds of RAM that no file backs."""
    held = fullsize.status("RssAnon")
    if not pinned:
        return held
    import torch

    return held + int(torch.cuda.host_memory_stats().get("allocated_bytes.current", 0))


def device_peak_bytes(before: int) -> tuple[int, int]:
    """Return what this process held of the card at most, and how much of it outside of torch."""
    import torch

    if not torch.cuda.is_initialized():
        return 0, 0
    outside = card_used_bytes() - torch.cuda.memory_reserved() - before
    return int(torch.cuda.max_memory_reserved()) + outside, outside


def card_used_bytes() -> int:
    """Return what the card that this process sees first holds, by the driver's word; 0 without one.

    CUDA's own count leaves out what the driver keeps for itself, 0.47 GiB of an H100: the two must not be mixed.
    """
    import pynvml

    try:
        pynvml.nvmlInit()
        first = os.environ.get("CUDA_VISIBLE_DEVICES", "").partition(",")[0] or "0"
        by = pynvml.nvmlDeviceGetHandleByIndex if first.isdigit() else pynvml.nvmlDeviceGetHandleByUUID
        return int(pynvml.nvmlDeviceGetMemoryInfo(by(int(first) if first.isdigit() else first)).used)
    except pynvml.NVMLError:
        return 0


@dataclasses.dataclass
class Place:
    """An installation whose worker may use as much as a card of some size has."""

    config: Config
    models: Models
    device: str
    device_bytes_before: int
    gauge: Gauge
    setting: Any
    """`safelightd.runjob`'s."""
    asked: dict[str, object] = dataclasses.field(default_factory=dict)
    """What every job says besides."""
    attention: str = "auto"
    """[worker] attention."""
    fused_gib: float = 0
    """[worker] fused_gib: what each job makes is made anew for each, unless this is what is measured."""
    jobs: int = 0
    learned_at: set[tuple[str, str]] = dataclasses.field(default_factory=set)
    """Models, and the sizes at which jobs of theirs have run that calibrated."""

    def become(self, cap_gib: int) -> None:
        """Be a card of that size from here on."""
        usable = USABLE_GIB[cap_gib]
        limits = {
            "vram_gib": usable, "ram_gib": HOST_GIB, "attention": self.attention, "fused_gib": self.fused_gib,
        }  # fmt: skip
        worker = self.config.settings.worker.model_copy(update=limits)
        settings = self.config.settings.model_copy(update={"worker": worker})
        self.config = dataclasses.replace(self.config, settings=settings)
        self.setting = dataclasses.replace(self.setting, config=self.config)
        if self.device == "cuda":
            limit(usable, self.device_bytes_before)

    def spec(self, model: str, **written: object) -> JobSpec:
        self.jobs += 1
        asked = {"prompt": f"a red fox in the snow, {self.jobs}", **self.asked, **written}
        spec = fullsize.spec_of(self.models[model], tiny=False, **asked)
        update = {"id": f"bench-{self.jobs}", "index": self.jobs, "submitted_at": SUBMITTED_AT, "batch": "bench"}
        return spec.model_copy(update=update)

    def picture(self) -> str:
        """Have a picture to start from; return the name that jobs know it by."""
        source = self.config.paths.state / "picture.png"
        source.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_mandelbrot((768, 768), (-2, -1, 1, 1), 50).convert("RGB").save(source)
        return inputs.store(source, self.config.paths.inputs).digest

    def run(self, spec: JobSpec, waiting: int = NIGHT, *, learn: bool) -> Receipt:
        """Run one job, give everything back as the engine does; `learn`: this machine's calibration learns from it."""
        from safelightd import calibration, device, runjob
        from safelightd.progress import Watch

        watch = Watch(lambda _told: None, threading.Event(), self.gauge)
        try:
            receipt = runjob.run_job(spec, 1, self.setting, watch, Circumstances(waiting=waiting))
        finally:
            device.release()
        state = self.config.paths.state
        if learn:
            calibration.save(state, calibration.learned(calibration.load(state), receipt))
        return receipt


@contextmanager
def place(device: str, folders: dict[str, Path], compiled: Path, prepared: Path | None = None) -> Iterator[Place]:
    """Have an installation with these model folders; torch is kept from more memory than the worker may use.

    Args:
        compiled: where compiled code stays from one call to the next.
        prepared: a models folder whose prepared weights it has, too.
    """
    own = "".join(f'[models.{key}]\npath = "{folder.absolute()}"\n' for key, folder in folders.items())
    with scratch(device=device, more=own) as made:
        before = card_used_bytes()
        config = made.config
        if prepared is not None:
            config.paths.models.mkdir(parents=True, exist_ok=True)
            (config.paths.models / "prepared").symlink_to((prepared / "prepared").absolute())
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(compiled.absolute())
        os.environ["TRITON_CACHE_DIR"] = str(compiled.absolute() / "triton")
        from safelightd import runjob
        from safelightd.embeddings import Cache
        from safelightd.pinnedset import PinnedSet

        table = models.load(config)
        cache = Cache(config.paths.embeddings, GIB)
        setting = runjob.Setting(config, table, Ledger(config.paths), PinnedSet(int(HOST_GIB * GIB)), cache)
        gauge = Gauge(before)
        if device == "cuda":
            gauge.learn_whether_pinned_is_counted()
        yield Place(config, table, device, before, gauge, setting)
        setting.pinned.drop_unless([])


def limit(usable_gib: float | None, before: int) -> None:
    """Let torch have what is usable less what the context takes; None: all of the card."""
    import torch

    torch.zeros(1, device="cuda")
    context = card_used_bytes() - torch.cuda.memory_reserved() - before
    total = torch.cuda.get_device_properties(0).total_memory
    share = 1.0 if usable_gib is None else (usable_gib * GIB - context) / total
    torch.cuda.set_per_process_memory_fraction(share)
