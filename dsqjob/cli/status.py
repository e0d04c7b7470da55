"""``dsqjob status``: a function of the event log. Kept light: no numpy, no pydantic, no rich."""

from __future__ import annotations

import json
import time
from pathlib import Path

import click

from dsqjob.engine.events import read_events
from dsqjob.engine.observe import StageSeen, observe
from dsqjob.engine.workspace import Workspace
from dsqjob.errors import UsageError
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
    seen = observe(read_events(Workspace(workspace).events), now)
    stages = sorted(seen.values(), key=lambda stage: STAGES.index(stage.stage))
    if as_json:
        click.echo(json.dumps({"workspace": str(workspace), "stages": [stage.to_json() for stage in stages]}, indent=1))
        return
    click.echo(f"workspace {workspace}")
    for stage in stages:
        click.echo(_line(stage))
    if not stages:
        click.echo("no stage has begun")


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
