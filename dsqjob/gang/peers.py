"""Supervisors tell each other that they live and how they ended, through a folder on the shared file system."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

from dsqjob.engine.workspace import unique_token
from dsqjob.errors import PeerError
from dsqjob.gang.ending import Ending
from dsqjob.gang.node import Limits, Node

_LOOK = 1.0
_TOUCH = 2.0


class Peers:
    """The other nodes of an attempt; one look a second at most."""

    def __init__(self, folder: Path, node: Node, limits: Limits) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._node, self._limits = folder, node, limits
        self._looked = self._touched = 0.0
        self._mine.write_text(socket.gethostname())

    @property
    def _mine(self) -> Path:
        return self._alive(self._node.index)

    def _alive(self, index: int) -> Path:
        return self._folder / f"node{index}.alive"

    def _end(self, index: int) -> Path:
        return self._folder / f"node{index}.json"

    def tell(self, ending: Ending) -> None:
        """Say how this node ended."""
        ending.write(self._end(self._node.index))

    def look(self) -> Ending | None:
        """How another node ended badly, or that it is silent; None while all is well. Says that this one lives."""
        now = time.monotonic()
        if self._node.nodes == 1 or now - self._looked < _LOOK:
            return None
        self._looked = now
        if now - self._touched > _TOUCH:
            self._touched = now
            os.utime(self._mine)
        clock = self._clock()
        for index in self._others():
            ending = Ending.read(self._end(index))
            if ending is not None:
                if ending.code:
                    return ending
                continue
            age = self._age(index, clock)
            if age is not None and age > self._limits.silence:
                return self._silent(index, age)
        return None

    def missing(self) -> list[int]:
        """Nodes that never said a word."""
        return [index for index in self._others() if not self._alive(index).exists()]

    def done(self) -> bool:
        """Whether every other node has ended well."""
        endings = [Ending.read(self._end(index)) for index in self._others()]
        return all(ending is not None and not ending.code for ending in endings)

    def _others(self) -> list[int]:
        return [index for index in range(self._node.nodes) if index != self._node.index]

    def _clock(self) -> float:
        probe = self._folder / f".clock-{unique_token()}"
        probe.touch()
        try:
            return probe.stat().st_mtime
        finally:
            probe.unlink()

    def _age(self, index: int, clock: float) -> float | None:
        try:
            return clock - self._alive(index).stat().st_mtime
        except FileNotFoundError:
            return None

    def _silent(self, index: int, age: float) -> Ending:
        host = self._alive(index).read_text()
        what = f"node {index} ({host}) gives no sign of life for {age:.0f} s: its supervisor or machine died"
        return Ending(PeerError.exit_code, "node-silent", what, "", "look at that machine; the same command resumes")
