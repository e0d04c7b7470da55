"""Time limits: as Slurm writes them, and the least that leaves room for work before the notice."""

from __future__ import annotations

import math
import re

from dsqjob.errors import UsageError
from dsqjob.job.schema import Job

EARLY = 60
"""Seconds by which Slurm may give the notice before its time."""
_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<clock>\d+(?::\d+){0,2})")


def seconds_of(text: str) -> float:
    """Seconds of ``MM``, ``MM:SS``, ``HH:MM:SS``, ``D-HH``, ``D-HH:MM``, ``D-HH:MM:SS``; infinite where it is none of
    these, which sbatch then judges."""
    match = _TIME.fullmatch(text.strip())
    if match is None:
        return math.inf
    parts = [int(part) for part in match["clock"].split(":")]
    if match["days"] is not None:
        hours, minutes, seconds = (*parts, 0, 0)[:3]
    elif len(parts) == 3:
        hours, minutes, seconds = parts
    else:
        hours, (minutes, seconds) = 0, (*parts, 0)[:2]
    return ((int(match["days"] or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def refuse_short(job: Job, *, gang: bool) -> None:
    """UsageError ``time-too-short`` where the job file itself leaves no time before the notice."""
    text = (job.slurm.gang if gang else job.slurm.workers).time
    if text is not None and 0 < (length := seconds_of(text)) <= job.slurm.notice + EARLY:
        raise too_short(length, job, gang=gang)


def too_short(length: float, job: Job, *, gang: bool) -> UsageError:
    """A job that would be told to stop as it begins, and come back for ever."""
    return UsageError(
        "time-too-short",
        f"a job of {length:.0f} s gets its notice {job.slurm.notice} s before the end, or {EARLY} s earlier: "
        "nothing would be done",
        where=f"slurm.{'gang' if gang else 'workers'}.time, slurm.notice",
        way_out="ask for more time, or set a shorter slurm.notice",
    )
