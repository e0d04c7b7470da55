"""Operations on byte ranges, as data. Made from headers alone; says nothing of how it is poured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from dsqjob.checkpoint.header import DTYPE_BITS, Header, TensorSpec, encode, nbytes_of


class Region(NamedTuple):
    """A rectangle of bytes in a file: ``rows`` runs of ``width`` bytes, ``pitch`` bytes apart."""

    file: str
    tensor: str
    offset: int
    rows: int
    width: int
    pitch: int

    @property
    def nbytes(self) -> int:
        return self.rows * self.width

    @property
    def contiguous(self) -> bool:
        return self.rows <= 1 or self.pitch == self.width


def region_of(header: Header, file: str, name: str) -> Region:
    """The whole of a tensor: a row per index of dimension 0 (one row for scalars and empty tensors)."""
    entry = header.tensors[name]
    rows = entry.shape[0] if entry.shape and entry.nbytes else 1
    width = entry.nbytes // rows
    return Region(file, name, header.offset(name), rows, width, width)


def take_rows(region: Region, start: int, stop: int) -> Region:
    """Rows ``start`` to ``stop`` of a region."""
    return region._replace(offset=region.offset + start * region.pitch, rows=stop - start)


def take_columns(region: Region, start: int, stop: int) -> Region:
    """Bytes ``start`` to ``stop`` of every row."""
    return region._replace(offset=region.offset + start, width=stop - start)


class Copy(NamedTuple):
    """The region's bytes as they are."""

    region: Region


class Constant(NamedTuple):
    """Bytes that the plan knows."""

    data: bytes


class MultiplyOut(NamedTuple):
    """FP8 ``weight`` [rows, cols] times its E8M0 ``scale`` of 128x128 blocks, to BF16."""

    weight: Region
    scale: Region


class Mxfp4(NamedTuple):
    """An MXFP4 projection: ``weight`` [out, in/2] nibbles, ``scale`` [out, in/32] E8M0 bytes."""

    path: str
    weight: Region
    scale: Region


class Cast(NamedTuple):
    """MXFP4 to NVFP4 without loss where that is possible. Outputs: weight, weight_scale, weight_scale_2.

    ``sharing`` are the projections, ``source`` included, that must have one ``weight_scale_2``.
    """

    source: Mxfp4
    sharing: tuple[Mxfp4, ...]


class Requantize(NamedTuple):
    """MXFP4 to NVFP4 by the weight's amax. Outputs: weight, weight_scale, weight_scale_2.

    ``amax`` None: the largest magnitude of all ``sharing`` projections, read from them.
    """

    source: Mxfp4
    sharing: tuple[Mxfp4, ...]
    amax: float | None


Op = Copy | Constant | MultiplyOut | Cast | Requantize


class Item(NamedTuple):
    """An operation and the tensors it yields, the bulky one first."""

    outputs: tuple[TensorSpec, ...]
    op: Op


class Layout(NamedTuple):
    """Where everything goes: header bytes, offset of each tensor from the start of the file, file size."""

    header: bytes
    offsets: Mapping[str, int]
    size: int


@dataclass(frozen=True)
class FilePlan:
    """One output file."""

    name: str
    metadata: Mapping[str, str] | None
    items: tuple[Item, ...]

    def layout(self) -> Layout:
        """Wider elements first, so that each tensor is aligned; then bulk in the order of the items, so that runs
        which lie together in the source stay together; small second outputs of one-byte elements at the end."""
        keyed = [
            (-DTYPE_BITS[spec.dtype], min(position, 1), number, spec)
            for number, item in enumerate(self.items)
            for position, spec in enumerate(item.outputs)
        ]
        keyed.sort(key=lambda key: key[:3])
        specs = [key[3] for key in keyed]
        header = encode(specs, self.metadata)
        offsets, position = {}, len(header)
        for spec in specs:
            offsets[spec.name] = position
            position += nbytes_of(spec.dtype, spec.shape)
        return Layout(header, offsets, position)

    def tensor_bytes(self) -> int:
        """Bytes of all tensors, header apart."""
        return sum(nbytes_of(spec.dtype, spec.shape) for item in self.items for spec in item.outputs)

    def bytes_in(self) -> int:
        """Bytes that pouring must read or move at least."""
        return sum(_bytes_in(item.op) for item in self.items)


def _bytes_in(op: Op) -> int:
    match op:
        case Copy(region):
            return region.nbytes
        case MultiplyOut(weight, scale):
            return weight.nbytes + scale.nbytes
        case Cast(source) | Requantize(source):
            return source.weight.nbytes + source.scale.nbytes
        case Constant():
            return 0
