"""A job that starts from a picture, from its spec to its file."""

from __future__ import annotations

import threading

import numpy as np
from PIL import Image

from safelight import embedded, inputs
from safelight.machine import GIB
from safelightd import runjob
from safelightd.assembly import PinnedSet
from safelightd.embeddings import Cache
from safelightd.progress import Watch
from tests.conftest import Installation
from tests.daemon.test_worker import specs_of
from tests.integration.rendering import NoMeter, picture


def test_a_job_that_starts_from_a_picture_runs_fewer_steps_and_says_so(installation: Installation) -> None:
    source = installation.root / "start.png"
    picture(96, 64).save(source)
    digest = inputs.store(source, installation.paths.inputs)
    fields = {"width": 96, "height": 64, "num_inference_steps": 8, "model": "tiny-flux-schnell", "kind": "image"}
    cache = Cache(installation.paths.embeddings, 1 * GIB)
    setting = runjob.Setting(
        installation.config, installation.models, installation.ledger, PinnedSet(0), cache
    )  # fmt: skip
    steps: list[tuple[int, int]] = []

    def told(message: dict[str, object]) -> None:
        if message["type"] == "step" and message["phase"] == "denoise":
            steps.append((int(str(message["i"])), int(str(message["n"]))))

    pixels = []
    for strength in (0.25, 1.0):
        (spec,) = specs_of(installation, ["a fox"], image=digest, strength=strength, **fields)
        receipt = runjob.run_job(spec, 1, setting, Watch(told, threading.Event(), NoMeter()))
        file = installation.paths.outbox / receipt.outputs[0].path
        assert embedded.read(file).spec.strength == strength
        with Image.open(file) as made:
            assert f"Denoising strength: {strength:g}" in made.info["parameters"]
            pixels.append(np.asarray(made))

    assert steps == [(1, 2), (2, 2), *((i, 8) for i in range(1, 9))]
    assert not np.array_equal(*pixels)
