"""The worker's loop: claim, do, publish, record; signals become 75, storage faults 74."""

from __future__ import annotations

import errno
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from dsqjob.engine.claims import Claim, Claims
from dsqjob.engine.events import EventLog
from dsqjob.engine.parent import dies_with_parent
from dsqjob.engine.stage import Context, PooledStage, StageState, Unit
from dsqjob.errors import BugError, DataError, DsqjobError, Interrupted, StorageError, UsageError

STORAGE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.EROFS}
_WRONG_PATHS = {errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP}
TRANSIENT_ERRORS = {errno.EIO, errno.ESTALE}
GRACE = 6.0
"""Seconds between a signal and the hard exit: a kill at any instant is harmless, so a stuck fsync need not be waited
for."""
_LISTEN = 0.2
_FIRST_PAUSE = 0.05
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)


class StopRequest:
    """Whether a signal asked this process to stop.

    The signals are blocked, and a thread waits for them: it hears them even while the main thread sits in an fsync
    that does not return.
    """

    def __init__(self, grace: float | None = GRACE) -> None:
        """``grace``: seconds from a signal to the hard exit; None where this process must outlive others."""
        self.grace = grace
        self.signal: signal.Signals | None = None
        self._parent = os.getppid()
        self._closed = threading.Event()

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Listen from the main thread, before other threads start."""
        handlers = {number: signal.signal(number, self._hear) for number in STOP_SIGNALS}
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._closed.set()
            thread.join()
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _hear(self, number: int, _: FrameType | None) -> None:
        """Where a library's thread, which does not block signals, was given it."""
        self.signal = self.signal or signal.Signals(number)

    def _listen(self) -> None:
        heard_at = None
        while not self._closed.is_set():
            heard = signal.sigtimedwait(STOP_SIGNALS, _LISTEN)
            if heard is not None and self.signal is None:
                self.signal = signal.Signals(heard.si_signo)
            if self.signal is not None and heard_at is None:
                heard_at = time.monotonic()
            if heard_at is not None and self.grace is not None and time.monotonic() - heard_at > self.grace:
                os._exit(Interrupted.exit_code)

    @property
    def cause(self) -> str:
        """The signal by name, or what stands behind it; empty where none came."""
        if self.signal == signal.SIGTERM and os.getppid() != self._parent and dies_with_parent():
            return f"the end of its launcher (process {self._parent})"
        return self.signal.name if self.signal is not None else ""

    def check(self) -> None:
        """Raises Interrupted once a signal came."""
        if self.signal is not None:
            raise Interrupted(
                "interrupted", f"stopped by {self.cause}", way_out="run the same command again: it resumes"
            )


class _UnitContext(Context):
    def __init__(self, claim: Claim, chunk_bytes: int, stop: StopRequest, log: EventLog, stage: str) -> None:
        self.token = claim.token
        self.chunk_bytes = chunk_bytes
        self._stop, self._log, self._unit, self._stage = stop, log, claim.unit, stage
        self._bytes, self._told = 0, time.monotonic()

    def tick(self, nbytes: int) -> None:
        self._stop.check()
        self._bytes += nbytes
        if time.monotonic() - self._told > 2:
            self._told = time.monotonic()
            self._log.write("progress", stage=self._stage, unit=self._unit, bytes=self._bytes)


