"""``dsqjob run`` on a launcher that submits, and ``dsqjob render``: what is sent, and what Slurm made of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import click

from dsqjob.engine.claims import Claims
from dsqjob.errors import UsageError
from dsqjob.job.schema import Job
from dsqjob.launchers.slurm.client import ask
from dsqjob.launchers.slurm.handle import Handle
from dsqjob.launchers.slurm.script import Need, Script
from dsqjob.launchers.slurm.submit import keep_job, last_of, queued, render, submit
from dsqjob.pipeline import Outstanding, outstanding, restart, selected
from dsqjob.stages import STAGES, pipeline
from dsqjob.stages.inputs import Inputs

_SUBMISSION = "submission"


def submit_pipeline(job: Job, *, stage: str | None, through: str | None, restart_first: bool) -> None:
    """Submit the selected stages that are not done, each after the one before; one line a stage, with its job ids."""
    inputs = Inputs(job)
    names = selected(inputs, stage, through)
    inputs.workspace.prepare()
    with _alone(inputs):
        if restart_first:
            _refuse_restart(job, names)
            for path in restart(inputs, names):
                click.echo(f"removed {path}")
        waiting = _at_work(job, inputs, names)
        todo = {one.name: one for one in outstanding(inputs, names, queued=waiting)}
        _send(job, inputs, names, waiting, todo)
    if todo or waiting:
        click.echo("dsqjob status, logs and cancel follow them")


def _send(
    job: Job, inputs: Inputs, names: Sequence[str], waiting: dict[str, Handle], todo: dict[str, Outstanding]
) -> None:
    after: list[str] = []
    before, anew = "", False
    for name in STAGES:
        handle = waiting.get(name)
        if handle is not None and anew and handle.after and handle.after != tuple(after):
            click.echo(f"{name}: job {', '.join(handle.jobs)} waited for a job that is over: cancelled")
            ask("scancel", *handle.jobs)
            (todo[name],) = outstanding(inputs, [name], queued=[before])
            handle = None
        if handle is None and name in todo:
            handle = submit(job, _need(job, todo[name]), after)
            anew = True
            click.echo(f"{name}: submitted, job {', '.join(handle.jobs)}{_size(handle.tasks)}")
        elif name in names:
            jobs = f"submitted, job {', '.join(handle.jobs)}" if handle else "done, nothing to do"
            click.echo(f"{name}: already {jobs}")
        if handle is not None:
            after, before = [last_of(handle)], name


@contextmanager
def _alone(inputs: Inputs) -> Iterator[None]:
    """One submission at a time. UsageError ``submission-running``."""
    claims = Claims(inputs.workspace.claims(_SUBMISSION))
    taken = claims.take(_SUBMISSION)
    if taken is None:
        holder = claims.holder(_SUBMISSION) or {}
        raise UsageError(
            "submission-running",
            f"process {holder.get('pid')} on {holder.get('host')} is submitting this job",
            where=claims.folder,
            way_out="wait until it is done; then the same command shows what is in the queue",
        )
    with claims.keeping(taken[0]):
        yield


def _refuse_restart(job: Job, names: Sequence[str]) -> None:
    """UsageError ``restart-while-running`` where the queue still holds a stage to restart, or one that reads it."""
    later = STAGES[STAGES.index(names[0]) :]
    found = {name: handle for name in later if (handle := queued(job, name, wanted=False)) is not None}
    if found:
        raise UsageError(
            "restart-while-running",
            f"{', '.join(found)} waits or runs in the queue",
            where=next(iter(found.values())).logs,
            way_out="dsqjob cancel JOB first",
        )


def print_scripts(job: Job, *, stage: str | None, through: str | None, out: Path | None) -> None:
    """Print what would be sent; with ``out``, write scripts that sbatch takes, and ``submit``, which sends them all."""
    inputs = Inputs(job)
    names = selected(inputs, stage, through)
    waiting = _at_work(job, inputs, names)
    for name, handle in waiting.items():
        click.echo(f"# {name}: already submitted, job {', '.join(handle.jobs)}")
    scripts = render(job, [_need(job, one) for one in outstanding(inputs, names, queued=waiting)])
    for script in scripts:
        click.echo(f"# {script.need.stage}.sh\n{script.text}", nl=False)
    if not scripts:
        click.echo("every selected stage is done: nothing would be sent")
    if out is not None:
        keep_job(job)
        job.slurm.logs.mkdir(parents=True, exist_ok=True)
        out.mkdir(parents=True, exist_ok=True)
        for script in scripts:
            (out / f"{script.need.stage}.sh").write_text(script.text)
        (out / "submit").write_text(_chain(job, scripts))
        (out / "submit").chmod(0o755)
        click.echo(f"# written to {out}; {out / 'submit'} sends them in order", err=True)


def _at_work(job: Job, inputs: Inputs, names: Sequence[str]) -> dict[str, Handle]:
    """The stages up to the last selected one that are in the queue already."""
    order = [name for name in STAGES if name in {*pipeline(inputs, always=True), *names}]
    found = {name: queued(job, name, wanted=name in names) for name in order[: order.index(names[-1]) + 1]}
    return {name: handle for name, handle in found.items() if handle is not None}


def _need(job: Job, stage: Outstanding) -> Need:
    tasks = 1 if stage.gang else min(job.launcher.workers, stage.units or job.launcher.workers)
    return Need(stage.name, stage.gang, max(1, tasks))


def _size(tasks: int) -> str:
    return f" (an array of {tasks})" if tasks > 1 else ""


def _chain(job: Job, scripts: Sequence[Script]) -> str:
    """A shell script that sends the scripts beside it, one after the other has ended well."""
    lines = ["#!/bin/bash", "set -euo pipefail", 'cd "$(dirname "$0")"', "after="]
    spare = "" if job.slurm.requeue else "singleton"
    for script in scripts:
        for _ in range(1 if job.slurm.requeue else job.slurm.spares + 1):
            depend = f'--dependency="${{after:+afterok:$after}}${{after:+,}}{spare}"' if spare else ""
            depend = depend or "${after:+--dependency=afterok:$after}"
            lines.append(f"id=$(sbatch --parsable {depend} {script.need.stage}.sh)")
            lines.append(f'echo "{script.need.stage} $id"')
        lines.append("after=${id%%;*}")
    return "\n".join(lines) + "\n"
