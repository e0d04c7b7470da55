"""From the fork to the exit: makes a process that elastic started into a rank, and ends it in an orderly way."""

from __future__ import annotations

import faulthandler
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch.distributed as dist

from dsqjob.engine.execute import in_words
from dsqjob.engine.parent import die_with_parent
from dsqjob.errors import BugError, DsqjobError, Interrupted, PeerError
from dsqjob.gang.board import ASKED, LEAVE, Board
from dsqjob.gang.ending import Ending
from dsqjob.gang.node import Limits, Node, Places
from dsqjob.gang.rank import Rank

_BEAT = 0.5
_HICCUP = 2.0
_LOST = re.compile(r"gloo|nccl|tcpstore", re.IGNORECASE)
LOST = "collective-failed"
"""The id of a rank whose peers vanished: a victim, most often."""


def run_rank(
    work: Callable[[Rank], None], node: Node, limits: Limits, board: Board, places: Places, stage: str, supervisor: int
) -> None:
    """The whole life of a forked rank: leaves its last word on the board, and exits with its code where that is not 0.

    ``supervisor`` is the process that forked it.
    """
    local = int(os.environ["LOCAL_RANK"])
    die_with_parent(signal.SIGKILL)
    # too late, or a second time: elastic starts ranks anew where it thinks that nodes changed
    if os.getppid() != supervisor or board.word >= ASKED or board.read(local).pid:
        os._exit(Interrupted.exit_code)
    board.hello(local, os.getpid())
    _hear(board)
    log = places.logs / f"rank{node.rank(local)}.log"
    error: DsqjobError | None = None
    rank: Rank | None = None
    try:
        _write_to(log, node)
        rank = Rank(node, local, board, places.events, stage, limits.rendezvous)
        threading.Thread(target=_beat, args=(rank, board, limits.silence), name="heartbeat", daemon=True).start()
        os.environ.update(RANK=str(rank.index), WORLD_SIZE=str(rank.size), LOCAL_RANK=str(local))
        work(rank)
    except DsqjobError as known:
        error = known
        print(known, file=sys.stderr)
    except BaseException as unknown:  # the entry of a process: everything becomes an exit code and words
        traceback.print_exc()
        error = _worded(unknown, log)
    phase, host = (rank.phase_name, rank.host) if rank is not None else ("start", socket.gethostname())
    place: dict[str, Any] = {"rank": node.rank(local), "host": host, "phase": phase}
    if error is None:
        board.end(local, Ending(0, **place))
    else:
        board.end(local, Ending.of(error, victim=error.id == LOST, **place))
    sys.stdout.flush()
    sys.stderr.flush()
    if error is not None:  # at once: destructors of process groups may wait for ranks that are gone
        os._exit(error.exit_code)


def _worded(error: BaseException, log: Path) -> DsqjobError:
    if isinstance(error, OSError) and (worded := in_words(error)) is not None:
        return worded
    text = str(error)
    if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and _LOST.search(text)):
        first = next((line for line in text.splitlines() if line.strip()), type(error).__name__)
        return PeerError(LOST, f"a collective failed: {first[:300]}", where=log, way_out="see other ranks' logs")
    return BugError("bug", f"{type(error).__name__}: {text}", where=log, way_out="report this, with the rank's log")


def _hear(board: Board) -> None:
    """Signals to a whole process group are the supervisor's to judge. Elastic sends SIGTERM to all when one rank died:
    it counts only once the supervisor said so."""

    def leave(_number: int, _frame: FrameType | None) -> None:
        if board.word >= LEAVE:
            raise Interrupted("interrupted", "told to leave", way_out="run the same command again: it resumes")

    for number in (signal.SIGINT, signal.SIGUSR2, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, leave)
    signal.siginterrupt(signal.SIGTERM, False)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def _write_to(log: Path, node: Node) -> None:
    """A log of one's own; SIGUSR1 writes the stacks of all threads to it."""
    log.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    os.close(fd)
    faulthandler.register(signal.SIGUSR1, file=2, all_threads=True)
    print(f"--- attempt {node.attempt} on {socket.gethostname()}, process {os.getpid()}, {time.ctime()}", flush=True)


def _beat(rank: Rank, board: Board, silence: float) -> None:
    """Says that this rank lives, and ends it where its supervisor was stopped: nobody else would."""
    floor = last = time.monotonic()
    while True:
        time.sleep(min(_BEAT, silence / 6))
        board.beat(rank.local)
        now = time.monotonic()
        if now - last > _HICCUP:
            floor = now
        last = now
        if now - max(board.pulsed, floor) > silence:
            error = PeerError(
                "node-silent", f"the supervisor on {rank.host} gives no sign of life: stopped by somebody"
            )
            print(error, file=sys.stderr, flush=True)
            place: dict[str, Any] = {"rank": rank.index, "host": rank.host, "phase": rank.phase_name}
            board.end(rank.local, Ending.of(error, victim=True, **place))
            os._exit(error.exit_code)
