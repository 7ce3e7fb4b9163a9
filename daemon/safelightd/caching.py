"""A transformer that answers some forwards from earlier ones: diffusers' caches, what they hold, how often they did.

They are put on last: around blocks that may be compiled, and inside of the hooks that stream them, which are told of
a forward that will leave blocks out, so that nothing passes for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from diffusers.hooks import FirstBlockCacheConfig, HookRegistry, TaylorSeerCacheConfig
from diffusers.hooks._helpers import TransformerBlockRegistry
from diffusers.hooks.first_block_cache import _FBC_LEADER_BLOCK_HOOK
from diffusers.hooks.hooks import StateManager
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from torch import nn

from safelight.caches import Cache
from safelightd.assembly import running_order
from safelightd.checkpoint import Saved
from safelightd.pipelines.wan_modulation import FrameModulatedBlock
from safelightd.streaming import LEFT_OUT

PROMPTS = ("cond", "uncond")
"""diffusers' names of the two forwards of a guided step: each has a cache of its own."""

TransformerBlockRegistry.register(FrameModulatedBlock, TransformerBlockRegistry.get(WanTransformerBlock))

Context = Callable[[int], AbstractContextManager[None]]
"""Around the forward of a prompt, by its number: the wanted one is 0."""

HOOKED = "_diffusers_hook"
"""diffusers' name of what a module's hooks are kept in."""

OF_ONE_FORWARD = frozenset({"head_block_output"})
"""What diffusers leaves in a state and no later forward looks at."""


def _nothing() -> None: ...


@dataclass
class Held:
    """What a job's cache holds after its last whole step, and how often it answered until then.

    What it holds is not copied. first-block's of a prompt is let go as soon as the prompt's next forward replaces it,
    so that the device never holds it twice: the step that this forward is of computes again what was replaced, whatever
    of it was done. taylorseer's factors, of one layer, stay until the step is whole.
    """

    forwards: int = 0
    skipped: int = 0
    """Of the forwards, over all experts and attempts."""
    prompts: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """By diffusers' name of a prompt: what each place in the transformer remembers, in its order."""
    settle: Callable[[], None] = _nothing
    """Call it when a step is whole."""
    _waiting: Callable[[], Any] | None = None

    @classmethod
    def of(cls, saved: Saved | None, device: torch.device) -> Held:
        """Return what a checkpoint has of it; tensors go to `device` when a cache takes them."""
        held = cls()
        if saved is not None and saved.cache is not None:
            held.forwards, held.skipped, _ = saved.cache
            held._waiting = partial(saved.cache_on, device)
        return held

    def told(self) -> list[Any]:
        """Return it as a checkpoint keeps it."""
        return [self.forwards, self.skipped, self.prompts]

    def taken(self) -> dict[str, list[dict[str, Any]]]:
        """Return what a checkpoint had, once: the next expert's cache begins empty."""
        waiting, self._waiting = self._waiting, None
        return waiting()[2] if waiting else {}


def _uncached(_prompt: int) -> AbstractContextManager[None]:
    return nullcontext()


@contextmanager
def caching(
    transformer: Any,
    cache: Cache | None,
    dtype: torch.dtype,
    tell: Callable[[int, int], None],
    held: Held | None = None,
) -> Iterator[Context]:
    """Have a cache on a transformer until the block ends; without one, nothing changes.

    Args:
        tell: gets the forwards that were asked for, and how many of them did not run the blocks but the first.
        held: what a checkpoint had of the cache, which is empty else at its beginning. What the cache holds is told
            there whenever `settle` is called, and stays there when a job is stopped within the block.
    """
    if cache is None:
        yield _uncached
        return
    held = held or Held()
    before = held.forwards, held.skipped
    asked, ran, began = 0, [0], [0]
    paths = [name for name, part in transformer.named_children() if _is_blocks(part)]
    blocks = [block for _, block in running_order(transformer, paths)]
    with ExitStack() as leaving:
        leaving.enter_context(_counting(blocks[-1], ran))
        leaving.enter_context(_counting(blocks[0], began))
        transformer.enable_cache(_config(cache, dtype))
        leaving.callback(transformer.disable_cache)
        # Else its tensors live as long as a name points at it.
        leaving.callback(transformer._reset_stateful_cache)  # noqa: SLF001 - diffusers has no other
        states = _states(transformer)
        running = PROMPTS[0]
        leaving.enter_context(_telling_when_decided(blocks, began, lambda: held.prompts.pop(running, None)))

        def settle() -> None:
            held.forwards, held.skipped = before[0] + asked, before[1] + asked - ran[0]
            for prompt in seen:
                with transformer.cache_context(prompt):
                    held.prompts[prompt] = [_remembered(state.get_state()) for state in states]

        seen = dict.fromkeys(_restored(transformer, states, held.taken()))
        settle()
        held.settle = settle
        leaving.callback(setattr, held, "settle", _nothing)  # it holds the transformer

        @contextmanager
        def around(prompt: int) -> Iterator[None]:
            nonlocal asked, running
            running = PROMPTS[prompt]
            seen[running] = None
            _say(blocks, left_out=False)
            with transformer.cache_context(running):
                yield
            asked += 1

        try:
            yield around
        finally:
            tell(asked, asked - ran[0])
    held.prompts.clear()


