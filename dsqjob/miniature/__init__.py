"""Miniatures: complete releases scaled down, from a seed; for trying dsqjob, and for its tests."""

from __future__ import annotations

import os
import shutil
from importlib import import_module, resources
from pathlib import Path
from typing import Any

from dsqjob.engine.publish import publish_bytes, sync_folder
from dsqjob.engine.workspace import unique_token
from dsqjob.errors import UsageError

MINIATURES = {"deepseek-v4": "dsqjob.miniature.deepseek_v4"}
"""Family -> module whose ``write_files(folder, seed=...)`` writes the release."""


def write_text(path: Path) -> None:
    """Calibration text as JSON lines, the same every time."""
    data = resources.files("dsqjob").joinpath("jobs", "miniature-v4.jsonl").read_bytes()
    publish_bytes(path, data, unique_token())


def write(family: str, folder: Path, *, seed: int, **options: Any) -> None:
    """A release in ``folder``, byte for byte the same for the same seed and options; whole or not there.

    UsageError ``family-unknown``, ``folder-not-empty``; ``usage`` where the seed is negative.
    """
    if family not in MINIATURES:
        raise UsageError(
            "family-unknown", f"no miniature of {family!r}", where="FAMILY", way_out=f"one of: {', '.join(MINIATURES)}"
        )
    if seed < 0:
        raise UsageError("usage", f"a seed is 0 or more, not {seed}", where="--seed", way_out="name another seed")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(
            "folder-not-empty",
            "the folder exists and is not empty",
            where=folder,
            way_out="name a new folder, or remove this one",
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = folder.with_name(f"{folder.name}.partial-{unique_token()}")
    aside.mkdir()
    try:
        import_module(MINIATURES[family]).write_files(aside, seed=seed, **options)
        os.rename(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    sync_folder(folder.parent)
