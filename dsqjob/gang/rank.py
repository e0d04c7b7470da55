"""What a rank has: its number, its phases and heartbeat, its way into the gang's process group."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from dsqjob.engine.events import EventLog
from dsqjob.engine.execute import in_words
from dsqjob.errors import BugError, DsqjobError, Interrupted, PeerError
from dsqjob.gang.board import Board, Sign
from dsqjob.gang.ending import Ending
from dsqjob.gang.node import Node, Places

_BEAT = 0.5
_PR_SET_PDEATHSIG = 1
_SPARE = 30.0
"""Seconds that collectives outlast a phase's limit: the supervisor, which can say more, comes first."""


class Rank:
    """A rank of a gang, numbered ``node.index * node.ranks + local``."""

    def __init__(self, node: Node, local: int, board: Board, events: Path) -> None:
        self.node, self.local = node, local
        self.index, self.size = node.index * node.ranks + local, node.size
        self.host = socket.gethostname()
        self.log = EventLog(events, worker=f"rank {self.index}/{self.size}", host=self.host)
        self._board, self._stop = board, threading.Event()
        self._limit = 60.0
        self.phase_name = "start"
        self._write({})
        signal.signal(signal.SIGTERM, lambda *_: self._stop.set())
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    def phase(self, name: str, limit: float) -> None:
        """Enter a phase that may last ``limit`` seconds without a ``beat``; collectives time out with it."""
        self.phase_name, self._limit = name, limit
        self._write({})
        if self.index == 0:
            self.log.write("phase", stage=self.stage, phase=name)
        if dist.is_initialized():
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=limit + _SPARE), None)

    stage = ""
    """Under which name events are told."""

    def beat(self, **progress: Any) -> None:
        """Progress within the phase, such as ``batch=3``: its clock begins again."""
        self._write(progress)

    def check(self) -> None:
        """Raises Interrupted once this rank is asked to stop."""
        if self._stop.is_set():
            raise Interrupted("interrupted", "asked to stop", way_out="run the same command again: it resumes")

    def join(self, backend: str, device: Any = None) -> None:
        """Meet all ranks in torch's default process group; nothing to do for a gang of one."""
        if self.size == 1:
            return
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        wait = timedelta(seconds=self._limit)
        store = dist.TCPStore(address, port, is_master=False, timeout=wait, wait_for_workers=False)
        prefix = dist.PrefixStore(f"gang/{self.node.job}/{self.node.attempt}", store)
        dist.init_process_group(
            backend, store=prefix, rank=self.index, world_size=self.size, timeout=wait, device_id=device
        )

    def leave(self) -> None:
        """Leave the process group, as well as that goes."""
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()

    def _write(self, progress: dict[str, Any]) -> None:
        now = time.monotonic()
        self._board.write(self.local, Sign(os.getpid(), now, now, self._limit, self.phase_name, progress))

    def _beat(self) -> None:
        while True:
            time.sleep(_BEAT)
            self._board.beat(self.local)


def run_rank(work: Callable[[Rank], None], node: Node, board: Board, places: Places, endings: Path, stage: str) -> None:
    """The whole life of a forked rank: leaves an ``Ending``, and exits with its code where that is not 0."""
    local = int(os.environ["LOCAL_RANK"])
    _separate(places.logs / f"rank{node.index * node.ranks + local}.log", node)
    rank = Rank(node, local, board, places.events)
    rank.stage = stage
    os.environ.update(RANK=str(rank.index), WORLD_SIZE=str(rank.size), LOCAL_RANK=str(local))
    error: DsqjobError | None = None
    try:
        work(rank)
    except DsqjobError as known:
        error = known
    except BaseException as unknown:  # the entry of a process: everything becomes an exit code and words
        traceback.print_exc()
        error = _worded(unknown)
    Ending.of(rank, error).write(endings)
    sys.stdout.flush()
    sys.stderr.flush()
    if error is not None:  # at once: destructors of process groups may wait for ranks that are gone
        os._exit(error.exit_code)


def _worded(error: BaseException) -> DsqjobError:
    if isinstance(error, OSError) and (worded := in_words(error)) is not None:
        return worded
    text = str(error)
    if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and ("gloo" in text or "NCCL" in text)):
        first = next((line for line in text.splitlines() if line.strip()), type(error).__name__)
        return PeerError("collective-failed", f"a collective failed: {first[:300]}", way_out="see other ranks' logs")
    return BugError("bug", f"{type(error).__name__}: {text}", way_out="report this, with the rank's log")


def _separate(log: Path, node: Node) -> None:
    """Die with the supervisor, listen to nobody else, write to a log of one's own."""
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(PeerError.exit_code)
    for number in (signal.SIGINT, signal.SIGUSR2):  # meant for the supervisor
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM,))
    log.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    print(f"--- attempt {node.attempt} on {socket.gethostname()}, process {os.getpid()}, {time.ctime()}", flush=True)
