"""One node's ranks as its supervisor sees them: who lives, who is silent, who takes too long, who died of what."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

from dsqjob.errors import PeerError
from dsqjob.gang.board import Board, Sign
from dsqjob.gang.ending import Ending, how_it_ended
from dsqjob.gang.node import Limits, Node

_HICCUP = 2.0
"""Seconds between two looks after which the supervisor takes it that it was stopped itself."""
_FORKING = 2.0
"""Seconds from a rank's first word until all others of its node are forked as well."""
UNKNOWN = "its exit status was lost"


class Ranks:
    """The ranks of this node, from their first sign of life to their end."""

    def __init__(self, node: Node, limits: Limits, board: Board, logs: Path, host: str) -> None:
        self._node, self._limits, self._board, self._logs, self._host = node, limits, board, logs, host
        self._strangers: set[int] | None = None
        self._looked = self._floor = time.monotonic()
        self._due = self._gone = float("inf")
        self.ends: dict[int, Ending] = {}
        """By local rank, as they come."""

    def expect(self, seconds: float) -> None:
        """Every rank is to have its first word within ``seconds``, or soon after the first one's."""
        self._strangers = set(_children())
        self._due = time.monotonic() + seconds + self._limits.silence

    @property
    def begun(self) -> bool:
        """Whether a rank has begun."""
        return any(self._board.read(local).pid for local in range(self._node.ranks))

    @property
    def working(self) -> bool:
        """Whether a rank is past its start."""
        return any(self._board.read(local).phase != "start" for local in range(self._node.ranks))

    @property
    def over(self) -> bool:
        """Whether every rank has ended, well or not."""
        return len(self.ends) == self._node.ranks

    @property
    def bad(self) -> list[Ending]:
        """Ends that are not good."""
        return [end for end in self.ends.values() if end.code]

    def look(self) -> list[Ending]:
        """Ends that are new. A rank that is silent or late counts as ended, after a dump of its stacks to its log."""
        now = time.monotonic()
        if now - self._looked > _HICCUP:
            self._floor = now
        self._looked = now
        if self.begun:
            self._due = min(self._due, now + self._limits.silence)
            self._gone = min(self._gone, now + _FORKING) if self._nobody_is_coming() else float("inf")
        news = []
        for local in range(self._node.ranks):
            if local not in self.ends and (end := self._end(local, now)) is not None:
                self.ends[local] = end
                news.append(end)
        return news

    def died(self, local: int, how: str) -> None:
        """What elastic saw of a rank's death; a rank without a first word is seen by nobody else."""
        if local not in self.ends or local in self.unclear:
            self.ends[local] = self._died(local, self._board.read(local), how)

    @property
    def unclear(self) -> list[int]:
        """Ranks that died, and elastic took their exit status first."""
        return [local for local, end in self.ends.items() if UNKNOWN in end.what]

    def clear(self, local: int, how: str) -> None:
        """How an unclear one died."""
        if local in self.unclear:
            self.died(local, how)

    def living(self) -> list[int]:
        """Processes that this one started for the gang, whether they had their first word or not."""
        if self._strangers is None:
            return []
        return [pid for pid in _children() if pid not in self._strangers]

    def kill(self, number: signal.Signals) -> None:
        """Send a signal to every rank that is left."""
        for pid in self.living():
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def _nobody_is_coming(self) -> bool:
        """Whether ranks lack their first word, and no process is left that could have it."""
        known = {self._board.read(local).pid for local in range(self._node.ranks)}
        return 0 in known and not set(self.living()) - known

    def _end(self, local: int, now: float) -> Ending | None:
        how = _how_it_ended(self._board.read(local).pid)
        if (said := self._board.ended(local)) is not None:
            return said
        sign = self._board.read(local)
        if how:
            return self._died(local, sign, how)
        if not sign.pid:
            return self._wordless(local, sign, now)
        if (age := now - max(sign.alive, self._floor)) > self._limits.silence:
            what = f"no sign of life for {age:.0f} s"
            return self._peer("rank-silent", local, sign, what, "stopped, or its machine is overloaded")
        if (age := now - max(sign.since, self._floor)) > sign.limit:
            with suppress(ProcessLookupError):
                os.kill(sign.pid, signal.SIGUSR1)
            what = f"no progress for {age:.0f} s"
            way_out = "its log has the stacks of all threads; calibrate.timeouts has the limits"
            return self._peer("phase-timeout", local, sign, what, way_out)
        return None

    def _wordless(self, local: int, sign: Sign, now: float) -> Ending | None:
        if now > self._gone:
            return self._died(local, sign, UNKNOWN)
        if now <= max(self._due, self._floor):
            return None
        return self._peer("rank-silent", local, sign, "never had a first word", "look at its GPU (nvidia-smi, dmesg)")

    def _died(self, local: int, sign: Sign, how: str) -> Ending:
        way_out = "killed by somebody, or by the kernel for want of memory (dmesg); the same command resumes"
        # NCCL's watchdog aborts ranks whose peers are gone
        victim = "SIGABRT" in how and self._node.size > 1
        what = f"process {sign.pid or 'without a first word'} died: {how}"
        return self._peer("rank-died", local, sign, what, way_out, victim=victim)

    def _peer(self, id: str, local: int, sign: Sign, what: str, way_out: str, *, victim: bool = False) -> Ending:
        number = self._node.rank(local)
        progress = " ".join(f"{name} {value}" for name, value in sign.progress.items())
        where = f"{self._logs}/rank{number}.log" + (f" ({progress})" if progress else "")
        error = PeerError(id, what, where=where, way_out=way_out)
        return Ending.of(error, rank=number, host=self._host, phase=sign.phase, victim=victim)


def _how_it_ended(pid: int) -> str:
    """Empty while the process lives. Its exit status is left to elastic, which may have taken it already."""
    if not pid:
        return ""
    try:
        status = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)
    except ChildProcessError:
        return UNKNOWN
    if status is None:
        return ""
    return how_it_ended(status.si_status if status.si_code == os.CLD_EXITED else -status.si_status)


def _children() -> list[int]:
    """Living children of this process."""
    found, me = [], os.getpid()
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                fields = Path("/proc", entry, "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[1]) == me and fields[0] not in "ZX":
                found.append(int(entry))
    return found
