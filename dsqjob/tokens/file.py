"""The token file: safetensors with ``input_ids`` int64 [N, S]."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dsqjob.checkpoint.header import read_header

TOKENS = "tokens.safetensors"


class TokenIds(NamedTuple):
    ids: NDArray[np.int64]
    digest: str


def load_tokens(path: Path) -> TokenIds:
    header = read_header(path)
    entry = header.tensors["input_ids"]
    data = path.read_bytes()
    ids = np.frombuffer(data, "<i8", entry.shape[0] * entry.shape[1], header.offset("input_ids")).reshape(entry.shape)
    return TokenIds(ids, hashlib.sha256(repr(ids.shape).encode() + ids.tobytes()).hexdigest())
