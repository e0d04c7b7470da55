"""What every launcher starts: a process that does units of a stage, or the supervisor of a node's ranks."""

from __future__ import annotations

import os
import signal
import tempfile
from importlib import import_module
from pathlib import Path

from dsqjob.engine import parent
from dsqjob.engine.claims import whoami
from dsqjob.engine.events import EventLog
from dsqjob.engine.execute import StopRequest, Worker, in_words
from dsqjob.engine.stage import GangStage, StageState
from dsqjob.errors import BugError, DsqjobError, UsageError
from dsqjob.job.schema import Job
from dsqjob.stages import build
from dsqjob.stages.inputs import Inputs

_MIB = 1 << 20
_FOOTPRINT = 160 * _MIB
"""What a worker takes before it holds any data: interpreter, numpy, compiled loops, headers of a large release."""
_PIECES = 6
"""Pieces of the chunk size that may be in memory at once."""


def chunk_bytes(memory: int) -> int:
    """The piece size that keeps a worker's peak within ``memory`` bytes."""
    return min(max((memory - _FOOTPRINT) // _PIECES, _MIB), 64 * _MIB)


def run_worker(stage_name: str, index: int, count: int, job: Job, *, run: str = "") -> None:
    """Work until every unit of the stage is done. Raises a DsqjobError; its exit code is the process's."""
    inputs = Inputs(job)
    inputs.workspace.prepare()
    me = whoami(run)
    log = EventLog(inputs.workspace.events, worker=f"{stage_name}-{index}/{count}", host=me["host"], run=run)
    stop = StopRequest()
    worker = Worker(index, count, chunk_bytes=chunk_bytes(job.memory), log=log, stop=stop, job=run)
    with stop.listening():
        try:
            worker.work(StageState(inputs.workspace, build(stage_name, inputs)))
        except DsqjobError as error:
            _tell(log, stage_name, error)
            raise
        except OSError as error:
            worded = in_words(error)
            if worded is None:
                raise
            _tell(log, stage_name, worded)
            raise worded from error


def run_node(stage_name: str, index: int, rendezvous: str, attempt: str, job: Job, *, run: str = "") -> None:
    """Supervise this node's ranks of a gang until the stage is done. Raises a DsqjobError, the same on every node."""
    os.environ.setdefault("OMP_NUM_THREADS", str(job.calibrate.threads))
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # before torch is imported: it traces every lost connection
    inputs = Inputs(job)
    inputs.workspace.prepare()
    me = whoami(run)
    log = EventLog(inputs.workspace.events, worker=f"{stage_name}-node{index}", host=me["host"], run=run)
    stop = StopRequest()  # until ``supervise`` gives its ranks more time
    with stop.listening():
        try:
            stage = build(stage_name, inputs)
            if not isinstance(stage, GangStage):
                raise UsageError("stage-shape", f"{stage_name} has no gang", way_out="give --worker and --workers")
            import_module("dsqjob.worker.node").supervise_stage(
                stage, inputs.workspace, index, rendezvous, attempt, log, stop
            )
        except DsqjobError as error:
            _tell(log, stage_name, error)
            raise
        except Exception as error:
            _tell(log, stage_name, BugError("bug", f"{type(error).__name__}: {error}"))
            raise


def _tell(log: EventLog, stage: str, error: DsqjobError) -> None:
    log.write("error", stage=stage, id=error.id, what=error.what, where=error.where, code=error.exit_code)


def die_with_parent() -> None:
    """Ask the kernel for SIGTERM when the process that started this one is gone."""
    launcher = os.getppid()
    parent.die_with_parent(signal.SIGTERM)
    if os.getppid() != launcher:
        os.kill(os.getpid(), signal.SIGTERM)


def private_cache() -> Path | None:
    """A node-local folder of this user's for compiled code, or None where a stranger owns the name."""
    folder = Path(tempfile.gettempdir(), f"dsqjob-cache-{os.getuid()}")
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError:
        return None
    status = folder.lstat()
    return folder if status.st_uid == os.getuid() and status.st_mode & 0o077 == 0 else None
