"""What toy ranks do, and a supervisor for them; run as functions of the warm parent."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dsqjob.engine.events import EventLog
from dsqjob.engine.execute import StopRequest
from dsqjob.errors import DataError, DsqjobError
from dsqjob.gang import rank as rank_module
from dsqjob.gang.node import Limits, Node, Places
from dsqjob.gang.preflight import agree, probe_storage
from dsqjob.gang.rank import Rank
from dsqjob.gang.supervisor import supervise


class Work:
    """What a rank does is chosen by name; ``folder`` is for traces that tests look at."""

    def __init__(self, what: str, folder: str, options: dict[str, Any]) -> None:
        self.what, self.folder, self.options = what, Path(folder), options

    def __call__(self, rank: Rank) -> None:
        torch.set_num_threads(1)
        self.mark(rank, "pid", os.getpid())
        getattr(self, f"do_{self.what}")(rank)

    def mark(self, rank: Rank, name: str, value: object = "") -> None:
        aside = self.folder / f".{name}-{rank.index}"
        aside.write_text(str(value))
        aside.rename(self.folder / f"{name}-{rank.index}")

    def is_culprit(self, rank: Rank) -> bool:
        return rank.index == self.options.get("culprit", 0)

    def do_sum(self, rank: Rank) -> None:
        """An all-reduce under our numbers."""
        rank.join("gloo")
        rank.phase("batch", 20)
        agree(rank, {"software": "1"}, torch.device("cpu"))
        value = torch.tensor([float(rank.index + 1)])
        if dist.is_initialized():
            dist.all_reduce(value)
            assert (dist.get_rank(), dist.get_world_size()) == (rank.index, rank.size)
        numbers = [os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")]
        self.mark(rank, "sum", f"{int(value)} {rank.node.index} {' '.join(numbers)}")
        time.sleep(self.options.get("linger", 0) * rank.node.index)
        rank.leave()

    def do_load(self, rank: Rank) -> None:
        """The culprit loads for ever, without a collective; the others wait for it in a barrier."""
        rank.join("gloo")
        rank.phase("load", self.options.get("limit", 60))
        if self.is_culprit(rank):
            self.mark(rank, "ready")
            while True:
                rank.check()
                time.sleep(0.05)
        self.mark(rank, "ready")
        dist.barrier()

    def do_hang(self, rank: Rank) -> None:
        """The culprit sleeps in a batch without asking whether it shall stop; the others wait in a collective."""
        rank.join("gloo")
        rank.phase("batch", self.options.get("limit", 60))
        rank.beat(batch=3)
        self.mark(rank, "ready")
        if self.is_culprit(rank):
            time.sleep(1000)
        dist.all_reduce(torch.ones(1))

    def do_never(self, rank: Rank) -> None:
        """A collective that never completes: all but one are in it, and that one says that it advances."""
        rank.join("gloo")
        rank.phase("batch", self.options.get("limit", 60))
        self.mark(rank, "ready")
        while self.is_culprit(rank):
            rank.beat()
            time.sleep(0.05)
        dist.all_reduce(torch.ones(1))

    def do_reduce(self, rank: Rank) -> None:
        """Collective after collective, and looks whether to stop in between."""
        rank.join("gloo")
        rank.phase("batch", 60)
        self.mark(rank, "ready")
        data = torch.ones(1 << 16)
        while True:
            rank.check()
            rank.beat()
            dist.all_reduce(data)
            time.sleep(0.01)

    def do_save(self, rank: Rank) -> None:
        """The culprit dies in the middle of a save."""
        rank.join("gloo")
        rank.phase("save", 60)
        dist.barrier()
        if self.is_culprit(rank):
            os.kill(os.getpid(), signal.SIGKILL)
        dist.barrier()

    def do_deaf(self, rank: Rank) -> None:
        """Never looks whether to stop, and leaves only when killed."""
        rank.phase("batch", 60)
        self.mark(rank, "ready")
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(1000)

    def do_leave_a_thread(self, rank: Rank) -> None:
        """Ends well, but for a thread that keeps its process alive."""
        rank.phase("batch", 60)
        threading.Thread(target=time.sleep, args=(1000,)).start()

    def do_leave_silently(self, rank: Rank) -> None:
        """A process that ends behind Python's back."""
        rank.phase("batch", 60)
        os._exit(0)

    def do_bad_data(self, rank: Rank) -> None:
        rank.join("gloo")
        rank.phase("load", 60)
        dist.barrier()
        if self.is_culprit(rank):
            time.sleep(0.2)
            raise DataError("tensor-missing", "a tensor is missing", where="a file", way_out="get it again")
        dist.all_reduce(torch.ones(1))

    def do_bug(self, rank: Rank) -> None:
        rank.join("gloo")
        rank.phase("load", 60)
        dist.barrier()
        if self.is_culprit(rank):
            raise ZeroDivisionError("so it is")
        dist.all_reduce(torch.ones(1))

    def do_disagree(self, rank: Rank) -> None:
        rank.join("gloo")
        rank.phase("preflight", 60)
        agree(rank, {"torch": "1", "modelopt": "2" if self.is_culprit(rank) else "1"}, torch.device("cpu"))

    def do_outlive(self, rank: Rank) -> None:
        """A collective that outlives its phase: the group's timeout ends it, where the supervisor does not."""
        rank_module._SPARE = 0.0
        rank.join("gloo")
        rank.phase("load", 60)
        dist.barrier()
        rank.phase("batch", 1.0)
        if self.is_culprit(rank):
            while True:
                rank.beat()
                time.sleep(0.05)
        threading.Thread(target=self.beat, args=(rank,), daemon=True).start()
        dist.all_reduce(torch.ones(1))

    @staticmethod
    def beat(rank: Rank) -> None:
        while True:
            rank.beat()
            time.sleep(0.1)


