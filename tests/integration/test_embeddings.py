"""Embeddings on disk: the same bytes as encoding gives, and never a reason for a job to fail."""

from __future__ import annotations

import dataclasses
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from safelight.machine import GIB
from safelight.models import ModelFacts
from safelight.plan import Plan
from safelightd import embeddings
from safelightd.embeddings import Cache, Keys
from safelightd.loading import Loader
from safelightd.modelfolder import model_folder
from tests.conftest import Installation
from tests.daemon.test_worker import specs_of
from tests.integration import making
from tests.integration.rendering import MODELS, Run, spec_for
from tests.integration.warm_engine import receipts

GPU = "NVIDIA GeForce RTX 4090 Laptop GPU"

JOBS: dict[str, dict[str, Any]] = {
    "schnell": {"model": "tiny-flux-schnell"},
    "dev with true guidance": {"model": "tiny-flux-dev", "negative_prompt": "blurry", "true_cfg_scale": 3.0},
    "5B": {"model": "tiny-wan-ti2v"},
    "5B without guidance": {"model": "tiny-wan-ti2v", "guidance_scale": 1.0, "negative_prompt": ""},
}


@dataclasses.dataclass
class Two:
    """Embeddings of no model."""

    prompt_embeds: torch.Tensor
    negative_prompt_embeds: torch.Tensor | None = None


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "embeddings", 1 * GIB)


def keys_of(run: Run, **changes: Any) -> Keys:
    """The keys of a run's job, `changes` to the plan or to `gpu`."""
    gpu = changes.pop("gpu", "")
    facts = MODELS[run.spec.model]
    plan = run.plan.model_copy(update=changes)
    is_guided = run.family.is_guided(run.spec)
    return embeddings.keys(run.spec, plan, facts, run.models_folder, gpu, is_guided=is_guided)


def of(value: float, size: int = 1024) -> Two:
    return Two(torch.full((size,), value))


def key(number: int) -> Keys:
    return Keys(f"{number:064x}", None)


def files(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "embeddings").iterdir())


@pytest.mark.parametrize("fields", JOBS.values(), ids=JOBS)
def test_what_was_encoded_once_gives_the_same_picture_without_text_encoders(
    fields: dict[str, Any], tiny_models_folder: Path, tmp_path: Path, cache: Cache
) -> None:
    run = Run(spec_for(**fields), tiny_models_folder)
    made = run.encode()
    assert not keys_of(run).are_all_in(cache.get(keys_of(run)))
    cache.put(keys_of(run), made)

    known = cache.get(keys_of(run))

    assert keys_of(run).are_all_in(known)
    without = _without_text_encoders(run, tmp_path)
    read = without.family.encode(without.spec, without.plan, without.loader, without.watch, None, known)
    for field in dataclasses.fields(made):
        assert _same(getattr(made, field.name), getattr(read, field.name))
    assert torch.equal(run.denoise(made), run.denoise(read))


def _same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.stride() == other.stride() and one.dtype == other.dtype and torch.equal(one, other)


def _without_text_encoders(run: Run, tmp_path: Path) -> Run:
    folder = tmp_path / "models" / run.spec.model
    ignored = shutil.ignore_patterns("text_encoder*")
    shutil.copytree(model_folder(MODELS[run.spec.model], run.models_folder), folder, ignore=ignored)
    return Run(run.spec, folder.parent)


def test_clips_share_what_their_negative_prompt_makes(tiny_models_folder: Path, cache: Cache) -> None:
    first = Run(spec_for("tiny-wan-ti2v"), tiny_models_folder)
    second = Run(spec_for("tiny-wan-ti2v", prompt="a boat"), tiny_models_folder)
    cache.put(keys_of(first), first.encode())

    known = cache.get(keys_of(second))

    assert list(known) == ["negative_prompt_embeds"]
    assert not keys_of(second).are_all_in(known)
    made = second.family.encode(second.spec, second.plan, second.loader, second.watch, None, known)
    whole = second.encode()
    assert torch.equal(whole.prompt_embeds, made.prompt_embeds)
    assert torch.equal(whole.negative_prompt_embeds, made.negative_prompt_embeds)


