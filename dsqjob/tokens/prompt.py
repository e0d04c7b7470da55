"""One text to token ids and back, with the release's own tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dsqjob.errors import DataError, UsageError

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def encode_prompt(release: Path, text: str) -> list[int]:
    """Token ids of ``text``, at least one.

    DataError ``tokenizer-missing``; UsageError ``prompt-empty``, ``prompt-text``.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UsageError(
            "prompt-text", "the prompt is not text", where="calibrate.generate", way_out="write it in UTF-8"
        ) from None
    ids: list[int] = _tokenizer(release).encode(text).ids
    if not ids:
        raise UsageError("prompt-empty", "the prompt has no token", where="calibrate.generate", way_out="write a word")
    return ids


def decode_ids(release: Path, ids: Sequence[int]) -> str:
    """Text of token ids, special tokens included."""
    return str(_tokenizer(release).decode(list(ids), skip_special_tokens=False))


def _tokenizer(release: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    path = release / "tokenizer.json"
    if not path.is_file():
        raise DataError(
            "tokenizer-missing", "the release has no tokenizer.json", where=path, way_out="download this file again"
        )
    return Tokenizer.from_file(str(path))
