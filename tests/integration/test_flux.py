"""FLUX.1: our loop against the stock pipeline, and what cancelling, tiling and broken numbers do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.modules.module import register_module_forward_pre_hook

from safelight.errors import SafelightError
from safelightd.pipelines import BrokenResult, stop_between_blocks, stop_inside
from safelightd.progress import Cancelled
from tests.integration.rendering import HALF, Run, StopAt, alive, moments_to_stop, picture, spec_for, stock_answer

JOBS: dict[str, dict[str, Any]] = {
    "schnell": {"model": "tiny-flux-schnell"},
    "schnell wide with short prompts": {"model": "tiny-flux-schnell", "width": 96, "max_sequence_length": 32},
    "dev": {"model": "tiny-flux-dev", "guidance_scale": 5.0},
    "dev with prompt_2": {"model": "tiny-flux-dev", "prompt_2": "oil on canvas"},
    "dev with true guidance": {"model": "tiny-flux-dev", "negative_prompt": "blurry", "true_cfg_scale": 3.0},
}


FROM_PICTURES: dict[str, dict[str, Any]] = {
    "schnell from a picture": {"model": "tiny-flux-schnell", "strength": 0.5},
    "schnell from a picture, one step": {"model": "tiny-flux-schnell", "strength": 0.01},
    "schnell from a picture, all steps": {"model": "tiny-flux-schnell", "strength": 1.0, "width": 96},
    "dev from a picture": {"model": "tiny-flux-dev", "guidance_scale": 5.0, "num_inference_steps": 7},
    "dev from a picture with true guidance": {
        "model": "tiny-flux-dev", "negative_prompt": "blurry", "true_cfg_scale": 3.0, "strength": 0.75,
    },
}  # fmt: skip


@pytest.fixture(params=(JOBS | FROM_PICTURES).values(), ids=(JOBS | FROM_PICTURES).keys())
def run(request: pytest.FixtureRequest, tiny_models_folder: Path) -> Run:
    if request.param in JOBS.values():
        return Run(spec_for(**request.param), tiny_models_folder)
    return Run(spec_for(**request.param, image="0" * 64), tiny_models_folder, image=picture())


@pytest.fixture
def schnell(tiny_models_folder: Path) -> Run:
    return Run(spec_for("tiny-flux-schnell"), tiny_models_folder)


def test_our_loop_gives_the_bits_of_the_stock_pipeline(run: Run) -> None:
    latents, pictures = stock_answer(run)

    ours = run.latents()
    frames = run.decode(ours)

    assert torch.equal(latents, ours)
    assert len(frames) == 1
    assert np.array_equal(pictures[0], frames[0])


def test_steps_are_counted_the_picture_is_not_flat_and_each_phase_leaves_no_component(run: Run) -> None:
    before = alive()

    embeddings = run.encode()
    after_encode = alive()
    latents = run.denoise(embeddings)
    after_denoise = alive()
    frame = run.decode(latents)[0]
    after_decode = alive()

    assert after_encode == after_denoise == after_decode == before
    steps = run.spec.steps_run
    assert run.steps("denoise") == [(i + 1, steps) for i in range(steps)]
    assert run.steps("decode") == [(1, 1)]
    assert (run.spec.height, run.spec.width, 3) == frame.shape
    assert frame.std() > 20
    assert embeddings.prompt_embeds.device.type == latents.device.type == "cpu"


def test_the_same_spec_twice_gives_the_same_bytes(schnell: Run, tiny_models_folder: Path) -> None:
    again = Run(schnell.spec, tiny_models_folder)

    assert schnell.frames()[0].tobytes() == again.frames()[0].tobytes()


@pytest.mark.parametrize("change", [{"prompt": "a blue fox"}, {"prompt": "狐"}, {"seed": 8}])
def test_another_prompt_or_seed_gives_another_picture(
    change: dict[str, Any], schnell: Run, tiny_models_folder: Path
) -> None:
    other = Run(schnell.spec.model_copy(update=change), tiny_models_folder)

    difference = np.abs(schnell.frames()[0].astype(int) - other.frames()[0])

    assert difference.mean() > 5


@pytest.mark.parametrize("phase", ["encode", "denoise", "decode"])
def test_cancelling_anywhere_in_a_phase_leaves_nothing_and_a_following_run_is_exact(
    phase: str, schnell: Run, tiny_models_folder: Path
) -> None:
    before = alive()
    embeddings = schnell.encode()
    latents = schnell.denoise(embeddings)
    given = {"encode": (), "denoise": (embeddings,), "decode": (latents,)}[phase]
    schnell.stop.asked = 0
    whole = getattr(schnell, phase)(*given)
    asked = schnell.stop.asked

    for moment in moments_to_stop(asked):
        cancelled = Run(schnell.spec, tiny_models_folder, stop=StopAt(moment))
        with pytest.raises(Cancelled):
            getattr(cancelled, phase)(*given)
        assert alive() == before

    again = getattr(Run(schnell.spec, tiny_models_folder), phase)(*given)
    assert _same(whole, again)


def test_a_step_asks_before_every_block_whether_to_stop(schnell: Run) -> None:
    """Two double and two single blocks a forward, a step's end, and the phase's beginning."""
    embeddings = schnell.encode()
    schnell.stop.asked = 0

    schnell.denoise(embeddings)

    blocks, step_end, phase_begin = 4, 1, 1
    assert schnell.spec.num_inference_steps * (blocks + step_end) + phase_begin <= schnell.stop.asked


def test_nothing_is_asked_inside_of_a_block_where_compiled_code_runs(schnell: Run) -> None:
    with schnell.loader.component("text_encoder_2", "cpu") as t5:
        stop_between_blocks(t5, schnell.watch)
        asking = [name for name, module in t5.named_modules() if module._forward_pre_hooks]

    assert asking == ["encoder.block.0", "encoder.block.1"]


def test_a_vae_asks_inside_of_its_blocks_too(schnell: Run) -> None:
    with schnell.loader.component("vae", "cpu") as vae:
        stop_inside(vae, schnell.watch)
        asking = [name for name, module in vae.named_modules() if module._forward_pre_hooks]

    assert {"decoder.up_blocks.0", "decoder.up_blocks.0.resnets.0"} <= set(asking)


def test_in_half_precision_the_vae_computes_in_float32_and_the_picture_is_the_same_to_the_eye(
    schnell: Run, tiny_models_folder: Path
) -> None:
    half = Run(schnell.spec, tiny_models_folder, HALF)

    embeddings = half.encode()
    latents = half.denoise(embeddings)

    assert embeddings.prompt_embeds.dtype == embeddings.pooled_prompt_embeds.dtype == latents.dtype == torch.float16
    difference = np.abs(half.decode(latents)[0].astype(int) - schnell.frames()[0])
    assert 0 < difference.mean() < 2


def test_an_iterator_that_is_closed_before_its_end_gives_the_vae_back(schnell: Run) -> None:
    before = alive()
    frames = schnell.family.decode(schnell.spec, schnell.plan, schnell.loader, schnell.latents(), schnell.watch)
    next(frames)
    holding = alive()

    frames.close()

    assert "AutoencoderKL" in holding
    assert alive() == before


def test_a_vae_in_strips_asks_before_each_of_them_whether_to_stop(tiny_models_folder: Path) -> None:
    spec = spec_for("tiny-flux-schnell", width=128, height=128, num_inference_steps=1, image="0" * 64, strength=1.0)
    runs = [Run(spec, tiny_models_folder, {"vae_strip_rows": rows}, image=picture()) for rows in (128, 16)]
    asked = []
    for run in runs:
        latents = run.denoise(run.encode())
        after_denoising = run.stop.asked
        run.decode(latents)
        asked.append((after_denoising, run.stop.asked - after_denoising))

    assert all(many > few + 20 for few, many in zip(*asked, strict=True))


def test_decoding_does_not_switch_gradients_off_for_who_reads_the_frames(schnell: Run) -> None:
    latents = schnell.latents()

    for _ in schnell.family.decode(schnell.spec, schnell.plan, schnell.loader, latents, schnell.watch):
        assert torch.is_grad_enabled()


def test_tiles_are_smaller_than_a_large_picture_and_give_the_bits_of_stock_tiles(tiny_models_folder: Path) -> None:
    large = spec_for("tiny-flux-schnell", num_inference_steps=1).model_copy(update={"width": 640, "height": 576})
    whole = Run(large, tiny_models_folder)
    tiled = Run(large, tiny_models_folder, plan_changes={"vae_tiling": True})
    latents, pictures = stock_answer(tiled, tiled=True)

    frame = tiled.decode(latents)[0]

    assert np.array_equal(pictures[0], frame)
    assert not np.array_equal(whole.decode(latents)[0], frame)


def test_a_picture_in_strips_is_that_of_the_whole_within_rounding(tiny_models_folder: Path) -> None:
    large = spec_for("tiny-flux-schnell", num_inference_steps=1).model_copy(update={"width": 640, "height": 576})
    whole = Run(large, tiny_models_folder)
    in_strips = Run(large, tiny_models_folder, plan_changes={"vae_strip_rows": 64})
    latents = whole.latents()
    shown: list[int] = []

    def look(part: Any, given: tuple[torch.Tensor, ...]) -> None:
        if isinstance(part, torch.nn.Conv2d) and part.out_channels > 3 and given[0].shape[3] == large.width:
            shown.append(given[0].shape[2])

    with register_module_forward_pre_hook(look):
        frame = in_strips.decode(latents)[0]

    assert np.abs(frame.astype(int) - whole.decode(latents)[0]).max() <= 1
    assert max(shown) == 64 + 2


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_numbers_that_are_no_picture_are_refused(number: float, schnell: Run) -> None:
    latents = schnell.latents()
    latents[0, 3, 5] = number

    with pytest.raises(BrokenResult, match="NaN or infinity"):
        schnell.decode(latents)


@pytest.mark.parametrize("how", [{}, {"vae_tiling": True}, {"vae_strip_rows": 16}], ids=["whole", "tiles", "strips"])
def test_pixels_that_overflow_in_the_vae_are_refused(how: dict[str, Any], tiny_models_folder: Path) -> None:
    """Finite latents can overflow on the way to pixels, as float16 does."""
    run = Run(spec_for("tiny-flux-schnell"), tiny_models_folder, plan_changes=how)

    with pytest.raises(BrokenResult, match="pixels hold NaN or infinity"):
        run.decode(torch.full_like(run.latents(), 3e38))


def test_a_picture_the_job_does_not_name_is_refused(schnell: Run) -> None:
    schnell.image = picture()

    with pytest.raises(SafelightError, match="the job names image None, and one was loaded"):
        schnell.encode()


def test_weights_that_take_guidance_are_not_run_without(tiny_models_folder: Path) -> None:
    run = Run(spec_for("tiny-flux-dev").model_copy(update={"guidance_scale": None}), tiny_models_folder)

    with pytest.raises(SafelightError, match="take a guidance_scale"):
        run.latents()


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, list):
        return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    return torch.equal(one.prompt_embeds, other.prompt_embeds)


@pytest.mark.parametrize("strength", [0.5, None])
def test_a_picture_in_tiles_in_strips_and_in_float16_is_started_from_too(
    strength: float | None, tiny_models_folder: Path
) -> None:
    fields = {"image": "0" * 64, "width": 96, "height": 96, **({"strength": strength} if strength else {})}
    spec = spec_for("tiny-flux-schnell", **fields)

    whole, half, tiled, in_strips = (
        Run(spec, tiny_models_folder, plan_changes=changes, image=picture()).frames()[0].astype(int)
        for changes in ({}, HALF, {"vae_tiling": True, "vae_tile_pixels": 32}, {"vae_strip_rows": 16})
    )
    assert half.std() > 10
    assert tiled.std() > 10
    assert np.abs(in_strips - whole).max() <= 1


def test_cancelling_while_the_picture_is_encoded_leaves_nothing(tiny_models_folder: Path) -> None:
    spec = spec_for("tiny-flux-schnell", image="0" * 64, strength=0.5)
    whole = Run(spec, tiny_models_folder, image=picture())
    embeddings = whole.encode()
    before = alive()

    cancelled = Run(spec, tiny_models_folder, image=picture(), stop=StopAt(2))
    with pytest.raises(Cancelled):
        cancelled.denoise(embeddings)

    assert alive() == before
