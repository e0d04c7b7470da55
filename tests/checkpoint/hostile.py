"""Hostile shards, by what is wrong with them."""

from __future__ import annotations

import json
from typing import Any


def shard(table: Any, body: int = 8, *, text: bytes | None = None, length: int | None = None) -> bytes:
    """A safetensors file: a header table (or its bytes), a stated length, and a body of zeros."""
    header = text if text is not None else json.dumps(table).encode()
    stated = len(header) if length is None else length
    return stated.to_bytes(8, "little") + header + bytes(body)


def entry(begin: int, end: int, shape: Any = None, dtype: Any = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


GOOD = {"a": entry(0, 4), "b": entry(4, 8)}
DOUBLED = b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"a":{"dtype":"U8","shape":[4],"data_offsets":[4,8]}}'
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0000000000000000000000000000000000000000\nsize 12\n"

CASES: dict[str, tuple[bytes, str, str]] = {
    "empty file": (b"", "header-truncated", ""),
    "seven bytes": (bytes(7), "header-truncated", ""),
    "header longer than the file": (shard(GOOD, length=1 << 20), "header-truncated", ""),
    "ten gigabytes of header": (shard(GOOD, length=10 << 30), "header-length", ""),
    "largest length": (shard(GOOD, length=(1 << 64) - 1), "header-length", ""),
    "git-lfs pointer": (LFS, "git-lfs-pointer", ""),
    "not JSON": (shard(None, text=b"{nothing}"), "header-json", ""),
    "a list": (shard([1, 2]), "header-json", ""),
    "leading space": (shard(None, text=b" " + json.dumps(GOOD).encode()), "header-json", ""),
    "not UTF-8": (shard(None, text=b'{"\xff":1}'), "header-json", ""),
    "nested beyond reason": (shard(None, text=b'{"a":' * 100_000 + b"1" + b"}" * 100_000), "header-json", ""),
    "doubled tensor": (shard(None, text=DOUBLED), "header-doubled-key", "a"),
    "doubled field": (
        shard(None, text=b'{"a":{"dtype":"U8","dtype":"I8","shape":[8],"data_offsets":[0,8]}}'),
        "header-doubled-key",
        "dtype",
    ),
    "metadata of numbers": (shard({"__metadata__": {"n": 1}, **GOOD}), "header-metadata", ""),
    "metadata is a list": (shard({"__metadata__": ["x"], **GOOD}), "header-metadata", ""),
    "tensor is a number": (shard({"a": 5}), "header-tensor", "a"),
    "tensor without shape": (shard({"a": {"dtype": "U8", "data_offsets": [0, 8]}}), "header-tensor", "a"),
    "negative dimension": (shard({"a": entry(0, 8, [-8])}), "header-tensor", "a"),
    "fractional dimension": (shard({"a": entry(0, 8, [8.0])}), "header-tensor", "a"),
    "boolean dimension": (shard({"a": entry(0, 1, [True])}, 1), "header-tensor", "a"),
    "offsets of three": (shard({"a": {**entry(0, 8), "data_offsets": [0, 4, 8]}}), "header-tensor", "a"),
    "offsets of text": (shard({"a": {**entry(0, 8), "data_offsets": ["0", "8"]}}), "header-tensor", "a"),
    "unknown dtype": (shard({"a": entry(0, 8, dtype="F17")}), "header-dtype", "a"),
    "dtype is a list": (shard({"a": entry(0, 8, dtype=["U8"])}), "header-dtype", "a"),
    "wrong size": (shard({"a": entry(0, 8, [7])}), "header-size", "a"),
    "shape beyond 64 bits": (shard({"a": entry(0, 8, [1 << 40, 1 << 40])}), "header-size", "a"),
    "odd FP4": (shard({"a": entry(0, 2, [3], "F4")}, 2), "header-size", "a"),
    "overlap": (shard({"a": entry(0, 4), "b": entry(3, 7)}, 7), "header-overlap", "b"),
    "hole at the start": (shard({"a": entry(4, 8)}), "header-hole", "a"),
    "hole in the middle": (shard({"a": entry(0, 3), "b": entry(4, 8)}), "header-hole", "b"),
    "end before begin": (shard({"a": {**entry(0, 8), "data_offsets": [8, 0]}}), "header-range", "a"),
    "negative offset": (shard({"a": {**entry(0, 8), "data_offsets": [-8, 0]}}), "header-range", "a"),
    "truncated": (shard(GOOD, 5), "shard-truncated", "b"),
    "body missing": (shard(GOOD, 0), "shard-truncated", "a"),
    "bytes after the end": (shard(GOOD, 9), "shard-trailing-bytes", ""),
}
"""What is wrong -> (file, error id, name in the error's place)."""
