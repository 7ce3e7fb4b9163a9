"""A clip with a cache that was stopped or killed comes out with the bits of an undisturbed one."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from safelightd import checkpoint, runjob
from safelightd.checkpoint import Checkpoint
from safelightd.progress import Cancelled
from tests.integration.rendering import Run, StopAt
from tests.integration.test_caching import AT_TIMES, EAGER
from tests.integration.test_checkpoint import interrupted, kept
from tests.integration.test_wan import JOBS, run_of

STEPS = 8

CACHES: dict[str, dict[str, Any]] = {
    "first-block": EAGER["first-block"],
    "first-block at times": {"kind": "first-block", "threshold": AT_TIMES["A14B"]},
    "taylorseer": EAGER["taylorseer"],
    "taylorseer of second order": {**EAGER["taylorseer"], "max_order": 2},
}

CLIPS = ("5B from text", "5B without guidance", "5B from a picture", "A14B from text")


def fields_of(job: str, cache: str) -> dict[str, Any]:
    return {**JOBS[job], "num_inference_steps": STEPS, "cache": CACHES[cache]}


def counts(run: Run) -> tuple[int, int]:
    record = runjob.cache_record(run.spec, run.watch)
    assert record is not None
    return record.forwards, record.skipped


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("job", CLIPS)
def test_a_cached_clip_that_is_killed_after_every_step_has_the_bits_of_an_undisturbed_one(
    job: str, cache: str, tiny_models_folder: Path, tmp_path: Path
) -> None:
    fields = fields_of(job, cache)
    undisturbed = run_of(fields, tiny_models_folder)
    expected = undisturbed.latents()
    for after_step in range(1, STEPS):
        interrupted(fields, tiny_models_folder, kept(tmp_path), after_step)
    last = run_of(fields, tiny_models_folder, checkpoint=kept(tmp_path))

    assert torch.equal(last.latents(), expected)
    assert last.steps("denoise") == [(STEPS, STEPS)]
    assert counts(last) == counts(undisturbed)
    assert 0 < counts(last)[1] < counts(last)[0]


@pytest.mark.parametrize(
    ("job", "cache"), [*(("5B from text", cache) for cache in CACHES), ("A14B from text", "first-block at times")]
)
def test_a_cached_clip_that_is_stopped_within_any_step_has_the_bits_of_an_undisturbed_one(
    job: str, cache: str, tiny_models_folder: Path, tmp_path: Path
) -> None:
    """Before any block of either prompt: what was done of the step is done again, with what the cache held before."""
    fields = fields_of(job, cache)
    undisturbed = run_of(fields, tiny_models_folder)
    embeddings = undisturbed.encode()
    undisturbed.watch._stop = counting = StopAt()
    expected = undisturbed.denoise(embeddings)
    for at in range(4, counting.asked, 3):
        place = kept(tmp_path / str(at), every_s=3600.0)
        with pytest.raises(Cancelled):
            run_of(fields, tiny_models_folder, checkpoint=place, stop=StopAt(at)).denoise(embeddings)
        last = run_of(fields, tiny_models_folder, checkpoint=place)

        assert torch.equal(last.denoise(embeddings), expected), at
        assert counts(last) == counts(undisturbed)
        assert (last.watch.resumed_after_step or 0) == STEPS - len(last.steps("denoise"))


def test_what_a_forward_replaces_is_not_held_until_the_step_is_whole(tiny_models_folder: Path, tmp_path: Path) -> None:
    """Else the device would hold it twice. A checkpoint of this moment need not have it: it is computed again."""
    fields = {**fields_of("5B from text", "first-block"), "cache": {"kind": "first-block", "threshold": 0.0}}
    whole = run_of(fields, tiny_models_folder)
    embeddings = whole.encode()
    whole.watch._stop = counting = StopAt()
    expected = whole.denoise(embeddings)
    place = kept(tmp_path, every_s=3600.0)
    with pytest.raises(Cancelled):  # before the last block of the last step's last forward
        run_of(fields, tiny_models_folder, checkpoint=place, stop=StopAt(counting.asked - 1)).denoise(embeddings)

    assert _cached_bytes(place) == []
    assert torch.equal(run_of(fields, tiny_models_folder, checkpoint=place).denoise(embeddings), expected)


@pytest.mark.parametrize("cache", [None, {"kind": "first-block", "threshold": 0.0}])
def test_a_clip_that_goes_on_lets_go_of_what_its_checkpoint_had(
    cache: dict[str, Any] | None, tiny_models_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors that a forward has replaced would be on the device twice, and a replaced file takes room while open."""
    fields = {**JOBS["5B from text"], "num_inference_steps": STEPS, "cache": cache}
    interrupted(fields, tiny_models_folder, kept(tmp_path), 3)
    loaded: list[weakref.ref[torch.Tensor]] = []
    cache_on = checkpoint.Saved.cache_on

    def seen(saved: checkpoint.Saved, device: torch.device) -> Any:
        found = cache_on(saved, device)
        states = [state for states in found[2].values() for state in states]
        values = [part for state in states for value in state.values() for part in _parts(value)]
        loaded.extend(weakref.ref(part) for part in values if isinstance(part, torch.Tensor))
        return found

    monkeypatch.setattr(checkpoint.Saved, "cache_on", seen)
    alive: list[int] = []
    opened: list[list[str]] = []

    def look(told: dict[str, Any]) -> None:
        if told["type"] == "step" and told["phase"] == "denoise":
            alive.append(sum(tensor() is not None for tensor in loaded))
            opened.append([place for place in _open_files() if str(tmp_path) in place])

    run = run_of(fields, tiny_models_folder, checkpoint=kept(tmp_path))
    run.watch._send = look
    run.latents()

    assert len(loaded) == (4 if cache else 0)
    assert alive[-1] == 0
    assert opened == [[]] * (STEPS - 3)


