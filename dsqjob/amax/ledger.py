"""The ledger: what calibration measured of each projection, by DeepSeek-native name. Needs no torch.

A safetensors file of columns: ``names`` (U8, joined by newlines), ``input_amax`` and ``weight_amax`` (F32 [N]; 0 is
"none"), ``tokens`` (I64 [N]; -1 is "not counted"). Its metadata says where the figures come from.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dsqjob.checkpoint.header import Header, TensorSpec, encode, read_header
from dsqjob.engine.publish import publish_bytes
from dsqjob.engine.workspace import unique_token
from dsqjob.errors import DataError

LEDGER = "amax-ledger.safetensors"
_FORMAT = "dsqjob amax ledger 1"
_COLUMNS = {"input_amax": ("F32", "<f4"), "weight_amax": ("F32", "<f4"), "tokens": ("I64", "<i8")}


class Row(NamedTuple):
    """One projection: largest input and weight magnitudes, None where nothing was measured; tokens seen, None where
    they were not counted."""

    input_amax: float | None
    weight_amax: float | None
    tokens: int | None = None


@dataclass(frozen=True)
class Ledger:
    """Rows by projection path, such as ``layers.7.ffn.experts.12.w1``."""

    rows: Mapping[str, Row]
    about: Mapping[str, str] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Publish the ledger; the same rows give the same bytes."""
        names = sorted(self.rows)
        rows = [self.rows[name] for name in names]
        text = "\n".join(names).encode()
        columns = {
            "input_amax": [row.input_amax or 0.0 for row in rows],
            "weight_amax": [row.weight_amax or 0.0 for row in rows],
            "tokens": [-1 if row.tokens is None else row.tokens for row in rows],
        }
        order = ("tokens", "input_amax", "weight_amax")
        specs = [TensorSpec(name, _COLUMNS[name][0], (len(rows),)) for name in order]
        head = encode([*specs, TensorSpec("names", "U8", (len(text),))], {**self.about, "format": _FORMAT})
        body = b"".join(np.array(columns[name], _COLUMNS[name][1]).tobytes() for name in order)
        path.parent.mkdir(parents=True, exist_ok=True)
        publish_bytes(path, head + body + text, unique_token())


def load_ledger(path: Path) -> Ledger:
    """DataError ``ledger-invalid`` where the file is no ledger, ``amax-value`` where a value cannot be."""
    header = read_header(path)
    data = path.read_bytes()
    metadata = dict(header.metadata or {})
    if metadata.pop("format", None) != _FORMAT or not {"names", *_COLUMNS} <= header.tensors.keys():
        raise _invalid(path, f"it is not in the format {_FORMAT!r}")

    names = data[header.offset("names") :][: header.tensors["names"].nbytes].decode().split("\n")
    inputs, weights, tokens = (_column(data, header, path, name, len(names)) for name in _COLUMNS)
    rows = {}
    for name, x, w, n in zip(names, inputs.tolist(), weights.tolist(), tokens.tolist(), strict=True):
        for column, value in (("input_amax", x), ("weight_amax", w)):
            if not math.isfinite(value) or value < 0:
                raise amax_value(path, f"{name}: {column}", value)
        rows[name] = Row(x or None, w or None, None if n < 0 else n)
    if len(rows) != len(names):
        raise _invalid(path, "a name stands twice")
    return Ledger(rows, metadata)


def _column(data: bytes, header: Header, path: Path, name: str, count: int) -> np.ndarray:
    dtype, kind = _COLUMNS[name]
    entry = header.tensors[name]
    if entry.dtype != dtype or entry.shape != (count,):
        raise _invalid(path, f"{name} is {entry.dtype} {list(entry.shape)}, not {dtype} [{count}]")
    return np.frombuffer(data, kind, count, header.offset(name))


def _invalid(path: Path, what: str) -> DataError:
    return DataError("ledger-invalid", f"the amax ledger cannot be read: {what}", where=path, way_out="calibrate again")


def amax_value(path: Path, key: str, value: float) -> DataError:
    """An amax that is NaN, infinite, negative or (where it must not be) zero."""
    return DataError(
        "amax-value",
        f"an amax must be finite and positive, this one is {value!r}",
        where=f"{path}: {key}",
        way_out="calibrate again with other data, and look at the layer that makes it",
    )


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
