"""A release as published: config, index, shards and side files, all of which must agree."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsqjob.checkpoint.header import Entry, Header, read_header
from dsqjob.errors import DataError

INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
_NEVER_COPIED_FOLDERS = frozenset({".cache", "__pycache__", ".git"})


@dataclass(frozen=True)
class Release:
    """A checkpoint folder whose index and shards agree.

    ``index`` maps tensor name to shard file name; ``shards`` maps shard file name to its header, by name.
    """

    root: Path
    config: dict[str, Any]
    index: dict[str, str]
    shards: dict[str, Header]
    config_digest: str
    index_digest: str
    total_bytes: int = field(default=0)

    def entry(self, name: str) -> Entry:
        """Header entry of a tensor; KeyError if there is none."""
        return self.shards[self.index[name]].tensors[name]

    def identity(self) -> dict[str, str]:
        """Digests of what the release is: config, index, and every shard's size and header."""
        digest = hashlib.sha256()
        for name, header in self.shards.items():
            digest.update(f"{name}\0{header.file_size}\0{header.digest}\n".encode())
        return {"config": self.config_digest, "index": self.index_digest, "shards": digest.hexdigest()}


def open_release(root: Path) -> Release:
    """Read config, index and every shard's header (each shard opened once, data untouched) and compare them.

    Raises DataError: ``release-missing``, ``config-missing``, ``index-missing``, ``json-invalid``,
    ``index-invalid``, ``index-escape``, ``shard-missing``, those of ``index_problems`` and of ``read_header``.
    """
    if not root.is_dir():
        raise DataError(
            "release-missing",
            "the release folder does not exist",
            where=root,
            way_out="set `release` to the folder of the downloaded release",
        )
    config, config_bytes = read_json(root / CONFIG, "config-missing")
    index, index_bytes = read_index(root)
    shards: dict[str, Header] = {}
    names = {shard: shard for shard in sorted(set(index.values()))}
    index = {name: names[shard] for name, shard in index.items()}  # one string a shard, not one a tensor
    for shard in names:
        path = root / shard
        if not path.is_file():
            raise DataError(
                "shard-missing",
                "the index names a shard that is not in the folder",
                where=path,
                way_out="download the release again: the shard did not arrive",
            )
        shards[shard] = read_header(path)
    for problem in index_problems(root, index, shards):
        raise problem
    return Release(
        root,
        config,
        index,
        shards,
        hashlib.sha256(config_bytes).hexdigest(),
        hashlib.sha256(index_bytes).hexdigest(),
        sum(entry.nbytes for header in shards.values() for entry in header.tensors.values()),
    )


def read_json(path: Path, missing: str) -> tuple[dict[str, Any], bytes]:
    """A JSON object without doubled keys, and its bytes. DataError ``missing`` or ``json-invalid``."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            names = [key for key, _ in pairs]
            raise ValueError(f"the key {next(key for key in names if names.count(key) > 1)!r} stands twice")
        return found

    try:
        data = path.read_bytes()
    except (FileNotFoundError, IsADirectoryError):
        raise DataError(
            missing,
            f"{path.name} is missing",
            where=path,
            way_out="download the folder again, or point the job file at the right one",
        ) from None
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_constant=_refuse)
        if not isinstance(value, dict):
            raise ValueError(f"holds a {type(value).__name__}, not an object")
    except (ValueError, RecursionError) as error:
        raise DataError(
            "json-invalid", f"{path.name} is not valid: {error}", where=path, way_out="download this file again"
        ) from None
    return value, data


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


def read_index(root: Path) -> tuple[dict[str, str], bytes]:
    """``weight_map`` of the folder's index, every shard name a plain name inside the folder."""
    path = root / INDEX
    raw, data = read_json(path, "index-missing")
    index = raw.get("weight_map")
    if not isinstance(index, dict) or not index or not all(isinstance(shard, str) for shard in index.values()):
        raise DataError(
            "index-invalid",
            "weight_map must map tensor names to shard names",
            where=path,
            way_out="download this file again",
        )
    for shard in set(index.values()):
        if shard != os.path.basename(shard) or not shard.endswith(".safetensors") or shard.startswith("."):
            tensor = next(name for name, value in index.items() if value == shard)
            raise DataError(
                "index-escape",
                f"the index points outside the folder, or not at a shard: {shard!r}",
                where=f"{path}: {tensor}",
                way_out="do not use this release; download it again from its publisher",
            )
    return index, data


def index_problems(root: Path, index: Mapping[str, str], shards: Mapping[str, Header]) -> Iterator[DataError]:
    """Every disagreement between an index and its shards: ``tensor-duplicate``, ``index-missing-tensor``,
    ``index-unnamed-tensor``."""
    again = "download the release again"
    found: dict[str, str] = {}
    for shard, header in shards.items():
        for name in header.tensors:
            if name in found:
                where = f"{root / shard}: {name}"
                yield DataError("tensor-duplicate", f"the tensor is also in {found[name]}", where=where, way_out=again)
            elif name not in index:
                where = f"{root / shard}: {name}"
                yield DataError("index-unnamed-tensor", "the index does not name it", where=where, way_out=again)
            found.setdefault(name, shard)
    for name, shard in index.items():
        if shard in shards and name not in shards[shard].tensors:
            where = f"{root / INDEX}: {name}"
            yield DataError(
                "index-missing-tensor", f"the index names it, {shard} does not hold it", where=where, way_out=again
            )


def side_files(root: Path) -> list[str]:
    """Relative POSIX paths of all other files of a release, sorted: not its shards, indexes or download caches.

    Linked files count (the Hub's cache is made of them); DataError ``folder-link`` for a linked folder.
    """
    found = []
    for folder, folders, files in os.walk(root):
        for name in folders:
            if Path(folder, name).is_symlink():
                raise DataError(
                    "folder-link",
                    "a folder of the release is a link: its files would be left behind",
                    where=Path(folder, name),
                    way_out="put the folder itself in its place",
                )
        folders[:] = sorted(name for name in folders if name not in _NEVER_COPIED_FOLDERS)
        for name in files:
            path = Path(folder, name)
            if name.endswith((".safetensors", ".safetensors.index.json")) and path.parent == root:
                continue
            if path.is_file() and ".partial-" not in name and not name.endswith(".incomplete"):
                found.append(path.relative_to(root).as_posix())
    return sorted(found)
