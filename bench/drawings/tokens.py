"""Tokenizers for the words of bench/drawings/world.py: one token a word in CLIP's, and in T5's."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tokenizers import pre_tokenizers
from torch import Tensor
from transformers import CLIPTokenizer, T5TokenizerFast

from bench.drawings.world import CAPTION_WORDS, MARKS, PIECES, WORDS, packed

CLIP_TOKENS_MAX = 77
T5_TOKENS = 32
"""Of a prompt, end and padding included."""
CLIP_TOKENS = CAPTION_WORDS + 2
"""In training. CLIP reads forward, so that the padding up to 77 changes nothing."""
MULTIPLE = 64
"""A vocabulary is rounded up to it, so that every matrix suits the quantisers."""


def clip_tokenizer() -> CLIPTokenizer:
    """Return a byte-pair tokenizer whose merges make every word one token."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = _merges(WORDS)
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges)]
    vocab = {piece: place for place, piece in enumerate(dict.fromkeys(pieces))}
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocab[special] = len(vocab)
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=CLIP_TOKENS_MAX)


def _merges(words: Sequence[str]) -> list[tuple[str, str]]:
    """Return the pairs to join, the most frequent first (Sennrich et al. 2016), until each word is whole.

    Of pairs that are as frequent the first in the alphabet: the trainer of `tokenizers` takes any of them.
    """
    split = [[*word[:-1], f"{word[-1]}</w>"] for word in words]
    merges: list[tuple[str, str]] = []
    while pairs := Counter(pair for parts in split for pair in itertools.pairwise(parts)):
        most = max(pairs.values())
        merges.append(min(pair for pair, count in pairs.items() if count == most))
        split = [_joined(parts, merges[-1]) for parts in split]
    return merges


def _joined(parts: list[str], pair: tuple[str, str]) -> list[str]:
    joined: list[str] = []
    for part in parts:
        if joined and (joined[-1], part) == pair:
            joined[-1] += part
        else:
            joined.append(part)
    return joined


def t5_tokenizer() -> T5TokenizerFast:
    """Return a tokenizer of whole words in small letters; any other word is the unknown token."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -10.0)]
    words = [("▁", -3.0), *((f"▁{word}", -2.0) for word in WORDS), *((mark, -2.0) for mark in MARKS)]
    return T5TokenizerFast(vocab=[*special, *words], extra_ids=0, model_max_length=512)


def rounded_up(size: int) -> int:
    """Return how many rows an embedding of so many tokens has."""
    return -(-size // MULTIPLE) * MULTIPLE


@dataclass(frozen=True)
class TokenTables:
    """The token of each piece, in both tokenizers."""

    t5: Tensor
    """(pieces,)."""
    clip: Tensor
    clip_begin: int
    clip_end: int

    @classmethod
    def of(cls, device: str, clip: CLIPTokenizer | None = None, t5: T5TokenizerFast | None = None) -> TokenTables:
        """Return the tables, read off the tokenizers themselves: those above, where no others are given."""
        clip, t5 = clip or clip_tokenizer(), t5 or t5_tokenizer()
        t5_row, clip_row = [0], [0]
        for piece in PIECES[1:]:
            # A mark has no space before it: it is read after a word.
            in_text = piece if piece not in MARKS else f"a{piece}"
            t5_row.append(t5(in_text).input_ids[-2])
            clip_tokens = clip(piece).input_ids
            if len(clip_tokens) != 3:
                raise AssertionError(f"{piece!r} is not one token of CLIP's but {len(clip_tokens) - 2}")
            clip_row.append(clip_tokens[1])
        t5_table, clip_table = (torch.tensor(row, device=device) for row in (t5_row, clip_row))
        return cls(t5_table, clip_table, clip.bos_token_id, clip.eos_token_id)

    def for_t5(self, captions: Tensor, length: int = T5_TOKENS) -> Tensor:
        """Return (B, length): words, the end (1), padding (0), as T5's tokenizer gives them."""
        row = torch.cat([self.t5[captions], captions.new_zeros(len(captions), length - captions.shape[1])], 1)
        return packed(row).scatter(1, (row > 0).sum(1, keepdim=True), 1)

    def for_clip(self, captions: Tensor) -> Tensor:
        """Return (B, CLIP_TOKENS): the beginning, words, and the end again and again, which is CLIP's padding."""
        begin = captions.new_full((len(captions), 1), self.clip_begin)
        end = captions.new_full((len(captions), 1), self.clip_end)
        words = torch.where(captions > 0, self.clip[captions], self.clip_end)
        return torch.cat([begin, words, end], 1)
