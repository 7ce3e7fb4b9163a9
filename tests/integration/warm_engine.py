"""The daemon's engine in this process: jobs one after another, each as a picture out of the outbox."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from safelight.jobspec import JobSpec
from safelight.machine import GIB
from safelightd import runjob
from safelightd.assembly import PinnedSet
from safelightd.embeddings import Cache
from safelightd.progress import Watch
from tests.conftest import Installation
from tests.integration.rendering import NoMeter


def engine(installation: Installation) -> Callable[[JobSpec], Any]:
    """Return what runs a job, and gives the picture that it published, (H, W, 3) uint8."""
    cache = Cache(installation.paths.embeddings, 1 * GIB)
    setting = runjob.Setting(installation.config, installation.models, installation.ledger, PinnedSet(0), cache)

    def run(spec: JobSpec) -> Any:
        receipt = runjob.run_job(spec, 1, setting, Watch(lambda _told: None, threading.Event(), NoMeter()))
        return np.asarray(Image.open(installation.paths.outbox / receipt.outputs[0].path))

    return run
