"""A transformer that answers some forwards from earlier ones: diffusers' caches, and how often they did.

They are put on last: around blocks that may be compiled, and inside of the hooks that stream them, which are told of
a forward that will leave blocks out, so that nothing passes for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from diffusers.hooks import FirstBlockCacheConfig, HookRegistry, TaylorSeerCacheConfig
from diffusers.hooks._helpers import TransformerBlockRegistry
from diffusers.hooks.first_block_cache import _FBC_LEADER_BLOCK_HOOK
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from torch import nn

from safelight.caches import Cache
from safelightd.assembly import running_order
from safelightd.pipelines.wan_modulation import FrameModulatedBlock
from safelightd.streaming import LEFT_OUT

PROMPTS = ("cond", "uncond")
"""diffusers' names of the two forwards of a guided step: each has a cache of its own."""

TransformerBlockRegistry.register(FrameModulatedBlock, TransformerBlockRegistry.get(WanTransformerBlock))

Context = Callable[[int], AbstractContextManager[None]]
"""Around the forward of a prompt, by its number: the wanted one is 0."""


def _uncached(_prompt: int) -> AbstractContextManager[None]:
    return nullcontext()


@contextmanager
def caching(
    transformer: Any, cache: Cache | None, dtype: torch.dtype, tell: Callable[[int, int], None]
) -> Iterator[Context]:
    """Have a cache on a transformer until the block ends, empty at its beginning; without one, nothing changes.

    Args:
        tell: gets the forwards that were asked for, and how many of them did not run the blocks but the first.
    """
    if cache is None:
        yield _uncached
        return
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
        leaving.enter_context(_telling_when_decided(blocks, began))

        @contextmanager
        def around(prompt: int) -> Iterator[None]:
            nonlocal asked
            _say(blocks, left_out=False)
            with transformer.cache_context(PROMPTS[prompt]):
                yield
            asked += 1

        try:
            yield around
        finally:
            tell(asked, asked - ran[0])


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
def _telling_when_decided(blocks: Sequence[nn.Module], began: list[int]) -> Iterator[None]:
    """Say of all blocks, once the first has run or was left out, whether they compute in this forward."""
    first = blocks[0]
    forward = first.forward
    state_of = HookRegistry.check_if_exists_or_initialize(first).get_hook(_FBC_LEADER_BLOCK_HOOK)

    def decided(*given: Any, **named: Any) -> Any:
        before = began[0]
        made = forward(*given, **named)
        computes = state_of.state_manager.get_state().should_compute if state_of else began[0] > before
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
