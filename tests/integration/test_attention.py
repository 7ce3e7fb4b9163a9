"""Which kernels attention runs on: chosen among those that agree, remembered, and in plan and checkpoint."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName
from hypothesis import given
from hypothesis import strategies as st

from safelight import footprint
from safelight.config import Config
from safelight.errors import SafelightError
from safelightd import attention, checkpoint
from safelightd.attention import Probed, Shape
from safelightd.loading import Loader
from safelightd.modelfolder import model_folder
from tests.conftest import Installation
from tests.integration.rendering import MODELS, Run, plan_for, spec_for
from tests.integration.test_wan import JOBS, run_of

SHAPE = Shape(tokens=96, heads=2, head_dim=32, dtype="float32")
ALSO_ON_CPU: Any = ("native", "_native_math", "_native_cudnn")
"""torch's own choice, one that computes the same on the CPU in another way, and one that cannot run there."""


def in_settings(config: Config, **worker: object) -> Config:
    changed = config.settings.worker.model_copy(update=worker)
    return replace(config, settings=config.settings.model_copy(update={"worker": changed}))


def test_a_probe_times_what_runs_here_and_says_why_the_rest_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "SAME_RESULT", ALSO_ON_CPU)
    probed = attention.probe(SHAPE, "cpu", ALSO_ON_CPU)

    assert set(probed.milliseconds) == set(probed.apart) == {"native", "_native_math"}
    assert all(took > 0 for took in probed.milliseconds.values())
    assert probed.apart["native"] == 0.0
    assert 0 <= probed.apart["_native_math"] < 1e-5
    assert set(probed.unusable) == {"_native_cudnn"}


@pytest.mark.parametrize(
    ("milliseconds", "apart", "expected"),
    [
        ({"native": 10.0, "_native_cudnn": 8.0}, {}, "_native_cudnn"),
        ({"native": 10.0, "_native_cudnn": 9.9}, {}, "native"),  # not worth other bits
        ({"native": 10.0, "_native_cudnn": 8.0}, {"_native_cudnn": 0.05}, "native"),  # another result
        ({"native": 10.0, "flash": 7.0, "_native_flash": 8.0}, {}, "flash"),
        ({"_native_flash": 8.0}, {}, "_native_flash"),
        ({}, {}, "native"),
    ],
)
def test_the_fastest_of_those_that_agree_is_taken_where_it_is_worth_it(
    milliseconds: dict[str, float], apart: dict[str, float], expected: str
) -> None:
    assert attention.fastest(milliseconds, {**dict.fromkeys(milliseconds, 0.002), **apart}) == expected


def test_a_shape_is_asked_once_and_another_card_or_size_again(tmp_path: Path) -> None:
    asked: list[int] = []

    def ask() -> Probed:
        asked.append(1)
        return Probed(chosen="_native_cudnn" if len(asked) == 1 else "native")

    larger = replace(SHAPE, tokens=400)
    answers = [
        attention.remembered(shape, card, tmp_path, ask).chosen
        for shape, card in ((SHAPE, "a card"), (SHAPE, "a card"), (larger, "a card"), (SHAPE, "another"))
    ]

    assert answers == ["_native_cudnn", "_native_cudnn", "native", "native"]
    assert len(asked) == 3


def test_what_ran_out_of_memory_is_not_remembered(tmp_path: Path) -> None:
    def ask() -> Probed:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        attention.remembered(SHAPE, "a card", tmp_path, ask)
    assert attention._load(tmp_path / "attention.json").probed == {}