def _parts(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def _open_files() -> list[str]:
    folder = Path("/proc/self/fd")
    return [str(entry.readlink()) for entry in folder.iterdir() if entry.is_symlink()]


def test_a_cached_clip_whose_checkpoint_is_damaged_begins_anew_and_counts_anew(
    tiny_models_folder: Path, tmp_path: Path
) -> None:
    fields = fields_of("5B from text", "first-block")
    undisturbed = run_of(fields, tiny_models_folder)
    expected = undisturbed.latents()
    interrupted(fields, tiny_models_folder, kept(tmp_path), 5)
    with (tmp_path / "job").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"?")
    last = run_of(fields, tiny_models_folder, checkpoint=kept(tmp_path))

    assert torch.equal(last.latents(), expected)
    assert (last.watch.began_anew, last.watch.resumed_after_step) == ("its checkpoint is damaged", None)
    assert counts(last) == counts(undisturbed)


def test_a_checkpoint_has_of_each_prompt_what_its_next_forward_needs(tiny_models_folder: Path, tmp_path: Path) -> None:
    """Of first-block two tensors as large as the hidden states: docs/memory.md says what that takes."""
    place = kept(tmp_path)
    interrupted(fields_of("5B from text", "first-block"), tiny_models_folder, place, 5)
    sizes = _cached_bytes(place)
    interrupted(fields_of("5B without guidance", "first-block"), tiny_models_folder, kept(tmp_path / "one"), 5)

    assert len(sizes) == 4
    assert len(set(sizes)) == 1
    assert _cached_bytes(kept(tmp_path / "one")) == sizes[:2]


def _cached_bytes(place: Checkpoint) -> list[int]:
    saved = place.load()
    assert saved is not None
    return [tensor.nbytes for name, tensor in saved.tensors.items() if name.startswith("cache.")]


def test_between_two_experts_a_checkpoint_holds_no_cache(tiny_models_folder: Path, tmp_path: Path) -> None:
    fields = fields_of("A14B from text", "first-block")
    interrupted(fields, tiny_models_folder, kept(tmp_path / "seldom", every_s=3600.0), STEPS)
    between = kept(tmp_path / "seldom").load()
    assert between is not None
    interrupted(fields, tiny_models_folder, kept(tmp_path / "often"), between.step)

    assert 0 < between.step < STEPS
    assert _cached_bytes(kept(tmp_path / "seldom")) == _cached_bytes(kept(tmp_path / "often")) == []
