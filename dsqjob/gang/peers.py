"""What the supervisors of one attempt tell each other through a folder on the shared file system.

One file a node, written in place and at its full length from the beginning, so that a last word fits on a full disk,
too. It is touched every few seconds. A thread does this, since a file server may make it wait. Silence is judged by
watching a file change, so no two clocks are compared; time in which this node could not look itself does not count.
What lay there when this node began, and never changes, is of an earlier start under the same attempt and says nothing.
A node's own file that changes is another process's, started under the same number: who finds it so leaves it alone.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dsqjob.engine.workspace import unique_token
from dsqjob.errors import UsageError
from dsqjob.gang.ending import Ending, Report
from dsqjob.gang.node import Limits, Node

_LENGTH = 32768


@dataclass
class _Seen:
    """A node's file as last seen, and when it was seen to change; ``lives`` once it changed at all."""

    stamp: tuple[int, int]
    changed: float
    lives: bool
    word: dict[str, Any]


class Peers:
    """The other nodes of an attempt, and this node's word to them."""

    def __init__(self, folder: Path, node: Node, host: str, limits: Limits) -> None:
        self._folder, self._node, self._silence = folder, node, limits.silence
        self._poll, self._touch = min(1.0, limits.silence / 10), min(3.0, limits.silence / 10)
        self._mine = self._path(node.index)
        self._others = [index for index in range(node.nodes) if index != node.index]
        self._token, self._host = unique_token(), host
        self._said: dict[str, Any] = {"asked": "", "report": None}
        self._told: tuple[dict[str, Any], str] = ({}, "")
        self._touched, self._looked = 0.0, time.monotonic()
        self._seen: dict[int, _Seen] = {}
        self._gang: dict[int, str] = {}
        self._replaced: set[int] = set()
        self._twice: str | None = None
        self._wake, self._closed = threading.Event(), False
        self._thread = threading.Thread(target=self._live, name="peers", daemon=True)
        self.reports: dict[int, Report] = {}
        """Of nodes whose part has ended."""
        self.asked = ""
        """A signal that another supervisor was sent, and where."""

    def open(self, given_up: Callable[[], object]) -> None:
        """Arrive, unless ``given_up`` while an old file must be watched.

        OSError where the folder cannot be written; UsageError ``node-twice``.
        """
        if self._others:
            self._folder.mkdir(parents=True, exist_ok=True)
            if self._sit_down(given_up):
                self._look(first=True)
                self._tell()
                self._thread.start()

    def form(self) -> None:
        """From now on, these nodes as they are make the gang: one that is started anew is another's."""
        self._gang = self._tokens()

    def announce(self, asked: str) -> None:
        """Tell the others that this supervisor was asked to stop."""
        self._said = {**self._said, "asked": asked}
        self._wake.set()

    def publish(self, report: Report) -> None:
        """Tell the others how this node's part ended."""
        few = [asdict(ending.shortened(400)) for ending in report.endings[:8]]
        self._said = {**self._said, "report": {"asked": report.asked, "endings": few, "well": report.well}}
        self._wake.set()

    @property
    def hosts(self) -> dict[int, str]:
        """Other nodes that have arrived, and their hosts."""
        return {index: str(seen.word.get("host", "")) for index, seen in list(self._seen.items()) if seen.lives}

    @property
    def missing(self) -> list[int]:
        """Nodes that have not arrived."""
        return sorted(set(self._others) - set(self.hosts))

    @property
    def lost(self) -> dict[int, str]:
        """Nodes that neither ended nor live, and what is known of them."""
        seen = {index: self._looked - one.changed for index, one in list(self._seen.items()) if one.lives}
        found = {index: f"gives no sign of life for {age:.0f} s" for index, age in seen.items() if age > self._silence}
        found |= dict.fromkeys(self._replaced, "was started anew")
        return {index: what for index, what in found.items() if index not in self.reports}

    @property
    def awaited(self) -> list[int]:
        """Nodes that have arrived, live, and have not ended."""
        return sorted(set(self.hosts) - set(self.reports) - set(self.lost))

    @property
    def told(self) -> bool:
        """Whether the others can read this node's last word, or will never hear of it."""
        return self._twice is not None or self._told[0] is self._said

    @property
    def arrived(self) -> bool:
        """Whether the others may know of this node."""
        return self._thread.ident is not None

    @property
    def twice(self) -> UsageError | None:
        """Why this process is not this node: another one is."""
        return self._refusal(self._twice) if self._twice is not None else None

    def _refusal(self, host: str) -> UsageError:
        return UsageError(
            "node-twice",
            f"node {self._node.index} of attempt {self._node.attempt} is at work already, on {host}",
            where="--node, --attempt",
            way_out="give each node its own number; or stop that one, and start all nodes with a new attempt",
        )

    @property
    def cut_off(self) -> float:
        """Seconds for which the shared file system has not answered, where that is so long that the others must think
        this node dead."""
        age = time.monotonic() - self._looked if self._others else 0.0
        return age if age > 2 * self._silence else 0.0

    def close(self) -> None:
        """Stop telling and looking, unless the file system holds the thread."""
        self._closed = True
        self._wake.set()
        if self.arrived:
            self._thread.join(self._poll + 1)

    def _path(self, index: int) -> Path:
        return self._folder / f"node{index}.json"

    def _live(self) -> None:
        while not self._closed:
            with suppress(OSError):
                self._tell()
            with suppress(OSError):
                self._look()
            self._wake.wait(self._poll)
            self._wake.clear()

    def _sit_down(self, given_up: Callable[[], object]) -> bool:
        """Make this node's file. One that lies there must not change for as long as makes a node count as dead."""
        with suppress(FileExistsError):
            os.close(os.open(self._mine, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
            return True
        stamp, _ = _read(self._mine)
        deadline = time.monotonic() + self._silence + self._touch
        while time.monotonic() < deadline:
            if given_up():
                return False
            os.utime(self._folder)  # so that nobody sweeps it
            time.sleep(self._poll / 4)
            now, word = _read(self._mine)
            if now != stamp:
                raise self._refusal(word["host"] if word is not None else "another host")
        return True

    def _tell(self) -> None:
        if self._told[1]:
            self._look_at_own()
        if self._twice is not None:
            return
        said = self._said
        seen = self._gang or self._tokens()
        text = json.dumps({"token": self._token, "host": self._host, "seen": seen, **said})
        if text != self._told[1]:
            data = text.encode().ljust(_LENGTH)
            fd = os.open(self._mine, os.O_WRONLY | os.O_CREAT, 0o666)
            try:
                os.pwrite(fd, data, 0)
                os.ftruncate(fd, len(data))
                os.fsync(fd)
            finally:
                os.close(fd)
            self._told, self._touched = (said, text), time.monotonic()
        elif time.monotonic() - self._touched > self._touch:
            os.utime(self._mine)
            self._touched = time.monotonic()

    def _look_at_own(self) -> None:
        """Another process may have begun after a killed one in the same instant; or a sweep took the file of a node
        that stood still for long."""
        try:
            _, word = _read(self._mine)
        except FileNotFoundError:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._told = ({}, "")
            return
        if word is not None and word["token"] != self._token:
            self._twice = word["host"]

    def _tokens(self) -> dict[int, str]:
        return {index: str(one.word["token"]) for index, one in list(self._seen.items()) if one.lives}

    def _look(self, *, first: bool = False) -> None:
        names = set(os.listdir(self._folder))  # opening a folder makes NFS ask the server anew
        now = time.monotonic()
        if now - self._looked > self._poll + self._silence / 3:
            for seen in self._seen.values():
                seen.changed = now
        for index in self._others:
            if f"node{index}.json" in names:
                self._take(index, now, first)
        self._looked = now

    def _take(self, index: int, now: float, first: bool) -> None:
        stamp, word = _read(self._path(index))
        old = self._seen.get(index)
        if word is None or (old is not None and old.stamp == stamp):
            return
        if index in self._gang and word["token"] != self._gang[index]:
            self._replaced.add(index)
            return
        ours = word["seen"].get(str(self._node.index), self._token) == self._token
        self._seen[index] = _Seen(stamp, now, not first and ours, word)
        if self._seen[index].lives:
            self.asked = self.asked or word["asked"]
            if word["report"] is not None:
                self.reports[index] = word["report"]


def _read(path: Path) -> tuple[tuple[int, int], dict[str, Any] | None]:
    """A node's file: what changes when it is touched, and its word."""
    with path.open("rb") as stream:
        status = os.fstat(stream.fileno())
        return (status.st_ino, status.st_mtime_ns), _word(stream.read())


def _word(data: bytes) -> dict[str, Any] | None:
    """A node's word, its report built; None while its writer is at it, or where it is in no form that we know."""
    try:
        word: dict[str, Any] = json.loads(data)
        kept: dict[str, Any] = {
            "token": str(word["token"]),
            "host": str(word["host"]),
            "asked": str(word["asked"]),
            "report": None,
        }
        kept["seen"] = dict(word["seen"])
        if (report := word["report"]) is not None:
            endings = tuple(Ending(**ending) for ending in report["endings"])
            kept["report"] = Report(str(report["asked"]), endings, bool(report["well"]))
    except (ValueError, KeyError, TypeError):
        return None
    return kept
