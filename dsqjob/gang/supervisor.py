"""The supervisor of a node: starts its ranks through torch's elastic API, watches them, and ends with all other nodes.

Elastic starts, joins and numbers processes; it does not tell why one ended, waits long for ranks that cannot end, and
hears signals that are ours. So ranks leave their last words in memory, the supervisor watches that memory and the other
nodes' files, and elastic runs in a thread.
"""

from __future__ import annotations

import math
import os
import signal
import socket
import threading
import time
from collections.abc import Callable

from dsqjob.engine.events import EventLog
from dsqjob.engine.execute import StopRequest, in_words
from dsqjob.errors import DsqjobError, Interrupted, PeerError
from dsqjob.gang.agent import Agent
from dsqjob.gang.board import ASKED, LEAVE, Board
from dsqjob.gang.ending import Ending, Report, verdict
from dsqjob.gang.entry import run_rank
from dsqjob.gang.node import Limits, Node, Places
from dsqjob.gang.peers import Peers
from dsqjob.gang.rank import Rank
from dsqjob.gang.watch import Ranks

Work = Callable[[Rank], None]
_TICK = 0.1
_PULSE = 0.5
_SETTLE = 1.0
_SETTLE_VICTIMS = 2.0
"""Seconds for the other ranks to say how they end, after the first bad end. Victims often end before the culprit has:
the kernel closes a dying process's sockets before it tells of its death."""
_BRIEF = 2.0
"""Seconds for ranks that have not yet met to stop: they wait for each other, and have nothing to lose."""
_LEAVE = 1.0
_GONE = 5.0
_WORD = 4.0
_LINGER = 10.0
"""Seconds for which a node that failed early waits for the others to come and hear of it."""
_MEET = 30.0
_HARD = 10.0


def supervise(
    prepare: Callable[[], Work],
    node: Node,
    limits: Limits,
    places: Places,
    *,
    log: EventLog,
    stop: StopRequest,
    stage: str = "",
) -> None:
    """Call ``prepare`` here, and the work that it makes in every rank; return when the ranks of all nodes ended well.

    Raises the error that the gang ended with, of the same exit code on every node: what ``prepare`` or a rank raised;
    PeerError ``rank-died``, ``rank-silent``, ``phase-timeout``, ``node-missing``, ``node-silent``, ``node-cut-off``,
    ``rendezvous-host``, ``rendezvous-failed``, ``collective-failed``; UsageError ``node-twice``; Interrupted when
    ``stop`` was asked here or elsewhere. No rank is left when this returns. Where the process hangs, ``stop`` ends it
    some seconds after its ranks' grace.
    """
    stop.grace = limits.grace + _HARD
    _Supervisor(node, limits, places, log, stop, stage).run(prepare)


