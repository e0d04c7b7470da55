"""What a rank has measured, published after every batch; resuming goes back to the newest batch that all ranks have.

A max calibration's state is a running maximum at a cursor, and replaying a batch is harmless. So that counts stay true
as well, a rank keeps the snapshot before its last batch, too: ranks are never further apart than one batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dsqjob.calibration.coverage import History
from dsqjob.checkpoint.header import Header, TensorSpec, encode, read_header
from dsqjob.engine.publish import publish_bytes
from dsqjob.errors import DataError

_FORMAT = "dsqjob calibration state 2"
_DTYPES = {"F32": "<f4", "I64": "<i8", "I32": "<i4"}


@dataclass(frozen=True)
class Snapshot:
    """After ``cursor`` batches: maxima FP32 [layers, experts, kinds] (0: none) and tokens int64 [layers, experts] of
    this rank's routed experts; int32 [cursor, layers] of projections whose maximum grew, and of experts reached."""

    cursor: int
    input_amax: NDArray[np.float32]
    tokens: NDArray[np.int64]
    grown: NDArray[np.int32]
    reached: NDArray[np.int32]

    def after(self, input_amax: NDArray[np.float32], tokens: NDArray[np.int64]) -> Snapshot:
        """The next one, when a batch led to these maxima and counts."""
        grown = (input_amax > self.input_amax).sum(axis=(1, 2), dtype=np.int32)
        reached = (tokens > 0).sum(axis=1, dtype=np.int32)
        return Snapshot(
            self.cursor + 1,
            input_amax,
            tokens,
            np.concatenate([self.grown, grown[None]]),
            np.concatenate([self.reached, reached[None]]),
        )


def empty_snapshot(layers: int, experts: int, kinds: int) -> Snapshot:
    """Before the first batch."""
    none = np.zeros((0, layers), np.int32)
    return Snapshot(
        0, np.zeros((layers, experts, kinds), np.float32), np.zeros((layers, experts), np.int64), none, none.copy()
    )


def history_of(snapshots: Sequence[Snapshot], batch_tokens: Sequence[int]) -> History:
    """Coverage and growth over all ranks, whose experts follow each other."""
    return History(
        np.concatenate([one.tokens for one in snapshots], axis=1),
        np.sum([one.grown for one in snapshots], axis=0, dtype=np.int32),
        np.sum([one.reached for one in snapshots], axis=0, dtype=np.int32),
        np.array(batch_tokens, np.int64),
    )


class Loaded(NamedTuple):
    """Snapshots by cursor; where there are none, ``unusable`` says why a file is of no use: damaged, or of something
    else."""

    snapshots: dict[int, Snapshot]
    unusable: str


@dataclass(frozen=True)
class RankState:
    """The file of one rank: its newest snapshot and the one before."""

    path: Path
    about: Mapping[str, str]
    """What the state belongs to: the stage's fingerprint, the driver, the rank; for who adds to it, what computes."""

    def save(self, now: Snapshot, before: Snapshot, token: str) -> None:
        """Publish both; ``token`` marks the partial."""
        arrays = {f"now.{name}": array for name, array in _arrays(now).items()}
        arrays |= {f"before.{name}": array for name, array in _arrays(before).items() if name in _SHORT}
        dtypes = {kind: name for name, kind in _DTYPES.items()}
        ordered = sorted(arrays.items(), key=lambda pair: (-pair[1].itemsize, pair[0]))
        specs = [TensorSpec(name, dtypes[array.dtype.str], array.shape) for name, array in ordered]
        body = b"".join(array.tobytes() for _, array in ordered)
        cursors = {"cursor": str(now.cursor), "before": str(before.cursor)}
        facts = {**self.about, **cursors, "format": _FORMAT, "sha256": hashlib.sha256(body).hexdigest()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        publish_bytes(self.path, encode(specs, facts) + body, token)

    def load(self) -> Loaded:
        """What can be used of the file; nothing where it is missing."""
        if not self.path.exists():
            return Loaded({}, "")
        try:
            header, data = read_header(self.path), self.path.read_bytes()
        except DataError as error:
            return Loaded({}, error.what)
        metadata = dict(header.metadata or {})
        if why := self._unusable(metadata, data[header.data_start :]):
            return Loaded({}, why)
        now = {name: _array(header, data, f"now.{name}") for name in (*_SHORT, *_LONG)}
        found = Snapshot(int(metadata["cursor"]), **now)
        before = {name: _array(header, data, f"before.{name}") for name in _SHORT}
        cursor = int(metadata["before"])
        earlier = Snapshot(cursor, **before, **{name: now[name][:cursor] for name in _LONG})
        return Loaded({cursor: earlier, found.cursor: found}, "")

    def _unusable(self, metadata: Mapping[str, str], body: bytes) -> str:
        wanted = {"format": _FORMAT, **self.about}
        pairs = [(key, metadata.get(key), value) for key, value in wanted.items()]
        if other := [f"{key} was {found}, is {value}" for key, found, value in pairs if found != value]:
            return "; ".join(other)
        same = hashlib.sha256(body).hexdigest() == metadata.get("sha256")
        return "" if same else "its bytes are not those that were written"


_SHORT = ("input_amax", "tokens")
_LONG = ("grown", "reached")


def _arrays(snapshot: Snapshot) -> dict[str, NDArray[np.generic]]:
    return {name: np.ascontiguousarray(getattr(snapshot, name)) for name in (*_SHORT, *_LONG)}


def _array(header: Header, data: bytes, name: str) -> Any:
    entry = header.tensors[name]
    count = entry.nbytes // np.dtype(_DTYPES[entry.dtype]).itemsize
    flat = np.frombuffer(data, _DTYPES[entry.dtype], count, header.offset(name))
    return flat.reshape(entry.shape).copy()
