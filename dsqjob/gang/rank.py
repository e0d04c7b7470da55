"""What a rank has: its number, its phases and heartbeat, its way into the gang's process group."""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from dsqjob.engine.events import EventLog
from dsqjob.errors import Interrupted
from dsqjob.gang.board import ASKED, Board
from dsqjob.gang.node import Node

_SPARE = 30.0
"""Seconds that collectives outlast a phase's limit: the supervisor, which can say more, comes first."""


class Rank:
    """A rank of a gang, numbered ``node.index * node.ranks + local``; ``stage`` is the name for events."""

    def __init__(self, node: Node, local: int, board: Board, events: Path, stage: str, limit: float) -> None:
        self.node, self.local, self.stage = node, local, stage
        self.index, self.size = node.rank(local), node.size
        self.host = socket.gethostname()
        self.log = EventLog(events, worker=f"rank {self.index}/{self.size}", host=self.host)
        self._board, self._limit = board, limit
        self.phase_name = "start"
        self.beat()

    def phase(self, name: str, limit: float) -> None:
        """Enter a phase that may last ``limit`` seconds without a ``beat``; collectives time out with it."""
        self.phase_name, self._limit = name, limit
        self.beat()
        if self.index == 0:
            self.log.write("phase", stage=self.stage, phase=name)
        if dist.is_initialized():
            dist.distributed_c10d._set_pg_timeout(self._timeout(), None)

    def beat(self, **progress: Any) -> None:
        """Progress within the phase, such as ``batch=3``: its clock begins again."""
        self._board.note(self.local, self.phase_name, self._limit, progress)

    def check(self) -> None:
        """Raises Interrupted once this rank is asked to stop."""
        if self._board.word >= ASKED:
            raise Interrupted("interrupted", "asked to stop", way_out="run the same command again: it resumes")

    def join(self, backend: str, device: Any = None) -> None:
        """Meet all ranks in torch's default process group, under our numbers and not those of the elastic agents;
        nothing to do for a gang of one."""
        if self.size == 1:
            return
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        wait = self._timeout()
        store = dist.TCPStore(address, port, is_master=False, timeout=wait, wait_for_workers=False)
        prefix = dist.PrefixStore(f"gang/{self.node.job}/{self.node.attempt}", store)
        dist.init_process_group(
            backend, store=prefix, rank=self.index, world_size=self.size, timeout=wait, device_id=device
        )

    def leave(self) -> None:
        """Leave the process group once all are ready to."""
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()

    def _timeout(self) -> timedelta:
        return timedelta(seconds=self._limit + _SPARE)