def test_a_negative_prompt_that_is_not_used_makes_no_difference(tiny_models_folder: Path) -> None:
    plain = Run(spec_for("tiny-flux-dev"), tiny_models_folder)
    with_one = Run(plain.spec.model_copy(update={"negative_prompt": "blurry"}), tiny_models_folder)

    assert keys_of(plain) == keys_of(with_one)


@pytest.mark.parametrize(
    "change",
    [{"prompt": "a blue fox"}, {"prompt_2": "oil on canvas"}, {"max_sequence_length": 64}],
)
def test_another_text_or_length_is_another_key(change: dict[str, Any], tiny_models_folder: Path) -> None:
    run = Run(spec_for("tiny-flux-schnell"), tiny_models_folder)
    other = Run(run.spec.model_copy(update=change), tiny_models_folder)

    assert keys_of(run) != keys_of(other)


@pytest.mark.parametrize("change", [{"seed": 8}, {"width": 96}, {"num_inference_steps": 1}, {"tags": ("a",)}])
def test_what_changes_no_embedding_changes_no_key(change: dict[str, Any], tiny_models_folder: Path) -> None:
    run = Run(spec_for("tiny-flux-schnell"), tiny_models_folder)
    other = Run(run.spec.model_copy(update=change), tiny_models_folder)

    assert keys_of(run) == keys_of(other)


def test_a_plan_that_rounds_differently_is_another_key_and_one_that_streams_is_not(tiny_models_folder: Path) -> None:
    run = Run(spec_for("tiny-flux-schnell"), tiny_models_folder)
    on_gpu: dict[str, Any] = {"device": "cuda", "text_encoder_device": "cuda", "gpu": GPU}

    keys = [
        keys_of(run),
        keys_of(run, dtype="bfloat16"),
        keys_of(run, **on_gpu),
        keys_of(run, **on_gpu | {"gpu": "NVIDIA H100 80GB HBM3"}),
        keys_of(run, **on_gpu, text_encoder_precision="nf4"),
    ]
    assert len(set(keys)) == len(keys)
    assert keys_of(run, **on_gpu) == keys_of(run, **on_gpu, streamed={"text_encoder_2": (0, 1)}, vae_tiling=True)
    assert keys_of(run) == keys_of(run, device="cuda", gpu=GPU)


@pytest.mark.parametrize("file", ["text_encoder_2/model.safetensors", "tokenizer/tokenizer.json", "model_index.json"])
def test_other_files_of_the_model_are_another_key(file: str, tiny_models_folder: Path, tmp_path: Path) -> None:
    own = tmp_path / "tiny-flux-schnell"
    shutil.copytree(model_folder(MODELS["tiny-flux-schnell"], tiny_models_folder), own)
    run = Run(spec_for("tiny-flux-schnell"), tmp_path)
    before = keys_of(run)
    at = (own / file).stat()

    _flip_a_byte(own / file)
    os.utime(own / file, ns=(at.st_atime_ns, at.st_mtime_ns))

    assert before != keys_of(run)


def _flip_a_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


def test_a_prepared_text_encoder_is_known_by_its_manifest(tiny_models_folder: Path, tmp_path: Path) -> None:
    facts, spec = MODELS["tiny-flux-schnell"], spec_for("tiny-flux-schnell")
    model_folder(facts, tmp_path)
    folder = tmp_path / "prepared" / "tiny-flux-schnell" / "nf4" / "text_encoder_2"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text('{"v": 1}')
    plan = _gpu_plan(facts)

    def now() -> Keys:
        return embeddings.keys(spec, plan, facts, tmp_path, GPU, is_guided=False)

    first = now()
    (folder / "model.safetensors").write_bytes(b"weights")
    assert first == now()
    (folder / "manifest.json").write_text('{"v": 1, "files": []}')
    assert first != now()


def _gpu_plan(facts: ModelFacts) -> Plan:
    return Plan(
        model=facts.key, device="cuda", dtype="bfloat16", precision="bf16", offload="model", vae_tiling=False,
        text_encoder_device="cuda", text_encoder_precision="nf4", prepared=("text_encoder_2",),
    )  # fmt: skip


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-10])


def _empty(file: Path) -> None:
    file.write_bytes(b"")


