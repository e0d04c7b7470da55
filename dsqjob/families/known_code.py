"""The vendors' inference code, by the SHA-256 of its files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from dsqjob.errors import UsageError

KNOWN: Mapping[str, frozenset[str]] = {"deepseek-v4": frozenset()}
"""Family -> hashes of files as their vendor published them. DeepSeek-V4's are not known yet."""

NEEDED = ("model.py", "kernel.py")


def code_digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every Python file of the vendor's inference code, by name."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.py"))}


def check_code(family: str, folder: Path, *, required: bool, vouched: Iterable[str]) -> dict[str, str]:
    """The digests of the code, whose needed files must be there; where ``required``, each needed file must be known
    or ``vouched`` for. UsageError ``vendor-code-missing``, ``vendor-code-unknown``."""
    digests = code_digests(folder)
    trusted = {*KNOWN[family], *vouched}
    for name in NEEDED:
        if name not in digests:
            raise UsageError(
                "vendor-code-missing",
                "the vendor's inference code is not there",
                where=folder / name,
                way_out="set inference_dir to the folder that holds model.py and kernel.py",
            )
        if required and digests[name] not in trusted:
            raise UsageError(
                "vendor-code-unknown",
                f"its SHA-256 {digests[name]} is neither known nor vouched for",
                where=folder / name,
                way_out="compare it with the vendor's; then add the SHA-256 to calibrate.known_code",
            )
    return digests
