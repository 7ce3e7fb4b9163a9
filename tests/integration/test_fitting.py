"""What fits the demo models' weights goes on where it was, and from what it came to where it has more seconds."""

from __future__ import annotations

import math
import time
from pathlib import Path

import torch
from bench.drawings.fitting import Fit, save_state, saved_state
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