def _no_tensors(file: Path) -> None:
    file.write_bytes(b"\x02\0\0\0\0\0\0\0{}")


@pytest.mark.parametrize("damage", [_cut, _empty, _flip_a_byte, _no_tensors])
def test_a_damaged_file_is_removed_said_and_written_anew(
    damage: Callable[[Path], None], cache: Cache, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache.put(key(1), of(1.5))
    damage(*files(tmp_path))

    assert cache.get(key(1)) == {}

    assert "embeddings.damaged" in caplog.text
    assert files(tmp_path) == []
    cache.put(key(1), of(1.5))
    assert torch.equal(of(1.5).prompt_embeds, cache.get(key(1))["prompt_embeds"])


def test_the_least_recently_used_leave_first(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "embeddings", 3 * 5000)
    for number in (1, 2, 3):
        cache.put(key(number), of(float(number)))
    assert len(files(tmp_path)) == 3
    for age_s, number in ((30, 1), (20, 2), (10, 3)):
        _make_old(tmp_path, number, age_s)
    cache.get(key(1))

    cache.put(key(4), of(4.0))

    assert [bool(cache.get(key(number))) for number in (1, 2, 3, 4)] == [True, False, True, True]


def _make_old(tmp_path: Path, number: int, age_s: float) -> None:
    at = time.time() - age_s
    os.utime(tmp_path / "embeddings" / f"{key(number).prompt}.safetensors", (at, at))


def test_what_is_larger_than_the_limit_is_not_kept(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "embeddings", 5000)

    cache.put(key(1), of(1.0, size=10_000))

    assert cache.get(key(1)) == {}


def test_a_limit_of_nothing_reads_nothing_and_removes_what_was_kept(cache: Cache, tmp_path: Path) -> None:
    cache.put(key(1), of(1.0))
    off = Cache(tmp_path / "embeddings", 0)

    assert off.get(key(1)) == {}
    off.put(key(2), of(2.0))
    assert files(tmp_path) == []


def test_a_limit_of_nothing_has_nothing_to_complain_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Cache(tmp_path / "embeddings", 0).put(key(1), of(1.0))

    assert caplog.text == ""
    assert not (tmp_path / "embeddings").exists()


def test_a_full_disk_is_said_and_leaves_no_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    full = tmp_path / "embeddings"
    full.mkdir()
    with making.file_size_limit(2048):
        Cache(full, 1 * GIB).put(key(1), of(1.0))

    assert "embeddings.not_kept" in caplog.text
    assert files(tmp_path) == []


def test_a_file_in_the_folders_place_fails_no_job(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "embeddings").write_text("not a folder")
    cache = Cache(tmp_path / "embeddings", 1 * GIB)

    cache.put(key(1), of(1.0))

    assert "embeddings.not_kept" in caplog.text
    assert cache.get(key(1)) == {}


def test_what_a_killed_process_left_unfinished_goes_after_an_hour(cache: Cache, tmp_path: Path) -> None:
    cache.put(key(1), of(1.0))
    old, young = (tmp_path / "embeddings" / f".{name}.safetensors.77.part" for name in ("old", "young"))
    old.write_bytes(b"half")
    young.write_bytes(b"half")
    os.utime(old, (time.time() - 4000,) * 2)

    cache.put(key(2), of(2.0))

    assert not old.exists()
    assert young.exists()


def test_a_second_job_of_a_prompt_loads_no_text_encoder_and_gives_the_same_picture(
    installation: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = receipts(installation)
    loaded: list[str] = []
    component = Loader.component

    def noted(self: Loader, name: str, device: Any) -> Any:
        loaded.append(name)
        return component(self, name, device)

    monkeypatch.setattr(Loader, "component", noted)
    plans, pictures = [], []
    for spec in specs_of(installation, ["a fox", "a fox"]):
        receipt = run(spec.model_copy(update={"seed": 7}))
        plans.append(receipt.plan)
        pictures.append(Image.open(installation.paths.outbox / receipt.outputs[0].path).convert("RGB").tobytes())

    assert [plan is not None and plan.embeddings_known for plan in plans] == [False, True]
    assert loaded == ["text_encoder", "text_encoder_2", "transformer", "vae", "transformer", "vae"]
    assert pictures[0] == pictures[1]