def supervisor(what: str, folder: str, node: dict[str, Any], limits: dict[str, Any], options: dict[str, Any]) -> None:
    """One node, as ``dsqjob worker calibrate`` starts it: an error is printed and becomes the exit code."""
    if "as_host" in options:
        host = f"host{node['index']}"
        socket.gethostname = lambda: host  # type: ignore[method-assign]
    place = Node(**node)
    shared = Path(options.get("shared", folder + "/shared"), place.job, place.attempt)
    places = Places(shared, Path(folder, "logs", place.job), Path(folder, "events"))
    log = EventLog(places.events, worker=f"node{place.index}", host=socket.gethostname())
    stop = StopRequest()

    def prepare() -> Work:
        if "probe" in options and place.index == options["culprit"]:
            probe_storage(Path(options["probe"]), options.get("need", 0))
        return Work(what, folder, options)

    with stop.listening():
        try:
            if "wordless" in options:
                _wordless(options["wordless"])
            if options.get("hang_main") == place.index:
                _hang_main_after(Path(folder))
            supervise(prepare, place, Limits(**limits), places, log=log, stop=stop, stage="calibrate")
        except DsqjobError as error:
            print(error, file=sys.stderr, flush=True)
            os._exit(error.exit_code)
    print("well", flush=True)


def _hang_main_after(folder: Path) -> None:
    """Once the ranks are ready, the supervisor's main thread sleeps for ever, as in an fsync that does not return."""
    from dsqjob.gang import supervisor as module

    module._HARD = 3.0
    real = module._Supervisor._look

    def look(self: Any) -> None:
        real(self)
        if (folder / "ready-0").exists():
            (folder / "hung").touch()
            while True:
                time.sleep(1)

    module._Supervisor._look = look  # type: ignore[method-assign]


def _wordless(culprit: int) -> None:
    """A rank that hangs before its first word, as in the initialisation of a broken GPU."""
    from dsqjob.gang import entry

    real = entry.Board.hello

    def hello(self: Any, local: int, pid: int) -> None:
        if int(os.environ["RANK"]) == culprit:
            time.sleep(1000)
        real(self, local, pid)

    entry.Board.hello = hello  # type: ignore[method-assign]
