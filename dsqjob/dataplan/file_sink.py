"""The plan poured into a file: unchanged bytes move inside the kernel, the rest passes through bounded buffers."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dsqjob.dataplan.follower import Follower
from dsqjob.dataplan.plan import (
    Cast,
    Constant,
    Copy,
    FilePlan,
    Item,
    Layout,
    MultiplyOut,
    Region,
    Requantize,
)
from dsqjob.dataplan.projections import COMPUTE_BYTES, CastProjection, RequantizedProjection, TensorScales
from dsqjob.dataplan.sources import Sources
from dsqjob.engine.publish import publishing, write_all
from dsqjob.engine.stage import Context
from dsqjob.errors import BugError
from dsqjob.formats.fp8 import multiply_out
from dsqjob.formats.mxfp4 import check_scales

_MOVE = 64 << 20
_NOT_MOVABLE = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF, errno.ETXTBSY}
_BLOCK = 128


class Poured(NamedTuple):
    """A published file: bytes, SHA-256 where asked for, and the cast's counts of 32-element source blocks."""

    nbytes: int
    sha256: str | None
    blocks: int
    lossless: int


class _Move(NamedTuple):
    """Adjacent bytes of a source file that stay adjacent, and the items they serve."""

    region: Region
    to: int
    items: tuple[Item, ...]


def pour_file(plan: FilePlan, path: Path, sources: Sources, context: Context, *, checksum: bool) -> Poured:
    """Write ``plan`` under ``path``, atomically; memory stays within a few ``context.chunk_bytes``.

    Raises DataError naming file and tensor for values that cannot be quantized, and what ``Sources`` raises.
    """
    layout = plan.layout()
    with publishing(path, context.token) as fd:
        os.ftruncate(fd, layout.size)
        write_all(fd, layout.header, 0)
        with Follower(fd, checksum=checksum) as follower:
            sink = _FileSink(fd, layout, sources, context, follower)
            sink.pour(plan)
            follower.advance(layout.size)
            sha256 = follower.finish()
    return Poured(layout.size, sha256, sink.blocks, sink.lossless)


