"""Gangs of toy ranks on this machine: starting, looking, and what must hold at every end."""

from __future__ import annotations

import itertools
import json
import signal
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.waiting import wait_until
from tests.warm import Started, Warm

_NUMBERS = itertools.count()
LIMITS = {"rendezvous": 20.0, "silence": 4.0, "grace": 3.0}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Gang:
    """``nodes`` supervisors with ``ranks`` ranks each."""

    def __init__(
        self, warm: Warm, folder: Path, what: str, nodes: int, ranks: int, *, limits: dict[str, float] | None = None,
        attempt: str = "0", job: str = "", port: int | None = None, **options: Any,
    ) -> None:  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        self.warm, self.folder, self.what, self.options = warm, folder, what, options
        self.nodes, self.ranks, self.limits = nodes, ranks, {**LIMITS, **(limits or {})}
        self.node = {
            "nodes": nodes,
            "ranks": ranks,
            "rendezvous": f"127.0.0.1:{port if port is not None else free_port()}",
            "attempt": attempt,
            "job": job or f"job{next(_NUMBERS)}",
        }
        self.supervisors: dict[int, Started] = {}

    def start(self, order: Sequence[int] | None = None, pause: float = 0.0) -> Gang:
        for index in order if order is not None else range(self.nodes):
            self.start_node(index)
            time.sleep(pause)
        return self

    def start_node(self, index: int) -> Started:
        said = self.folder / f"said-{index}"
        arguments = (self.what, str(self.folder), {**self.node, "index": index}, self.limits, self.options)
        self.supervisors[index] = self.warm.begin("tests.gang.works:supervisor", *arguments, said=said)
        return self.supervisors[index]

    def ready(self, name: str = "ready") -> Gang:
        """Until all ranks have left that trace."""
        total = self.nodes * self.ranks
        wait_until(lambda: all((self.folder / f"{name}-{rank}").exists() for rank in range(total)))
        return self

    def pid(self, rank: int) -> int:
        return int((self.folder / f"pid-{rank}").read_text())

    def trace(self, name: str) -> list[str]:
        return [(self.folder / f"{name}-{rank}").read_text() for rank in range(self.nodes * self.ranks)]

    def log(self, rank: int) -> str:
        return (self.folder / "logs" / str(self.node["job"]) / f"rank{rank}.log").read_text()

    def events(self) -> list[dict[str, Any]]:
        lines = [line for path in (self.folder / "events").glob("*.jsonl") for line in path.read_text().splitlines()]
        return [json.loads(line) for line in lines]

    def ends(self, *codes: int, within: float, nodes: Sequence[int] | None = None) -> list[str]:
        """Every node ends with one of ``codes``, the same, in time, leaving nothing; what each said first."""
        begun, found = time.monotonic(), {}
        for index in nodes if nodes is not None else sorted(self.supervisors):
            found[index] = self.supervisors[index].wait(within)
        seconds = time.monotonic() - begun
        said = {index: self.supervisors[index].said() for index in found}
        assert set(found.values()) == {codes[0]} if len(codes) == 1 else set(found.values()) <= set(codes), (
            found,
            said,
        )
        assert seconds < within, (seconds, said)
        self.nothing_left(list(found))
        return [said[index].partition("\n")[0] for index in found]

    def nothing_left(self, nodes: Sequence[int]) -> None:
        wait_until(lambda: not any(self.supervisors[index].processes() for index in nodes), 5)

    def signal(self, index: int, number: signal.Signals) -> None:
        self.supervisors[index].signal(number)

    def kill_all(self) -> None:
        for supervisor in self.supervisors.values():
            supervisor.kill_all()
