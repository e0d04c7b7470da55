"""What Slurm says of a stage's jobs, in words, now or long afterwards. Light: standard library only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dsqjob.errors import DsqjobError, PeerError
from dsqjob.launchers.slurm.cause import fields
from dsqjob.launchers.slurm.client import ask

_LIVE = frozenset(
    {"PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "REQUEUED", "REQUEUE_HOLD", "RESV_DEL_HOLD",
     "REQUEUE_FED", "SPECIAL_EXIT", "RESIZING", "SIGNALING", "STAGE_OUT", "STOPPED"}
)  # fmt: skip
_STATES = {
    "PENDING": "waits",
    "RUNNING": "runs",
    "COMPLETING": "is ending",
    "CONFIGURING": "its nodes are being prepared",
    "SUSPENDED": "is suspended",
    "REQUEUED": "goes back into the queue",
    "REQUEUE_HOLD": "went back into the queue and is held there",
    "COMPLETED": "ended well",
    "FAILED": "failed",
    "TIMEOUT": "reached its time limit",
    "CANCELLED": "was cancelled",
    "PREEMPTED": "was preempted",
    "NODE_FAIL": "lost a node",
    "BOOT_FAIL": "its nodes did not come up",
    "OUT_OF_MEMORY": "ran out of memory",
    "DEADLINE": "missed its deadline",
}
_REASONS = {
    "None": "",
    "Priority": "others are before it",
    "Resources": "no free nodes yet",
    "Dependency": "for the job before it",
    "job_requeued_in_held_state": "it was put back and held: scontrol release",
    "DependencyNeverSatisfied": "the job before it failed: it can never begin",
    "BeginTime": "Slurm lets a requeued job wait a while",
    "JobHeldUser": "held by its user: scontrol release",
    "JobHeldAdmin": "held by an administrator",
    "JobArrayTaskLimit": "the array runs only so many tasks at a time",
    "PartitionDown": "the partition is down",
    "PartitionInactive": "the partition is inactive",
    "PartitionTimeLimit": "its time is more than the partition allows",
    "PartitionNodeLimit": "its nodes are more than the partition allows",
    "Reservation": "for its reservation",
    "ReqNodeNotAvail": "a node that it needs is not available",
    "NodeDown": "a node went down",
    "TimeLimit": "",
    "JobLaunchFailure": "it could not be launched: does the log folder exist on the nodes?",
    "QOSMaxWallDurationPerJobLimit": "its time is more than the qos allows",
    "AssocMaxJobsLimit": "your account may not run more jobs",
    "BadConstraints": "no node has what it asks for",
}


@dataclass(frozen=True)
class Observed:
    """A job, or a task of an array."""

    job: str
    state: str
    reason: str
    nodes: str
    restarts: int
    exit_code: str

    @property
    def alive(self) -> bool:
        """Whether it still waits or runs."""
        return self.state in _LIVE

    @property
    def words(self) -> str:
        """State, reason, nodes and restarts for people."""
        text = _STATES.get(self.state, self.state.lower())
        reason = _REASONS.get(self.reason.partition(",")[0], self.reason)
        if self.reason == "NonZeroExitCode":
            reason = f"exit {self.exit_code.partition(':')[0]}"
        number = self.exit_code.partition(":")[2]
        if self.reason == "JobLaunchFailure" and number.isdigit() and int(number):
            reason = f"its batch process was killed by signal {number}; the same command goes on"
        text += f": {reason}" if reason else ""
        text += f" on {self.nodes}" if self.nodes else ""
        return text + (f", restarted {self.restarts} times" if self.restarts else "")

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "alive": self.alive, "words": self.words}


def observed(job: str) -> list[Observed]:
    """A job's records, those of an array one a task; empty where Slurm knows nothing (any more).

    PeerError ``slurm-silent``, UsageError ``slurm-missing``.
    """
    if said := said_of(job):
        return [_shown(fields(line)) for line in said.splitlines() if line.strip()]
    return _accounted(job)


def said_of(job: str) -> str:
    """What scontrol says of a job, a line a record; empty where there is no such job (any more).

    PeerError ``slurm-silent``, for all else is no answer; UsageError ``slurm-missing``.
    """
    answer = ask("scontrol", "show", "job", "-o", job)
    if answer.code and "invalid job id" not in answer.said.lower():
        raise PeerError(
            "slurm-silent",
            answer.said or f"scontrol ended with {answer.code} and said nothing",
            where=f"job {job}",
            way_out="Slurm's controller may be down: try again later; jobs go on meanwhile",
        )
    return "" if answer.code else answer.out.strip()


def alive(job: str) -> bool:
    """Whether a job still waits or runs, in part or whole."""
    return any(one.alive for one in observed(job))


def _shown(job: dict[str, str]) -> Observed:
    array, task = job.get("ArrayJobId"), job.get("ArrayTaskId")
    return Observed(
        f"{array}_[{task}]" if array and task and not task.isdigit() else f"{array}_{task}" if array else job["JobId"],
        job["JobState"],
        job.get("Reason", "None"),
        _empty(job.get("NodeList")),
        int(job.get("Restarts", 0)),
        job.get("ExitCode", ""),
    )


def _empty(value: str | None) -> str:
    return "" if value in (None, "", "(null)", "None assigned") else str(value)


def _accounted(job: str) -> list[Observed]:
    """From the accounts: the last run of each job, and how many there were."""
    try:
        answer = ask("sacct", "-D", "-X", "-n", "-P", "-j", job, "-o", "JobID,State,NodeList,ExitCode")
    except DsqjobError:
        return []
    runs: dict[str, list[Sequence[str]]] = {}
    for line in answer.out.splitlines() if answer.code == 0 else []:
        words = line.split("|")
        if len(words) == 4:
            runs.setdefault(words[0], []).append(words)
    found = []
    for name, rows in runs.items():
        _, state, nodes, code = rows[-1]
        state = (state.split() or ["UNKNOWN"])[0]
        reason = "NonZeroExitCode" if state == "FAILED" else "None"
        found.append(Observed(name, state, reason, _empty(nodes), len(rows) - 1, code))
    return found
