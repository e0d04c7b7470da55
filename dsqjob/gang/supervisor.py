"""The supervisor of a node: starts its ranks through torch's elastic API, watches them, and ends with all other nodes.

Elastic starts, joins and numbers processes; it does not tell why one ended (only the first death, an uncaught
exception as 1), waits long for ranks that cannot end, and hears signals that are ours. So ranks leave their endings in
files, the supervisor watches a page of memory and the other nodes' folder, and elastic runs in a thread.
"""

from __future__ import annotations

import os
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous.api import RendezvousError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from dsqjob.engine.events import EventLog
from dsqjob.engine.execute import StopRequest
from dsqjob.errors import Interrupted, PeerError
from dsqjob.gang.board import Board, Sign
from dsqjob.gang.ending import Ending, worst
from dsqjob.gang.node import Limits, Node, Places
from dsqjob.gang.peers import Peers
from dsqjob.gang.rank import Rank, run_rank

_TICK = 0.2
_LATE = 15.0
"""Seconds that elastic is given to notice what the supervisor already knows."""
_FOREIGN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


def supervise(
    work: Callable[[Rank], None],
    node: Node,
    limits: Limits,
    places: Places,
    *,
    log: EventLog,
    stop: StopRequest,
    stage: str = "",
) -> None:
    """Run ``work`` in every rank of this node; return when the ranks of all nodes ended well.

    Raises the error that the gang ended with, of the same exit code on every node: what ranks raised; PeerError
    ``rank-died``, ``rank-silent``, ``phase-timeout``, ``node-missing``, ``node-silent``, ``collective-failed``;
    Interrupted when ``stop`` was asked here or elsewhere. No rank is left when this returns.
    """
    _Supervisor(work, node, limits, places, log, stop, stage).run()


