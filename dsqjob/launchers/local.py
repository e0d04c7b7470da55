"""Workers as processes of this machine."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from dsqjob.engine.execute import StopRequest
from dsqjob.errors import EXIT_CODES, Interrupted, PeerError

_SEVERITY = (65, 64, 74, 70, 75, 69, 0)
_KILL_AFTER = 10.0
_GANG_KILL_AFTER = 25.0
"""A supervisor gives its ranks ten seconds, and itself some more to see the end of them."""
_TOLD_KILL_AFTER = 10.0
"""One that ends by itself leaves when the others have ended their parts or are lost: whoever hears it last still takes
_GONE + _LEAVE + _WORD of gang/supervisor.py."""
_TICK = 0.1


class WorkerProcess:
    """One worker and where its standard error goes."""

    def __init__(self, argv: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> None:
        self.argv, self.log = list(argv), log
        self._environment = {**os.environ, **(environment or {})}
        self.start()

    def start(self) -> None:
        """Start (again), appending to the log."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as stream:
            self._begin = stream.tell()
            self.process = subprocess.Popen(
                self.argv,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                env=self._environment,
                start_new_session=True,
            )

    def said(self) -> str:
        """What this start of the worker wrote."""
        with self.log.open("rb") as stream:
            stream.seek(self._begin)
            return stream.read().decode(errors="replace").strip()


def run_workers(
    commands: Sequence[Sequence[str]],
    log_names: Sequence[Path],
    *,
    max_faults: int,
    stop: StopRequest,
    watch: Callable[[], None],
    again: Callable[[str], None],
) -> tuple[int, str]:
    """Run one process a command until all are done; (exit code, what the worker that decided it said).

    A worker that dies without a code of ours, or with 69, is started again, ``max_faults`` times in all. Any other
    code but 0 stops the rest. ``again`` hears of every new start, in a line. A signal to this process is passed on;
    10 s later what is left is killed.
    """
    workers = [WorkerProcess(argv, log) for argv, log in zip(commands, log_names, strict=True)]
    try:
        return _wait(workers, max_faults, stop, watch, again)
    finally:
        _stop_all(workers, signal.SIGKILL, 0)


def _wait(
    workers: list[WorkerProcess],
    max_faults: int,
    stop: StopRequest,
    watch: Callable[[], None],
    again: Callable[[str], None],
) -> tuple[int, str]:
    running, codes, faults = list(workers), {0: ""}, 0
    for ended in _ticks(running, stop, watch, _KILL_AFTER):
        for worker, code, said in ended:
            if code == PeerError.exit_code and faults < max_faults:
                faults += 1
                again(_new_start(said, faults, max_faults))
                worker.start()
                running.append(worker)
            elif code:
                codes.setdefault(code, said)
                _stop_all(running, signal.SIGTERM, _KILL_AFTER)
    return _outcome(codes, stop)


def run_gang(
    commands: Callable[[str, str], Sequence[Sequence[str]]],
    logs: Sequence[Path],
    *,
    run: str,
    gpus_per_node: int,
    patience: float,
    max_faults: int,
    stop: StopRequest,
    watch: Callable[[], None],
    again: Callable[[str], None],
) -> tuple[int, str]:
    """Run the supervisors of a gang, all on this machine, each with GPUs of its own; (exit code, what was said).

    ``commands(rendezvous, attempt)`` gives one command a node. A gang that ends with 69 is started again as a whole,
    ``max_faults`` times; ``again`` hears of it, in a line. Supervisors end each other. One that outlives the first is
    killed: soon where that ended by itself and so told it, after ``patience`` and a little more where it was killed.
    """
    for fault in range(max_faults + 1):
        rendezvous, attempt = f"127.0.0.1:{_free_port()}", f"{run}-{fault}"
        environments = [_gpus(node, gpus_per_node) if len(logs) > 1 else {} for node in range(len(logs))]
        each = zip(commands(rendezvous, attempt), logs, environments, strict=True)
        supervisors = [WorkerProcess(argv, log, environment) for argv, log, environment in each]
        try:
            code, said = _wait_together(supervisors, patience, stop, watch)
        finally:
            _stop_all(supervisors, signal.SIGKILL, 0)
        if code != PeerError.exit_code or stop.signal is not None or fault == max_faults:
            break
        again(_new_start(said, fault + 1, max_faults))
    return code, said


def _wait_together(
    supervisors: list[WorkerProcess], patience: float, stop: StopRequest, watch: Callable[[], None]
) -> tuple[int, str]:
    """The worst code once all have ended, or a while after the first one failed."""
    codes, deadline = {0: ""}, float("inf")
    for ended in _ticks(list(supervisors), stop, watch, _GANG_KILL_AFTER):
        for worker, code, said in ended:
            codes.setdefault(code, said)
            if code:
                told = worker.process.returncode in EXIT_CODES
                wait = _TOLD_KILL_AFTER if told else patience + _GANG_KILL_AFTER
                deadline = min(deadline, time.monotonic() + wait)
        if time.monotonic() > deadline:
            break
    return _outcome(codes, stop)


def _ticks(
    running: list[WorkerProcess], stop: StopRequest, watch: Callable[[], None], grace: float
) -> Iterator[list[tuple[WorkerProcess, int, str]]]:
    """Every tick those that have ended, taken out of ``running``, with their codes and what they said; until none runs,
    or ``stop`` was asked and all have been stopped."""
    while running:
        time.sleep(_TICK)
        watch()
        if stop.signal is not None:
            _stop_all(running, stop.signal, grace)
            return
        ended = [(worker, code) for worker in running if (code := worker.process.poll()) is not None]
        for worker, _ in ended:
            running.remove(worker)
        yield [(worker, *_understood(worker, code)) for worker, code in ended]


def _outcome(codes: dict[int, str], stop: StopRequest) -> tuple[int, str]:
    """Exit code and words: of a signal to this process, or of the worst that a worker ended with."""
    if stop.signal is not None:
        return Interrupted.exit_code, f"stopped by {stop.cause}; the same command resumes"
    worst = min(codes, key=_SEVERITY.index)
    return worst, codes[worst]


def _gpus(node: int, count: int) -> dict[str, str]:
    """This node's part of the GPUs that are visible here; nothing to say where a node has all of them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    known = visible.split(",") if visible else [str(number) for number in range((node + 1) * count)]
    mine = known[node * count : (node + 1) * count]
    return {"CUDA_VISIBLE_DEVICES": ",".join(mine)} if count else {}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _understood(worker: WorkerProcess, code: int) -> tuple[int, str]:
    """Our exit codes as they are; a death by signal or any other code is a peer's fault."""
    if code in EXIT_CODES:
        return code, worker.said()
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
    return PeerError.exit_code, f"worker {worker.process.pid} {how} (log: {worker.log})\n{worker.said()}".strip()


def _new_start(said: str, number: int, of: int) -> str:
    """What a fault was, and that work starts again."""
    first = said.partition("\n")[0] or EXIT_CODES[PeerError.exit_code]
    return f"{first}; starting again ({number} of {of})"


def _stop_all(workers: Sequence[WorkerProcess], number: int, wait: float) -> None:
    deadline = time.monotonic() + wait
    for worker in workers:
        if worker.process.poll() is None:
            os.kill(worker.process.pid, number)
    for worker in workers:
        try:
            worker.process.wait(max(0.01, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            worker.process.kill()
            worker.process.wait()
