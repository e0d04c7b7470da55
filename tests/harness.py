"""Runs dsqjob as its users do, and reads checkpoints without dsqjob."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml


class Tensor(NamedTuple):
    dtype: str
    shape: tuple[int, ...]
    data: bytes

    def bytes_2d(self) -> np.ndarray:
        """The bytes as [rows, bytes per row]."""
        return np.frombuffer(self.data, np.uint8).reshape(self.shape[0], -1)


def read_shard(path: Path) -> dict[str, Tensor]:
    """Name -> tensor, in the order of the data."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    table = json.loads(raw[8 : 8 + length])
    table.pop("__metadata__", None)
    found = {}
    for name, item in sorted(table.items(), key=lambda pair: pair[1]["data_offsets"]):
        begin, end = item["data_offsets"]
        found[name] = Tensor(item["dtype"], tuple(item["shape"]), raw[8 + length + begin : 8 + length + end])
    return found


def read_checkpoint(folder: Path) -> dict[str, tuple[str, Tensor]]:
    """Name -> (shard, tensor) over all shards; a name may come once."""
    found: dict[str, tuple[str, Tensor]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        for name, tensor in read_shard(path).items():
            assert name not in found, name
            found[name] = (path.name, tensor)
    return found


def write_job(folder: Path, release: Path, **settings: Any) -> Path:
    """A job file in ``folder`` with workspace and outputs beside it; ``settings`` are dotted by ``__``."""
    job: dict[str, Any] = {
        "name": "test",
        "family": "deepseek-v4",
        "release": str(release),
        "workspace": str(folder / "work"),
        "memory": "256MiB",
        "parallel": {"model_parallel": 2, "nodes": 1, "gpus_per_node": 2},
        "export": {"output": str(folder / "out"), "input_scale": "one"},
        "launcher": {"kind": "local", "workers": 1},
    }
    for path, value in settings.items():
        place = job
        *parents, last = path.split("__")
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = str(value) if isinstance(value, Path) else value
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "job.yaml"
    file.write_text(yaml.safe_dump(job))
    return file


def command(*arguments: object) -> list[str]:
    """The command line of dsqjob with this interpreter."""
    return [sys.executable, "-m", "dsqjob", *map(str, arguments)]


def dsqjob(
    *arguments: object, code: int | None = 0, environment: Mapping[str, str] | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run dsqjob to its end; the exit code must be ``code`` (None: any)."""
    done = subprocess.run(
        command(*arguments),
        capture_output=True,
        text=True,
        env={**os.environ, **(environment or {})},
        cwd=cwd,
        timeout=300,
        check=False,
    )
    if code is not None:
        assert done.returncode == code, f"exit {done.returncode}, not {code}\n{done.stdout}\n{done.stderr}"
    return done


def worker(stage: str, job: Path, *more: object, index: int = 0, count: int = 1) -> list[str]:
    """The command line of one worker."""
    return command("worker", stage, job, "--worker", index, "--workers", count, *more)


def digests(folder: Path) -> dict[str, str]:
    """Relative path -> SHA-256 of every file, hidden ones too."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def events(workspace: Path) -> Iterator[dict[str, Any]]:
    """Every event of every process."""
    for path in sorted((workspace / "logs" / "events").glob("*.jsonl")):
        for line in path.read_text().splitlines():
            yield json.loads(line)


def error_id(done: subprocess.CompletedProcess[str]) -> str:
    """The id of the error that a run ended with."""
    lines = [line for line in done.stderr.splitlines() if line.startswith("[")]
    return lines[-1][1:].partition("]")[0] if lines else ""