class _FileSink:
    def __init__(self, fd: int, layout: Layout, sources: Sources, context: Context, follower: Follower) -> None:
        self._fd, self._layout, self._sources, self._context, self._follower = fd, layout, sources, context, follower
        self._scales = TensorScales(sources)
        self._movable = True
        self.blocks = self.lossless = 0

    def pour(self, plan: FilePlan) -> None:
        self._write_tensor_scales(plan)
        ordered = sorted(plan.items, key=lambda item: self._layout.offsets[item.outputs[0].name])
        for step in self._steps(ordered):
            if isinstance(step, _Move):
                self._move(step.region, step.to)
                for item in step.items:
                    if isinstance(item.op, Cast):
                        self._finish_cast(item, item.op)
                end = step.to + step.region.nbytes
            else:
                end = self._compute(step)
            self._follower.advance(end)

    def _write_tensor_scales(self, plan: FilePlan) -> None:
        """First, since they lie before the bulk and everything else depends on them."""
        for item in plan.items:
            if isinstance(item.op, Cast | Requantize):
                scale = self._scales.of(item.op)
                write_all(self._fd, np.float32(scale).tobytes(), self._offset(item, 2))
                self._context.tick(0)

    def _steps(self, items: list[Item]) -> Iterator[_Move | Item]:
        """Moves, joined where source and target both go on, up to 64 MiB; other items as they are."""
        pending: _Move | None = None
        for item in items:
            region = _moved(item)
            to = self._offset(item, 0)
            if region is None:
                if pending is not None:
                    yield pending
                    pending = None
                yield item
            elif (
                pending is not None
                and pending.region.file == region.file
                and pending.region.offset + pending.region.nbytes == region.offset
                and pending.to + pending.region.nbytes == to
                and pending.region.nbytes + region.nbytes <= _MOVE
            ):
                joined = pending.region._replace(rows=1, width=pending.region.nbytes + region.nbytes)
                pending = _Move(joined._replace(pitch=joined.width), pending.to, (*pending.items, item))
            else:
                if pending is not None:
                    yield pending
                flat = region._replace(rows=1, width=region.nbytes, pitch=region.nbytes)
                pending = _Move(flat, to, (item,))
        if pending is not None:
            yield pending

    def _move(self, region: Region, to: int) -> None:
        done = 0
        while done < region.nbytes and self._movable:
            source = self._sources.descriptor(region.file)
            count = min(_MOVE, region.nbytes - done)
            try:
                moved = os.copy_file_range(source, self._fd, count, region.offset + done, to + done)
            except OSError as error:
                if error.errno not in _NOT_MOVABLE:
                    raise
                self._movable = False
                break
            if moved == 0:
                break
            done += moved
            self._context.tick(moved)
        rest = take_tail(region, done)
        self._copy_by_hand(rest, to + done)

    def _copy_by_hand(self, region: Region, to: int) -> None:
        """Through a buffer: where the kernel cannot move, and for rows that lie apart."""
        for piece, offset in self._pieces(region, to):
            write_all(self._fd, self._sources.read(piece).data.cast("B"), offset)
            self._context.tick(piece.nbytes)

    def _pieces(self, region: Region, to: int) -> Iterator[tuple[Region, int]]:
        if region.rows == 1:
            for start in range(0, region.width, self._context.chunk_bytes):
                width = min(self._context.chunk_bytes, region.width - start)
                yield region._replace(offset=region.offset + start, width=width, pitch=width), to + start
        else:
            for row, piece in self._sources.chunks(region, self._context.chunk_bytes):
                yield piece, to + row * region.width

    def _compute(self, item: Item) -> int:
        """Items that are not mere moves; the end of their bulk."""
        to = self._offset(item, 0)
        match item.op:
            case Constant(data):
                write_all(self._fd, data, to)
                return to + len(data)
            case Copy(region):
                self._copy_by_hand(region, to)
                return to + region.nbytes
            case MultiplyOut(weight, scale):
                return self._multiply_out(weight, scale, to)
            case Requantize() as op:
                return self._requantize(item, op)
            case _:
                raise BugError("op-unknown", f"no way to pour {item.op!r}")

    def _multiply_out(self, weight: Region, scale: Region, to: int) -> int:
        scales = self._sources.read(scale)
        for row, piece in self._sources.chunks(weight, COMPUTE_BYTES, multiple=_BLOCK):
            block = row // _BLOCK
            rows = scales[block : block + -(-piece.rows // _BLOCK)]
            with self._sources.blaming(scale):
                check_scales(rows)
            bits = multiply_out(self._sources.read(piece), rows)
            write_all(self._fd, bits.data.cast("B"), to + row * weight.width * 2)
            self._context.tick(piece.nbytes)
        return to + weight.nbytes * 2

    def _finish_cast(self, item: Item, op: Cast) -> None:
        """The block scales of a cast projection, and the blocks whose nibbles do not stay."""
        projection = CastProjection(op.source, self._scales.exponent(op.sharing), self._sources)
        to, to_scale = self._offset(item, 0), self._offset(item, 1)
        for row, piece in self._sources.chunks(op.source.scale, COMPUTE_BYTES):
            part = projection.part(row, piece)
            write_all(self._fd, part.scales.data.cast("B"), to_scale + row * part.scales.shape[1])
            for at, nibbles in part.patches:
                write_all(self._fd, nibbles, to + at)
            self.blocks += part.blocks
            self.lossless += part.lossless
            self._context.tick(piece.nbytes)

    def _requantize(self, item: Item, op: Requantize) -> int:
        projection = RequantizedProjection(op.source, self._scales.amax(op), self._sources)
        to, to_scale = self._offset(item, 0), self._offset(item, 1)
        weight = op.source.weight
        for row, piece in self._sources.chunks(weight, COMPUTE_BYTES):
            nibbles, scales = projection.part(row, piece)
            write_all(self._fd, nibbles.data.cast("B"), to + row * weight.width)
            write_all(self._fd, scales.data.cast("B"), to_scale + row * scales.shape[1])
            self._context.tick(piece.nbytes)
        return to + weight.nbytes

    def _offset(self, item: Item, output: int) -> int:
        return self._layout.offsets[item.outputs[output].name]


def take_tail(region: Region, done: int) -> Region:
    """What is left of a flat region after ``done`` bytes."""
    width = region.width - done
    return region._replace(offset=region.offset + done, width=width, pitch=width)


def _moved(item: Item) -> Region | None:
    """The region whose bytes the item's bulk is, if they lie in one piece."""
    match item.op:
        case Copy(region) if region.contiguous:
            return region
        case Cast(source):
            return source.weight
        case _:
            return None
