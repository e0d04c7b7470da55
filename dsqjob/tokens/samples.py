"""JSON lines become texts, column by column as the reference's loader reads them."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from dsqjob.errors import DataError
from dsqjob.tokens.chat import ChatTemplate

_CHAT = ("messages", "conversations")
_JOINED = (("prompt", ("completion", "response", "output")), ("text", ()), ("input", ("output",)))
_COLUMNS = "messages, conversations, prompt, text or input"


class Sample(NamedTuple):
    """A text, the line it stands on (from 1), and where in the file that line ends, in bytes."""

    text: str
    number: int
    end: int


def read_samples(path: Path, limit: int | None, chat: ChatTemplate) -> Iterator[Sample]:
    """The first ``limit`` samples of a file of JSON lines, in its order; blank lines are none, empty texts
    count, a byte-order mark at its beginning is skipped.

    DataError ``jsonl-line`` (bad JSON, no text), ``jsonl-columns``; what ``ChatTemplate.render`` raises.
    """
    taken = end = 0
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            if taken == limit:
                return
            end += len(raw)
            line = raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw
            if not line.strip():
                continue
            taken += 1
            yield Sample(_text(_parse(line, path, number), path, number, chat), number, end)


def _parse(raw: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        value = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise _bad(path, number, f"no JSON in UTF-8: {error}") from None
    if not isinstance(value, dict):
        raise _bad(path, number, f"a line must be an object, not {type(value).__name__}")
    return value


def _text(sample: dict[str, Any], path: Path, number: int, chat: ChatTemplate) -> str:
    for column in _CHAT:
        if (messages := sample.get(column)) is not None:
            if not isinstance(messages, list):
                raise _bad(path, number, f"{column} must be a list of messages")
            return chat.render(messages, sample.get("tools"), f"{path}:{number}")
    for first, others in _JOINED:
        if sample.get(first) is not None:
            names = [first, *(name for name in others if sample.get(name) is not None)]
            return "\n".join(_string(sample[name], name, path, number) for name in names)
    raise DataError(
        "jsonl-columns",
        f"no column that a text can be made of; found: {', '.join(sample) or 'none'}",
        where=f"{path}:{number}",
        way_out=f"give every line one of {_COLUMNS}",
    )


def _string(value: Any, name: str, path: Path, number: int) -> str:
    if not isinstance(value, str):
        raise _bad(path, number, f"{name} must be text, not {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise _bad(path, number, f"{name} holds half a surrogate pair, which no tokenizer takes") from None
    return value


def _bad(path: Path, number: int, what: str) -> DataError:
    return DataError("jsonl-line", what, where=f"{path}:{number}", way_out="mend or remove this line")
