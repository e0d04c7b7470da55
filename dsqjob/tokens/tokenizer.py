"""The release's tokenizer, as transformers' AutoTokenizer (5 and later) would use it, on the tokenizers library alone.

It reads special tokens, padding and truncation sides from ``tokenizer_config.json``. What is put before and after a
text is the matter of ``tokenizer.json``'s post-processor alone: AutoTokenizer drops ``add_bos_token`` and
``add_eos_token`` of the configuration where there is a ``tokenizer.json``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from dsqjob.checkpoint.release import read_json
from dsqjob.errors import DataError, UsageError
from dsqjob.tokens.chat import CHAT_TEMPLATE, ChatTemplate, template_sources

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def tokenizer_digest(folder: Path) -> str:
    """SHA-256 over the release's tokenizer files. DataError ``tokenizer-missing``."""
    digest = hashlib.sha256()
    for name in (TOKENIZER, TOKENIZER_CONFIG, CHAT_TEMPLATE):
        path = folder / name
        if path.is_file():
            digest.update(f"{name}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
        elif name != CHAT_TEMPLATE:
            raise DataError(
                "tokenizer-missing", f"{name} is missing", where=path, way_out="download the release's tokenizer files"
            )
    return digest.hexdigest()


def release_chat(folder: Path) -> ChatTemplate:
    """The release's chat template, or one that refuses every message. DataError ``tokenizer-missing``,
    ``json-invalid``."""
    config, _ = read_json(folder / TOKENIZER_CONFIG, "tokenizer-missing")
    return ChatTemplate(template_sources(folder, config), special_tokens(config), folder)


def special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Name -> text of the special tokens that a tokenizer configuration sets."""
    found = {name: config.get(name) for name in _SPECIAL}
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in found.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


class ReleaseTokenizer:
    """Texts to ids. DataError ``tokenizer-missing``, ``tokenizer-invalid``, ``json-invalid``."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / TOKENIZER
        config, _ = read_json(folder / TOKENIZER_CONFIG, "tokenizer-missing")
        self._special = special_tokens(config)
        self.padding_side = str(config.get("padding_side", "right"))
        self._cuts_left = config.get("truncation_side") == "left"
        self.digest = tokenizer_digest(folder)
        try:
            self._tokenizer = Tokenizer.from_str(self._path.read_text(encoding="utf-8"))
        except Exception as error:  # the library raises bare Exceptions
            raise self._invalid(f"the tokenizers library refuses it: {error}") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, nothing added and nothing cut."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def row(self, ids: list[int], length: int) -> list[int]:
        """At most ``length`` ids: what the post-processor puts around a text stays, the text is cut."""
        before, after = self.around
        room = length - len(before) - len(after)
        if room < 1:
            raise UsageError(
                "sequence-too-short",
                f"the tokenizer adds {len(before) + len(after)} tokens, so {length} leave no room for text",
                where="tokens.sequence_length",
                way_out="raise it",
            )
        cut = ids[-room:] if self._cuts_left else ids[:room]
        return [*before, *cut, *after]

    @cached_property
    def around(self) -> tuple[list[int], list[int]]:
        """What the post-processor puts before and after every text."""
        plain = self._tokenizer.encode("a", add_special_tokens=False).ids
        full = self._tokenizer.encode("a").ids
        for at in range(len(full) - len(plain) + 1):
            if full[at : at + len(plain)] == plain:
                return full[:at], full[at + len(plain) :]
        raise self._invalid("its post-processor changes the text's own tokens")

    @cached_property
    def eos_id(self) -> int:
        return self._id("eos_token")

    @cached_property
    def pad_id(self) -> int:
        """The pad token, or EOS where there is none."""
        return self._id("pad_token" if "pad_token" in self._special else "eos_token")

    def _id(self, name: str) -> int:
        text = self._special.get(name)
        found = self._tokenizer.token_to_id(text) if text is not None else None
        if found is None:
            raise self._invalid(f"{name} is {text!r}, which {TOKENIZER} does not know")
        return int(found)

    def _invalid(self, what: str) -> DataError:
        return DataError(
            "tokenizer-invalid", what, where=self._path, way_out="download the release's tokenizer files again"
        )
