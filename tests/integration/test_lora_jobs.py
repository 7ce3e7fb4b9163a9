"""LoRAs from a command line to a receipt: found at submission, else by the worker's host, and the same again later."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from safelight.errors import InvalidJob
from safelight.jobqueue import JobQueue
from safelight.lora import Lora
from safelightd import checkpoint, embeddings, metadata
from safelightd.failure import failure
from safelightd.progress import Watch
from tests.cli_steps import Safelight, end, ids_of, runner
from tests.conftest import Installation
from tests.daemon.test_worker import specs_of
from tests.integration.lora_files import factors, peft, random_lora, rescaled, write
from tests.integration.rendering import MODELS, NoMeter, Run, spec_for
from tests.integration.test_checkpoint import Killed, kept
from tests.integration.test_inbox_service import drop, line, running, until
from tests.integration.warm_engine import receipts

FLUX = "tiny-flux-schnell"


@pytest.fixture
def safelight(installation: Installation) -> Safelight:
    return runner(installation)


@pytest.fixture
def style(installation: Installation) -> Iterator[Path]:
    """A LoRA that this installation knows by the name `style`."""
    folder = installation.paths.models / "loras"
    yield random_lora(folder / "style.safetensors", FLUX, installation.paths.models)[1]
    shutil.rmtree(folder)


def test_add_finds_a_name_and_keeps_a_file_and_rerun_asks_for_both_again(
    safelight: Safelight, installation: Installation, queue: JobQueue, style: Path
) -> None:
    own = Path(shutil.copy(style, installation.root / "own.safetensors"))
    (job,) = ids_of(safelight("add", "a fox <lora:style:0.5>", "--lora", f"{own}:2"))
    receipt = end(installation, queue, job)
    own.unlink()

    (again,) = ids_of(safelight("rerun", str(installation.paths.outbox / receipt.outputs[0].path)))

    first, second = queue.spec(job), queue.spec(again)
    assert first is not None
    assert second is not None
    assert [(each.label, each.scale) for each in first.loras] == [(str(own), 2.0), ("style", 0.5)]
    assert len({each.sha256 for each in first.loras}) == 1
    assert (installation.paths.inputs / first.loras[0].sha256).is_file()
    assert second.loras == first.loras
    assert second.prompt == "a fox"

    style.write_bytes(style.read_bytes()[:-4] + b"\0\0\0\0")
    result = safelight("rerun", str(installation.paths.outbox / receipt.outputs[0].path))
    assert result.exit_code == 2
    assert "LoRA style" in result.stderr
    assert "has changed since it was submitted" in result.stderr


def test_an_unknown_name_fails_when_it_is_submitted_and_names_the_near_ones(
    safelight: Safelight, queue: JobQueue, style: Path
) -> None:
    result = safelight("add", "a fox", "--lora", "stile")

    assert result.exit_code == 2
    assert "LoRA stile: no stile.safetensors in" in result.stderr
    assert "Did you mean style?" in result.stderr
    assert queue.waiting_ids() == []


def test_a_batch_file_names_files_beside_it_and_none_elsewhere(
    safelight: Safelight, installation: Installation, queue: JobQueue, style: Path
) -> None:
    folder = installation.root / "prompts"
    (folder / "mine").mkdir(parents=True)
    shutil.copy(style, folder / "mine/x.safetensors")
    file = folder / "n.yaml"
    file.write_text("- prompt: a fox\n  loras:\n  - path: mine/x.safetensors\n    scale: 0.5\n")
    (job,) = ids_of(safelight("batch", str(file)))
    file.write_text(f"- prompt: a fox\n  loras:\n  - path: ../{style.name}\n")
    refused = safelight("batch", str(file))

    spec = queue.spec(job)
    assert spec is not None
    assert spec.loras[0].path == "mine/x.safetensors"
    assert (installation.paths.inputs / spec.loras[0].sha256).read_bytes() == style.read_bytes()
    assert refused.exit_code == 2
    assert "it leads out of the folder of the job file" in refused.stderr


def test_a_name_that_nobody_could_look_up_is_found_by_the_host_that_runs_it_and_is_in_the_receipt(
    installation: Installation, style: Path
) -> None:
    plain, changed, again = specs_of(installation, ["a fox"] * 3)
    lora = {"loras": (Lora(name="style", scale=0.7),), "seed": plain.seed}

    run = receipts(installation)
    made = [run(plain), *(run(s.model_copy(update=lora)) for s in (changed, again))]

    digests = [receipt.outputs[0].sha256 for receipt in made]
    files = [(installation.paths.outbox / receipt.outputs[0].path).read_bytes() for receipt in made]
    assert digests[0] != digests[1]
    assert len(made[1].spec.loras[0].sha256) == 64
    assert made[1].spec.loras[0].size_bytes == style.stat().st_size
    assert made[1].plan is not None
    assert made[1].plan.loras == 1
    assert b"a fox <lora:style:0.7>" in files[1]
    assert b"<lora:" not in files[0]


def test_a_lora_that_is_gone_or_does_not_match_is_the_jobs_own_fault(installation: Installation, style: Path) -> None:
    write(style, peft(factors({"transformer_blocks.7.attn.to_q": (64, 64)}, 1)))
    for name, says in (("style", "1 key does not match the model"), ("gone", "no gone.safetensors")):
        (spec,) = specs_of(installation, ["a fox"])
        with pytest.raises(InvalidJob) as caught:
            receipts(installation)(spec.model_copy(update={"loras": (Lora(name=name),)}))
        verdict = failure(caught.value, Watch(lambda _told: None, threading.Event(), NoMeter()))
        assert (verdict["kind"], says in verdict["message"]) == ("job", True)


def test_prompts_are_encoded_anew_only_for_a_lora_that_changes_an_encoder(
    tiny_models_folder: Path, tmp_path: Path
) -> None:
    style = random_lora(tmp_path / "style.safetensors", FLUX, tiny_models_folder)
    clip = write(
        tmp_path / "clip.safetensors", peft(factors({"encoder.layers.0.mlp.fc1": (128, 64)}, 1), "text_encoder")
    )

    def key(*loras: tuple[Lora, Path]) -> str:
        spec = spec_for(FLUX).model_copy(update={"loras": tuple(lora for lora, _ in loras)})
        run = Run(spec, tiny_models_folder, loras=loras)
        facts, changed = MODELS[FLUX], run.loader.changes_text_encoders
        return embeddings.keys(spec, run.plan, facts, tiny_models_folder, "", is_guided=False, changed=changed).prompt

    assert key() == key(style) == key(rescaled(style, 0.5))
    assert len({key(), key(clip), key(rescaled(clip, 0.5)), key(clip, style)}) == 4


def test_a_clip_with_a_lora_goes_on_where_it_was_killed_and_with_another_lora_it_starts_anew(
    tiny_models_folder: Path, tmp_path: Path
) -> None:
    spec = spec_for("tiny-wan-t2v-a14b", num_frames=5, num_inference_steps=6)
    lora = random_lora(tmp_path / "l.safetensors", spec.model, tiny_models_folder)

    def of(scale: float = 1.0) -> Run:
        named = rescaled(lora, scale)
        changed = spec.model_copy(update={"loras": (named[0],)})
        run = Run(changed, tiny_models_folder, loras=[named])
        made_by = checkpoint.digest(changed, run.plan, run.loader.weights(), metadata.versions())
        return replace(run, checkpoint=replace(kept(tmp_path / "kept"), made_by=made_by))

    undisturbed = replace(of(), checkpoint=checkpoint.NOWHERE).latents()
    killed = of()

    def kill(told: dict[str, object]) -> None:
        if told["type"] == "step" and told["phase"] == "denoise" and told["i"] == 4:
            raise Killed

    killed.watch._send = kill
    with pytest.raises(Killed):
        killed.latents()
    resumed, other = of(), of(0.5)

    assert torch.equal(resumed.latents(), undisturbed)
    assert resumed.watch.resumed_after_step == 4
    other.latents()
    assert other.watch.resumed_after_step is None


def test_the_inbox_takes_loras_by_name_and_says_where_a_file_belongs(
    installation: Installation, queue: JobQueue, style: Path
) -> None:
    paths = installation.paths
    with running(installation.config):
        drop(paths.inbox, "a.txt", "a fox <lora:style:0.5>")
        drop(paths.inbox, "b.txt", "--prompt 'a fox' --lora style.safetensors")
        drop(paths.inbox, "c.txt", "a fox <lora:stile>")
        shutil.copy(style, paths.inbox / "mine.safetensors")
        until(lambda: len(list(paths.rejected.glob("*.error.txt"))) == 3 and queue.waiting_ids())
        until(lambda: list(paths.rejected.glob("*~mine.safetensors")))  # a file follows what is said of it

    (spec,) = line(queue)
    assert [(lora.name, lora.scale, len(lora.sha256)) for lora in spec.loras] == [("style", 0.5, 64)]
    said = "".join(file.read_text() for file in paths.rejected.glob("*.error.txt"))
    assert f"LoRA style.safetensors: a LoRA's file is not taken from the inbox. Move it to {style.parent}" in said
    assert "Did you mean style?" in said
    assert "mine.safetensors: a LoRA's file is not taken from the inbox. Move it into the folder loras" in said
    assert "write its name: loras: mine" in said
    (left,) = paths.rejected.glob("*~mine.safetensors")
    assert left.read_bytes() == style.read_bytes()
