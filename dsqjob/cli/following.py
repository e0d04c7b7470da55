"""``dsqjob logs`` and ``dsqjob cancel``: of jobs in a queue and of processes on this machine. Light."""

from __future__ import annotations

import codecs
import os
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click

from dsqjob.engine.claims import Claims
from dsqjob.engine.events import read_events
from dsqjob.engine.observe import observe
from dsqjob.engine.workspace import Workspace
from dsqjob.errors import DsqjobError, UsageError
from dsqjob.launchers.slurm.client import ask
from dsqjob.launchers.slurm.handle import Handle, read_handle
from dsqjob.launchers.slurm.watch import alive, observed
from dsqjob.stages import GANGS, STAGES

_TAIL = 40
_LOOK = 0.5
_GOES_ON = ("waiting", "starting", "running")
_NEVER = "DependencyNeverSatisfied"


def print_logs(root: Path, *, stage: str | None, rank: int | None, follow: bool) -> None:
    """The end of a stage's logs; with ``follow``, what is added, until the run, or the stage that is named, is over, or
    Ctrl-C.

    ``rank``: of one rank of a gang. UsageError ``log-missing``.
    """
    workspace = Workspace(root)
    named = stage or (GANGS[0] if rank is not None else None)
    name = named or _latest(workspace)
    if not follow and not any(_files(workspace, name, rank)):
        raise UsageError(
            "log-missing",
            f"{name} has left no log yet" + (f" of rank {rank}" if rank is not None else ""),
            where=workspace.logs,
            way_out="dsqjob status JOB says where the job stands; --stage names another stage",
        )
    printer, over = _Printer(), not follow
    while True:
        for path in _files(workspace, name, rank):
            printer.show(path)
        if over:
            break
        later = named or _latest(workspace)
        over = later == name and _over(workspace, name, named=named is not None)
        name = later
        time.sleep(0 if over else _LOOK)
    printer.close()


def cancel_jobs(root: Path) -> None:
    """Ask what runs on this machine to stop, and cancel what is in the queue, the last stage first."""
    workspace = Workspace(root)
    stopped, elsewhere = _stop_holders("run", workspace.launches)
    for stage in reversed(STAGES):
        handle = read_handle(workspace, stage)
        for job in reversed(handle.jobs if handle is not None else ()):
            if alive(job):
                answer = ask("scancel", job)
                click.echo(f"{stage}: job {job} " + (answer.said if answer.code else "is cancelled"))
                stopped += 1
        here, there = _stop_holders(stage, workspace.claims(stage), tell=handle is None)
        stopped, elsewhere = stopped + here, elsewhere + there
    if stopped or not elsewhere:
        click.echo("the same command goes on from where it stopped" if stopped else "nothing is waiting or running")


def _stop_holders(what: str, folder: Path, *, tell: bool = True) -> tuple[int, int]:
    """Ask the holders of these claims to stop; how many were, and how many cannot be from here, if ``tell`` says so."""
    here, elsewhere = set(), 0
    for claims, holder in _holders(folder):
        if claims.nearby(holder):
            here.add(int(holder["pid"]))
        elif tell:
            click.echo(f"{what}: process {holder.get('pid')} on {holder.get('host')} must be stopped there")
            elsewhere += 1
    stopped = 0
    for pid in sorted(here):
        try:
            os.kill(pid, signal.SIGTERM)
        except ProcessLookupError:
            continue
        except PermissionError:
            click.echo(f"{what}: process {pid} is another user's, who must stop it")
            elsewhere += 1
            continue
        click.echo(f"{what}: process {pid} is asked to stop")
        stopped += 1
    return stopped, elsewhere


def _holders(folder: Path) -> Iterator[tuple[Claims, dict[str, Any]]]:
    """Holders of the live claims in a folder."""
    if folder.is_dir():
        claims = Claims(folder)
        yield from ((claims, holder) for holder in claims.alive())


def _latest(workspace: Workspace) -> str:
    """The stage that was last heard of."""
    seen = observe(read_events(workspace.events), time.time())
    submitted = [stage for stage in STAGES if read_handle(workspace, stage) is not None]
    if seen:
        return max(seen.values(), key=lambda stage: stage.last).stage
    return submitted[0] if submitted else STAGES[0]


def _files(workspace: Workspace, stage: str, rank: int | None) -> Iterator[Path]:
    if rank is not None:
        path = workspace.logs / f"{stage}-ranks" / f"rank{rank}.log"
        if path.is_file():
            yield path
        return
    handle = read_handle(workspace, stage)
    for job in handle.jobs if handle is not None else ():
        found = [*Path(handle.logs if handle else "").glob(f"{job}_*log.out")]
        yield from sorted(found)
    yield from sorted(path for path in workspace.logs.glob(f"{stage}-*.log"))


class _Growing:
    """A file of text, read as it grows."""

    def __init__(self, path: Path) -> None:
        self._path, self._position = path, 0
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def added(self) -> str:
        """What was added since; a character that is not there in full is left for later."""
        with self._path.open("rb") as stream:
            stream.seek(self._position)
            text = self._decoder.decode(stream.read())
            self._position = stream.tell()
        return text


class _Printer:
    """Prints what is added to files (at first: their ends), each under its name."""

    def __init__(self) -> None:
        self._files: dict[Path, _Growing] = {}
        self._last: Path | None = None
        self._line_open = False

    def show(self, path: Path) -> None:
        """Print what is new in a file."""
        known = path in self._files
        text = self._files.setdefault(path, _Growing(path)).added()
        if not known:
            text = "".join(text.splitlines(keepends=True)[-_TAIL:])
        elif not text:
            return
        if path != self._last:
            self.close()
            click.echo(f"==> {path} <==")
            self._last = path
        click.echo(text, nl=False)
        self._line_open = not text.endswith("\n") if text else self._line_open

    def close(self) -> None:
        """End the line that is open."""
        if self._line_open:
            click.echo()
        self._line_open = False


def _over(workspace: Workspace, stage: str, *, named: bool) -> bool:
    """Whether nothing more will come. A launcher that lives may begin the next stage, or this one again."""
    if any(_holders(workspace.claims(stage))):
        return False
    seen = observe(read_events(workspace.events), time.time()).get(stage)
    if any(_holders(workspace.launches)):
        return named and seen is not None and seen.state == "done"
    stages = [one for one in reversed(STAGES) if one == stage or not named]
    if handles := [handle for one in stages if (handle := read_handle(workspace, one)) is not None]:
        return not _queue_goes_on(handles)
    return seen is not None and seen.state not in _GOES_ON


def _queue_goes_on(handles: Sequence[Handle]) -> bool:
    """Whether a job of these waits or runs; also where Slurm cannot be asked."""
    jobs = (job for handle in handles for job in handle.jobs)
    try:
        return any(one.alive and one.reason != _NEVER for job in jobs for one in observed(job))
    except DsqjobError:
        return True
