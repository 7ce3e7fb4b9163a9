"""Wan's VAE decoded strip by strip: the sums of a whole decode in a third of its memory, and no seams.

Only the attention in the middle looks across the picture. It is at a sixteenth or an eighth of its side, and is left
whole, with what precedes it. Every layer after it needs a row above and below at most, so rows pass through all of them
before the next ones do: a convolution keeps the last two that it was shown, which it needs once more, and gives as many
as it can. Nothing is computed twice. At full height there are the frames before, of which each convolution needs two,
and the part of the clip that comes out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    DupUp3D,
    WanCausalConv3d,
    WanDecoder3d,
    WanResample,
    WanResidualBlock,
    WanResidualUpBlock,
    WanRMS_norm,
    WanUpBlock,
    WanUpsample,
)
from torch import nn
from torch.nn import functional

from safelight.errors import SafelightError
from safelightd.pipelines.wan_vae import Convolution, Norm

PAST = 2
"""Frames before its own that a convolution is shown: diffusers' CACHE_T. Before the clip they are zero."""


class UnknownLayer(SafelightError):
    """The decoder has a layer that is not known to work on some rows as it does on all."""


class Strip(NamedTuple):
    """Rows of a part of the clip, in order from the top."""

    rows: torch.Tensor
    """(B, C, T, h, W)"""
    is_last: bool
    """They reach the bottom edge."""


Pointwise = Callable[[torch.Tensor], torch.Tensor]
"""What makes each pixel of its own channels alone."""


def go_on() -> None: ...


def _as_it_is(x: torch.Tensor) -> torch.Tensor:
    return x


