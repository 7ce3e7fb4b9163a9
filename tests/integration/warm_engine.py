"""The daemon's engine in this process: one job after another, each as its receipt or as the picture it published."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from safelight.jobspec import JobSpec
from safelight.machine import GIB
from safelight.receipt import Receipt
from safelightd import runjob
from safelightd.embeddings import Cache
from safelightd.pinnedset import PinnedSet
from safelightd.progress import Watch
from tests.conftest import Installation
from tests.integration.rendering import NoMeter


def setting_of(installation: Installation) -> runjob.Setting:
    cache = Cache(installation.paths.embeddings, 1 * GIB)
    return runjob.Setting(installation.config, installation.models, installation.ledger, PinnedSet(0), cache)


def receipts(
    installation: Installation, told: Callable[[dict[str, object]], None] = lambda _message: None
) -> Callable[[JobSpec], Receipt]:
    """Return what runs a job and gives its receipt; `told` gets what the engine says of it meanwhile."""
    setting = setting_of(installation)
    return lambda spec: runjob.run_job(spec, 1, setting, Watch(told, threading.Event(), NoMeter()))


def engine(installation: Installation) -> Callable[[JobSpec], Any]:
    """Return what runs a job and gives the picture that it published, (H, W, 3) uint8."""
    run = receipts(installation)

    def draw(spec: JobSpec) -> Any:
        return np.asarray(Image.open(installation.paths.outbox / run(spec).outputs[0].path))

    return draw
