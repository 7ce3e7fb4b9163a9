"""Compiled blocks: one compilation of each kind of block serves every size and every block."""

from __future__ import annotations

import functools
import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from safelightd import compiling, device
from safelightd.loading import Loader
from safelightd.modelfolder import model_folder
from tests.integration.rendering import MODELS, Run, spec_for

SIZES = ((128, 128), (96, 64), (128, 96), (32, 48), (64, 64))
"""The first has as many tokens as the model has channels: that must not be taken for a rule."""


@pytest.fixture
def compiled_kinds(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Counts what dynamo hands to its back end, which computes as torch does: inductor would take half a minute."""
    seen: list[int] = []

    def count(graph: torch.fx.GraphModule, _inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        seen.append(1)
        return graph

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=count))
    yield seen
    torch._dynamo.reset()


def test_each_kind_of_block_is_compiled_once_for_all_sizes_with_the_same_bits(
    tiny_models_folder: Path, compiled_kinds: list[int]
) -> None:
    for width, height in SIZES:
        latents = []
        for compiled in (False, True):
            run = Run(spec_for("tiny-flux-schnell", width=width, height=height), tiny_models_folder)
            run.plan = run.plan.model_copy(update={"compiled": compiled})
            facts = MODELS[run.spec.model]
            run.loader = Loader(model_folder(facts, tiny_models_folder), run.plan, blocks=facts.blocks)
            latents.append(run.latents())
        assert torch.equal(*latents)

    assert len(compiled_kinds) == 2  # double and single blocks


@pytest.mark.parametrize("model", ["tiny-wan-ti2v", "tiny-wan-t2v-a14b"])
def test_blocks_of_clips_are_compiled_once_for_all_sizes_and_both_experts(
    model: str, tiny_models_folder: Path, compiled_kinds: list[int]
) -> None:
    for width, height, num_frames in ((96, 64, 9), (128, 128, 17), (64, 96, 5)):
        size = {"width": width, "height": height, "num_frames": num_frames, "num_inference_steps": 3}
        plain, compiled = (
            Run(spec_for(model, **size), tiny_models_folder, plan_changes={"compiled": compiled}).latents()
            for compiled in (False, True)
        )
        assert torch.equal(plain, compiled)

    assert len(compiled_kinds) == 1


def test_a_view_becomes_what_it_would_have_been_by_itself_in_the_same_memory() -> None:
    joined = torch.arange(24.0).view(1, 6, 4)
    part = joined[:, 2:]
    plain = compiling._plain(part)

    assert part._base is not None
    assert plain._base is None
    assert (plain.stride(), plain.data_ptr()) == ((16, 4, 1), part.data_ptr())
    assert torch.equal(plain, part)


@pytest.mark.parametrize("value", [None, 3, "x", torch.arange(6).view(2, 3).t()])
def test_what_is_not_contiguous_or_no_tensor_stays_as_it_is(value: object) -> None:
    assert compiling._plain(value) is value


def test_what_is_alive_between_two_jobs_is_not_walked_through_after_each_component() -> None:
    left_by_a_compiler = [[place] for place in range(50_000)]

    device.release()

    assert len(gc.get_objects()) < len(left_by_a_compiler) // 2
