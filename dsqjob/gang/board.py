"""A page of memory that a supervisor shares with its ranks: each writes its own signs of life, the supervisor reads."""

from __future__ import annotations

import json
import mmap
import struct
import time
from dataclasses import dataclass, field
from typing import Any

_RECORD = 512
_HEAD = struct.Struct("<qddd")
_TEXT = _RECORD - _HEAD.size


@dataclass(frozen=True)
class Sign:
    """What a rank last said. ``alive`` and ``since`` are of this machine's monotonic clock; ``limit`` is how long the
    phase may last from ``since``."""

    pid: int
    alive: float
    since: float
    limit: float
    phase: str
    progress: dict[str, Any] = field(default_factory=dict)


class Board:
    """Made before the ranks are forked; one writer a record."""

    def __init__(self, ranks: int) -> None:
        self._memory = mmap.mmap(-1, ranks * _RECORD)
        self.ranks = ranks

    def write(self, rank: int, sign: Sign) -> None:
        text = json.dumps([sign.phase, sign.progress]).encode()[:_TEXT].ljust(_TEXT, b"\0")
        head = _HEAD.pack(sign.pid, sign.alive, sign.since, sign.limit)
        self._memory[rank * _RECORD : (rank + 1) * _RECORD] = head + text

    def beat(self, rank: int) -> None:
        """Move ``alive`` only."""
        struct.pack_into("<d", self._memory, rank * _RECORD + 8, time.monotonic())

    def read(self, rank: int) -> Sign | None:
        """None before the rank's first word, or where it was caught in the middle of one."""
        raw = self._memory[rank * _RECORD : (rank + 1) * _RECORD]
        pid, alive, since, limit = _HEAD.unpack_from(raw)
        try:
            phase, progress = json.loads(raw[_HEAD.size :].rstrip(b"\0"))
        except ValueError:
            return None
        return Sign(pid, alive, since, limit, phase, progress) if pid else None
