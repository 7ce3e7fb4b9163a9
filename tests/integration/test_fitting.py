"""What fits the demo models' weights goes on where it was, and from what it came to where it has more seconds."""

from __future__ import annotations

import math
import time
from pathlib import Path

import pytest
import torch
from bench.drawings.fitting import Fit, matrices, save_state, saved_state
from torch import nn


def fit(weight: nn.Parameter, seconds: float) -> Fit:
    return Fit(
        "line", [weight], lambda batch: ((batch["x"] * weight - 3 * batch["x"]) ** 2).mean(),
        lr=0.1, seconds=seconds, ema_decay=0.9, warm_up_steps=5,
    )  # fmt: skip


def went_on(one: Fit) -> Fit:
    one.run(lambda: {"x": torch.ones(4)}, math.inf)
    return one


def test_a_fit_comes_to_its_target() -> None:
    weight = nn.Parameter(torch.zeros(()))
    went_on(fit(weight, 0.3)).use_average()

    assert abs(weight.item() - 3) < 0.1


def test_a_fit_that_was_stopped_goes_on_with_its_moments(tmp_path: Path) -> None:
    first, second = (nn.Parameter(torch.zeros(())) for _ in range(2))
    stopped, again = fit(first, 60.0), fit(second, 60.0)
    stopped.run(lambda: {"x": torch.ones(4)}, time.monotonic() + 0.1)
    save_state(tmp_path / "state.safetensors", stopped.state())

    again.restore(saved_state(tmp_path / "state.safetensors"))

    assert (again.steps, again.spent_s, again.is_done) == (stopped.steps, stopped.spent_s, False)
    assert second.item() == first.item() != 0
    assert again.state().keys() == stopped.state().keys()
    assert all(torch.equal(again.state()[name], tensor) for name, tensor in stopped.state().items())


def test_a_fit_that_was_done_goes_on_from_its_average_where_it_has_more_seconds(tmp_path: Path) -> None:
    first, second = (nn.Parameter(torch.zeros(())) for _ in range(2))
    done = went_on(fit(first, 0.1))
    save_state(tmp_path / "state.safetensors", done.state())
    done.use_average()

    longer = fit(second, 0.2)
    longer.restore(saved_state(tmp_path / "state.safetensors"))

    assert not longer.is_done
    assert second.item() == first.item() != 0
    assert went_on(longer).steps > done.steps


@pytest.mark.parametrize("shape", [(6, 6), (4, 10), (10, 4)], ids=["square", "wide", "tall"])
def test_a_step_of_a_matrix_is_as_long_in_every_direction(shape: tuple[int, int]) -> None:
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    gradient[0] *= 30  # so that the directions differ
    weight = nn.Parameter(torch.zeros(shape))
    one = Fit(
        "matrix", [weight], lambda batch: (weight * batch["gradient"]).sum(),
        lr=0.1, seconds=math.inf, ema_decay=0.9, warm_up_steps=1, orthogonal=[weight],
    )  # fmt: skip
    batches = iter([{"gradient": gradient}] * 2)  # the first is looked at

    with pytest.raises(StopIteration):
        one.run(lambda: next(batches), math.inf)

    lengths = torch.linalg.svdvals(weight.detach()) / (0.1 * 0.2 * max(shape) ** 0.5)
    assert torch.linalg.svdvals(gradient).max() > 10 * torch.linalg.svdvals(gradient).min()
    assert lengths.min() > 0.6
    assert lengths.max() < 1.3
    assert (weight * gradient).sum() < 0


def test_only_two_dimensional_weights_are_matrices() -> None:
    block = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Conv2d(1, 2, 3))

    assert [tuple(weight.shape) for weight in matrices(block)] == [(6, 4)]