def _restored(
    transformer: Any, states: Sequence[StateManager], prompts: Mapping[str, list[dict[str, Any]]]
) -> list[str]:
    """Put back what the states remembered, and return of which prompts; no name points at any of it afterwards."""
    for prompt, parts in prompts.items():
        with transformer.cache_context(prompt):
            for state, part in zip(states, parts, strict=True):
                vars(state.get_state()).update(part)
    return list(prompts)


def _states(transformer: nn.Module) -> list[StateManager]:
    """Return where diffusers' hooks keep what they remember of each prompt, each once, in the order of the modules."""
    registries: list[HookRegistry] = [vars(part)[HOOKED] for part in transformer.modules() if HOOKED in vars(part)]
    hooks = [hook for registry in registries for hook in registry.hooks.values()]
    found = [value for hook in hooks for value in vars(hook).values() if isinstance(value, StateManager)]
    return list({id(state): state for state in found}.values())


def _remembered(state: object) -> dict[str, Any]:
    """Return what a state holds now; diffusers changes its dicts, and replaces what is in them."""
    return {
        name: dict(value) if isinstance(value, dict) else value
        for name, value in vars(state).items()
        if name not in OF_ONE_FORWARD
    }


def _is_blocks(part: nn.Module) -> bool:
    return isinstance(part, nn.ModuleList) and len(part) > 0


@contextmanager
def _counting(block: nn.Module, ran: list[int]) -> Iterator[None]:
    """Count how often a block computes: a cache that skips it does not ask for this forward."""
    forward = block.forward

    def counted(*given: Any, **named: Any) -> Any:
        ran[0] += 1
        return forward(*given, **named)

    with _going_through(block, counted):
        yield


@contextmanager
def _telling_when_decided(
    blocks: Sequence[nn.Module], began: list[int], replaces: Callable[[], object]
) -> Iterator[None]:
    """Say of all blocks, once the first has run or was left out, whether they compute in this forward.

    Args:
        replaces: is called where they do, and what the cache held of the prompt will be of no use.
    """
    first = blocks[0]
    forward = first.forward
    state_of = HookRegistry.check_if_exists_or_initialize(first).get_hook(_FBC_LEADER_BLOCK_HOOK)

    def decided(*given: Any, **named: Any) -> Any:
        before = began[0]
        made = forward(*given, **named)
        computes = state_of.state_manager.get_state().should_compute if state_of else began[0] > before
        if state_of and computes:
            replaces()
        _say(blocks, left_out=not computes)
        return made

    with _going_through(first, decided):
        yield


@contextmanager
def _going_through(block: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Have a block's forward replaced until this ends."""
    before = vars(block).get("forward")
    block.forward = forward
    try:
        yield
    finally:
        if before is None:
            del block.forward
        else:
            block.forward = before


def _say(blocks: Sequence[nn.Module], *, left_out: bool) -> None:
    for block in blocks:
        setattr(block, LEFT_OUT, left_out)


def _config(cache: Cache, dtype: torch.dtype) -> Any:
    if cache.kind == "first-block":
        return FirstBlockCacheConfig(**cache.given)
    # In its lite form: of each attention it would keep more than a card holds.
    return TaylorSeerCacheConfig(**cache.given, taylor_factors_dtype=dtype, use_lite_mode=True)
