"""Blocks that pass through a ring: the same bits as resident ones, from pinned memory and from the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from safelightd.loading import Loader
from safelightd.modelfolder import model_folder
from safelightd.pinned import PinnedMemory
from safelightd.pinnedset import PinnedSet
from safelightd.precision import format_of
from safelightd.progress import Cancelled
from safelightd.streaming import places
from safelightd.weights import Reader, stored_tensors
from tests.integration.rendering import MODELS, Run, plan_for, spec_for

FLUX = "tiny-flux-dev"
HELD = ("bf16", "fp8-weight-only", "fp8-quanto", "int8-dynamic", "int8-weight-only", "int8-bnb", "nf4")
"""What a CPU can compute with; fp8-dynamic needs a GPU."""


def run_of(folder: Path, model: str = FLUX, **changes: Any) -> Run:
    return Run(spec_for(model), folder, plan_changes={"dtype": "bfloat16", **changes})


def blocks_of(model: str, component: str = "transformer") -> int:
    return sum(blocks.count for blocks in MODELS[model].blocks[component])


@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=30))
def test_no_block_is_fetched_over_one_that_has_not_run_and_every_block_arrives_before_its_turn(
    sizes: list[int],
) -> None:
    layout = places(sizes)
    spans = [range(begin, begin + size) for begin, size in zip(layout.offsets, sizes, strict=True)]

    assert all(span.stop <= layout.nbytes <= 2 * max(sizes) for span in spans)

    lies: dict[int, int] = {}  # byte of the ring: whose it is

    def fetch(j: int) -> None:
        for k in {lies[byte] for byte in spans[j] if byte in lies}:
            assert k not in waiting
        lies.update(dict.fromkeys(spans[j], j))
        waiting.add(j)

    waiting: set[int] = set()
    for j in range(len(sizes)):
        if layout.follows[j] >= j:
            fetch(j)
    for j in [*range(len(sizes))] * 3:
        assert j in waiting
        assert {lies[byte] for byte in spans[j]} == {j}

        waiting.remove(j)
        for k in range(len(sizes)):
            if layout.follows[k] == j:
                fetch(k)


@pytest.mark.parametrize("streamed", [(0,), (1, 2), (0, 1, 2, 3)])
@pytest.mark.parametrize("streamed_from", ["pinned", "file"])
def test_streamed_blocks_give_the_bits_of_resident_ones(
    streamed: tuple[int, ...], streamed_from: str, tiny_models_folder: Path
) -> None:
    here = tuple(place for place in streamed if place < blocks_of(FLUX))
    resident = run_of(tiny_models_folder).latents()
    passing = run_of(
        tiny_models_folder, offload="partial", streamed={"transformer": here}, streamed_from=streamed_from
    ).latents()

    assert torch.equal(resident, passing)


@pytest.mark.parametrize("model", ["tiny-wan-ti2v", "tiny-wan-t2v-a14b"])
def test_a_clip_with_all_blocks_streamed_has_the_bits_of_one_with_none(model: str, tiny_models_folder: Path) -> None:
    every = tuple(range(blocks_of(model)))
    streamed = {name: every for name in MODELS[model].blocks if name.startswith("transformer")}

    resident = run_of(tiny_models_folder, model).latents()
    passing = run_of(tiny_models_folder, model, offload="partial", streamed=streamed).latents()

    assert torch.equal(resident, passing)


@pytest.mark.parametrize("model", [FLUX, "tiny-wan-ti2v"])
def test_a_streamed_text_encoder_gives_the_bits_of_a_resident_one(model: str, tiny_models_folder: Path) -> None:
    name = "text_encoder_2" if model == FLUX else "text_encoder"
    every = tuple(range(blocks_of(model, name)))

    resident = run_of(tiny_models_folder, model).encode()
    passing = run_of(tiny_models_folder, model, streamed={name: every}).encode()

    assert torch.equal(resident.prompt_embeds, passing.prompt_embeds)


@pytest.mark.parametrize("precision", HELD[1:])
def test_quantised_blocks_are_near_bf16_and_the_same_bits_resident_and_streamed(
    precision: str, tiny_models_folder: Path
) -> None:
    exact = run_of(tiny_models_folder).latents().float()
    resident = run_of(tiny_models_folder, precision=precision).latents()
    streamed = {"transformer": tuple(range(blocks_of(FLUX)))}
    passing = run_of(tiny_models_folder, precision=precision, offload="partial", streamed=streamed).latents()

    error = float((resident.float() - exact).norm() / exact.norm())

    assert torch.equal(resident, passing)
    assert 1e-4 < error < (0.5 if precision == "nf4" else 0.15), error


@pytest.mark.parametrize("precision", HELD[1:])
def test_new_bytes_in_the_parts_of_a_weight_are_new_weights(precision: Any) -> None:
    held = format_of(precision)
    assert held
    stream = torch.Generator().manual_seed(7)
    weights = [torch.randn(128, 192, generator=stream).bfloat16() for _ in range(2)]
    seen = torch.randn(5, 192, generator=stream).bfloat16()
    memory = {
        part: torch.empty(shape, dtype=dtype) for part, (shape, dtype) in held.layout(128, 192, torch.bfloat16).items()
    }
    linear = torch.nn.Linear(192, 128, bias=False, device="meta", dtype=torch.bfloat16)
    module = held.attach(linear, memory, torch.bfloat16)
    for weight in weights:
        for part, made in held.quantise(weight).items():
            memory[part].copy_(made)
        wanted = seen.float() @ weight.float().T

        assert float((module(seen).float() - wanted).norm() / wanted.norm()) < 0.12


def test_the_pinned_set_of_one_job_serves_the_next_of_the_same_plan_and_no_other(tiny_models_folder: Path) -> None:
    kept = PinnedSet(limit_bytes=2**30)
    folder = model_folder(MODELS[FLUX], tiny_models_folder)
    plan = plan_for(FLUX, dtype="bfloat16", offload="partial", streamed={"transformer": (0, 1)})

    def load(**changes: Any) -> bytes:
        loader = Loader(folder, plan.model_copy(update=changes), blocks=MODELS[FLUX].blocks, pinned=kept)
        before = kept.nbytes
        with loader.component("transformer", "cpu"):
            assert kept.nbytes == 0  # it is the component's meanwhile
        return before.to_bytes(8)

    first, second = load(), load()
    other = load(streamed={"transformer": (1,)})

    assert int.from_bytes(first) == 0
    assert int.from_bytes(second) > 0
    assert int.from_bytes(other) == 0


def test_a_pinned_set_above_the_limit_is_given_back(tiny_models_folder: Path) -> None:
    kept = PinnedSet(limit_bytes=10)
    plan = plan_for(FLUX, dtype="bfloat16", offload="partial", streamed={"transformer": (0, 1)})
    folder = model_folder(MODELS[FLUX], tiny_models_folder)
    with Loader(folder, plan, blocks=MODELS[FLUX].blocks, pinned=kept).component("transformer", "cpu"):
        pass

    assert kept.nbytes == 0


def test_a_cancelled_streamed_job_leaves_the_pinned_set_right_for_the_next(tiny_models_folder: Path) -> None:
    changes = {"offload": "partial", "streamed": {"transformer": tuple(range(blocks_of(FLUX)))}}
    whole = run_of(tiny_models_folder, **changes)
    undisturbed = whole.latents()
    run = run_of(tiny_models_folder, **changes)
    run.loader._pinned = PinnedSet(limit_bytes=2**30)
    embeddings = run.encode()
    run.stop.at = run.stop.asked + 6
    with pytest.raises(Cancelled):
        run.denoise(embeddings)
    run.stop.at = 0

    assert run.loader._pinned.nbytes > 0
    assert torch.equal(undisturbed, run.denoise(embeddings))


def test_a_reader_converts_on_the_way(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    tensors = {"a": torch.linspace(-3, 3, 1000).view(10, 100), "b": torch.arange(7)}
    save_file(tensors, tmp_path / "model.safetensors")
    stored = stored_tensors(tmp_path, "model.safetensors")
    half = torch.empty(10, 100, dtype=torch.bfloat16)
    whole = torch.empty(7, dtype=torch.int64)
    with Reader(torch.device("cpu")) as reader:
        reader.read([(stored["a"], half), (stored["b"], whole)])

    assert torch.equal(half, tensors["a"].bfloat16())
    assert torch.equal(whole, tensors["b"])


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def test_pinned_memory_is_counted_as_this_processs_own_and_is_gone_after_it() -> None:
    """Shared memory would be counted elsewhere, and get no huge pages: pinning 10 GiB took three times as long."""
    size = 64 * 2**20
    before = _resident("RssAnon"), _resident("RssShmem")
    memory = PinnedMemory(size, torch.device("cpu"))
    memory.bytes.fill_(1)
    left = memory.bytes[:100]  # as in a cycle that nobody has collected yet
    grown = _resident("RssAnon") - before[0], _resident("RssShmem") - before[1]
    memory.close()

    assert grown[0] > 0.9 * size
    assert grown[1] < 0.1 * size
    assert _resident("RssAnon") - before[0] < 0.1 * size
    assert len(left) == 100


def test_the_second_expert_streams_from_the_memory_of_the_first(tiny_models_folder: Path) -> None:
    """Two sets at a time would be twice the RAM that the plan says."""
    kept = PinnedSet(limit_bytes=2**30)
    facts = MODELS["tiny-wan-t2v-a14b"]
    experts = ("transformer", "transformer_2")
    streamed = {name: tuple(range(blocks_of(facts.key, name))) for name in experts}
    plan = plan_for(facts.key, dtype="bfloat16", offload="partial", streamed=streamed)
    loader = Loader(model_folder(facts, tiny_models_folder), plan, blocks=facts.blocks, pinned=kept)
    places, contents = [], []
    for name in (*experts, "transformer"):
        with loader.component(name, "cpu"):
            pass
        assert kept._memory is not None
        places.append(kept._memory.bytes.data_ptr())
        contents.append(kept._memory.bytes.clone())

    assert len(set(places)) == 1
    assert not torch.equal(contents[0], contents[1])
    assert torch.equal(contents[0], contents[2])


@given(sizes=st.lists(st.integers(1, 40), min_size=2, max_size=30))
def test_a_ring_for_one_block_at_a_time_holds_the_largest_and_no_more(sizes: list[int]) -> None:
    found = places(sizes, at_once=1)

    assert found.nbytes == max(sizes)
    assert all(offset + size <= found.nbytes for offset, size in zip(found.offsets, sizes, strict=True))


@pytest.mark.parametrize("model", ["tiny-flux-schnell", "tiny-wan-ti2v"])
def test_the_cpus_way_of_little_ram_gives_the_bits_of_the_other(model: str, tiny_models_folder: Path) -> None:
    whole = Run(spec_for(model), tiny_models_folder)
    facts = MODELS[model]
    large = next(name for name in facts.blocks if name.startswith("text_encoder"))
    streamed = {name: tuple(range(blocks_of(model, name))) for name in (large, "transformer")}
    small = Run(
        spec_for(model), tiny_models_folder,
        plan_changes={"offload": "partial", "streamed": streamed, "streamed_from": "file"},
    )  # fmt: skip

    assert torch.equal(whole.latents(), small.latents())