def test_kernels_that_end_the_process_are_not_asked_again(tmp_path: Path) -> None:
    program = (
        f"import os, sys\nsys.path[:0] = {sys.path!r}\nfrom pathlib import Path\nfrom safelightd import attention\n"
        f"shape = attention.Shape(96, 2, 32, 'float32')\n"
        f"attention.remembered(shape, 'a card', Path({str(tmp_path)!r}), lambda: os._exit(9))\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], check=False)

    def ask() -> Probed:
        raise AssertionError("it was asked again")

    assert ended.returncode == 9
    assert attention.remembered(SHAPE, "a card", tmp_path, ask) == attention.UNFINISHED
    assert attention.UNFINISHED.chosen == "native"


def test_what_another_engine_found_meanwhile_is_kept(tmp_path: Path) -> None:
    def ask() -> Probed:
        attention.remembered(SHAPE, "another card", tmp_path, lambda: Probed(chosen="_native_flash"))
        return Probed(chosen="_native_cudnn")

    attention.remembered(SHAPE, "a card", tmp_path, ask)
    known = attention._load(tmp_path / "attention.json").probed

    assert [probed.chosen for probed in known.values()] == ["_native_flash", "_native_cudnn"]


def test_a_damaged_memory_is_asked_again(tmp_path: Path) -> None:
    (tmp_path / "attention.json").write_text("{", encoding="utf-8")

    assert attention.remembered(SHAPE, "a card", tmp_path, lambda: Probed(chosen="native")).chosen == "native"
    assert attention._load(tmp_path / "attention.json").probed


@given(st.integers(1, 100_000), st.integers(1, 100_000))
def test_a_probe_serves_sizes_that_are_nearly_the_same_and_no_others(one: int, other: int) -> None:
    names = [replace(SHAPE, tokens=tokens).name for tokens in (one, other)]
    most = attention.PROBED_TOKENS_MAX
    times = max(min(one, most), min(other, most)) / min(one, other, most)

    assert names[0] != names[1] or times <= 2**0.51
    assert names[0] == names[1] or one != other


def test_the_cpu_has_torchs_own_choice_and_refuses_what_is_for_cuda(installation: Installation) -> None:
    config = installation.config
    plan, spec, facts = plan_for("tiny-wan-ti2v"), spec_for("tiny-wan-ti2v"), MODELS["tiny-wan-ti2v"]

    for wanted in ("auto", "native"):
        planned = attention.planned(plan, spec, facts, in_settings(config, attention=wanted), "")
        assert planned.attention == "native"
    with pytest.raises(SafelightError, match=r'\[worker\] attention = "_native_cudnn": it is for CUDA'):
        attention.planned(plan, spec, facts, in_settings(config, attention="_native_cudnn"), "")


def test_the_heads_of_a_single_file_are_told_by_the_models_own_folder(
    installation: Installation, tiny_models_folder: Path, tmp_path: Path
) -> None:
    key = "tiny-flux-dev"
    whole = model_folder(MODELS[key], tiny_models_folder)
    (single := tmp_path / "one.safetensors").touch()
    facts = MODELS[key].model_copy(update={"path": str(whole), "component_paths": {"transformer": str(single)}})
    plan, spec, config = plan_for(key, device="cuda"), spec_for(key), installation.config
    told = json.loads((whole / "transformer" / "config.json").read_bytes())
    tokens = footprint.tokens(facts, spec.width, spec.height, spec.num_frames, spec.max_sequence_length)
    shape = Shape(tokens, told["num_attention_heads"], told["attention_head_dim"], plan.dtype)
    config.paths.state.mkdir(parents=True, exist_ok=True)
    attention.remembered(
        shape, f"a card, torch {torch.__version__}", config.paths.state, lambda: Probed(chosen="_native_cudnn")
    )

    assert attention.planned(plan, spec, facts, config, "a card").attention == "_native_cudnn"


def test_kernels_whose_package_is_missing_are_refused_by_its_name() -> None:
    assert attention.unusable("sage", "cuda") == "sageattention is not installed"
    assert attention.unusable("_native_flash", "cuda") is None


@pytest.mark.parametrize("model", ["tiny-flux-schnell", "tiny-wan-ti2v", "tiny-wan-t2v-a14b"])
@pytest.mark.parametrize("compiled", [False, True])
def test_every_attention_of_the_transformer_runs_on_what_the_plan_says(
    model: str, compiled: bool, tiny_models_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    eager = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *given, **named: eager(*given, **named, backend="eager"))
    run = Run(spec_for(model), tiny_models_folder)
    plain = run.latents()
    run.plan = plan_for(model, compiled=compiled).model_copy(update={"attention": "_native_math"})
    facts = MODELS[model]
    run.loader = Loader(model_folder(facts, tiny_models_folder), run.plan, blocks=facts.blocks)
    with run.loader.component("transformer", "cpu") as transformer:
        used = {module.processor._attention_backend for module in transformer.modules() if hasattr(module, "processor")}
    ours = run.latents()

    assert used == {AttentionBackendName._NATIVE_MATH}
    assert torch.allclose(plain, ours, atol=1e-3)


def test_other_kernels_are_other_bits_to_a_checkpoint(tiny_models_folder: Path) -> None:
    run = run_of(JOBS["5B from text"], tiny_models_folder)
    other = run.plan.model_copy(update={"attention": "_native_flash"})

    assert checkpoint.digest(run.spec, run.plan, {}, {}) != checkpoint.digest(run.spec, other, {}, {})
    assert "attention _native_flash" in other.rung
