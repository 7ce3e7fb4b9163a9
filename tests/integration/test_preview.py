"""What a job looks like while it runs: learned from pictures that are done, shown in the place of the last one."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from safelight import display
from safelightd import pipelines, preview
from safelightd.preview import Preview
from tests.conftest import Installation
from tests.daemon.test_worker import specs_of
from tests.integration.own_models import with_own_models
from tests.integration.rendering import Run, spec_for
from tests.integration.test_wan import JOBS, run_of
from tests.integration.warm_engine import receipts

CHANNELS, HEIGHT, WIDTH, TIMES = 5, 12, 16, 8
RANDOM = np.random.default_rng(5)
MIXED = RANDOM.uniform(-15, 15, (CHANNELS, 3))


def latents_and_frame() -> tuple[preview.Values, np.ndarray]:
    """Latents, and the picture of a VAE that mixes their channels into colours."""
    latents = RANDOM.standard_normal((CHANNELS, HEIGHT, WIDTH)).astype(np.float32)
    colours = np.tensordot(MIXED, latents, axes=(0, 0)).transpose(1, 2, 0) + 128
    small = np.clip(np.rint(colours), 0, 255).astype(np.uint8)
    return latents, small.repeat(TIMES, axis=0).repeat(TIMES, axis=1)


def of(installation: Installation, job: str = "job") -> Preview:
    return Preview(installation.paths, job, "vae")


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preview, "EVERY_S", 0.0)


def learn(installation: Installation) -> None:
    latents, frame = latents_and_frame()
    assert len(list(of(installation).learning(iter([frame, frame]), latents))) == 2


def test_where_nothing_was_learned_nothing_is_shown(installation: Installation) -> None:
    def never() -> preview.Values:
        raise AssertionError("nobody can look at them yet")

    of(installation).show(never)

    assert not preview.picture(installation.paths, "job").exists()


def test_a_vaes_charts_teach_what_its_first_job_looks_like_and_are_asked_for_once(installation: Installation) -> None:
    asked: list[int] = []

    def encoded(pictures: Sequence[pipelines.Frame]) -> list[preview.Values]:
        asked.append(len(pictures))
        small = [picture[::TIMES, ::TIMES].astype(np.float32) - 128 for picture in pictures]
        return [np.tensordot(np.linalg.pinv(MIXED), of_one, axes=(0, 2)).astype(np.float32) for of_one in small]

    for _ in range(2):
        of(installation).begin(None, encoded)
    of(installation).show(lambda: latents_and_frame()[0])
    with Image.open(preview.picture(installation.paths, "job")) as opened:
        shown = np.asarray(opened, dtype=float)

    assert len(asked) == 1
    assert shown.shape == (HEIGHT, WIDTH, 3)


def test_a_job_that_is_over_soon_has_no_charts_made_for_it(installation: Installation) -> None:
    def never(_pictures: Sequence[pipelines.Frame]) -> list[preview.Values]:
        raise AssertionError("nobody would look")

    of(installation).begin(preview.WORTH_S / 2, never)

    assert not (installation.paths.previews / "vae.json").exists()


def test_a_vae_that_makes_no_numbers_of_charts_teaches_nothing(installation: Installation) -> None:
    broken = np.full((CHANNELS, HEIGHT, WIDTH), np.nan, np.float32)
    of(installation).begin(None, lambda pictures: [broken for _ in pictures])

    assert not (installation.paths.previews / "vae.json").exists()


@pytest.mark.parametrize(("key", "prompt"), [("demo-flux", "a red circle"), ("demo-wan", "a red circle moving left")])
def test_what_charts_teach_shows_the_colours_of_other_pictures(
    key: str, prompt: str, installation: Installation
) -> None:
    """With VAEs that were trained: a picture shown by its latents has the colours it has."""
    run = Run(spec_for(key, prompt=prompt), installation.paths.models)
    shower = of(installation)
    shower.begin(60.0, lambda pictures: run.family.encoded_pictures(pictures, run.plan, run.loader, run.watch))
    drawn = Image.linear_gradient("L").convert("RGB")
    drawn.paste((200, 40, 30), (40, 60, 140, 200))
    drawn.paste((30, 60, 190), (150, 20, 230, 120))
    picture = np.asarray(drawn)
    (latents,) = run.family.encoded_pictures([picture], run.plan, run.loader, run.watch)
    shower.show(lambda: latents)
    with Image.open(preview.picture(installation.paths, "job")) as opened:
        shown = np.asarray(opened, dtype=float)
    small = np.asarray(drawn.resize((shown.shape[1], shown.shape[0]), Image.Resampling.BOX), dtype=float)

    assert np.corrcoef(shown.ravel(), small.ravel())[0, 1] > 0.9


def test_the_next_job_looks_like_what_its_vae_will_make_of_it(installation: Installation) -> None:
    for _ in range(3):
        learn(installation)
    latents, frame = latents_and_frame()
    of(installation).show(lambda: latents)
    with Image.open(preview.picture(installation.paths, "job")) as opened:
        shown = np.asarray(opened, dtype=float)

    assert shown.shape == (HEIGHT, WIDTH, 3)
    unclipped = (frame[::TIMES, ::TIMES] > 0) & (frame[::TIMES, ::TIMES] < 255)
    assert np.corrcoef(shown[unclipped], frame[::TIMES, ::TIMES][unclipped].astype(float))[0, 1] > 0.9


def test_pictures_come_no_oftener_than_a_person_looks(
    installation: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:
    learn(installation)
    monkeypatch.setattr(preview, "EVERY_S", 3600.0)
    asked: list[preview.Values] = []

    def latents_of() -> preview.Values:
        asked.append(latents_and_frame()[0])
        return asked[-1]

    shower = of(installation)
    for _ in range(5):
        shower.show(latents_of)

    assert asked == []


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b'{"gram": 1, "moment": 1}', b'{"gram": [[1]], "moment": [[1, 2, 3], [4, 5, 6]]}', b"\xff\xfe"],
)
def test_what_was_learned_and_is_damaged_is_learned_again(content: bytes, installation: Installation) -> None:
    learn(installation)
    (installation.paths.previews / "vae.json").write_bytes(content)
    of(installation).show(lambda: latents_and_frame()[0])
    assert not preview.picture(installation.paths, "job").exists()

    learn(installation)
    of(installation).show(lambda: latents_and_frame()[0])
    assert preview.picture(installation.paths, "job").exists()


def test_latents_that_are_no_numbers_or_another_vaes_are_not_shown(installation: Installation) -> None:
    learn(installation)
    broken = latents_and_frame()[0]
    broken[0, 0, 0] = np.nan
    of(installation).show(lambda: broken)
    of(installation).show(lambda: np.zeros((CHANNELS + 1, HEIGHT, WIDTH), np.float32))

    assert not preview.picture(installation.paths, "job").exists()


def test_a_disk_that_takes_no_preview_fails_no_job(installation: Installation) -> None:
    learn(installation)
    factors = (installation.paths.previews / "vae.json").read_bytes()
    (installation.paths.previews / "vae.json").unlink()
    installation.paths.previews.rmdir()
    shower = of(installation)
    installation.paths.previews.write_bytes(factors)  # a file where the folder was
    latents, frame = latents_and_frame()

    assert len(list(shower.learning(iter([frame]), latents))) == 1


@pytest.mark.parametrize("model", ["tiny-flux-schnell", "tiny-wan-ti2v", "tiny-wan-t2v-a14b"])
def test_every_family_shows_its_steps(model: str, tiny_models_folder: Path, installation: Installation) -> None:
    fields: dict[str, Any] = {"model": model, "num_inference_steps": 3}
    first = Run(spec_for(**fields), tiny_models_folder) if "flux" in model else run_of(fields, tiny_models_folder)
    latents = first.latents()
    first_frame = pipelines.values(first.family.first_frame(first.spec, latents))
    frame = next(iter(first.decode(latents)))
    assert len(list(Preview(installation.paths, "one", model).learning(iter([frame]), first_frame))) == 1

    second = Run(first.spec, tiny_models_folder)
    seen: list[preview.Values] = []

    class Seen(Preview):
        def show(self, latents_of: Callable[[], preview.Values]) -> None:
            seen.append(latents_of())
            super().show(lambda: seen[-1])

    second.watch.preview = Seen(installation.paths, "two", model)
    second.latents()

    assert [values.shape for values in seen] == [first_frame.shape] * 3
    assert np.allclose(seen[-1], first_frame, atol=1e-3)  # before the last step the rest of the way is straight
    with Image.open(preview.picture(installation.paths, "two")) as opened:
        assert opened.size == (first_frame.shape[2], first_frame.shape[1])


@pytest.mark.parametrize(("job", "frame"), [("5B from text", 0), ("5B from a picture", -1), ("A14B from a picture", 0)])
def test_a_clip_shows_a_frame_that_is_denoised_and_not_what_lies_under_the_picture(
    job: str, frame: int, tiny_models_folder: Path, installation: Installation
) -> None:
    run = run_of({**JOBS[job], "num_inference_steps": 3}, tiny_models_folder)
    seen: list[preview.Values] = []

    class Seen(Preview):
        def show(self, latents_of: Callable[[], preview.Values]) -> None:
            seen.append(latents_of())

    run.watch.preview = Seen(installation.paths, "job", "vae")
    latents = run.latents()
    shown, other = (pipelines.values(latents[0, :, place]) for place in (frame, -1 - frame))

    assert np.allclose(seen[-1], shown, atol=1e-3)
    assert not np.allclose(seen[-1], other, atol=1e-1)
    misses = [np.abs(values - shown).mean() for values in seen]  # of where the way would end if it were straight
    assert misses == sorted(misses, reverse=True)


@pytest.mark.parametrize("same_vae", [True, False])
def test_a_models_first_job_is_shown_where_it_takes_long_and_one_vae_is_learned_once(
    same_vae: bool, tiny_models_folder: Path, installation: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preview, "WORTH_S", 0.0)
    own = with_own_models(installation, tiny_models_folder, "tiny-flux-schnell", "tiny-flux-dev")
    schnell, dev = own.paths.models / "tiny-flux-schnell", own.paths.models / "tiny-flux-dev"
    if same_vae:
        shutil.rmtree(dev / "vae")
        shutil.copytree(schnell / "vae", dev / "vae")
    shown: list[bool] = []

    def told(message: dict[str, object]) -> None:
        if (message["type"], message.get("phase")) == ("step", "denoise"):
            shown.append(any(own.paths.previews.glob("*.jpg")))

    run = receipts(own, told)
    for kind in ("schnell", "dev"):
        (spec,) = specs_of(own, ["a fox"], model=f"tiny-flux-{kind}")
        run(spec)
        assert shown == [True] * spec.num_inference_steps
        shown.clear()

    assert len(list(own.paths.previews.glob("*.json"))) == (1 if same_vae else 2)


def test_a_job_leaves_what_it_taught_and_no_picture(installation: Installation) -> None:
    from safelight.ledger import leave_nothing

    learn(installation)
    of(installation).show(lambda: latents_and_frame()[0])
    (installation.paths.previews / ".job.jpg.part").touch()  # an engine was killed while it wrote
    checkpoints = installation.paths.checkpoints
    checkpoints.mkdir(parents=True)
    for name in ("job", ".job.123.part", "other"):
        (checkpoints / name).touch()
    leave_nothing(installation.paths, "job")

    assert [file.name for file in checkpoints.iterdir()] == ["other"]
    assert [file.name for file in installation.paths.previews.iterdir()] == ["vae.json"]


def test_a_terminal_shows_two_pixels_a_character(tmp_path: Path) -> None:
    file = tmp_path / "preview.png"
    pixels = np.zeros((4, 6, 3), np.uint8)
    pixels[0], pixels[1] = (255, 0, 0), (0, 0, 255)
    Image.fromarray(pixels).save(file)
    text = display.half_blocks(file, 20, 10)

    assert text is not None
    assert text.plain == "▀▀▀▀▀▀\n▀▀▀▀▀▀\n"
    assert str(text.spans[0].style) == "#ff0000 on #0000ff"
    assert display.half_blocks(tmp_path / "none.png", 20, 10) is None
    assert display.half_blocks(file, 20, 0) is not None  # a terminal of one line
