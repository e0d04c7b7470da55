"""What people see of a plan, a run and a clean-up."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType

import click

from dsqjob.cli.status import duration, progress, sizes
from dsqjob.engine.claims import Claims
from dsqjob.engine.events import read_events
from dsqjob.engine.execute import StopRequest
from dsqjob.engine.observe import observe
from dsqjob.engine.stage import Stage, StageState
from dsqjob.engine.workspace import Workspace, free_bytes, unique_token
from dsqjob.job.schema import Job
from dsqjob.pipeline import Command, StageResult, restart, run_stage, selected
from dsqjob.stages import GANGS, STAGES, build, pipeline
from dsqjob.stages.inputs import Inputs

_GRACE = 45.0
"""Seconds in which a launcher must have stopped everything: a gang's ranks are given ten, supervisors more."""


def print_plan(inputs: Inputs) -> None:
    """Every stage of the job: units, bytes, why it grows, disk; refusals are raised."""
    release, job = inputs.release, inputs.job
    tensors = sum(len(header.tensors) for header in release.shards.values())
    click.echo(f"job       {job.name} ({job.family})")
    click.echo(
        f"release   {release.root}: {len(release.shards)} shards, {tensors} tensors, {sizes(release.total_bytes)}"
    )
    click.echo(f"workspace {job.workspace}")
    names, awaited = pipeline(inputs), ""
    for name in names:
        awaited = awaited if _plan_stage(inputs, name, awaited) else awaited or name
    if not set(names) & set(GANGS):
        click.echo("\nno GPU is needed for these stages")


def _plan_stage(inputs: Inputs, name: str, awaited: str) -> bool:
    """Print what a stage would do; whether it is done. ``awaited``: an earlier one that must come first."""
    stage = build(name, inputs)
    state = StageState(inputs.workspace, stage)
    begun = not awaited and state.compare()
    missing = state.missing() if begun else list(stage.units)
    out = sum(unit.bytes_out for unit in missing)
    click.echo(
        f"\n{name}: {len(stage.units)} units, {len(stage.units) - len(missing)} done; "
        f"reads {sizes(sum(unit.bytes_in for unit in missing))}, writes {sizes(out)}"
        + (f"; waits for {awaited}" if awaited else "")
    )
    if any(unit.outputs for unit in stage.units):
        click.echo(f"  to {stage.folder} ({sizes(free_bytes(stage.folder))} free)")
    state.refuse_disk(out)
    if not (awaited or begun):
        stage.check()
    for line in stage.describe():
        click.echo(f"  {line}")
    return begun and not missing


def run_pipeline(
    job: Job, name: str, sets: tuple[str, ...], *, stage: str | None, through: str | None, restart_first: bool
) -> None:
    """Run the selected stages to their end and say what came of each."""
    inputs = Inputs(job)
    names = selected(inputs, stage, through)
    build(names[0], inputs)  # what it refuses comes before anything is written
    with launching(inputs.workspace) as stop:
        for path in restart(inputs, names) if restart_first else ():
            click.echo(f"removed {path}")
        for one in names:
            stop.check()
            begun = time.monotonic()
            with Progress(one, inputs) as progress:
                result = run_stage(inputs, one, Command(name, sets), stop=stop, watch=progress)
            _report(result, time.monotonic() - begun)


@contextmanager
def launching(workspace: Workspace) -> Iterator[StopRequest]:
    """Hears signals for the workers that are started within, and holds a claim, by which ``cancel`` finds this process
    before its workers hold any, and ``logs`` sees it live."""
    stop = StopRequest(grace=_GRACE)
    with stop.listening():
        workspace.prepare()
        claims = Claims(workspace.launches)
        claims.sweep()
        while (taken := claims.take(f"run-{os.getpid()}-{unique_token()}")) is None:
            pass
        with claims.keeping(taken[0]):
            yield stop


def _report(result: StageResult, seconds: float) -> None:
    stage, records = result.stage, result.records
    written = sum(output.bytes for record in records for output in record.outputs)
    if result.worked:
        click.echo(f"{stage.name}: {len(records)} units, {sizes(written)} in {duration(seconds)}")
    else:
        click.echo(f"{stage.name}: already done, {len(records)} units, nothing to do")
    for line in stage.summary(records):
        click.echo(f"  {line}")
    if written:
        click.echo(f"  {stage.folder}")


class Progress(AbstractContextManager["Progress"]):
    """A bar on a terminal; silent elsewhere, where ``dsqjob status`` tells more."""

    def __init__(self, stage: str, inputs: Inputs) -> None:
        self._stage, self._events = stage, inputs.workspace.events
        self._told = 0.0
        self._bar = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[said]}"))
            self._bar = Bar(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task(stage, total=None, said="")

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, stage: Stage) -> None:
        if self._bar is None or time.monotonic() - self._told < 0.5:
            return
        self._told = time.monotonic()
        seen = observe(read_events(self._events), time.time()).get(stage.name)
        if seen is not None and seen.bytes:
            self._bar.update(self._task, completed=seen.bytes_done, total=seen.bytes, said=progress(seen))


def clean_workspace(inputs: Inputs) -> None:
    """Sweep the partials and claims of dead workers, stage by stage, and of dead launchers."""
    launches = inputs.workspace.launches
    swept = Claims(launches).sweep() if launches.is_dir() else []
    for name in STAGES:
        if inputs.workspace.stage_file(name).exists():
            swept += StageState(inputs.workspace, build(name, inputs)).sweep_all()
    for path in swept:
        click.echo(f"removed {path}")
    click.echo(f"{len(swept)} leftovers removed; finished files stay" if swept else "nothing to clean")
