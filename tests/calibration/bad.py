"""Ways to spoil checkpoints."""

from __future__ import annotations

import json
from pathlib import Path


def _table(path: Path) -> tuple[dict[str, dict[str, list[int]]], int]:
    """The tensors of a safetensors file, and where data begins."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), 8 + length


def overwrite(folder: Path, name: str, data: bytes) -> None:
    """Put ``data`` where a tensor of the checkpoint begins."""
    for path in folder.glob("*.safetensors"):
        table, begin = _table(path)
        if name in table:
            path.chmod(0o644)
            with path.open("r+b") as file:
                file.seek(begin + table[name]["data_offsets"][0])
                file.write(data)
            return
    raise AssertionError(f"{name} is nowhere in {folder}")


def rename_tensor(path: Path, old: str, new: str) -> None:
    """Another name of the same length in a safetensors file's header."""
    assert len(old) == len(new)
    raw = path.read_bytes()
    assert raw.count(f'"{old}"'.encode()) == 1
    path.write_bytes(raw.replace(f'"{old}"'.encode(), f'"{new}"'.encode()))
