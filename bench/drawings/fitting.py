"""Fitting parameters within a budget of seconds: AdamW and Muon, an average over time, CUDA graphs, resumable.

Knows nothing of what is fitted.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

Batch = dict[str, Tensor]
Loss = Callable[[Batch], Tensor]

WARM_UP_STEPS = 300
HELD_SHARE = 0.3
"""Of the budget, at the full learning rate; then it falls to nothing in a straight line."""
TOLD_EVERY_S = 10.0
LOOKED_EVERY_STEPS = 20
"""How often the clock is asked: to ask waits for the GPU."""


def told(text: str) -> None:
    """Print a line with the time since the start, at once."""
    print(f"[{time.monotonic() - _BEGAN:6.1f} s] {text}", flush=True)


_BEGAN = time.monotonic()


class Fit:
    """Fits parameters to a loss, for `seconds` in all, over as many runs as that takes."""

    def __init__(
        self, name: str, parameters: Sequence[nn.Parameter], loss: Loss, *, lr: float, seconds: float, ema_decay: float,
        warm_up_steps: int = WARM_UP_STEPS, orthogonal: Sequence[nn.Parameter] = (),
    ) -> None:  # fmt: skip
        """Fit `parameters`; of them those of `orthogonal`, two-dimensional, by orthogonal steps (`_muon`)."""
        self.name, self.seconds = name, seconds
        self.spent_s, self.steps = 0.0, 0
        self._parameters: list[Any] = list(parameters)
        self._loss, self._lr, self._ema_decay = loss, lr, ema_decay
        self._warm_up_steps = warm_up_steps
        chosen = {id(matrix) for matrix in orthogonal}
        self._matrices = {i for i, parameter in enumerate(self._parameters) if id(parameter) in chosen}
        self._cuda = self._parameters[0].is_cuda
        self._average = [parameter.detach().clone() for parameter in self._parameters]
        self._moments = [
            [torch.zeros_like(parameter) for parameter in self._parameters],
            # Muon has none.
            [torch.zeros_like(each[:0] if i in self._matrices else each) for i, each in enumerate(self._parameters)],
        ]
        device = self._parameters[0].device
        self._rate = torch.zeros((), device=device)
        self._count = torch.zeros((), device=device)

    @property
    def is_done(self) -> bool:
        return self.spent_s >= self.seconds

    def run(self, batch: Callable[[], Batch], until: float) -> None:
        """Go on until the budget is spent or `until` (monotonic) is reached."""
        step = self._captured(batch())
        began, before, spoke = time.monotonic(), self.spent_s, time.monotonic()
        lately: list[Tensor] = []
        while True:
            if not self._cuda or self.steps % LOOKED_EVERY_STEPS == 0:
                self._wait()
                now = time.monotonic()
                self.spent_s = before + now - began
                if self.is_done or now >= until:
                    break
                self._rate.fill_(self._lr * self._share())
                if lately and now - spoke >= TOLD_EVERY_S:
                    mean = torch.stack(lately).mean().item()
                    ms = (now - spoke) / len(lately) * 1e3
                    told(f"{self.name}: {self.spent_s:.0f} s, step {self.steps}, loss {mean:.5f}, {ms:.2f} ms a step")
                    spoke, lately = now, []
            lately.append(step(batch()).clone())
            self.steps += 1
        told(f"{self.name}: {self.steps} steps in {self.spent_s:.0f} of {self.seconds:.0f} s")

    @torch.no_grad()
    def use_average(self) -> None:
        """Put the average in the parameters' place."""
        torch._foreach_copy_(self._parameters, self._average)

    def _share(self) -> float:
        """Return the learning rate now, of the full one."""
        spent = min(self.spent_s / self.seconds, 1.0)
        return min(1.0, (self.steps + 1) / self._warm_up_steps) * min(1.0, (1 - spent) / (1 - HELD_SHARE)) + 1e-4

    def gradients(self, batch: Batch) -> tuple[Tensor, Sequence[Tensor | None]]:
        """Return the loss of a batch and what it says to each parameter; nothing changes."""
        loss = self._loss(batch)
        return loss.detach(), torch.autograd.grad(loss, self._parameters, allow_unused=True)

    def _step(self, batch: Batch) -> Tensor:
        loss, gradients = self.gradients(batch)
        pairs = [(i, gradient) for i, gradient in enumerate(gradients) if gradient is not None]
        others = [pair for pair in pairs if pair[0] not in self._matrices]
        if others:
            self._adam(others)
        alike: dict[torch.Size, list[tuple[int, Tensor]]] = {}
        for place, gradient in pairs:
            if place in self._matrices:
                alike.setdefault(gradient.shape, []).append((place, gradient))
        for same in alike.values():
            self._muon(same)
        with torch.no_grad():
            weights = [weight.detach() for weight in self._parameters]
            torch._foreach_lerp_(self._average, weights, 1 - self._ema_decay)
        return loss

    @torch.no_grad()
    def _muon(self, pairs: Sequence[tuple[int, Tensor]]) -> None:
        """Muon (Jordan et al. 2024) for matrices of one shape: each step is the momentum with all its singular values
        brought near 1, as long as AdamW's are (Liu et al. 2025, "Muon is scalable for LLM training": 0.2 sqrt(n))."""
        decay, beta = 0.01, 0.95
        weights = [self._parameters[i] for i, _ in pairs]
        momenta = [self._moments[0][i] for i, _ in pairs]
        gradients = [gradient for _, gradient in pairs]
        torch._foreach_lerp_(momenta, gradients, 1 - beta)
        ahead = torch.stack(torch._foreach_lerp(momenta, gradients, 1 - beta))
        steps = _orthogonal(ahead) * (0.2 * max(ahead.shape[1:]) ** 0.5 * self._rate)
        torch._foreach_mul_(weights, 1 - self._rate * decay)
        torch._foreach_sub_(weights, list(steps.unbind(0)))

    @torch.no_grad()
    def _adam(self, pairs: Sequence[tuple[int, Tensor]]) -> None:
        """AdamW (Loshchilov & Hutter 2019) with the gradient's norm held to 1; everything stays on the device."""
        decay, betas, small = 0.01, (0.9, 0.98), 1e-8
        weights = [self._parameters[i] for i, _ in pairs]
        gradients = [gradient for _, gradient in pairs]
        first, second = ([moments[i] for i, _ in pairs] for moments in self._moments)
        norm = torch.stack(torch._foreach_norm(gradients)).norm()
        torch._foreach_mul_(gradients, (1.0 / norm.clamp(min=1.0)))
        self._count += 1
        torch._foreach_lerp_(first, gradients, 1 - betas[0])
        torch._foreach_mul_(second, betas[1])
        torch._foreach_addcmul_(second, gradients, gradients, 1 - betas[1])
        unbiased = self._rate / (1 - betas[0] ** self._count)
        deviation = torch._foreach_sqrt(second)
        torch._foreach_div_(deviation, (1 - betas[1] ** self._count).sqrt())
        torch._foreach_add_(deviation, small)
        steps: Any = torch._foreach_div(first, deviation)
        torch._foreach_mul_(steps, unbiased)
        torch._foreach_mul_(weights, 1 - self._rate * decay)
        torch._foreach_sub_(weights, steps)

    def _captured(self, first: Batch) -> Loss:
        """Return the step as one CUDA graph; on the CPU, as it is."""
        if not self._cuda:
            return self._step
        held = {name: tensor.clone() for name, tensor in first.items()}
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # allocators, libraries and compilers settle before a graph is taken
            for _ in range(3):
                self._step(held)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = self._step(held)

        def replay(batch: Batch) -> Tensor:
            for name, tensor in held.items():
                tensor.copy_(batch[name])
            graph.replay()
            return loss

        return replay

    def _wait(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()

    def state(self) -> dict[str, Tensor]:
        """Return all that another run needs to go on from here, or of a finished fit what it came to."""
        tensors = {f"{self.name}.average.{i}": average for i, average in enumerate(self._average)}
        if not self.is_done:
            for kind, parts in self._parts().items():
                tensors |= {f"{self.name}.{kind}.{i}": part.detach() for i, part in enumerate(parts)}
        spent = torch.tensor([self.spent_s, float(self.steps), self._count.item()], dtype=torch.float64)
        return tensors | {f"{self.name}.spent": spent}

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from a state; without one of this name, from the start; from what it came to where it was done."""
        if f"{self.name}.spent" not in tensors:
            return
        spent_s, steps, count = tensors[f"{self.name}.spent"].tolist()
        self.spent_s, self.steps = spent_s, int(steps)
        for i, average in enumerate(self._average):
            average.copy_(tensors[f"{self.name}.average.{i}"])
        if f"{self.name}.weight.0" not in tensors:  # it was done: with a larger budget it goes on from the average
            self.use_average()
            return
        self._count.fill_(count)
        for kind, parts in self._parts().items():
            for i, part in enumerate(parts):
                part.copy_(tensors[f"{self.name}.{kind}.{i}"])

    def _parts(self) -> dict[str, list[Any]]:
        return {"weight": self._parameters, "first": self._moments[0], "second": self._moments[1]}


def matrices(*blocks: nn.Module) -> list[nn.Parameter]:
    """Return the two-dimensional weights of a network's blocks: those of its ends are better fitted one by one."""
    return [weight for block in blocks for weight in block.parameters() if weight.ndim == 2]


def _orthogonal(given: Tensor) -> Tensor:
    """Return matrices (N, m, n) with singular values of 0.7 to 1.2 in the place of their own, in float32; of those that
    are less than a five-hundredth of the norm, smaller ones. Five steps of the Newton-Schulz iteration with Jordan's
    coefficients (https://kellerjordan.github.io/posts/muon)."""
    tall = given.shape[1] > given.shape[2]
    x: Tensor = (given.mT if tall else given).bfloat16()
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return (x.mT if tall else x).float()


def save_state(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a state so that an interruption leaves the one before."""
    unfinished = file.with_suffix(".part")
    save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, unfinished)
    unfinished.rename(file)


def saved_state(file: Path) -> dict[str, Tensor]:
    """Return what save_state wrote; nothing where there is no file."""
    if not file.is_file():
        return {}
    with safe_open(file, framework="pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - it is no mapping


def write_json(file: Path, found: Mapping[str, object]) -> None:
    file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def shifted(u: Tensor, shift: float) -> Tensor:
    """Return noise levels 0 to 1, moved towards noise as FlowMatchEuler and UniPC move theirs (shift 1: not at all)."""
    return shift * u / (1 + (shift - 1) * u)


def some_sigmas(count: int, stream: torch.Generator) -> Tensor:
    """Return (count,) noise levels: half of them logit-normal (Esser et al. 2024), half uniform."""
    device = stream.device
    uniform = torch.rand(count, generator=stream, device=device)
    normal = torch.randn(count, generator=stream, device=device).sigmoid()
    return torch.where(torch.rand(count, generator=stream, device=device) < 0.5, normal, uniform)


def even_sigmas(steps: int) -> list[float]:
    """Return the noise levels of so many equal steps, and 0."""
    return [1 - i / steps for i in range(steps)] + [0.0]
