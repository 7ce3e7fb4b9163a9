"""Tokenizers made without any file from outside: CLIP's reads bytes, T5's reads the printable characters of ASCII."""

from __future__ import annotations

import string

from transformers import CLIPTokenizer, T5TokenizerFast

CLIP_TOKENS_MAX = 77
T5_TOKENS_MAX = 512
T5_VOCABULARY = 128
"""Rows of the embedding: the 98 tokens, rounded up to a multiple of 64."""


def clip_tokenizer() -> CLIPTokenizer:
    """Return a tokenizer of one token a byte; 514 tokens, the last two begin and end a text."""
    letters = _byte_letters()
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocab = {piece: place for place, piece in enumerate(pieces)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=CLIP_TOKENS_MAX)


def t5_tokenizer() -> T5TokenizerFast:
    """Return a tokenizer of one token a character; what is not ASCII becomes the unknown token."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -10.0)]
    characters = ["▁", *string.ascii_letters, *string.digits, *string.punctuation]
    # Every piece costs the same, so that Unigram has exactly one best way to cut a word.
    pieces = [*special, *((character, -1.0) for character in characters)]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=T5_TOKENS_MAX)


def _byte_letters() -> list[str]:
    """The 256 printable letters that stand for the bytes in a byte-level vocabulary (GPT-2's encoder.py)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + place) for place in range(len(others))]