def in_strips(vae: Any, rows: int, ask: Callable[[], None] = go_on) -> None:
    """Make an AutoencoderKLWan decode so many rows of the picture at a time, and no fewer than one of its latents.

    Args:
        ask: is called before each strip, and may raise.

    Raises:
        UnknownLayer: the decoder is of another kind.
    """
    decoder = vae.decoder
    _require(decoder, type(decoder) is WanDecoder3d)
    times = (vae.config.patch_size or 1) * 2 ** sum(isinstance(part, WanResample) for part in decoder.modules())
    decoder.rows, decoder.ask = max(rows // times, 1), ask
    _require_causal(decoder.conv_in, (3, 3, 3))
    for is_first in (True, False):  # to refuse what is not known before anything is decoded
        _Decoder.passage(decoder, (), 1, [], [0], is_first=is_first)
    decoder.__class__ = _Decoder


class _Decoder(WanDecoder3d):  # type: ignore[misc] # diffusers has no types
    rows: int
    """Of latents, at a time."""
    ask: Callable[[], None]

    def forward(
        self,
        x: torch.Tensor,
        feat_cache: list[Any],
        feat_idx: list[int],
        first_chunk: bool = False,  # noqa: FBT001, FBT002 - diffusers' own arguments
    ) -> torch.Tensor:
        """Return a part of the clip (B, C, T, H, W) as diffusers' decoder does, which keeps the same frames."""
        height = x.shape[3]
        first = _Passage([Strip(x, is_last=True)], height, feat_cache, feat_idx)
        first.convolve(self.conv_in)
        (whole,) = first.strips
        whole = Strip(self.mid_block(whole.rows, feat_cache=feat_cache, feat_idx=feat_idx), is_last=True)
        passage = self.passage([whole], height, feat_cache, feat_idx, is_first=first_chunk)
        del whole
        made, top = x.new_empty(0), 0
        for strip in passage.strips:
            if top == 0:
                b, c, t, _, w = strip.rows.shape
                made = x.new_empty(b, c, t, passage.height, w)
            bottom = top + strip.rows.shape[3]
            made[:, :, :, top:bottom] = strip.rows
            top = bottom
        return made

    def passage(
        self, whole: Iterable[Strip], height: int, feat_cache: list[Any], feat_idx: list[int], *, is_first: bool
    ) -> _Passage:
        """Return the way of rows through all that follows the middle."""
        passage = _Passage(_pieces(whole, self.rows, self.ask), height, feat_cache, feat_idx)
        rows = self.rows
        for block in self.up_blocks:
            if passage.up(block, is_first=is_first):
                rows *= 2
                # The last strip brings with it what all layers before had waited with.
                passage.strips = _pieces(passage.strips, rows, self.ask)
        passage.convolve(self.conv_out, _activated(self.norm_out, self.nonlinearity))
        return passage


class _Passage:
    """The way of strips through layers, each of which is built on those before; nothing runs until one is asked for.

    Convolutions have their places in `feat_cache` in the order in which they are built.
    """

    def __init__(self, strips: Iterable[Strip], height: int, feat_cache: list[Any], feat_idx: list[int]) -> None:
        self.strips = iter(strips)
        self.height = height
        self.feat_cache, self.feat_idx = feat_cache, feat_idx

    def up(self, block: Any, *, is_first: bool) -> bool:
        """Go through one of the decoder's blocks, and say whether it has made the picture larger."""
        _require(block, type(block) in (WanUpBlock, WanResidualUpBlock))
        is_residual = type(block) is WanResidualUpBlock
        resample = block.upsampler if is_residual else block.upsamplers and block.upsamplers[0]
        duplicated = block.avg_shortcut if is_residual else None
        if duplicated is None:
            self._through(block.resnets, resample, is_first=is_first)
        else:
            _require(duplicated, type(duplicated) is DupUp3D and duplicated.factor_s == 2)
            shortcut = _Shortcut(lambda x: duplicated(x, first_chunk=is_first), times=2)
            self.strips = map(shortcut.keep, self.strips)
            self._through(block.resnets, resample, is_first=is_first)
            self.strips = map(shortcut.add, self.strips)
        return resample is not None

    def _through(self, resnets: Iterable[Any], resample: Any, *, is_first: bool) -> None:
        for resnet in resnets:
            self.residual(resnet)
        if resample is not None:
            self.resample(resample, is_first=is_first)

    def residual(self, block: Any) -> None:
        _require(block, type(block) is WanResidualBlock and not (block.training and block.dropout.p))
        if not isinstance(block.conv_shortcut, nn.Identity):
            _require_causal(block.conv_shortcut, (1, 1, 1))
        shortcut = _Shortcut(block.conv_shortcut)
        self.strips = map(shortcut.keep, self.strips)
        self.convolve(block.conv1, _activated(block.norm1, block.nonlinearity))
        self.convolve(block.conv2, _activated(block.norm2, block.nonlinearity))
        self.strips = map(shortcut.add, self.strips)

    def resample(self, layer: Any, *, is_first: bool) -> None:
        _require(layer, type(layer) is WanResample and layer.mode in ("upsample2d", "upsample3d"))
        if layer.mode == "upsample3d":
            if is_first:  # the clip's first frame stays one, and is none that the next are made of
                _require_causal(layer.time_conv, (3, 1, 1))
                self.feat_idx[0] += 1
            else:
                self.convolve(layer.time_conv, kernel_size=(3, 1, 1))
                self.strips = map(_interleaved, self.strips)
        self.strips = filter(None, map(_Upsample(*layer.resample), self.strips))
        self.height *= 2

    def convolve(
        self, layer: Any, before: Pointwise = _as_it_is, kernel_size: tuple[int, int, int] = (3, 3, 3)
    ) -> None:
        _require_causal(layer, kernel_size)
        convolution = _Convolution(layer, before, self.feat_cache, self.feat_idx[0], self.height)
        self.strips = filter(None, map(convolution, self.strips))
        self.feat_idx[0] += 1


class _Border:
    """What is around new rows when they are convolved: those above, zeros beside the picture and beyond its edges."""

    def __init__(self, reach: int) -> None:
        self.reach = reach
        self.seen = self.above = torch.empty(0)

    def room(self, like: torch.Tensor, size: tuple[int, ...], *, is_last: bool) -> torch.Tensor:
        """Return where new rows of that size, (..., h, W), are to be written."""
        *outer, height, width = size
        above = self.above.shape[-2] if self.above.numel() else self.reach
        below = self.reach if is_last else 0
        self.seen = like.new_zeros(*outer, above + height + below, width + 2 * self.reach)
        if self.above.numel():
            self.seen[..., :above, :] = self.above
        return self.seen[..., above : above + height, self.reach : self.reach + width]

    def close(self) -> torch.Tensor | None:
        """Return all that is to be convolved, where it is enough for a row, and keep what is needed once more."""
        seen, again = self.seen, 2 * self.reach
        self.seen = torch.empty(0)
        self.above = seen[..., seen.shape[-2] - again :, :].clone()
        return seen if seen.shape[-2] > again else None


class _Convolution:
    """A causal convolution in time and space; what it is shown of a frame is kept for the next part in its place."""

    def __init__(self, layer: Any, before: Pointwise, cache: list[Any], place: int, height: int) -> None:
        self.layer, self.before = layer, before
        self.cache, self.place, self.height = cache, place, height
        self.border = _Border(layer.kernel_size[1] // 2)
        self.top = 0

    def __call__(self, strip: Strip) -> Strip | None:
        seen = self._seen(strip)
        if seen is None:
            return None
        return Strip(functional.conv3d(seen, self.layer.weight, self.layer.bias), strip.is_last)

    def _seen(self, strip: Strip) -> torch.Tensor | None:
        rows = self.before(strip.rows)
        b, c, t, h, w = rows.shape
        past = self._past(rows)[:, :, :, self.top : self.top + h]
        self.top += h
        room = self.border.room(rows, (b, c, PAST + t, h, w), is_last=strip.is_last)
        room[:, :, :PAST] = past
        room[:, :, PAST:] = rows
        past.copy_(room[:, :, -PAST:])  # which this part has no more need of
        return self.border.close()

    def _past(self, rows: torch.Tensor) -> torch.Tensor:
        if self.cache[self.place] is None:
            b, c, _, _, w = rows.shape
            self.cache[self.place] = rows.new_zeros(b, c, PAST, self.height, w)
        past: torch.Tensor = self.cache[self.place]
        return past


class _Upsample:
    """Each pixel four times, and a convolution in space."""

    def __init__(self, upsample: Any, layer: Any) -> None:
        _require(upsample, type(upsample) is WanUpsample and upsample.mode == "nearest-exact")
        _require(upsample, upsample.scale_factor == (2.0, 2.0))
        _require(layer, type(layer) is nn.Conv2d and layer.kernel_size == (3, 3) and layer.padding == (1, 1))
        _require(layer, _is_plain(layer))
        self.layer = layer
        self.border = _Border(1)

    def __call__(self, strip: Strip) -> Strip | None:
        b, c, t, h, w = strip.rows.shape
        room = self.border.room(strip.rows, (b * t, c, 2 * h, 2 * w), is_last=strip.is_last)
        fourfold = room.unflatten(-1, (w, 2)).unflatten(-3, (h, 2)).unflatten(0, (b, t))
        fourfold.copy_(strip.rows.transpose(1, 2)[..., :, None, :, None])
        seen = self.border.close()
        if seen is None:
            return None
        made = functional.conv2d(seen, self.layer.weight, self.layer.bias)
        return Strip(made.unflatten(0, (b, t)).transpose(1, 2), strip.is_last)


class _Shortcut:
    """What goes past some layers, and is added to what comes out of them: a few rows later."""

    def __init__(self, made: Pointwise, times: int = 1) -> None:
        """Have `made` of the rows so many times as many."""
        self.made, self.times = made, times
        self.kept: list[torch.Tensor] = []
        self.used = 0
        """Rows made of the first that is kept which are added already."""

    def keep(self, strip: Strip) -> Strip:
        self.kept.append(strip.rows)
        return strip

    def add(self, strip: Strip) -> Strip:
        kept = torch.cat(self.kept, dim=3)
        until = self.used + strip.rows.shape[3]
        made = self.made(kept[:, :, :, : -(-until // self.times)])[:, :, :, self.used : until]
        done, self.used = divmod(until, self.times)
        self.kept = [kept[:, :, :, done:].clone()]
        return Strip(strip.rows.add_(made), strip.is_last)


def _pieces(strips: Iterable[Strip], rows: int, ask: Callable[[], None]) -> Iterator[Strip]:
    """Yield the same rows, no more than so many at once."""
    for strip in strips:
        pieces, is_last = list(strip.rows.split(rows, dim=3)), strip.is_last
        del strip  # nothing is held here of what layers work on
        while pieces:
            ask()
            yield Strip(pieces.pop(0), is_last and not pieces)


def _interleaved(strip: Strip) -> Strip:
    """Return the two frames that lie in the channels of each one after the other."""
    both = strip.rows.unflatten(1, (2, -1))
    return Strip(both.permute(0, 2, 3, 1, 4, 5).flatten(2, 3), strip.is_last)


def _activated(norm: Any, nonlinearity: Any) -> Pointwise:
    _require(norm, type(norm) in (WanRMS_norm, Norm) and norm.channel_first)
    _require(nonlinearity, type(nonlinearity) is nn.SiLU)
    return lambda x: nonlinearity(norm(x))


def _require_causal(layer: Any, kernel_size: tuple[int, int, int]) -> None:
    time, high, wide = (size // 2 for size in kernel_size)
    _require(layer, type(layer) in (WanCausalConv3d, Convolution) and layer.kernel_size == kernel_size)
    _require(layer, layer._padding == (wide, wide, high, high, 2 * time, 0))  # noqa: SLF001 - it has no other name
    _require(layer, _is_plain(layer))


def _is_plain(layer: Any) -> bool:
    return set(layer.stride) == set(layer.dilation) == {layer.groups} == {1} and layer.padding_mode == "zeros"


def _require(part: Any, is_known: bool) -> None:  # noqa: FBT001 - what is required
    if not is_known:
        name = type(part).__name__
        raise UnknownLayer(
            f"{name}: of another kind than Wan's, and cannot be decoded in strips. Use vae_tiling on or off."
        )
