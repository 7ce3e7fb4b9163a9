"""Caches of a transformer: they act, they say how often, nothing of them is left, and without them nothing changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from safelight.caches import Cache
from safelightd import runjob, streaming
from safelightd.caching import caching
from safelightd.loading import Loader
from safelightd.modelfolder import model_folder
from safelightd.progress import Cancelled
from tests.conftest import Installation
from tests.daemon.test_worker import specs_of
from tests.integration.rendering import MODELS, Run, StopAt, alive, picture, plan_for, spec_for
from tests.integration.test_wan import DIGEST
from tests.integration.warm_engine import receipts

STEPS = 8
EAGER: dict[str, Any] = {"first-block": {"kind": "first-block", "threshold": 1.0}}
EAGER["taylorseer"] = {"kind": "taylorseer", "cache_interval": 3, "disable_cache_before_step": 2}

AT_TIMES = {"FLUX": 0.5, "A14B": 0.15}
"""Thresholds by which the tiny models leave out some forwards, and then run again."""

JOBS: dict[str, dict[str, Any]] = {
    "FLUX": {"model": "tiny-flux-dev"},
    "FLUX with true CFG": {"model": "tiny-flux-dev", "negative_prompt": "blurry", "true_cfg_scale": 2.0},
    "5B": {"model": "tiny-wan-ti2v"},
    "5B from a picture": {"model": "tiny-wan-ti2v", "image": DIGEST},
    "A14B": {"model": "tiny-wan-t2v-a14b"},
}


def run_of(fields: dict[str, Any], models_folder: Path, cache: dict[str, Any] | None, **plan: Any) -> Run:
    image = picture() if "image" in fields else None
    run = Run(spec_for(**fields, num_inference_steps=STEPS, cache=cache), models_folder, image=image)
    run.plan = plan_for(run.spec.model, **plan)
    facts = MODELS[run.spec.model]
    run.loader = Loader(model_folder(facts, models_folder), run.plan, blocks=facts.blocks)
    return run


def forwards_of(run: Run) -> int:
    return STEPS * (2 if run.family.is_guided(run.spec) else 1)


@pytest.mark.parametrize("kind", EAGER)
@pytest.mark.parametrize("job", JOBS)
def test_a_cache_answers_some_forwards_counts_them_and_changes_the_result(
    job: str, kind: str, tiny_models_folder: Path
) -> None:
    plain = run_of(JOBS[job], tiny_models_folder, None)
    cached = run_of(JOBS[job], tiny_models_folder, EAGER[kind])
    latents = cached.latents()

    assert not torch.equal(latents, plain.latents())
    assert torch.isfinite(latents).all()
    assert cached.watch.forwards == forwards_of(cached)
    assert 0 < cached.watch.skipped < cached.watch.forwards
    assert plain.watch.forwards == plain.watch.skipped == 0


@pytest.mark.parametrize("job", JOBS)
def test_a_threshold_of_nothing_leaves_the_bits_as_they_are(job: str, tiny_models_folder: Path) -> None:
    cached = run_of(JOBS[job], tiny_models_folder, {"kind": "first-block", "threshold": 0})

    assert torch.equal(cached.latents(), run_of(JOBS[job], tiny_models_folder, None).latents())
    assert (cached.watch.forwards, cached.watch.skipped) == (forwards_of(cached), 0)


@pytest.mark.parametrize("kind", EAGER)
def test_a_transformer_that_had_a_cache_is_as_it_was(kind: str, tiny_models_folder: Path) -> None:
    """What is left around its blocks would grow with each cache, until Python's stack ends."""
    run = run_of(JOBS["FLUX"], tiny_models_folder, EAGER[kind])
    with run.loader.component("transformer", "cpu") as transformer:
        blocks = [block for part in transformer.children() if isinstance(part, torch.nn.ModuleList) for block in part]
        before = [block.forward for block in blocks]
        for _ in range(3):
            with caching(transformer, run.spec.cache, torch.float32, lambda _asked, _skipped: None):
                assert blocks[0].forward != before[0]

        assert [block.forward for block in blocks] == before


