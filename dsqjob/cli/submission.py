"""``dsqjob run`` on a launcher that submits, and ``dsqjob render``: what is sent, and what Slurm made of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from dsqjob.job.schema import Job
from dsqjob.launchers.slurm.handle import Handle
from dsqjob.launchers.slurm.script import Need, Script
from dsqjob.launchers.slurm.submit import keep_job, last_of, queued, render, submit
from dsqjob.pipeline import Outstanding, outstanding, restart, selected
from dsqjob.stages import STAGES, pipeline
from dsqjob.stages.inputs import Inputs


def submit_pipeline(job: Job, *, stage: str | None, through: str | None, restart_first: bool) -> None:
    """Submit the selected stages that are not done, each after the one before; one line a stage, with its job ids."""
    inputs = Inputs(job)
    names = selected(inputs, stage, through)
    if restart_first:
        for path in restart(inputs, names):
            click.echo(f"removed {path}")
    after, waiting = _at_work(job, inputs, names)
    for name, handle in waiting.items():
        click.echo(f"{name}: already submitted, job {', '.join(handle.jobs)}")
    left = [name for name in names if name not in waiting]
    todo = outstanding(inputs, left, awaited=bool(after))
    for name in left:
        found = next((one for one in todo if one.name == name), None)
        if found is None:
            click.echo(f"{name}: already done, nothing to do")
            continue
        handle = submit(job, _need(job, found), after)
        after = [last_of(handle)]
        click.echo(f"{name}: submitted, job {', '.join(handle.jobs)}{_size(handle.tasks)}")
    if todo or waiting:
        click.echo("dsqjob status, logs and cancel follow them")


def print_scripts(job: Job, *, stage: str | None, through: str | None, out: Path | None) -> None:
    """Print what would be sent; with ``out``, write scripts that sbatch takes, and ``submit``, which sends them all."""
    inputs = Inputs(job)
    names = selected(inputs, stage, through)
    scripts = render(job, [_need(job, one) for one in outstanding(inputs, names, awaited=False)])
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


def _at_work(job: Job, inputs: Inputs, names: Sequence[str]) -> tuple[list[str], dict[str, Handle]]:
    """Jobs that the first new one must wait for, and those of the selected stages that are in the queue already."""
    waiting: dict[str, Handle] = {}
    after: list[str] = []
    order = [name for name in STAGES if name in {*pipeline(inputs, always=True), *names}]
    for name in order[: order.index(names[-1]) + 1]:
        if (handle := queued(job, name)) is not None:
            after = [last_of(handle)]
            if name in names:
                waiting[name] = handle
    return after, waiting


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
