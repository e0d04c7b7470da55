"""A small byte-level BPE tokenizer, as ``tokenizer.json`` of the tokenizers library."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

BOS, EOS = "<|begin|>", "<|end|>"
_TEXT = """
A release is the checkpoint as it was published. A shard is one file of it. The routed experts are small matrices, and
each token visits a few of them. Calibration runs text through the model and keeps the largest magnitude that every
expert has seen. The export then writes the same weights with finer scales, so that a server can multiply them in four
bits. When the job is stopped in the middle of the night, the same command in the morning continues where it was: what
is done stays done, what was half done is done again, and the bytes at the end are the same as if nothing had happened.
"""


def _byte_letters() -> dict[int, str]:
    """The printable letter that byte-level BPE writes for each byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + n) for n, byte in enumerate(others)}


def tokenizer_files(vocabulary: int) -> dict[str, Any]:
    """``tokenizer.json`` and ``tokenizer_config.json`` with exactly ``vocabulary`` ids (at least 258): begin 0, end 1,
    then bytes, then merges learned from a paragraph. Padding on the right with the end token; no begin token added."""
    letters = _byte_letters()
    vocab = {BOS: 0, EOS: 1} | {letter: n + 2 for n, letter in enumerate(sorted(letters.values()))}
    words = [
        [letters[byte] for byte in word.encode()] for word in _TEXT.replace("\n", " ").replace(" ", "\n ").split("\n")
    ]
    merges: list[tuple[str, str]] = []
    while len(vocab) < vocabulary:
        pair = _most_common(words, vocab)
        merges.append(pair)
        vocab[pair[0] + pair[1]] = len(vocab)
        words = [_merge(word, pair) for word in words]
    special = [
        {
            "id": n,
            "content": text,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for n, text in enumerate((BOS, EOS))
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = {"type": "BPE", "vocab": vocab, "merges": [list(pair) for pair in merges], "byte_fallback": False}
    return {
        "tokenizer.json": {
            "version": "1.0",
            "added_tokens": special,
            "pre_tokenizer": byte_level,
            "decoder": byte_level,
            "model": {**model, "ignore_merges": False, "fuse_unk": False},
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BOS,
            "eos_token": EOS,
            "pad_token": EOS,
            "padding_side": "right",
            "add_bos_token": False,
            "add_eos_token": False,
            "model_max_length": 1048576,
        },
    }


def _most_common(words: list[list[str]], vocab: dict[str, int]) -> tuple[str, str]:
    pairs = Counter(pair for word in words for pair in pairwise(word))
    if not pairs:  # the paragraph is used up: join what was not joined yet
        names = [name for name in vocab if name not in (BOS, EOS)]
        return next((a, b) for a in names for b in names if a + b not in vocab)
    best = max(pairs.values())
    return min(pair for pair, count in pairs.items() if count == best)


def _merge(word: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for letter in word:
        if merged and (merged[-1], letter) == pair:
            merged[-1] += letter
        else:
            merged.append(letter)
    return merged