@pytest.mark.parametrize("kind", EAGER)
@pytest.mark.parametrize("job", ["FLUX", "5B", "A14B"])
def test_the_same_bits_come_from_compiled_blocks(
    job: str, kind: str, tiny_models_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_with = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *given, **named: compile_with(*given, **named, backend="eager"))
    eager = run_of(JOBS[job], tiny_models_folder, EAGER[kind])
    compiled = run_of(JOBS[job], tiny_models_folder, EAGER[kind], compiled=True)

    assert torch.equal(eager.latents(), compiled.latents())
    assert eager.watch.skipped == compiled.watch.skipped > 0


@pytest.mark.parametrize("kind", [*EAGER, "first-block at times"])
@pytest.mark.parametrize("job", ["FLUX", "A14B"])
@pytest.mark.parametrize("streamed", ["all", "but the first", "the first"])
@pytest.mark.parametrize("streamed_from", ["file", "pinned"])
def test_the_same_bits_come_from_streamed_blocks_and_nothing_passes_for_a_forward_that_is_left_out(
    streamed_from: str, streamed: str, job: str, kind: str, tiny_models_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[int] = []
    for source in (streaming.FromFile, streaming.FromPinned):
        monkeypatch.setattr(source, "fetch", _noting(source.fetch, fetched))
    blocks = MODELS[JOBS[job]["model"]].blocks
    count = sum(part.count for part in blocks["transformer"])
    every = tuple(range(count))
    places = {"all": every, "but the first": every[1:], "the first": every[:1]}[streamed]
    names = [name for name in blocks if name.startswith("transformer")]
    plan = {"offload": "partial", "streamed": dict.fromkeys(names, places), "streamed_from": streamed_from}
    cache = EAGER.get(kind, {"kind": "first-block", "threshold": AT_TIMES[job]})
    resident = run_of(JOBS[job], tiny_models_folder, cache)
    other = run_of(JOBS[job], tiny_models_folder, cache, **plan)

    assert torch.equal(resident.latents(), other.latents())
    assert resident.watch.skipped == other.watch.skipped > 0
    computed = other.watch.forwards - other.watch.skipped
    assert len(fetched) <= len(places) * (computed + 2 * len(names))  # ahead, and a little at each end


def _noting(fetch: Any, fetched: list[int]) -> Any:
    def noted(self: Any, j: int, after: Any) -> Any:
        fetched.append(j)
        return fetch(self, j, after)

    return noted


def test_each_expert_begins_with_an_empty_cache(tiny_models_folder: Path) -> None:
    run = run_of(JOBS["A14B"], tiny_models_folder, EAGER["first-block"])
    run.latents()

    assert run.watch.forwards - run.watch.skipped >= 2 * 2  # of each prompt, the first of each expert


def test_a_job_that_is_stopped_within_a_step_leaves_no_component(tiny_models_folder: Path) -> None:
    for at in (4, 9, 14):
        run = run_of(JOBS["5B"], tiny_models_folder, EAGER["first-block"])
        embeddings = run.encode()
        before = alive()
        run.watch._stop = StopAt(at)
        with pytest.raises(Cancelled):
            run.denoise(embeddings)
        assert alive() == before


def test_the_receipt_of_a_job_says_how_often_its_cache_answered(installation: Installation) -> None:
    (spec,) = specs_of(installation, ["a fox"])
    cached = spec.model_copy(update={"cache": Cache(kind="first-block", threshold=1.0), "num_inference_steps": 4})
    receipt = receipts(installation)(cached)

    assert installation.ledger.receipt(spec.id) == receipt
    assert receipt.plan is not None
    assert receipt.cache is not None
    assert (receipt.cache.kind, receipt.cache.forwards) == ("first-block", 4)
    assert receipt.cache.skipped > 0
    assert (receipt.plan.cache, receipt.plan.attention) == ("first-block", "native")


def test_without_a_cache_there_is_no_record(tiny_models_folder: Path) -> None:
    run = run_of(JOBS["FLUX"], tiny_models_folder, None)

    assert runjob.cache_record(run.spec, run.watch) is None
    assert Cache(kind="first-block").given == {}
