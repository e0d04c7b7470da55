"""What a routed-expert projection becomes: tensor scales over a group, and its rows piece by piece."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dsqjob.dataplan.plan import Cast, Mxfp4, Region, Requantize, take_rows
from dsqjob.dataplan.sources import Sources
from dsqjob.errors import DataError
from dsqjob.formats import cast, mxfp4, nvfp4, requantize

COMPUTE_BYTES = 1 << 20
"""Pieces that pass through loops: small enough for the cache, and for the allocator to give the same memory again."""
_BLOCK_BYTES = 16
"""Nibble bytes of one MXFP4 block of 32 elements."""


class TensorScales:
    """``weight_scale_2`` of groups of projections, each read once."""

    def __init__(self, sources: Sources) -> None:
        self._sources = sources
        self._exponents: dict[str, int | None] = {}
        self._amax: dict[str, float] = {}

    def of(self, op: Cast | Requantize) -> np.float32:
        """``weight_scale_2`` (FP32) of the operation."""
        if isinstance(op, Cast):
            return cast.cast_tensor_scale(self.exponent(op.sharing))
        with self._sources.blaming(op.source.weight):
            return nvfp4.weight_scale_2(self.amax(op))

    def amax(self, op: Requantize) -> float:
        """The plan's amax, or the largest magnitude of all sharing projections."""
        return op.amax if op.amax is not None else max(self.largest(source) for source in op.sharing)

    def exponent(self, sharing: tuple[Mxfp4, ...]) -> int | None:
        """Largest block exponent of all projections, None where every scale byte is 0."""
        found = [k for source in sharing if (k := self._exponent(source)) is not None]
        return max(found, default=None)

    def _exponent(self, source: Mxfp4) -> int | None:
        if source.path not in self._exponents:
            found = []
            for _, piece in self._sources.chunks(source.scale, COMPUTE_BYTES):
                with self._sources.blaming(source.scale):
                    found.append(mxfp4.max_exponent(self._sources.read(piece)))
            self._exponents[source.path] = max((k for k in found if k is not None), default=None)
        return self._exponents[source.path]

    def largest(self, source: Mxfp4) -> float:
        """Largest magnitude of one projection."""
        if source.path not in self._amax:
            largest = 0.0
            for row, piece in self._sources.chunks(source.weight, COMPUTE_BYTES):
                scales = self._sources.read(take_rows(source.scale, row, row + piece.rows))
                with self._sources.blaming(source.scale):
                    mxfp4.check_scales(scales)
                with self._sources.blaming(source.weight):
                    largest = max(largest, requantize.largest(self._sources.read(piece), scales))
            self._amax[source.path] = largest
        return self._amax[source.path]


class CastPart(NamedTuple):
    """Rows of a cast projection: block scales [rows, in/16], (byte offset, 16 nibble bytes) to put right, counts."""

    scales: NDArray[np.uint8]
    patches: Iterator[tuple[int, bytes]]
    blocks: int
    lossless: int


class CastProjection:
    """One projection under the cast with the group's exponent."""

    def __init__(self, source: Mxfp4, exponent: int | None, sources: Sources) -> None:
        self._source, self._exponent, self._sources = source, exponent, sources

    def part(self, row: int, scale: Region) -> CastPart:
        """The part whose E8M0 bytes are ``scale``, which begins at ``row``."""
        e8m0 = self._sources.read(scale)
        k_max = 0 if self._exponent is None else self._exponent
        scales = cast.cast_scales(e8m0, k_max)
        outside = cast.out_of_range(e8m0, k_max)
        if not len(outside):
            return CastPart(scales, iter(()), e8m0.size, e8m0.size)
        weight = self._source.weight
        starts = (row + outside[:, 0]) * weight.width + outside[:, 1] * _BLOCK_BYTES
        nibbles = np.empty((len(outside), _BLOCK_BYTES), np.uint8)
        for number, start in enumerate(starts):
            block = Region(weight.file, weight.tensor, weight.offset + int(start), 1, _BLOCK_BYTES, _BLOCK_BYTES)
            self._sources.read_into(block, nibbles[number : number + 1])
        new, survived = cast.cast_blocks(nibbles, e8m0[outside[:, 0], outside[:, 1]], k_max)
        changed = (new != nibbles).any(axis=1)
        patches = ((int(starts[n]), new[n].tobytes()) for n in np.flatnonzero(changed))
        return CastPart(scales, patches, e8m0.size, e8m0.size - int((~survived).sum()))


class RequantizedProjection:
    """One projection requantized by its amax."""

    def __init__(self, source: Mxfp4, amax: float, sources: Sources) -> None:
        self._source, self._sources = source, sources
        present = np.zeros(256, np.bool_)
        with sources.blaming(source.scale):
            for _, piece in sources.chunks(source.scale, COMPUTE_BYTES):
                present |= requantize.bytes_present(sources.read(piece))
        with sources.blaming(source.weight):
            self._tables = requantize.tables(amax, present)

    def part(self, row: int, weight: Region) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Nibbles [rows, in/2] and block scales [rows, in/16] of the rows whose bytes are ``weight``."""
        packed = self._sources.read(weight)
        e8m0 = self._sources.read(take_rows(self._source.scale, row, row + weight.rows))
        nibbles = np.empty_like(packed)
        scales = np.empty((weight.rows, weight.width // 8), np.uint8)
        saturated = requantize.requantize(packed, e8m0, self._tables, nibbles, scales)
        if saturated:
            raise DataError(
                "amax-too-small",
                "the weight is larger than its recorded amax: its scales would saturate",
                where=self._sources.place(weight),
                way_out="the amax belong to another release; calibrate this one",
            )
        return nibbles, scales
