"""Memory that a supervisor shares with its ranks: signs of life, phases, last words, and the word to stop.

An anonymous mapping made before the fork: nothing of it lies on a disk that may be full, and a dead supervisor leaves
nothing behind. Times are of the monotonic clock, which all processes of a machine share.
"""

from __future__ import annotations

import json
import mmap
import struct
import time
from dataclasses import dataclass, field
from typing import Any

from dsqjob.gang.ending import Ending

GO, ASKED, LEAVE = 0, 1, 2
"""Words to the ranks: work; stop at the next ``check``; leave at once."""

_RECORD = 16384
_PID, _ALIVE, _TURN, _NOTE, _END = 0, 8, 16, 24, 4096
_PULSE = 8
_TRIES = 5


@dataclass(frozen=True)
class Sign:
    """What a rank last said. ``alive`` and ``since`` are monotonic times; ``limit`` is how long the phase may last from
    ``since``. ``pid`` is 0 before the rank's first word."""

    pid: int = 0
    alive: float = 0.0
    since: float = 0.0
    limit: float = float("inf")
    phase: str = "start"
    progress: dict[str, Any] = field(default_factory=dict)


class Board:
    """A record a rank, written by that rank only, and a head written by the supervisor only."""

    def __init__(self, ranks: int) -> None:
        self._memory = mmap.mmap(-1, (ranks + 1) * _RECORD)
        self.pulse()
        self._notes: dict[int, dict[str, Any]] = {}

    @property
    def word(self) -> int:
        """GO, ASKED or LEAVE."""
        return self._memory[0]

    def say(self, word: int) -> None:
        """To all ranks; a word is never taken back."""
        self._memory[0] = max(word, self._memory[0])

    def pulse(self) -> None:
        """The supervisor lives."""
        struct.pack_into("d", self._memory, _PULSE, time.monotonic())

    @property
    def pulsed(self) -> float:
        """When the supervisor last lived."""
        return float(struct.unpack_from("d", self._memory, _PULSE)[0])

    def hello(self, local: int, pid: int) -> None:
        """A rank's first act."""
        self.beat(local)
        struct.pack_into("q", self._memory, self._at(local) + _PID, pid)

    def beat(self, local: int) -> None:
        """The rank lives."""
        struct.pack_into("d", self._memory, self._at(local) + _ALIVE, time.monotonic())

    def note(self, local: int, phase: str, limit: float, progress: dict[str, Any]) -> None:
        """A phase, or progress in it; its clock begins now. An odd turn marks a note that is being written."""
        at = self._at(local)
        said = {"phase": phase[:100], "limit": limit, "since": time.monotonic()}
        data = json.dumps({**said, "progress": progress}).encode()
        if len(data) > _END - _NOTE - 4:
            data = json.dumps({**said, "progress": {}}).encode()
        (turn,) = struct.unpack_from("q", self._memory, at + _TURN)
        struct.pack_into("q", self._memory, at + _TURN, turn + 1)
        self._put(at + _NOTE, data)
        struct.pack_into("q", self._memory, at + _TURN, turn + 2)

    def read(self, local: int) -> Sign:
        """The rank's last signs; a note that is torn, since its writer is at it or was killed, is passed over."""
        at = self._at(local)
        pid, alive = struct.unpack_from("qd", self._memory, at + _PID)
        for _ in range(_TRIES):
            (before,) = struct.unpack_from("q", self._memory, at + _TURN)
            data = self._get(at + _NOTE)
            (after,) = struct.unpack_from("q", self._memory, at + _TURN)
            if before == after and before % 2 == 0 and data:
                self._notes[local] = json.loads(data)
                break
        return Sign(pid, alive, **self._notes.get(local, {}))

    def end(self, local: int, ending: Ending) -> None:
        """The rank's last word, written once: first the text, then its length."""
        self._put(self._at(local) + _END, ending.shortened(3000).to_json().encode())

    def ended(self, local: int) -> Ending | None:
        """How the rank ended by its own word."""
        data = self._get(self._at(local) + _END)
        return Ending(**json.loads(data)) if data else None

    def _at(self, local: int) -> int:
        return _RECORD * (local + 1)

    def _put(self, at: int, data: bytes) -> None:
        self._memory[at + 4 : at + 4 + len(data)] = data
        struct.pack_into("i", self._memory, at, len(data))

    def _get(self, at: int) -> bytes:
        (length,) = struct.unpack_from("i", self._memory, at)
        return self._memory[at + 4 : at + 4 + length]
