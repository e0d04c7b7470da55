"""What a stage's output depends on, in named parts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Fingerprint:
    """Part name -> digest or short value. Equal parts, equal output bytes."""

    parts: Mapping[str, str]

    @property
    def digest(self) -> str:
        return digest_of(dict(self.parts))

    def changes(self, before: Mapping[str, str]) -> list[str]:
        """Names of the parts that differ from ``before``."""
        return [name for name in sorted({*self.parts, *before}) if self.parts.get(name) != before.get(name)]


def digest_of(value: Any) -> str:
    """SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
