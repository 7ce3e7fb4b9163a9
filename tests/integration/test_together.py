"""What jobs may ask for together: LoRAs, ControlNets, caches, pictures to start from, single files, checkpoints."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from bench import layouts

from safelight import inputs
from safelight.caches import Cache
from safelight.controlnet import ControlNet
from safelight.jobspec import JobSpec
from safelight.lora import Lora
from safelightd import checkpoint, metadata, tiny
from safelightd.pinnedset import PinnedSet
from tests.conftest import Installation
from tests.daemon.test_worker import specs_of
from tests.integration import registering
from tests.integration.lora_files import random_lora, rescaled
from tests.integration.registering import add, table
from tests.integration.rendering import Run, picture, spec_for, stock, stock_pipeline
from tests.integration.test_caching import AT_TIMES, EAGER
from tests.integration.test_checkpoint import Killed, kept
from tests.integration.test_lora import changed_weights
from tests.integration.warm_engine import engine

FLUX = "tiny-flux-dev"
EXPERTS = "tiny-wan-t2v-a14b"
DIGEST = "0" * 64

own, disk = registering.own, registering.disk

Loras = list[tuple[Lora, Path]]


@pytest.fixture
def style(tiny_models_folder: Path, tmp_path: Path) -> tuple[Lora, Path]:
    return random_lora(tmp_path / "style.safetensors", FLUX, tiny_models_folder)


@pytest.fixture
def grain(tiny_models_folder: Path, tmp_path: Path) -> tuple[Lora, Path]:
    return random_lora(tmp_path / "grain.safetensors", FLUX, tiny_models_folder, seed=2)


# -- LoRAs and caches ----------------------------------------------------------------------------------------------

NOTHING_LEFT_OUT: dict[str, dict[str, Any]] = {
    "first-block": {"kind": "first-block", "threshold": 0},
    "taylorseer": {"kind": "taylorseer", "cache_interval": 2, "disable_cache_before_step": 100},
}


@pytest.mark.parametrize("kind", NOTHING_LEFT_OUT)
@pytest.mark.parametrize("model", [FLUX, EXPERTS])
def test_a_cache_that_leaves_nothing_out_changes_no_bit_of_a_job_with_a_lora(
    model: str, kind: str, tiny_models_folder: Path, tmp_path: Path
) -> None:
    lora = random_lora(tmp_path / "l.safetensors", model, tiny_models_folder)

    def run(cache: dict[str, Any] | None, *loras: tuple[Lora, Path]) -> Run:
        return Run(spec_for(model, num_inference_steps=6, cache=cache), tiny_models_folder, loras=loras)

    cached, eager = run(NOTHING_LEFT_OUT[kind], lora), run(EAGER[kind], lora)
    expected = run(None, lora).latents()

    assert torch.equal(cached.latents(), expected)
    assert (cached.watch.skipped, cached.watch.forwards > 0) == (0, True)
    assert not torch.equal(eager.latents(), expected)
    assert eager.watch.skipped > 0
    assert not torch.equal(run(None).latents(), expected)


@pytest.mark.parametrize("cache", [*EAGER.values(), {"kind": "first-block", "threshold": AT_TIMES["FLUX"]}])
def test_nothing_of_a_cache_is_left_for_the_next_job_with_another_lora(
    cache: dict[str, Any], style: tuple[Lora, Path], grain: tuple[Lora, Path], tiny_models_folder: Path
) -> None:
    """Also where blocks wait in pinned memory for the next job, and have other LoRAs in them then."""
    plan = {"offload": "partial", "streamed": {"transformer": (0, 1, 3)}, "streamed_from": "pinned"}
    pinned = PinnedSet(limit_bytes=1 << 40)

    def run(loras: Loras, **more: Any) -> Run:
        return Run(spec_for(FLUX, cache=cache), tiny_models_folder, loras=loras, **more)

    for loras in ([style], [grain], [], [style, grain], [style]):
        cold, warm = run(loras), run(loras, plan_changes=plan, pinned=pinned)

        assert torch.equal(cold.latents(), warm.latents())
        assert cold.watch.skipped == warm.watch.skipped > 0


def test_a_warm_engine_makes_of_each_job_what_a_fresh_one_makes(
    installation: Installation, style: tuple[Lora, Path], grain: tuple[Lora, Path]
) -> None:
    asked: list[dict[str, Any]] = []
    for loras in ((style,), (grain,), (), (style, grain)):
        kept = tuple(_stored(installation, each) for each in loras)
        asked += [{"loras": kept, "cache": cache} for cache in (Cache(**EAGER["taylorseer"]), None)]
    specs = specs_of(installation, ["a fox"] * 2 * len(asked), model=FLUX, num_inference_steps=6)
    jobs = [spec.model_copy(update={**each, "seed": 7}) for spec, each in zip(specs, asked + asked, strict=True)]
    warm = engine(installation)

    warmly = [warm(job) for job in jobs[: len(asked)]]
    freshly = [engine(installation)(job) for job in jobs[len(asked) :]]

    assert all(np.array_equal(one, other) for one, other in zip(warmly, freshly, strict=True))
    assert len({pixels.tobytes() for pixels in warmly}) == len(warmly)


def _stored(installation: Installation, lora: tuple[Lora, Path]) -> Lora:
    """Return a LoRA as a job has one whose file it brought."""
    installation.paths.inputs.mkdir(parents=True, exist_ok=True)
    (installation.paths.inputs / lora[0].sha256).write_bytes(lora[1].read_bytes())
    return lora[0].model_copy(update={"name": "", "path": lora[1].name})


# -- single files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", ["bf16", "fp8_e4m3 scaled", "Q8_0"])
def test_a_single_file_goes_with_a_controlnet_a_cache_and_loras(
    packed: str, own: Installation, disk: Path, style: tuple[Lora, Path]
) -> None:
    """What it makes is, bit for bit, what the weights make that it stands for."""
    for key, file in zip(("fox", "meant"), _packed(disk / FLUX / "transformer", disk, packed), strict=True):
        assert add(own, file, "--as", key, "--with", disk / FLUX).exit_code == 0
    tiny.build_controlnet(own.paths.models / "controlnets/tiny")
    own = replace(own, models=table(own))
    source = disk / "pose.png"
    picture(64, 64).save(source)
    digest = inputs.store(source, own.paths.inputs).digest
    leads = ControlNet(model="tiny", image=digest)
    lora, cache = _stored(own, style), Cache(**EAGER["first-block"])
    asked: dict[str, dict[str, Any]] = {
        "alone": {},
        "led": {"controlnet": leads},
        "cached": {"cache": cache},
        "changed": {"loras": (lora,)},
        "led, changed": {"controlnet": leads, "loras": (lora,)},
        "from a picture, led, changed": {"image": digest, "strength": 0.6, "controlnet": leads, "loras": (lora,)},
        "cached, changed": {"cache": cache, "loras": (lora,)},
    }
    run = engine(own)

    made = {model: [run(job) for job in _jobs(own, model, asked)] for model in ("fox", "meant")}

    for what, of_file, of_weights in zip(asked, made["fox"], made["meant"], strict=True):
        assert np.array_equal(of_file, of_weights), what
    assert len({pixels.tobytes() for pixels in made["fox"]}) == len(asked)


def _jobs(installation: Installation, model: str, asked: dict[str, dict[str, Any]]) -> list[JobSpec]:
    specs = specs_of(installation, ["a fox"] * len(asked), model=model, num_inference_steps=6)
    return [spec.model_copy(update={**each, "seed": 7}) for spec, each in zip(specs, asked.values(), strict=True)]


def _packed(transformer: Path, place: Path, kind: str) -> tuple[Path, Path]:
    """Write a transformer as one file of a layout, and as one of what that stands for, by definition."""
    weights = layouts.flux_of_authors(layouts.published(transformer))
    file = place / f"packed.{'gguf' if kind == 'Q8_0' else 'safetensors'}"
    if kind == "Q8_0":
        meant = layouts.save_gguf(weights, file, gguf.GGMLQuantizationType.Q8_0)
    elif kind == "bf16":
        layouts.save(weights := {name: each.bfloat16() for name, each in weights.items()}, file)
        meant = {name: each.float() for name, each in weights.items()}
    else:
        layouts.save(weights := layouts.scaled(weights, "scale_weight"), file)
        meant = layouts.unscaled(weights, "scale_weight")
    return file, layouts.save(meant, place / "meant.safetensors")


# -- LoRAs, ControlNets and pictures to start from -----------------------------------------------------------------

LED: dict[str, dict[str, Any]] = {
    "led": {"controlnet": {"model": "tiny", "image": DIGEST, "scale": 0.8}},
    "from a picture": {"image": DIGEST, "strength": 0.7},
    "led from a picture": {
        "controlnet": {"model": "tiny", "image": DIGEST, "end": 0.6}, "image": DIGEST, "strength": 0.7, "width": 96,
    },
}  # fmt: skip


def led(fields: dict[str, Any], folder: Path, *loras: tuple[Lora, Path]) -> Run:
    pictures: dict[str, Any] = {}
    if "controlnet" in fields:
        pictures["control_image"] = picture()
    if "image" in fields:
        pictures["image"] = picture(96, 64).rotate(180)
    return Run(spec_for(FLUX, **fields), folder, loras=loras, **pictures)


def test_a_controlnet_leads_from_a_picture_with_the_bits_of_the_stock_pipeline(tiny_models_folder: Path) -> None:
    run = led(LED["led from a picture"], tiny_models_folder)
    pipe = stock_pipeline(run)

    assert type(pipe).__name__ == "FluxControlNetImg2ImgPipeline"
    assert torch.equal(run.latents(), stock(run, pipe, "latent"))
    assert not torch.equal(run.latents(), led(LED["from a picture"] | {"width": 96}, tiny_models_folder).latents())


@pytest.mark.parametrize("fields", LED.values(), ids=LED)
def test_with_loras_it_is_the_stock_pipeline_with_the_loras_in_its_weights(
    fields: dict[str, Any], style: tuple[Lora, Path], grain: tuple[Lora, Path], tiny_models_folder: Path
) -> None:
    loras = [rescaled(style, 0.8), rescaled(grain, -0.5)]
    run = led(fields, tiny_models_folder, *loras)
    pipe = stock_pipeline(run)
    with torch.no_grad():
        for name, weight in changed_weights(tiny_models_folder, *loras).items():
            pipe.transformer.get_parameter(name).copy_(weight)
    expected = stock(run, pipe, "latent")

    ours = run.latents()

    assert torch.allclose(ours, expected, atol=1e-4)
    assert (led(fields, tiny_models_folder).latents() - expected).abs().mean() > 0.01


# -- LoRAs, caches and checkpoints ---------------------------------------------------------------------------------

CLIP: dict[str, Any] = {"num_frames": 5, "num_inference_steps": 12}


@pytest.mark.parametrize("expert", ["high", "low"])
@pytest.mark.parametrize("steps_before_the_exchange", [0, 1])
@pytest.mark.parametrize(
    "cache",
    [NOTHING_LEFT_OUT["first-block"], EAGER["first-block"], EAGER["taylorseer"]],
    ids=["nothing left out", "first-block", "taylorseer"],
)
def test_a_clip_with_a_lora_and_a_cache_goes_on_where_it_was_killed(
    cache: dict[str, Any], steps_before_the_exchange: int, expert: str, tiny_models_folder: Path, tmp_path: Path
) -> None:
    """Bit for bit, in the middle of an expert and between the two."""
    lora = rescaled(random_lora(tmp_path / "l.safetensors", EXPERTS, tiny_models_folder), 1.0, expert)
    spec = spec_for(EXPERTS, cache=cache, **CLIP).model_copy(update={"loras": (lora[0],)})

    def run() -> Run:
        made = Run(spec, tiny_models_folder, loras=[lora])
        made_by = checkpoint.digest(spec, made.plan, made.loader.weights(), metadata.versions())
        return replace(made, checkpoint=replace(kept(tmp_path / "kept"), made_by=made_by))

    expected = replace(run(), checkpoint=checkpoint.NOWHERE).latents()
    killed = run()
    last = _steps_of_the_first(tiny_models_folder) - steps_before_the_exchange

    def kill(told: dict[str, object]) -> None:
        if told["type"] == "step" and told["phase"] == "denoise" and told["i"] == last:
            raise Killed

    killed.watch._send = kill
    with pytest.raises(Killed):
        killed.latents()
    resumed = run()

    assert torch.equal(resumed.latents(), expected)
    assert resumed.watch.resumed_after_step == last
    assert (resumed.watch.skipped > 0) == (cache != NOTHING_LEFT_OUT["first-block"])
    assert not torch.equal(Run(spec, tiny_models_folder).latents(), expected)


def _steps_of_the_first(models_folder: Path) -> int:
    """Return how many steps the expert for high noise does: in those it is called, the other is not."""
    run = Run(spec_for(EXPERTS, **CLIP), models_folder)
    boundary = run.loader.option("boundary_ratio") * 1000
    scheduler = run.loader.scheduler(flow_shift=run.spec.flow_shift)
    scheduler.set_timesteps(run.spec.num_inference_steps)
    return sum(bool(t >= boundary) for t in scheduler.timesteps)
