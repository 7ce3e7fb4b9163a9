"""ControlNets for FLUX: our loop against the stock pipeline, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxControlNetModel
from PIL import Image

from safelight import inputs, models
from safelight.errors import SafelightError
from safelight.jobqueue import JobQueue
from safelightd import tiny
from safelightd.modelfolder import controlnet_folder
from safelightd.progress import Cancelled
from safelightd.tiny.weights import fill
from safelightd.weights import BadModelFolder
from tests.cli_steps import end, ids_of, runner
from tests.conftest import Installation
from tests.daemon.test_worker import specs_of
from tests.integration.rendering import HALF, MODELS, Run, StopAt, alive, picture, spec_for, stock_answer
from tests.integration.warm_engine import receipts

DEV = "tiny-flux-dev"

JOBS: dict[str, dict[str, Any]] = {
    "all steps": {"controlnet": {"model": "tiny", "image": "0" * 64}},
    "the first steps, less": {"controlnet": {"model": "tiny", "image": "0" * 64, "scale": 0.6, "end": 0.5}},
    "steps in the middle, a wide picture": {
        "controlnet": {"model": "tiny", "image": "0" * 64, "start": 0.25, "end": 0.8}, "width": 96,
    },
    "with true guidance": {
        "controlnet": {"model": "tiny", "image": "0" * 64, "scale": 0.9}, "negative_prompt": "blurry",
        "true_cfg_scale": 3.0,
    },
}  # fmt: skip


def run_of(folder: Path, *, more: dict[str, Any] | None = None, **changes: Any) -> Run:
    fields = JOBS["all steps"] | (more or {})
    return Run(spec_for(DEV, **fields), folder, **{"control_image": picture(), **changes})


@pytest.mark.parametrize("fields", JOBS.values(), ids=JOBS)
def test_our_loop_gives_the_bits_of_the_stock_pipeline(fields: dict[str, Any], tiny_models_folder: Path) -> None:
    run = run_of(tiny_models_folder, more=fields)
    latents, pictures = stock_answer(run)

    ours = run.latents()

    assert torch.equal(latents, ours)
    assert np.array_equal(pictures[0], run.decode(ours)[0])


def test_one_that_reads_pixels_gives_the_bits_of_the_stock_pipeline(tiny_models_folder: Path, tmp_path: Path) -> None:
    """XLabs' kind: patches of two, a small network in the place of the VAE, its blocks' sums used again and again."""
    net = FluxControlNetModel(
        patch_size=2, in_channels=64, num_layers=1, num_single_layers=0, attention_head_dim=32, num_attention_heads=2,
        joint_attention_dim=64, pooled_projection_dim=64, guidance_embeds=True, axes_dims_rope=(8, 12, 12),
        conditioning_embedding_channels=16,
    )  # fmt: skip
    fill(net, "pixels").save_pretrained(tmp_path / "net")
    run = run_of(tiny_models_folder, controlnet=tmp_path / "net")
    latents, _ = stock_answer(run)

    assert torch.equal(latents, run.latents())


def test_a_picture_leads_and_another_leads_elsewhere(tiny_models_folder: Path) -> None:
    plain = Run(spec_for(DEV), tiny_models_folder).latents()
    led = run_of(tiny_models_folder).latents()
    other = run_of(tiny_models_folder, control_image=Image.new("RGB", (64, 64), "white")).latents()

    assert (plain - led).abs().mean() > 0.01
    assert (other - led).abs().mean() > 0.01


def test_nothing_is_left_of_it_after_the_phase_or_a_cancellation(tiny_models_folder: Path) -> None:
    run = run_of(tiny_models_folder)
    embeddings = run.encode()
    before = alive()
    run.stop.asked = 0
    run.denoise(embeddings)

    assert alive() == before
    for moment in (2, run.stop.asked // 2, run.stop.asked - 1):
        with pytest.raises(Cancelled):
            run_of(tiny_models_folder, stop=StopAt(moment)).denoise(embeddings)
        assert alive() == before


def test_it_goes_with_streamed_and_quantised_blocks_and_float16(tiny_models_folder: Path) -> None:
    bf16 = {"dtype": "bfloat16", "precision": "bf16"}
    resident = run_of(tiny_models_folder, plan_changes=bf16).latents()
    streamed = bf16 | {"offload": "partial", "streamed": {"transformer": (0, 1, 2, 3)}}

    assert torch.equal(resident, run_of(tiny_models_folder, plan_changes=streamed).latents())
    tiles, strips = {"vae_tiling": True, "vae_tile_pixels": 32}, {"vae_strip_rows": 16}
    for changes in (bf16 | {"precision": "nf4"}, HALF, tiles, strips):
        assert run_of(tiny_models_folder, plan_changes=changes).frames()[0].std() > 10


def test_one_that_wants_a_mode_and_one_that_is_not_there_are_refused(tiny_models_folder: Path, tmp_path: Path) -> None:
    net = FluxControlNetModel(
        in_channels=64, num_layers=1, num_single_layers=0, attention_head_dim=32, num_attention_heads=2,
        joint_attention_dim=64, pooled_projection_dim=64, guidance_embeds=True, axes_dims_rope=(8, 12, 12), num_mode=3,
    )  # fmt: skip
    net.save_pretrained(tmp_path / "union")
    with pytest.raises(SafelightError, match="asks for a mode"):
        run_of(tiny_models_folder, controlnet=tmp_path / "union").latents()
    with pytest.raises(
        BadModelFolder,
        match=r"missing\. safelight models pull flux-dev --controlnet union-pro-2 fetches it\. Put the files of",
    ):
        controlnet_folder(models.load()["flux-dev"], "union-pro-2", tmp_path)
    broken = Path(shutil.copytree(controlnet_folder(MODELS[DEV], "tiny", tiny_models_folder), tmp_path / "broken"))
    (broken / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(BadModelFolder, match=r"diffusion_pytorch_model\.safetensors is missing"):
        run_of(tiny_models_folder, controlnet=broken).latents()


@pytest.mark.parametrize("key", [key for key, facts in MODELS._facts.items() if facts.controlnets])
def test_the_table_counts_what_the_classes_have(key: str, tiny_models_folder: Path) -> None:
    facts = MODELS[key]
    config = {
        "num_layers": 6,
        "num_single_layers": 0,
        "guidance_embeds": True,
    }  # union-pro-2's, the rest as in the class
    for name, net in facts.controlnets.items():
        with torch.device("meta"):
            if facts.tiny:
                own = FluxControlNetModel.load_config(controlnet_folder(facts, name, tiny_models_folder))
                module = FluxControlNetModel.from_config(own)
            else:
                module = FluxControlNetModel(**config)
        assert sum(parameter.numel() for parameter in module.parameters()) == net.parameters
        for blocks in net.blocks:
            parts = list(module.get_submodule(blocks.path).children())
            assert len(parts) == blocks.count
            assert {sum(parameter.numel() for parameter in part.parameters()) for part in parts} == {blocks.parameters}


def test_a_tiny_one_is_built_once_and_never_over_something_else(tmp_path: Path) -> None:
    tiny.build_controlnet(tmp_path / "a")
    weights = (tmp_path / "a/diffusion_pytorch_model.safetensors").stat()
    tiny.build_controlnet(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b/mine.txt").touch()

    assert (tmp_path / "a/diffusion_pytorch_model.safetensors").stat().st_mtime_ns == weights.st_mtime_ns
    with pytest.raises(tiny.NotATinyModel):
        tiny.build_controlnet(tmp_path / "b")


def test_a_job_with_a_controlnet_runs_from_its_spec_to_its_file(installation: Installation) -> None:
    source = installation.root / "pose.png"
    picture(64, 64).save(source)
    digest = inputs.store(source, installation.paths.inputs).digest
    (spec,) = specs_of(installation, ["a fox"], model=DEV, controlnet={"model": "tiny", "image": digest, "scale": 0.7})

    receipt = receipts(installation)(spec)

    assert receipt.plan is not None
    assert receipt.plan.controlnet == "tiny"
    assert "ControlNet tiny" in receipt.plan.rung
    assert receipt.spec.controlnet == spec.controlnet


def test_add_keeps_the_picture_and_rerun_asks_for_it_again(installation: Installation, queue: JobQueue) -> None:
    safelight = runner(installation)
    source = installation.root / "pose.png"
    picture(64, 64).save(source)
    (job,) = ids_of(safelight("add", "a fox", "--model", DEV, "--controlnet", f"tiny:{source}:0.7:0:0.8"))
    source.unlink()
    receipt = end(installation, queue, job)
    file = installation.paths.outbox / receipt.outputs[0].path
    (again,) = ids_of(safelight("rerun", str(file)))

    (varied,) = ids_of(safelight("rerun", str(file), "--strength", "0.5"))

    variation = queue.spec(varied)
    assert variation is not None
    assert variation.image == receipt.outputs[0].sha256
    assert variation.controlnet is not None
    specs = [queue.spec(each) for each in (job, again)]
    nets = [spec.controlnet for spec in specs if spec]
    assert nets[0] == nets[1]
    assert nets[0] is not None
    assert (nets[0].model, nets[0].scale, nets[0].start, nets[0].end) == ("tiny", 0.7, 0.0, 0.8)
    (installation.paths.inputs / nets[0].image).unlink()
    result = safelight("rerun", str(file))
    assert result.exit_code == 2
    assert "its controlnet image is not in" in result.stderr
