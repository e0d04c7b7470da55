"""The safetensors header, on one page: eight bytes, JSON, and every invariant.

A file is ``u64 little-endian N``, N bytes of JSON, then the buffer. What the safetensors library refuses
is refused here too, with the file and the tensor named.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
from collections.abc import Iterable, Mapping
from typing import Any, BinaryIO, NamedTuple

from dsqjob.errors import DataError

MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors library."""

DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
"""Bits of one element. ``F4`` counts logical elements: two a byte."""

_LFS_PREFIX = b"version https://git-lfs"
_METADATA = "__metadata__"


class Entry(NamedTuple):
    """One tensor of a header; ``begin`` and ``end`` are bytes from the start of the buffer."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


class TensorSpec(NamedTuple):
    """Name, dtype and shape of a tensor that is to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]


class Header(NamedTuple):
    """A valid header. ``tensors`` is in the order of the data; ``digest`` is the SHA-256 of the JSON bytes."""

    metadata: dict[str, str] | None
    tensors: dict[str, Entry]
    data_start: int
    file_size: int
    digest: str

    def offset(self, name: str) -> int:
        """Offset of a tensor's first byte from the start of the file."""
        return self.data_start + self.tensors[name].begin


def nbytes_of(dtype: str, shape: Iterable[int]) -> int:
    """Bytes that a tensor takes; ValueError where the bits do not fill whole bytes."""
    bits = DTYPE_BITS[dtype] * math.prod(shape)
    if bits % 8:
        raise ValueError(f"{bits} bits of {dtype} do not fill whole bytes")
    return bits // 8


def read_header(path: str | os.PathLike[str]) -> Header:
    """Open ``path`` once, read eight bytes and the JSON, and check every invariant.

    Raises DataError: ``header-truncated``, ``git-lfs-pointer``, ``header-length``, and what ``parse`` raises.
    """
    with open(path, "rb", buffering=0) as file:
        return header_of(file, path)


def header_of(file: BinaryIO, path: str | os.PathLike[str]) -> Header:
    """The same of a file that stands at its beginning."""
    size = os.fstat(file.fileno()).st_size
    first = file.read(8)
    if len(first) < 8:
        raise _bad(path, "header-truncated", f"the file ends after {size} bytes, inside its first eight")
    length = int.from_bytes(first, "little")
    if length > MAX_HEADER_BYTES or length > size - 8:
        start = first + file.read(len(_LFS_PREFIX))
        if start.startswith(_LFS_PREFIX):
            raise DataError(
                "git-lfs-pointer",
                "this is a Git LFS pointer, not a shard: the weights were not downloaded",
                where=path,
                way_out="download the release with its large files (`git lfs pull`, or the Hub's downloader)",
            )
        if length > MAX_HEADER_BYTES:
            raise _bad(path, "header-length", f"header of {length} bytes; at most {MAX_HEADER_BYTES} are allowed")
        raise _bad(path, "header-truncated", f"header of {length} bytes in a file of {size}")
    text = file.read(length)
    if len(text) < length:
        raise _bad(path, "header-truncated", f"the file ends inside its header of {length} bytes")
    return parse(text, path=path, file_size=size)


def parse(text: bytes, *, path: str | os.PathLike[str], file_size: int) -> Header:
    """Header from its JSON bytes.

    Invariants: an object without doubled keys; ``__metadata__`` maps strings to strings; every dtype is
    known and every shape made of non-negative integers; offsets are ordered, of exactly the size that dtype
    and shape say, contiguous from 0 without hole or overlap; the last one ends the file.

    Raises DataError: ``header-json``, ``header-doubled-key``, ``header-metadata``, ``header-tensor``,
    ``header-dtype``, ``header-size``, ``header-overlap``, ``header-hole``, ``header-range``,
    ``shard-truncated``, ``shard-trailing-bytes``.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise _bad(path, "header-doubled-key", f"the key {twice!r} stands twice", twice)
        return found

    if not text.startswith(b"{"):
        raise _bad(path, "header-json", "the header does not start with '{'")
    try:
        raw = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise _bad(path, "header-json", f"the header is not JSON: {error}") from None
    metadata = raw.pop(_METADATA, None)
    if metadata is not None and (
        not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values())
    ):
        raise _bad(path, "header-metadata", "__metadata__ must map strings to strings")
    entries = sorted((_entry(name, item, path) for name, item in raw.items()), key=lambda e: (e.begin, e.end))
    position = 0
    for entry in entries:
        if entry.begin < position:
            raise _bad(path, "header-overlap", f"begins at {entry.begin}, inside the tensor before it", entry.name)
        if entry.begin > position:
            raise _bad(path, "header-hole", f"begins at {entry.begin}, leaving a hole from {position}", entry.name)
        position = entry.end
    data_start = 8 + len(text)
    if data_start + position > file_size:
        last = next(entry for entry in entries if data_start + entry.end > file_size)
        raise _bad(path, "shard-truncated", f"needs {data_start + position} bytes, the file has {file_size}", last.name)
    if data_start + position < file_size:
        raise _bad(path, "shard-trailing-bytes", f"{file_size - data_start - position} bytes follow the last tensor")
    return Header(
        metadata, {entry.name: entry for entry in entries}, data_start, file_size, hashlib.sha256(text).hexdigest()
    )


def _entry(name: str, item: Any, path: str | os.PathLike[str]) -> Entry:
    if not isinstance(item, dict) or item.keys() != {"dtype", "shape", "data_offsets"}:
        raise _bad(path, "header-tensor", "must have exactly dtype, shape and data_offsets", name)
    dtype, shape, offsets = item["dtype"], item["shape"], item["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise _bad(path, "header-dtype", f"unknown dtype {dtype!r}", name)
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        raise _bad(path, "header-tensor", f"the shape must be non-negative integers, is {shape!r}", name)
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(n) is int for n in offsets):
        raise _bad(path, "header-tensor", f"data_offsets must be two integers, are {offsets!r}", name)
    begin, end = offsets
    if not 0 <= begin <= end < 1 << 63:
        raise _bad(path, "header-range", f"data_offsets [{begin}, {end}] are out of range", name)
    try:
        expected = nbytes_of(dtype, shape)
    except ValueError as error:
        raise _bad(path, "header-size", str(error), name) from None
    if end - begin != expected:
        raise _bad(
            path, "header-size", f"{dtype} {shape} takes {expected} bytes, data_offsets give {end - begin}", name
        )
    return Entry(name, sys.intern(dtype), tuple(shape), begin, end)


def _bad(path: str | os.PathLike[str], id: str, what: str, tensor: str = "") -> DataError:
    where = f"{os.fspath(path)}: {tensor}" if tensor else os.fspath(path)
    return DataError(id, what, where=where, way_out="download this file again, or write it again")


def encode(specs: Iterable[TensorSpec], metadata: Mapping[str, str] | None = None) -> bytes:
    """Eight bytes and JSON, padded with spaces to a multiple of 8, for tensors laid out in this order.

    Readers view tensors in place, so put wider dtypes first: each tensor must start at a multiple of its
    element's size. ValueError otherwise, and for a name that comes twice.
    """
    table: dict[str, Any] = {}
    if metadata is not None:
        table[_METADATA] = dict(metadata)
    position = 0
    for spec in specs:
        if spec.name in table:
            raise ValueError(f"{spec.name} comes twice")
        if position % max(1, DTYPE_BITS[spec.dtype] // 8):
            raise ValueError(f"{spec.name} would start at {position}, unaligned for {spec.dtype}")
        end = position + nbytes_of(spec.dtype, spec.shape)
        table[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