class Worker:
    """Worker ``index`` of ``count``: begins with its own share of the units, then helps with what is left.

    It looks at units that others hold after a pause that doubles up to ``poll_seconds``.
    """

    def __init__(
        self,
        index: int,
        count: int,
        *,
        chunk_bytes: int,
        log: EventLog,
        stop: StopRequest,
        job: str = "",
        poll_seconds: float = 2.0,
        retry_seconds: float = 2.0,
    ) -> None:
        self.index, self.count = index, count
        self._chunk_bytes, self._log, self._stop = chunk_bytes, log, stop
        self._job, self._poll, self._retry = job, poll_seconds, retry_seconds

    def work(self, state: StageState) -> None:
        """Return when every unit of the stage has a record, whoever made it.

        Units that other workers hold are waited for, since a holder may die and leave its unit to us.
        """
        stage = _pooled(state)
        stage.check()
        state.begin()
        claims = Claims(state.workspace.claims(stage.name), job=self._job)
        self._log.write(
            "stage",
            stage=stage.name,
            units=len(stage.units),
            bytes=sum(unit.work for unit in stage.units),
            fingerprint=stage.fingerprint.digest,
        )
        start = len(stage.units) * self.index // max(1, self.count)
        pending = [*stage.units[start:], *stage.units[:start]]
        pause = _FIRST_PAUSE
        while pending:
            self._stop.check()
            left = [unit for unit in pending if not self._settled(unit, state, claims)]
            pause = _FIRST_PAUSE if len(left) < len(pending) else min(2 * pause, self._poll)
            if pending := left:
                time.sleep(pause)
        state.sweep_all()
        stage.settle()
        self._log.write("stage-done", stage=stage.name)

    def _settled(self, unit: Unit, state: StageState, claims: Claims) -> bool:
        """Whether the unit has a record, after doing it if nobody else does."""
        self._stop.check()
        if state.record(unit) is not None:
            return True
        taken = claims.take(unit.id)
        if taken is None:
            return False
        claim, dead = taken
        try:
            if state.record(unit) is None:
                for token in dead:
                    state.sweep(unit, token)
                with claims.beating(claim):
                    self._do(unit, state, claim)
        except FileNotFoundError:
            if not claims.lost(claim):
                raise
            self._log.write("claim-lost", stage=state.stage.name, unit=unit.id)
            return False
        finally:
            claims.release(claim)
        return True

    def _do(self, unit: Unit, state: StageState, claim: Claim) -> None:
        stage = _pooled(state)
        begun = time.monotonic()
        self._log.write("unit", stage=stage.name, unit=unit.id, bytes=unit.work)
        context = _UnitContext(claim, self._chunk_bytes, self._stop, self._log, stage.name)
        for attempt in (1, 2, 3):
            try:
                done = stage.do(unit, context)
                state.write_record(
                    unit,
                    done,
                    worker=f"{self.index}/{self.count}",
                    host=socket.gethostname(),
                    seconds=time.monotonic() - begun,
                    token=claim.token,
                )
                break
            except OSError as error:
                if error.errno not in TRANSIENT_ERRORS or attempt == 3:
                    raise
                self._log.write("retry", stage=stage.name, unit=unit.id, reason=str(error))
                time.sleep(self._retry * attempt)
        seconds = time.monotonic() - begun
        self._log.write("unit-done", stage=stage.name, unit=unit.id, bytes=unit.work, seconds=round(seconds, 3))


def _pooled(state: StageState) -> PooledStage:
    if not isinstance(state.stage, PooledStage):
        raise BugError("stage-shape", f"{state.stage.name} is the work of a gang, not of single workers")
    return state.stage


def in_words(error: OSError) -> DsqjobError | None:
    """The error as the user meets it, where the storage or a path is to blame."""
    if isinstance(error, FileNotFoundError):
        return DataError(
            "file-vanished",
            "a file that was there when the work was planned is gone",
            where=error.filename or "",
            way_out="put it back, then run the same command again: it resumes",
        )
    if error.errno in _WRONG_PATHS:
        return UsageError(
            "path-unusable",
            f"{error.strerror}",
            where=error.filename or "",
            way_out="name another path in the job file",
        )
    if isinstance(error, PermissionError):
        return UsageError(
            "permission", f"{error.strerror}", where=error.filename or "", way_out="check owner and mode of this path"
        )
    if error.errno not in STORAGE_ERRORS:
        return None
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return StorageError(
        "storage-full" if full else "storage-fault",
        f"the storage refused: {error.strerror}",
        where=error.filename or "",
        way_out=("free space" if full else "check the file system") + ", then run the same command again: it resumes",
    )
