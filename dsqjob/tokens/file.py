"""The token file: safetensors with ``input_ids`` int64 [N, S]."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dsqjob.checkpoint.header import TensorSpec, encode, read_header
from dsqjob.engine.publish import publishing, write_all
from dsqjob.errors import DataError

TOKENS = "tokens.safetensors"
INPUT_IDS = "input_ids"
_WIDTHS = {"I64": "<i8", "I32": "<i4"}


class TokenIds(NamedTuple):
    """Ids int64 [N, S], and a digest of shape and values that does not depend on how the file is laid out."""

    ids: NDArray[np.int64]
    digest: str


def load_tokens(path: Path) -> TokenIds:
    """The file that the tokens stage publishes. DataError ``tokens-invalid`` where it is no ``input_ids`` I64 [N, S],
    ``tokens-empty``, and what ``read_header`` raises."""
    ids = read_rows(path, ("I64",))
    return TokenIds(ids, ids_digest(ids))


def read_rows(path: Path, dtypes: tuple[str, ...] = ("I64", "I32")) -> NDArray[np.int64]:
    """``input_ids`` [N, S] of one of these dtypes, widened to int64. DataError ``tokens-invalid``, ``tokens-empty``,
    and what ``read_header`` raises."""
    header = read_header(path)
    entry = header.tensors.get(INPUT_IDS)
    if entry is None:
        raise _invalid(path, f"there is no tensor {INPUT_IDS}; found: {', '.join(header.tensors) or 'none'}")
    if entry.dtype not in dtypes or len(entry.shape) != 2:
        raise _invalid(path, f"{INPUT_IDS} is {entry.dtype} {list(entry.shape)}, not {' or '.join(dtypes)} [N, S]")
    if 0 in entry.shape:
        raise DataError(
            "tokens-empty", f"{INPUT_IDS} is {list(entry.shape)}: no token at all", where=path, way_out="make it again"
        )
    values = np.fromfile(path, _WIDTHS[entry.dtype], entry.shape[0] * entry.shape[1], offset=header.offset(INPUT_IDS))
    return values.reshape(entry.shape).astype(np.int64, copy=False)


def _invalid(path: Path, what: str) -> DataError:
    way_out = f"write token ids as a safetensors file with one tensor {INPUT_IDS}, int64 [samples, length]"
    return DataError("tokens-invalid", what, where=path, way_out=way_out)


def ids_digest(ids: NDArray[np.int64]) -> str:
    """SHA-256 of shape and values of int64 [N, S]."""
    digest = hashlib.sha256(repr(ids.shape).encode())
    digest.update(_body(ids))
    return digest.hexdigest()


def _body(ids: NDArray[np.int64]) -> memoryview:
    return np.ascontiguousarray(ids, "<i8").data.cast("B")


def publish_tokens(path: Path, ids: NDArray[np.int64], token: str) -> tuple[int, str]:
    """Publish int64 [N, S] under its final name, whole or not at all; the file's size in bytes, and its SHA-256."""
    head = encode([TensorSpec(INPUT_IDS, "I64", ids.shape)])
    body = _body(ids)
    with publishing(path, token) as fd:
        write_all(fd, head, 0)
        write_all(fd, body, len(head))
    digest = hashlib.sha256(head)
    digest.update(body)
    return len(head) + len(body), digest.hexdigest()
