"""Where a supervisor stands in its gang, and how long it waits. Light: no torch."""

from __future__ import annotations

import re
import socket
from dataclasses import dataclass
from pathlib import Path

from dsqjob.errors import PeerError, UsageError

_ADDRESS = re.compile(r"(\[[^\s\[\]]+\]|[^\s:/\[\]]+):([0-9]{1,5})")
_ATTEMPT = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class Node:
    """Node ``index`` of ``nodes``, with ``ranks`` ranks each; ``rendezvous`` is HOST:PORT on node 0. ``attempt`` is the
    same on all nodes and new for each start; ``job`` tells gangs of other jobs apart."""

    index: int
    nodes: int
    ranks: int
    rendezvous: str
    attempt: str
    job: str

    @property
    def size(self) -> int:
        """Ranks of the whole gang."""
        return self.nodes * self.ranks

    def rank(self, local: int) -> int:
        """The number in the whole gang of this node's rank ``local``."""
        return self.index * self.ranks + local

    @property
    def address(self) -> tuple[str, int]:
        """Host and port of the rendezvous."""
        host, _, port = self.rendezvous.rpartition(":")
        return host.strip("[]"), int(port)

    def look_up(self) -> None:
        """PeerError ``rendezvous-host`` where this machine does not know the host of the rendezvous."""
        host, port = self.address
        try:
            socket.getaddrinfo(host, port or None, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise PeerError(
                "rendezvous-host",
                f"{socket.gethostname()} (node {self.index}) cannot look up {host}: {error}",
                where=f"--rendezvous {self.rendezvous}",
                way_out="name node 0 as every node knows it, or by its address",
            ) from None


def check_meeting(rendezvous: str, attempt: str, nodes: int) -> None:
    """UsageError ``rendezvous-invalid``, ``attempt-invalid``. Port 0, any free one, is for a node that is alone."""
    match = _ADDRESS.fullmatch(rendezvous)
    least = 0 if nodes == 1 else 1
    if match is None or not least <= int(match[2]) < 1 << 16:
        raise UsageError(
            "rendezvous-invalid",
            f"{rendezvous!r} is no HOST:PORT with a port from {least} to 65535",
            where="--rendezvous",
            way_out="name node 0's host and a free port of it, such as node-a:29400",
        )
    if _ATTEMPT.fullmatch(attempt) is None:
        raise UsageError(
            "attempt-invalid",
            f"{attempt!r} cannot name an attempt",
            where="--attempt",
            way_out="use up to 64 letters, digits, dots, dashes, such as 2",
        )


@dataclass(frozen=True)
class Places:
    """Folders: ``shared`` of this attempt on the shared file system, ``logs`` of the ranks, ``events``."""

    shared: Path
    logs: Path
    events: Path


@dataclass(frozen=True)
class Limits:
    """Seconds: until all nodes have arrived; without a sign of life of a rank or node; from being asked to stop to
    being killed."""

    rendezvous: float = 300
    silence: float = 30
    grace: float = 10
