"""Samples of all sources become the rows of one array."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from dsqjob.errors import DataError
from dsqjob.tokens.samples import Sample
from dsqjob.tokens.tokenizer import ReleaseTokenizer

Ids = NDArray[np.int64]
_SLICE_TEXTS, _SLICE_LETTERS = 256, 1 << 20


@dataclass(frozen=True)
class Taken:
    """Where a sample comes from: its source, counted from 0, and its number there, from 1: the line of a file of
    lines, the row of a token file, the place in a data set's samples. ``tokens`` are those before cutting."""

    source: int
    number: int
    tokens: int

    def to_json(self) -> dict[str, int]:
        return asdict(self)


class Gathered:
    """Samples in order, of all sources."""

    def __init__(self, tokenizer: ReleaseTokenizer, length: int, *, packing: bool) -> None:
        self._tokenizer, self._length, self._packing = tokenizer, length, packing
        self.samples: list[Taken] = []
        self._pieces: list[Ids] = []
        self._left: list[bool] = []

    def texts(self, source: int, samples: Iterable[Sample], moved: Callable[[int], None]) -> dict[str, int]:
        """Add texts; ``moved(end)`` after each slice. How many were taken, and how many of them were empty: those
        leave no row, as with the reference."""
        taken = empty = 0
        for part in _slices(samples):
            full = [sample for sample in part if sample.text]
            for sample, ids in zip(full, self._tokenizer.encode([sample.text for sample in full]), strict=True):
                self.samples.append(Taken(source, sample.number, len(ids)))
                row = [*ids, self._tokenizer.eos_id] if self._packing else self._tokenizer.row(ids, self._length)
                self._pieces.append(np.array(row, np.int64))
                self._left.append(self._tokenizer.padding_side == "left")
            taken, empty = taken + len(part), empty + len(part) - len(full)
            moved(part[-1].end)
        return {"taken": taken, "empty": empty}

    def rows(self, source: int, ids: Ids) -> dict[str, int]:
        """Add rows of ids made before, int64 [N, S]."""
        self.samples += [Taken(source, number, ids.shape[1]) for number in range(1, len(ids) + 1)]
        self._pieces += list(ids)
        self._left += [False] * len(ids)
        return {"taken": len(ids), "empty": 0}

    def joined(self) -> Ids:
        """All rows, int64 [N, S]: padded to the longest, or packed. DataError ``tokens-empty`` where there is none."""
        if self._packing:
            stream = np.concatenate(self._pieces) if self._pieces else np.empty(0, np.int64)
            n = len(stream) // self._length
            ids = stream[: n * self._length].reshape(n, self._length)
        else:
            ids = self._padded()
        if not ids.size:
            short = f" for a full row of {self._length}" if self._packing and self._pieces else ""
            raise DataError(
                "tokens-empty",
                f"the calibration data has no tokens{short}",
                where="tokens.data",
                way_out="name a source that has text" + (", or lower tokens.sequence_length" if short else ""),
            )
        return ids

    def _padded(self) -> Ids:
        width = max((len(piece) for piece in self._pieces), default=0)
        pads = any(len(piece) < width for piece in self._pieces)
        ids = np.full((len(self._pieces), width), self._tokenizer.pad_id if pads else 0, np.int64)
        for row, piece, left in zip(ids, self._pieces, self._left, strict=True):
            start = width - len(piece) if left else 0
            row[start : start + len(piece)] = piece
        return ids

    def places(self, n: int) -> list[list[int]]:
        """Which samples, counted from 0, lie in each of ``n`` rows."""
        if not self._packing:
            return [[row] for row in range(n)]
        ends = list(accumulate(len(piece) for piece in self._pieces))
        found: list[list[int]] = [[] for _ in range(n)]
        for sample, end in enumerate(ends):
            begin = end - len(self._pieces[sample])
            for row in range(begin // self._length, min(n, (end - 1) // self._length + 1)):
                found[row].append(sample)
        return found


def _slices(samples: Iterable[Sample]) -> Iterator[list[Sample]]:
    """A few hundred texts at a time, fewer of long ones."""
    part: list[Sample] = []
    letters = 0
    for sample in samples:
        part.append(sample)
        letters += len(sample.text)
        if len(part) == _SLICE_TEXTS or letters > _SLICE_LETTERS:
            yield part
            part, letters = [], 0
    if part:
        yield part


def refuse_outside(ids: Ids, vocabulary: int, place: Callable[[int], str]) -> None:
    """DataError ``token-id`` for an id of int64 [N, S] that the model has no embedding for; ``place(row)`` says
    where a row comes from."""
    outside = (ids < 0) | (ids >= vocabulary)
    if not outside.any():
        return
    row, column = np.unravel_index(int(outside.argmax()), ids.shape)
    raise DataError(
        "token-id",
        f"the id {ids[row, column]} at position {column} is outside the model's vocabulary of {vocabulary}",
        where=place(int(row)),
        way_out="make the tokens with the tokenizer of this release",
    )