class _Supervisor:
    def __init__(
        self,
        work: Callable[[Rank], None],
        node: Node,
        limits: Limits,
        places: Places,
        log: EventLog,
        stop: StopRequest,
        stage: str,
    ) -> None:
        self.work, self.node, self.limits, self.log, self.stop, self.stage = work, node, limits, log, stop, stage
        self.places = places
        self.board = Board(node.ranks)
        self.peers = Peers(places.shared, node, limits)
        self.host = socket.gethostname()
        self._failure: BaseException | None = None
        self._asked = False

    def run(self) -> None:
        _prepare_environment()
        self.log.write("gang", stage=self.stage, attempt=self.node.attempt, node=self.node.index)
        with tempfile.TemporaryDirectory(prefix="dsqjob-gang-") as folder:
            self.endings = Path(folder)
            thread = threading.Thread(target=self._elastic, name="elastic", daemon=True)
            thread.start()
            try:
                cause = self._watch(thread)
                ending = self._conclude(thread, cause)
            finally:
                self._kill(signal.SIGKILL)
            self.peers.tell(ending or Ending(0, host=self.host))
        if ending is not None:
            self.log.write("gang-ended", stage=self.stage, attempt=self.node.attempt, code=ending.code)
            raise ending.error()

    def _elastic(self) -> None:
        """Runs in a thread of its own; ranks are forked from it."""
        node = self.node
        config = LaunchConfig(
            min_nodes=node.nodes,
            max_nodes=node.nodes,
            nproc_per_node=node.ranks,
            run_id=f"{node.job}-{node.attempt}",
            rdzv_backend="c10d",
            rdzv_endpoint=node.rendezvous,
            rdzv_configs={
                "timeout": int(self.limits.rendezvous),
                "join_timeout": int(self.limits.rendezvous),
                "is_host": node.index == 0,
            },
            local_addr=node.rendezvous.rpartition(":")[0] if node.nodes == 1 else None,
            max_restarts=0,
            monitor_interval=_TICK,
            start_method="fork",
            signals_to_handle="SIGHUP",
            shutdown_timeout=max(1, int(self.limits.grace)),
        )
        arguments = (self.work, node, self.board, self.places, self.endings, self.stage)
        try:
            elastic_launch(config, run_rank)(*arguments)
        except BaseException as error:  # told to the main thread
            self._failure = error

    def _watch(self, thread: threading.Thread) -> Ending | None:
        """Until elastic is done, or something ends the gang: then that."""
        begun = time.monotonic()
        while thread.is_alive():
            time.sleep(_TICK)
            if self.stop.signal is not None:
                return self._interrupted(f"stopped by {self.stop.signal.name}")
            if (elsewhere := self.peers.look()) is not None:
                return elsewhere
            signs = [self.board.read(local) for local in range(self.node.ranks)]
            if not any(signs):
                if time.monotonic() - begun > self.limits.rendezvous:
                    return self._nobody()
                continue
            for local, sign in enumerate(signs):
                if sign is not None and (found := self._judge(local, sign)) is not None:
                    return found
        return None

    def _judge(self, local: int, sign: Sign) -> Ending | None:
        """A rank that died, is silent, or takes too long."""
        if (self.endings / f"rank{self._number(local)}.json").exists():
            ending = Ending.read(self.endings / f"rank{self._number(local)}.json")
            return ending if ending is not None and ending.code else None
        now = time.monotonic()
        if not _runs(sign.pid):
            return self._died(local, sign, -_exit_signal(sign.pid))
        if now - sign.alive > self.limits.silence:
            what = f"no sign of life for {now - sign.alive:.0f} s"
            return self._peer("rank-silent", local, sign, what, "stopped, or its machine is overloaded")
        if now - sign.since > sign.limit:
            what = f"no progress for {now - sign.since:.0f} s"
            return self._peer("phase-timeout", local, sign, what, "see its log; calibrate.timeouts has the limits")
        return None

    def _died(self, local: int, sign: Sign, code: int = 0) -> Ending:
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit {code}" if code else "without a word"
        return self._peer(
            "rank-died", local, sign, f"process {sign.pid} died: {how}",
            "killed by somebody, or by the kernel for want of memory (dmesg); the same command resumes",
        )  # fmt: skip

    def _number(self, local: int) -> int:
        return self.node.index * self.node.ranks + local

    def _peer(self, id: str, local: int, sign: Sign, what: str, way_out: str) -> Ending:
        number = self._number(local)
        progress = " ".join(f"{name} {value}" for name, value in sign.progress.items())
        where = f"{self.places.logs}/rank{number}.log" + (f" ({progress})" if progress else "")
        return Ending(PeerError.exit_code, id, what, where, way_out, number, self.host, sign.phase)

    def _interrupted(self, what: str) -> Ending:
        self._asked = True
        return Ending(Interrupted.exit_code, "interrupted", what, "", "run the same command again: it resumes")

    def _nobody(self) -> Ending:
        missing = ", ".join(str(index) for index in self.peers.missing()) or "none"
        what = f"the rendezvous at {self.node.rendezvous} was not complete after {self.limits.rendezvous:.0f} s"
        return Ending(
            PeerError.exit_code, "node-missing", f"{what}; nodes that never came: {missing}", "",
            "start a supervisor on each node, and check that they reach that address", host=self.host,
        )  # fmt: skip

    def _conclude(self, thread: threading.Thread, cause: Ending | None) -> Ending | None:
        """End the ranks, collect how they ended, and decide."""
        if cause is None and self._failure is None:
            return None
        died = self._died_in_elastic()
        if cause is not None and cause.code == Interrupted.exit_code:
            self._asked = True
            self.peers.tell(cause)
            self._stop_gently()
        elif cause is not None:
            self.peers.tell(cause)
        self._kill(signal.SIGKILL)
        thread.join(_LATE)
        endings = [ending for path in sorted(self.endings.glob("rank*.json")) if (ending := Ending.read(path))]
        endings += [one for one in (cause, died) if one is not None]
        found = worst(endings, asked_to_stop=self._asked)
        return found if found is not None else self._from_elastic()

    def _died_in_elastic(self) -> Ending | None:
        """The rank that elastic saw die first, if it left no word."""
        if not isinstance(self._failure, ChildFailedError):
            return None
        failure = self._failure.get_first_failure()[1]
        local = failure.local_rank
        if (self.endings / f"rank{self._number(local)}.json").exists():
            return None
        return self._died(local, self.board.read(local) or Sign(failure.pid, 0, 0, 0, "start"), failure.exitcode)

    def _from_elastic(self) -> Ending:
        """No rank left a word, and none died."""
        if isinstance(self._failure, RendezvousError | OSError):
            return self._nobody()
        what = f"{type(self._failure).__name__}: {self._failure}"
        return Ending(70, "bug", f"the elastic agent failed: {what}", "", "report this", host=self.host)

    def _stop_gently(self) -> None:
        """Ask the ranks to stop, and give them the grace."""
        self._kill(signal.SIGTERM)
        deadline = time.monotonic() + self.limits.grace
        while time.monotonic() < deadline and any(True for _ in self._living()):
            time.sleep(_TICK)

    def _living(self) -> Iterator[int]:
        for local in range(self.node.ranks):
            sign = self.board.read(local)
            if sign is not None and _runs(sign.pid):
                yield sign.pid

    def _kill(self, number: signal.Signals) -> None:
        for pid in self._living():
            with suppress(ProcessLookupError):
                os.kill(pid, number)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (OSError, IndexError):
        return False


def _exit_signal(pid: int) -> int:
    """The signal that ended a process nobody has waited for yet; 0 where that is not to be seen."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[-1]) & 0x7F
    except (OSError, ValueError, IndexError):
        return 0


def _prepare_environment() -> None:
    """What an outer launcher says of ranks would confuse ours; looking at GPUs must not initialise CUDA before a
    fork."""
    for name in _FOREIGN:
        os.environ.pop(name, None)
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")
