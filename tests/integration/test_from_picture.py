"""A job that starts from a picture, from its spec to its file."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

from safelight import embedded, inputs
from safelightd import runjob
from tests.conftest import Installation
from tests.daemon.test_worker import specs_of
from tests.integration.rendering import picture
from tests.integration.warm_engine import receipts


def test_a_job_that_starts_from_a_picture_runs_fewer_steps_and_says_so(installation: Installation) -> None:
    source = installation.root / "start.png"
    picture(96, 64).save(source)
    digest = inputs.store(source, installation.paths.inputs).digest
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


def test_a_depth_map_of_16_bit_is_read_in_its_own_range_as_the_camera_was_held(tmp_path: Path) -> None:
    depths = np.arange(6 * 256, dtype=np.uint16).reshape(6, 256) * 42
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 3
    Image.fromarray(depths).save(tmp_path / "depth.png", exif=exif)
    kept = inputs.store(tmp_path / "depth.png", tmp_path / "inputs")

    read = runjob.input_picture(kept.digest, tmp_path / "inputs")

    assert read is not None
    wanted = np.round(depths[::-1, ::-1] / 257).astype(np.uint8)
    assert np.array_equal(np.asarray(read), np.dstack([wanted] * 3))


def test_a_picture_with_transparency_that_an_earlier_version_kept_is_still_read(tmp_path: Path) -> None:
    Image.new("RGBA", (8, 8), (1, 2, 3, 0)).save(tmp_path / "fox.png")
    digest = hashlib.sha256((tmp_path / "fox.png").read_bytes()).hexdigest()
    (tmp_path / "fox.png").rename(tmp_path / digest)

    read = runjob.input_picture(digest, tmp_path)

    assert read is not None
    assert (read.mode, read.getpixel((0, 0))) == ("RGB", (1, 2, 3))
