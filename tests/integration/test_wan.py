"""Wan 2.2: our loop against the stock pipelines, two experts in turn, and what cancelling and tiling do."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file
from torch.nn.modules.module import register_module_forward_pre_hook

from safelight.errors import SafelightError
from safelightd.pipelines import BrokenResult
from safelightd.progress import Cancelled, Watch
from safelightd.weights import BadModelFolder
from tests.integration.rendering import (
    HALF,
    NoMeter,
    Run,
    StopAt,
    alive,
    moments_to_stop,
    picture,
    spec_for,
    stock,
    stock_answer,
    stock_pipeline,
)

DIGEST = "0" * 64

JOBS: dict[str, dict[str, Any]] = {
    "5B from text": {"model": "tiny-wan-ti2v"},
    "5B without guidance": {"model": "tiny-wan-ti2v", "guidance_scale": 1.0, "negative_prompt": ""},
    "5B own shift and negative": {"model": "tiny-wan-ti2v", "flow_shift": 3.0, "negative_prompt": "blurry"},
    "5B from a picture": {"model": "tiny-wan-ti2v", "image": DIGEST},
    "A14B from text": {"model": "tiny-wan-t2v-a14b", "guidance_scale": 5.0, "guidance_scale_2": 2.0},
    "A14B without guidance": {"model": "tiny-wan-t2v-a14b", "guidance_scale": 1.0},
    "A14B from a picture": {"model": "tiny-wan-i2v-a14b", "image": DIGEST},
    "A14B from two pictures": {"model": "tiny-wan-i2v-a14b", "image": DIGEST, "last_image": "1" * 64},
}


def run_of(fields: dict[str, Any], models_folder: Path, **more: Any) -> Run:
    image = picture() if "image" in fields else None
    last_image = picture(90, 70).rotate(180) if "last_image" in fields else None
    return Run(spec_for(**fields), models_folder, image=image, last_image=last_image, **more)


@pytest.fixture
def text_run(tiny_models_folder: Path) -> Run:
    return run_of({"model": "tiny-wan-ti2v", "num_inference_steps": 2}, tiny_models_folder)


@pytest.mark.parametrize("fields", JOBS.values(), ids=JOBS)
def test_our_loop_gives_the_bits_of_the_stock_pipeline(fields: dict[str, Any], tiny_models_folder: Path) -> None:
    run = run_of(fields, tiny_models_folder)
    latents, pictures = stock_answer(run)

    ours = run.latents()
    frames = run.decode(ours)

    assert torch.equal(latents, ours)
    assert len(frames) == run.spec.num_frames
    assert all(np.array_equal(a, b) for a, b in zip(pictures, frames, strict=True))


@pytest.mark.parametrize("job", ["5B from text", "5B from a picture", "A14B from text", "A14B from a picture"])
@pytest.mark.parametrize("size", [(64, 96, 5), (32, 128, 13), (160, 32, 21), (64, 32, 121)], ids=str)
def test_upright_narrow_and_long_clips_are_those_of_the_stock_pipeline(
    size: tuple[int, int, int], job: str, tiny_models_folder: Path
) -> None:
    width, height, num_frames = size
    asked = {"width": width, "height": height, "num_frames": num_frames, "num_inference_steps": 2}
    run = run_of(JOBS[job] | asked, tiny_models_folder)
    latents, pictures = stock_answer(run)

    frames = run.decode(ours := run.latents())

    assert torch.equal(latents, ours)
    assert [frame.shape for frame in frames] == [(height, width, 3)] * num_frames
    assert all(np.array_equal(a, b) for a, b in zip(pictures, frames, strict=True))


@pytest.mark.parametrize("job", ["5B from text", "5B from a picture"])
def test_a_clip_of_more_tokens_than_rows_are_embedded_has_the_bits_of_stock(job: str, tiny_models_folder: Path) -> None:
    run = run_of(
        JOBS[job] | {"width": 256, "height": 256, "num_frames": 69, "num_inference_steps": 2}, tiny_models_folder
    )
    expected = stock(run, stock_pipeline(run), "latent")
    given: list[torch.Size] = []

    def look(module: Any, arguments: tuple[torch.Tensor, ...]) -> None:
        if isinstance(module, WanTransformer3DModel):
            given.append(arguments[1].shape)

    with register_module_forward_pre_hook(look):
        ours = run.latents()

    assert torch.equal(expected, ours)
    assert given == [(1, 1 if run.image is None else 2)] * 4  # timesteps of two steps, each twice


@pytest.mark.parametrize("job", ["5B from a picture", "A14B from text"])
def test_steps_are_counted_frames_move_and_each_phase_leaves_no_component(job: str, tiny_models_folder: Path) -> None:
    run = run_of(JOBS[job], tiny_models_folder)
    before = alive()

    embeddings = run.encode()
    after_encode = alive()
    latents = run.denoise(embeddings)
    after_denoise = alive()
    frames = run.decode(latents)
    after_decode = alive()

    assert after_encode == after_denoise == after_decode == before
    steps = run.spec.num_inference_steps
    assert run.steps("denoise") == [(i + 1, steps) for i in range(steps)]
    assert run.steps("decode") == [(1, 3), (2, 3), (3, 3)]
    assert all(frame.shape == (run.spec.height, run.spec.width, 3) for frame in frames)
    assert all(frame.std() > 20 for frame in frames)
    assert np.abs(frames[0].astype(int) - frames[-1]).mean() > 5


@pytest.mark.parametrize("model", ["tiny-wan-t2v-a14b", "tiny-wan-i2v-a14b"])
def test_of_two_experts_one_is_in_memory_and_both_run(model: str, tiny_models_folder: Path) -> None:
    run = run_of({"model": model} | ({"image": DIGEST} if "i2v" in model else {}), tiny_models_folder)
    loaded: list[int] = []
    embeddings = run.encode()
    run.watch = Watch(lambda told: loaded.append(alive().count("WanTransformer3DModel")), run.stop, NoMeter())
    run.watch.current = "denoise"

    run.family.denoise(run.spec, run.plan, run.loader, embeddings, run.watch, run.image)

    assert loaded == [1] * run.spec.num_inference_steps
    one_expert = Run(run.spec, tiny_models_folder, component_paths=_first_expert_twice(model, tiny_models_folder))
    one_expert.image = run.image
    assert not torch.equal(one_expert.denoise(embeddings), run.denoise(embeddings))


def _first_expert_twice(model: str, models_folder: Path) -> dict[str, str]:
    return {"transformer_2": str(models_folder / model / "transformer")}


@pytest.mark.parametrize("job", ["5B from text", "A14B from two pictures"])
def test_the_same_spec_twice_gives_the_same_bytes(job: str, tiny_models_folder: Path) -> None:
    run = run_of(JOBS[job], tiny_models_folder)
    again = run_of(JOBS[job], tiny_models_folder)

    assert [frame.tobytes() for frame in run.frames()] == [frame.tobytes() for frame in again.frames()]


@pytest.mark.parametrize(
    ("model", "change"),
    [
        ("tiny-wan-ti2v", {"prompt": "a blue fox"}),
        ("tiny-wan-ti2v", {"seed": 8}),
        ("tiny-wan-ti2v", {"negative_prompt": "red"}),
        ("tiny-wan-t2v-a14b", {"prompt": "a blue fox"}),
    ],
)
def test_another_prompt_or_seed_gives_another_clip(
    model: str, change: dict[str, Any], tiny_models_folder: Path
) -> None:
    run = run_of({"model": model}, tiny_models_folder)
    other = Run(run.spec.model_copy(update=change), tiny_models_folder)

    difference = np.abs(np.stack(run.frames()).astype(int) - np.stack(other.frames()))

    assert difference.mean() > 2


def test_another_picture_gives_another_clip(tiny_models_folder: Path) -> None:
    run = run_of({"model": "tiny-wan-ti2v", "image": DIGEST}, tiny_models_folder)
    other = run_of({"model": "tiny-wan-ti2v", "image": DIGEST}, tiny_models_folder)
    other.image = picture().rotate(180)

    assert not torch.equal(run.latents(), other.latents())


def test_a_picture_with_transparency_or_a_palette_is_read_as_rgb(tiny_models_folder: Path) -> None:
    run = run_of({"model": "tiny-wan-ti2v", "image": DIGEST, "num_inference_steps": 1}, tiny_models_folder)
    embeddings = run.encode()
    expected = run.denoise(embeddings)
    assert run.image is not None

    run.image = run.image.convert("RGBA")

    assert torch.equal(expected, run.denoise(embeddings))


@pytest.mark.parametrize("phase", ["encode", "denoise", "decode"])
@pytest.mark.parametrize("job", ["5B from a picture", "A14B from text"])
def test_cancelling_anywhere_in_a_phase_leaves_nothing_and_a_following_run_is_exact(
    job: str, phase: str, tiny_models_folder: Path
) -> None:
    run = run_of(JOBS[job], tiny_models_folder)
    before = alive()
    embeddings = run.encode()
    latents = run.denoise(embeddings)
    given = {"encode": (), "denoise": (embeddings,), "decode": (latents,)}[phase]
    run.stop.asked = 0
    whole = getattr(run, phase)(*given)
    asked = run.stop.asked

    for moment in moments_to_stop(asked):
        cancelled = run_of(JOBS[job], tiny_models_folder, stop=StopAt(moment))
        with pytest.raises(Cancelled):
            getattr(cancelled, phase)(*given)
        assert alive() == before

    again = getattr(run_of(JOBS[job], tiny_models_folder), phase)(*given)
    assert _same(whole, again)


@pytest.mark.parametrize("job", ["5B from a picture", "A14B from a picture"])
def test_in_half_precision_the_vae_computes_in_float32_and_the_clip_is_the_same_to_the_eye(
    job: str, tiny_models_folder: Path
) -> None:
    run = run_of(JOBS[job], tiny_models_folder)
    half = run_of(JOBS[job], tiny_models_folder, plan_changes=HALF)

    embeddings = half.encode()
    latents = half.denoise(embeddings)

    assert embeddings.prompt_embeds.dtype == torch.float16
    assert latents.dtype == torch.float32
    difference = np.abs(np.stack(half.decode(latents)).astype(int) - np.stack(run.frames()))
    assert 0 < difference.mean() < 2


def test_frames_come_while_the_clip_is_still_being_decoded(text_run: Run) -> None:
    latents = text_run.latents()
    frames = text_run.family.decode(text_run.spec, text_run.plan, text_run.loader, latents, text_run.watch)
    text_run.watch.current = "decode"

    next(frames)

    assert text_run.steps("decode") == [(1, 3)]
    assert "AutoencoderKLWan" in alive()
    frames.close()
    assert "AutoencoderKLWan" not in alive()


@pytest.mark.parametrize("job", ["5B from a picture", "A14B from a picture"])
def test_tiles_give_the_bits_of_stock_tiles(job: str, tiny_models_folder: Path) -> None:
    fields = JOBS[job] | {"num_inference_steps": 1, "num_frames": 5}
    tiled = run_of(fields, tiny_models_folder, plan_changes={"vae_tiling": True})
    tiled.spec = tiled.spec.model_copy(update={"width": 544, "height": 32})
    latents, pictures = stock_answer(tiled, tiled=True)

    ours = tiled.latents()
    frames = tiled.decode(ours)

    assert torch.equal(latents, ours)
    assert all(np.array_equal(a, b) for a, b in zip(pictures, frames, strict=True))
    whole = run_of(fields, tiny_models_folder)
    whole.spec = tiled.spec
    assert not np.array_equal(whole.decode(ours)[-1], frames[-1])


def test_timesteps_that_are_equal_are_each_their_own_step(tiny_models_folder: Path) -> None:
    """A large shift leaves neighbours the same whole number; looked up by value, the second of them would be first."""
    fields = JOBS["A14B from a picture"] | {"flow_shift": 100.0, "num_inference_steps": 40}
    run = run_of(fields, tiny_models_folder)

    frames = run.frames()

    assert run.steps("denoise")[-1] == (40, 40)
    assert all(frame.std() > 20 for frame in frames)


@pytest.mark.parametrize("number", [float("nan"), float("-inf")])
def test_numbers_that_are_no_picture_are_refused(number: float, text_run: Run) -> None:
    latents = text_run.latents()
    latents[0, 3, 2, 1, 1] = number

    with pytest.raises(BrokenResult, match="NaN or infinity"):
        text_run.decode(latents)


@pytest.mark.parametrize("job", ["5B from text", "A14B from text"])
def test_a_clip_in_strips_is_that_of_the_whole_and_asks_before_each_whether_to_stop(
    job: str, tiny_models_folder: Path
) -> None:
    fields = JOBS[job] | {"num_inference_steps": 1, "num_frames": 5}
    runs = [run_of(fields, tiny_models_folder, plan_changes={"vae_strip_rows": rows}) for rows in (0, 2048, 16)]
    latents = runs[0].latents()
    shown, asked = [], []
    for run in runs:
        before = run.stop.asked
        shown.append(np.stack(run.decode(latents)).astype(int))
        asked.append(run.stop.asked - before)

    assert shown[0].std() > 10
    assert all(np.abs(other - shown[0]).max() <= 1 for other in shown[1:])
    assert asked[2] > asked[1] + 10


@pytest.mark.parametrize("how", [{}, {"vae_tiling": True}, {"vae_strip_rows": 16}], ids=["whole", "tiles", "strips"])
def test_pixels_that_overflow_in_the_vae_are_refused(how: dict[str, Any], text_run: Run, tmp_path: Path) -> None:
    """The VAE would clamp infinity to a white picture that looks like a result."""
    vae = Path(shutil.copytree(text_run.models_folder / "tiny-wan-ti2v" / "vae", tmp_path / "vae"))
    file = vae / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["decoder.conv_out.bias"].fill_(float("inf"))
    save_file(weights, file, metadata={"format": "pt"})
    broken = Run(text_run.spec, text_run.models_folder, how, component_paths={"vae": str(vae)})

    with pytest.raises(BrokenResult, match="pixels hold NaN or infinity"):
        broken.decode(text_run.latents())


def test_a_picture_the_job_names_and_nobody_loaded_is_refused(tiny_models_folder: Path) -> None:
    """Without it the 5B would make a clip from text alone, and nobody would notice."""
    run = run_of({"model": "tiny-wan-ti2v", "image": DIGEST}, tiny_models_folder)
    run.image = None

    with pytest.raises(SafelightError, match="none was loaded"):
        run.encode()


def test_a_job_without_a_guidance_scale_is_refused(text_run: Run) -> None:
    text_run.spec = text_run.spec.model_copy(update={"guidance_scale": None})

    with pytest.raises(SafelightError, match="no guidance_scale"):
        text_run.encode()


def test_a_flow_shift_the_scheduler_does_not_know_is_refused(tiny_models_folder: Path) -> None:
    """A flow-match scheduler calls it `shift` and would ignore ours."""
    flux = Run(spec_for("tiny-flux-schnell"), tiny_models_folder)

    with pytest.raises(BadModelFolder, match="a FlowMatchEulerDiscreteScheduler has no flow_shift"):
        flux.loader.scheduler(flow_shift=5.0)


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, list):
        return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    return torch.equal(one.prompt_embeds, other.prompt_embeds)
