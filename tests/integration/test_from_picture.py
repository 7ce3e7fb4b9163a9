"""A job that starts from a picture, from its spec to its file."""

from __future__ import annotations

import numpy as np
from PIL import Image

from safelight import embedded, inputs
from tests.conftest import Installation
from tests.daemon.test_worker import specs_of
from tests.integration.rendering import picture
from tests.integration.warm_engine import receipts


def test_a_job_that_starts_from_a_picture_runs_fewer_steps_and_says_so(installation: Installation) -> None:
    source = installation.root / "start.png"
    picture(96, 64).save(source)
    digest = inputs.store(source, installation.paths.inputs)
    fields = {"width": 96, "height": 64, "num_inference_steps": 8, "model": "tiny-flux-schnell", "kind": "image"}
    steps: list[tuple[int, int]] = []

    def told(message: dict[str, object]) -> None:
        if message["type"] == "step" and message["phase"] == "denoise":
            steps.append((int(str(message["i"])), int(str(message["n"]))))

    run, pixels = receipts(installation, told), []
    for strength in (0.25, 1.0):
        (spec,) = specs_of(installation, ["a fox"], image=digest, strength=strength, **fields)
        file = installation.paths.outbox / run(spec).outputs[0].path
        assert embedded.read(file).spec.strength == strength
        with Image.open(file) as made:
            assert f"Denoising strength: {strength:g}" in made.info["parameters"]
            pixels.append(np.asarray(made))

    assert steps == [(1, 2), (2, 2), *((i, 8) for i in range(1, 9))]
    assert not np.array_equal(*pixels)
