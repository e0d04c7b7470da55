"""``dsqjob logs`` and ``dsqjob cancel``: of jobs in a queue and of processes on this machine. Light."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import click

from dsqjob.engine.claims import Claims
from dsqjob.engine.events import read_events
from dsqjob.engine.observe import observe
from dsqjob.engine.workspace import Workspace
from dsqjob.errors import UsageError
from dsqjob.launchers.slurm.client import ask
from dsqjob.launchers.slurm.handle import read_handle
from dsqjob.launchers.slurm.watch import alive
from dsqjob.stages import GANGS, STAGES

_TAIL = 40
_LOOK = 0.5
_OVER = ("done", "failed")


def print_logs(root: Path, *, stage: str | None, rank: int | None, follow: bool) -> None:
    """The end of a stage's logs; with ``follow``, what is added, until the stage is over or Ctrl-C.

    ``rank``: of one rank of a gang. UsageError ``log-missing``.
    """
    workspace = Workspace(root)
    name = stage or (GANGS[0] if rank is not None else _latest(workspace))
    paths = list(_files(workspace, name, rank))
    if not paths and not follow:
        raise UsageError(
            "log-missing",
            f"{name} has left no log yet" + (f" of rank {rank}" if rank is not None else ""),
            where=workspace.logs,
            way_out="dsqjob status JOB says where the job stands; --stage names another stage",
        )
    seen: dict[Path, int] = {}
    last: Path | None = None
    while True:
        for path in _files(workspace, name, rank):
            last = _show_new(path, seen, last)
        if not follow or _over(workspace, name):
            break
        time.sleep(_LOOK)
    for path in _files(workspace, name, rank):
        last = _show_new(path, seen, last)


def cancel_jobs(root: Path) -> None:
    """Cancel what is in the queue, the last stage first, and ask what runs on this machine to stop."""
    workspace = Workspace(root)
    stopped = 0
    for stage in reversed(STAGES):
        handle = read_handle(workspace, stage)
        for job in reversed(handle.jobs if handle is not None else ()):
            if alive(job):
                answer = ask("scancel", job)
                click.echo(f"{stage}: job {job} " + (answer.said if answer.code else "is cancelled"))
                stopped += 1
        stopped += _stop_here(workspace, stage)
    click.echo("the same command goes on from where it stopped" if stopped else "nothing is waiting or running")


def _stop_here(workspace: Workspace, stage: str) -> int:
    """Ask the holders of this stage's claims to stop; how many there were."""
    folder = workspace.claims(stage)
    pids = set()
    claims = Claims(folder) if folder.is_dir() else None
    for holder in claims.alive() if claims is not None else ():
        if claims is not None and claims.nearby(holder):
            pids.add(int(holder["pid"]))
        elif read_handle(workspace, stage) is None:
            click.echo(f"{stage}: process {holder.get('pid')} on {holder.get('host')} must be stopped there")
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
        click.echo(f"{stage}: process {pid} is asked to stop")
    return len(pids)


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


def _show_new(path: Path, seen: dict[Path, int], last: Path | None) -> Path | None:
    """Print what was added to a file (at first: its end), under its name; the file whose text was printed last."""
    size = path.stat().st_size
    if size == seen.get(path, -1):
        return last
    with path.open("rb") as stream:
        stream.seek(seen.get(path, 0))
        text = stream.read().decode(errors="replace")
    if path not in seen:
        text = "".join(text.splitlines(keepends=True)[-_TAIL:])
    seen[path] = size
    if path != last:
        click.echo(f"==> {path} <==")
    click.echo(text, nl=not text.endswith("\n"))
    return path


def _over(workspace: Workspace, stage: str) -> bool:
    """Whether nothing more will come."""
    handle = read_handle(workspace, stage)
    if handle is not None:
        return not any(alive(job) for job in handle.jobs)
    seen = observe(read_events(workspace.events), time.time()).get(stage)
    return seen is not None and (seen.state in _OVER or seen.state == "interrupted")
