"""The vendors' inference code, by the SHA-256 of its files."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

KNOWN: Mapping[str, frozenset[str]] = {"deepseek-v4": frozenset()}
"""Family -> hashes of files as their vendor published them. DeepSeek-V4's are not known yet."""

NEEDED = ("model.py", "kernel.py")


def code_digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every Python file of the vendor's inference code, by name."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.py"))}
