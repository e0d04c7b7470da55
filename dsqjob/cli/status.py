"""``dsqjob status``: a function of the event log, Slurm's word beside it. Light: no numpy, no pydantic, no rich."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import click

from dsqjob.engine.events import read_events
from dsqjob.engine.observe import StageSeen, observe
from dsqjob.engine.workspace import Workspace
from dsqjob.errors import DsqjobError, Interrupted, UsageError
from dsqjob.launchers.slurm.handle import read_handle
from dsqjob.launchers.slurm.watch import Observed, observed
from dsqjob.stages import STAGES


def print_status(workspace: Path, as_json: bool) -> None:
    """A line a stage, or JSON. UsageError ``workspace-missing``."""
    if not workspace.is_dir():
        raise UsageError(
            "workspace-missing",
            "nothing was run in this workspace yet",
            where=workspace,
            way_out="dsqjob plan JOB, then dsqjob run JOB",
        )
    now = time.time()
    events = list(read_events(Workspace(workspace).events))
    seen = observe(events, now)
    stages = sorted(seen.values(), key=lambda stage: STAGES.index(stage.stage))
    jobs = {stage: _in_queue(Workspace(workspace), stage, events) for stage in STAGES}
    if as_json:
        queue = {stage: [job.to_json() for job in found.jobs] for stage, found in jobs.items() if found is not None}
        whole = {"workspace": str(workspace), "stages": [stage.to_json() for stage in stages], "slurm": queue}
        click.echo(json.dumps(whole, indent=1))
        return
    click.echo(f"workspace {workspace}")
    for name in STAGES:
        if name in seen:
            click.echo(_line(seen[name]))
        elif jobs[name] is not None:
            click.echo(f"{name:<9} waiting")
        for line in found.lines if (found := jobs[name]) is not None else ():
            click.echo(f"          {line}")
    if not stages and not any(jobs.values()):
        click.echo("no stage has begun")


class _Queue(NamedTuple):
    """A stage's jobs as Slurm sees them, and lines about them."""

    jobs: list[Observed]
    lines: list[str]


def _in_queue(workspace: Workspace, stage: str, events: list[dict[str, Any]]) -> _Queue | None:
    """What Slurm says of a stage that was submitted, and what its jobs said of themselves. Never fails for Slurm."""
    handle = read_handle(workspace, stage)
    if handle is None:
        return None
    found, lines = [], []
    for job in handle.jobs:
        try:
            records = observed(job)
        except DsqjobError as error:
            lines.append(f"job {job}: {error.what}")
            continue
        found += records
        lines += _records(job, records)
    ends = [event for event in events if event.get("of") == stage and event["event"] == "batch-end"]
    if ends and ends[-1].get("cause", "NONE") != "NONE":
        lines.append(f"job {ends[-1]['job']} was last stopped because {ends[-1]['why']}")
    if ends and ends[-1]["code"] not in (0, Interrupted.exit_code):
        lines.append(f"job {ends[-1]['job']} ended with {ends[-1]['code']}: {ends[-1].get('said', ends[-1]['why'])}")
    return _Queue(found, lines)


def _records(job: str, records: list[Observed]) -> list[str]:
    """A line a job; tasks of an array are counted by what they do."""
    if not records:
        return [f"job {job}: Slurm does not know it any more"]
    if len(records) == 1:
        return [f"job {records[0].job} {records[0].words}"]
    same: dict[str, list[str]] = {}
    for one in records:
        same.setdefault(one.words, []).append(one.job)
    return [f"job {job}: {len(names)} of {len(records)} tasks: {words}" for words, names in same.items()]


def _line(stage: StageSeen) -> str:
    text = f"{stage.stage:<9} {stage.state:<11} {progress(stage)}"
    if stage.state == "running":
        text += f"  {len(stage.workers)} workers" + (f"  phase {stage.phase}" if stage.phase else "")
        text += f"  attempt {stage.attempts}" if stage.attempts > 1 else ""
        if stage.seconds_left is not None:
            text += f"  {duration(stage.seconds_left)} left"
    if stage.state == "quiet":
        text += "  no worker has spoken for two minutes: run the same command again to resume"
    return text + (f"\n          {stage.error}" if stage.error else "")


def progress(stage: StageSeen) -> str:
    """Units and bytes, or batches and tokens, and how fast they come."""
    amount, units = (sizes, "units") if stage.measure == "bytes" else (tokens, "batches")
    text = f"{stage.units_done}/{stage.units} {units}  {amount(stage.bytes_done)} of {amount(stage.bytes)}"
    return text + (f"  {amount(stage.rate)}/s" if stage.state == "running" else "")


def sizes(nbytes: float) -> str:
    """Bytes for people, in decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(nbytes) < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:,.2f} TB"


def tokens(count: float) -> str:
    """Tokens for people."""
    return f"{count:,.0f} tokens"


def duration(seconds: float) -> str:
    """Seconds for people."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