class _Supervisor:
    def __init__(
        self,
        node: Node,
        limits: Limits,
        places: Places,
        log: EventLog,
        stop: StopRequest,
        stage: str,
    ) -> None:
        self._node, self._limits, self._places = node, limits, places
        self._log, self._stop, self._stage = log, stop, stage
        self._host, self._begun = socket.gethostname(), time.monotonic()
        self._board = Board(node.ranks)
        self._peers = Peers(places.shared, node, self._host, limits)
        self._ranks = Ranks(node, limits, self._board, places.logs, self._host)
        self._meet = max(_MEET, limits.rendezvous)
        self._agent = Agent(run_rank, node, self._meet)
        self._asked, self._asked_at = "", math.inf
        self._own: list[Ending] = []
        """Ends of this node that are no rank's."""
        self._closed = threading.Event()

    def run(self, prepare: Callable[[], Work]) -> None:
        made: list[Work] = []
        threading.Thread(target=self._pulse, name="pulse", daemon=True).start()
        self._log.write("gang", stage=self._stage, attempt=self._node.attempt, node=self._node.index)
        try:
            self._guarded(lambda: self._peers.open(self._stopping))
            self._guarded(self._node.look_up)
            if not self._own and not self._stopping():
                self._guarded(lambda: made.append(prepare()))
            if not self._own and self._gathered():
                self._peers.form()
                self._ranks.expect(self._meet)
                self._agent.start(*made, self._node, self._limits, self._board, self._places, self._stage, os.getpid())
                self._watch()
            self._end_ranks()
            error = self._conclude()
        finally:
            self._board.say(LEAVE)
            self._ranks.kill(signal.SIGKILL)
            self._peers.close()
            self._closed.set()
            self._agent.release(_LEAVE)
        if error is not None:
            self._log.write("gang-ended", stage=self._stage, attempt=self._node.attempt, code=error.exit_code)
            raise error

    def _pulse(self) -> None:
        while not self._closed.wait(_PULSE):
            self._board.pulse()

    def _guarded(self, step: Callable[[], None]) -> None:
        """A step before the ranks: its error is told to all nodes."""
        try:
            step()
        except DsqjobError as error:
            if not (self._stopping() and isinstance(error, Interrupted)):
                self._own.append(Ending.of(error, host=self._host))
        except OSError as error:
            worded = in_words(error)
            if worded is None:
                raise
            self._own.append(Ending.of(worded, host=self._host))

    def _gathered(self) -> bool:
        """Whether every node arrived."""
        while missing := self._peers.missing:
            if self._stopping() or self._others_ended() or self._is_twice():
                return False
            if time.monotonic() - self._begun > self._limits.rendezvous:
                self._missing(missing)
                return False
            time.sleep(_TICK)
        return not self._stopping() and not self._others_ended()

    def _watch(self) -> None:
        """Until every rank ended, or those that did not had their time."""
        deadline, word = math.inf, ASKED
        while not self._ranks.over:
            self._look()
            now = time.monotonic()
            if self._stopping():
                if self._board.word < ASKED:
                    self._board.say(ASKED)
                    deadline = now + (self._limits.grace if self._ranks.working else min(_BRIEF, self._limits.grace))
                if not self._ranks.living():
                    return
            elif self._failing():
                victims = all(end.victim for end in [*self._own, *self._ranks.bad])
                deadline = min(deadline, now + (_SETTLE_VICTIMS if victims else _SETTLE))
            if now > deadline:
                if word == LEAVE or not self._asked:
                    return
                word, deadline = LEAVE, now + _LEAVE
                self._board.say(LEAVE)
                self._ranks.kill(signal.SIGTERM)
            time.sleep(_TICK)

    def _look(self) -> None:
        for end in self._ranks.look():
            self._log.write("rank-ended", rank=end.rank, code=end.code, id=end.id, what=end.what, phase=end.phase)

    def _stopping(self) -> str:
        """Which signal asked the gang to stop, and where."""
        if not self._asked:
            if self._stop.signal is not None:
                self._asked = f"{self._stop.cause} on {self._host} (node {self._node.index})"
            self._asked = self._asked or self._peers.asked
            if self._asked:
                self._asked_at = time.monotonic()
                self._peers.announce(self._asked)
                self._log.write("gang-stopping", stage=self._stage, signal=self._asked)
        return self._asked

    def _failing(self) -> bool:
        """Whether the gang cannot end well any more."""
        return bool(
            self._is_twice() or self._own or self._ranks.bad or self._others_ended() or self._cut_off()
            or self._agent_failed()
        )  # fmt: skip

    def _is_twice(self) -> bool:
        if (error := self._peers.twice) is not None and not self._own:
            self._own.append(Ending.of(error, host=self._host))
        return error is not None

    def _others_ended(self) -> bool:
        return any(not report.well for report in self._peers.reports.values()) or bool(self._peers.lost)

    def _cut_off(self) -> bool:
        if not (seconds := self._peers.cut_off):
            return False
        what = f"node {self._node.index} ({self._host}): the shared file system has not answered for {seconds:.0f} s"
        self._fail("node-cut-off", what, str(self._places.shared), "look at the mount; the same command resumes")
        return True

    def _agent_failed(self) -> bool:
        """Whether elastic gave up. What became of ranks is seen better by others, but for one without a first word."""
        if not self._agent.over.is_set() or self._ranks.over:
            return False
        if (died := self._agent.died()) is not None:
            self._ranks.died(*died)
            return True
        what = f"node {self._node.index} ({self._host}), rendezvous at {self._node.rendezvous}: {self._agent.reasons()}"
        way_out = "check that this port of node 0 is free and reachable from every node, or name another one"
        self._fail("rendezvous-failed", what, self._node.rendezvous, way_out, victim=self._ranks.begun)
        return True

    def _missing(self, nodes: list[int]) -> None:
        what = f"node {', '.join(map(str, nodes))} did not arrive within {self._limits.rendezvous:g} s"
        self._fail(
            "node-missing",
            f"{what} (here: node {self._node.index} on {self._host})",
            str(self._places.shared),
            "start a supervisor on each node, with the same --attempt, and check that all see this folder",
        )

    def _fail(self, id: str, what: str, where: str, way_out: str, *, victim: bool = False) -> None:
        if not self._own:
            error = PeerError(id, what, where=where, way_out=way_out)
            self._own.append(Ending.of(error, host=self._host, victim=victim))

    def _end_ranks(self) -> None:
        """No process is left after this, unless the kernel itself cannot end it."""
        self._look()
        self._board.say(LEAVE)
        deadline = time.monotonic() + _GONE
        well = self._ranks.over and not self._ranks.bad
        while (left := self._ranks.living()) and time.monotonic() < deadline:
            if not well or time.monotonic() > deadline - _GONE / 2:
                self._ranks.kill(signal.SIGKILL)
            time.sleep(_TICK / 2)
        if left:
            self._log.write("rank-stuck", stage=self._stage, pids=left)
        if self._ranks.unclear and self._agent.over.wait(_LEAVE) and (died := self._agent.died()) is not None:
            self._ranks.clear(*died)

    def _conclude(self) -> DsqjobError | None:
        """Tell how this node's part ended, learn how the others' did, and end as all do."""
        mine = self._report()
        self._peers.publish(mine)
        deadline = math.inf
        while self._peers.arrived and time.monotonic() < min(
            deadline, self._asked_at + self._limits.grace + _LEAVE + _WORD
        ):
            lingering = (
                self._own
                and self._peers.missing
                and time.monotonic() < self._begun + min(_LINGER, self._limits.rendezvous)
            )
            if self._peers.told and not self._peers.awaited and (self._stopping() or not lingering):
                break
            if deadline == math.inf and (not mine.well or self._others_ended() or self._cut_off()):
                deadline = time.monotonic() + self._limits.silence + self._limits.grace + _WORD
            self._stopping()
            time.sleep(_TICK)
        mine = self._report()
        return verdict([mine, *self._peers.reports.values()], self._lost())

    def _report(self) -> Report:
        well = self._ranks.over and not self._ranks.bad and not self._own
        return Report(self._asked, (*self._own, *self._ranks.bad), well)

    def _lost(self) -> list[Ending]:
        """Ends of nodes that could not say so themselves."""
        endings = []
        for index, known in self._peers.lost.items():
            host = self._peers.hosts[index]
            what = f"node {index} ({host}) {known}: its supervisor or machine died"
            error = PeerError("node-silent", what, where=host, way_out="look at that machine; the same command resumes")
            endings.append(Ending.of(error, host=host))
        return endings
