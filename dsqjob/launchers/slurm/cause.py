"""Why a job is being stopped, read from Slurm and not guessed from the clock; and what the job does about it."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

_FIELD = re.compile(r"(?:^| )([A-Z][A-Za-z:/_]*)=")


class Cause(Enum):
    """In words, as the log says them."""

    NONE = "nothing that Slurm knows of"
    LIMIT_NOTICE = "the time limit is near"
    PREEMPTION_NOTICE = "a job of higher priority wants the nodes"
    REQUEUED = "Slurm has put the job back into the queue"
    LIMIT = "the time limit is reached"
    PREEMPTED = "a job of higher priority took the nodes"
    CANCELLED = "the job was cancelled"


def fields(line: str) -> dict[str, str]:
    """``Name=value`` words of a line of scontrol; a value may hold spaces."""
    found = list(_FIELD.finditer(line))
    ends = [match.start() for match in found[1:]] + [len(line)]
    return {match[1]: line[match.end() : end].strip() for match, end in zip(found, ends, strict=True)}


def read_cause(job: Mapping[str, str], restarts: int, *, signalled: bool) -> Cause:
    """From what ``scontrol show job`` says at the signal. ``restarts``: how often this run itself had been requeued."""
    state = job.get("JobState")
    preempted = job.get("PreemptTime", "None") not in ("None", "Unknown", "")
    if int(job.get("Restarts", "0") or 0) > restarts or state in ("PENDING", "REQUEUED"):
        return Cause.REQUEUED
    if state == "RUNNING" and not preempted:
        return Cause.LIMIT_NOTICE if signalled else Cause.NONE
    if preempted:
        return Cause.PREEMPTION_NOTICE if state == "RUNNING" else Cause.PREEMPTED
    return Cause.LIMIT if state == "TIMEOUT" or job.get("Reason") == "TimeLimit" else Cause.CANCELLED


class Term(NamedTuple):
    """When a job must have ended, in seconds since 1970, and how long it may run in all; infinite without a limit."""

    end: float
    length: float


def read_term(job: Mapping[str, str]) -> Term:
    """From ``scontrol show job``, whose times are local ones."""
    start, end = (_seconds(job.get(name, "")) for name in ("StartTime", "EndTime"))
    return Term(end, end - start) if start < end < math.inf else Term(math.inf, math.inf)


def _seconds(text: str) -> float:
    try:
        return time.mktime(time.strptime(text, "%Y-%m-%dT%H:%M:%S"))
    except ValueError:
        return math.inf


@dataclass(frozen=True)
class Verdict:
    """How the batch process ends: its exit code, and whether it first puts the job back into the queue."""

    code: int
    requeue: bool
    fault: bool = False
    """Whether this counts as a fault."""


def decide(code: int, cause: Cause, *, faults: int, max_faults: int) -> Verdict:
    """``code``: what the step ended with; ``faults``: how many there were before.

    75 comes back without bound, 69 ``max_faults`` times, the others never; where Slurm or a person has decided, that
    stands. A step that was ended from outside counts as interrupted, whatever code its death left.
    """
    if code in (0, 64, 65, 70, 74):
        return Verdict(code, requeue=False)
    if cause in (Cause.REQUEUED, Cause.CANCELLED):
        return Verdict(75, requeue=False)
    if code == 75 or cause is not Cause.NONE:
        return Verdict(75, requeue=True)
    return Verdict(69, requeue=faults < max_faults, fault=True)
