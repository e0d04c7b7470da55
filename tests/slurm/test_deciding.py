"""What a job does about its end: the table of causes and codes, and the fields that Slurm was seen to write."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from dsqjob.engine.workspace import Workspace
from dsqjob.errors import UsageError
from dsqjob.job.load import load
from dsqjob.launchers.slurm.allocation import Allocation
from dsqjob.launchers.slurm.batch import Batch
from dsqjob.launchers.slurm.cause import Cause, decide, fields, read_cause, read_term
from dsqjob.launchers.slurm.faults import Faults
from dsqjob.launchers.slurm.limits import seconds_of
from dsqjob.launchers.slurm.refusals import explained
from tests.harness import write_job

SEEN = [
    # state, reason, PreemptTime, Restarts, own restarts, signalled
    ("RUNNING", "None", "", "0", 0, True, Cause.LIMIT_NOTICE),
    ("RUNNING", "None", "", "0", 0, False, Cause.NONE),
    ("RUNNING", "None", "2026-11-24T10:00:00", "0", 0, True, Cause.PREEMPTION_NOTICE),
    ("RUNNING", "None", "2026-11-24T10:00:00", "0", 0, False, Cause.PREEMPTION_NOTICE),
    ("COMPLETING", "BeginTime", "", "1", 0, True, Cause.REQUEUED),
    ("COMPLETING", "None", "", "2", 1, True, Cause.REQUEUED),
    ("PENDING", "BeginTime", "", "1", 1, True, Cause.REQUEUED),
    ("COMPLETING", "TimeLimit", "", "1", 1, True, Cause.LIMIT),
    ("TIMEOUT", "TimeLimit", "", "0", 0, True, Cause.LIMIT),
    ("COMPLETING", "None", "2026-11-24T10:00:00", "0", 0, True, Cause.PREEMPTED),
    ("COMPLETING", "None", "", "0", 0, True, Cause.CANCELLED),
    ("CANCELLED", "None", "", "0", 0, True, Cause.CANCELLED),
]


@pytest.mark.parametrize(("state", "reason", "preempted", "restarts", "own", "signalled", "cause"), SEEN)
def test_the_cause_is_read_from_slurm(
    state: str, reason: str, preempted: str, restarts: str, own: int, signalled: bool, cause: Cause
) -> None:
    line = f"JobId=7 JobName=a b JobState={state} Reason={reason} Restarts={restarts}"
    line += f" PreemptEligibleTime=x PreemptTime={preempted}" if preempted else ""
    assert read_cause(fields(line), own, signalled=signalled) is cause


@pytest.mark.parametrize("code", [0, 64, 65, 70, 74])
@pytest.mark.parametrize("cause", list(Cause))
def test_a_decided_end_is_never_requeued(code: int, cause: Cause) -> None:
    verdict = decide(code, cause, faults=0, max_faults=3)
    assert (verdict.code, verdict.requeue, verdict.fault) == (code, False, False)


def test_75_comes_back_without_bound_and_69_so_many_times() -> None:
    assert decide(75, Cause.NONE, faults=99, max_faults=3).requeue
    assert decide(75, Cause.LIMIT_NOTICE, faults=99, max_faults=0).requeue
    again = [decide(69, Cause.NONE, faults=faults, max_faults=2).requeue for faults in range(4)]
    assert again == [True, True, False, False]
    assert decide(69, Cause.NONE, faults=2, max_faults=2).code == 69


@pytest.mark.parametrize("cause", [Cause.LIMIT, Cause.PREEMPTED, Cause.LIMIT_NOTICE, Cause.PREEMPTION_NOTICE])
def test_workers_that_slurm_killed_are_no_fault(cause: Cause) -> None:
    verdict = decide(69, cause, faults=0, max_faults=3)
    assert (verdict.code, verdict.requeue, verdict.fault) == (75, True, False)


@pytest.mark.parametrize("cause", [Cause.REQUEUED, Cause.CANCELLED])
@pytest.mark.parametrize("code", [69, 75])
def test_what_slurm_or_a_person_decided_stands(cause: Cause, code: int) -> None:
    verdict = decide(code, cause, faults=0, max_faults=3)
    assert (verdict.code, verdict.requeue, verdict.fault) == (75, False, False)


def test_a_node_is_bad_after_two_faults(tmp_path: Path) -> None:
    faults = Faults(Workspace(tmp_path), "calibrate")
    assert (faults.count, faults.bad_nodes) == (0, [])
    faults.add("7-0-0", ["n1"])
    faults.add("7-0-0", ["n1"])  # the same attempt counts once
    faults.add("7-1-0", ["n1", "n2"])
    assert (faults.count, faults.bad_nodes) == (2, ["n1"])
    faults.forget()
    assert (faults.count, faults.bad_nodes) == (0, [])


@pytest.mark.parametrize(
    ("said", "setting"),
    [
        ("sbatch: error: invalid partition specified: nope", "slurm.gang.partition"),
        ("Invalid account or account/partition combination specified", "slurm.account"),
        ("Invalid qos specification", "slurm.qos"),
        ("Requested node configuration is not available", "slurm.gpu_type"),
        ("Invalid generic resource (gres) specification", "slurm.gpus"),
        ("Requested reservation is invalid", "slurm.reservation"),
        ("Invalid feature specification", "slurm.constraint"),
        ("Requested time limit is invalid (missing or exceeds some limit)", "slurm.gang.time"),
        ("Invalid --time specification", "slurm.gang.time"),
        ("sbatch: error: Batch job submission failed: Invalid job array specification", "launcher.workers"),
        ("Node count specification invalid", "parallel.nodes"),
        ("Invalid --exclusive specification", "slurm.gang.exclusive"),
        ("sbatch: unrecognized option '--segment=2'", "slurm.segment"),
        ("srun: unrecognized option '--container-image=x'", "slurm.container"),
    ],
)
def test_texts_of_slurm_name_a_setting(said: str, setting: str) -> None:
    error = explained(said, gang=True)
    assert error.id == "slurm-refused" and setting in error.where and error.way_out


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("2", 120), ("2:30", 150), ("1:00:00", 3600), ("1-00", 86400), ("1-02:03", 93780), ("1-02:03:04", 93784),
     ("soon", float("inf")), ("UNLIMITED", float("inf"))],
)  # fmt: skip
def test_time_limits_as_slurm_writes_them(text: str, seconds: float) -> None:
    assert seconds_of(text) == seconds


def test_the_end_of_a_job_is_read_from_slurm() -> None:
    """Its clock is a local one; without a limit there is no end."""
    term = read_term(fields("JobId=7 StartTime=2026-11-24T10:00:00 EndTime=2026-11-24T10:02:00 Deadline=N/A"))
    assert term.length == 120 and time.localtime(term.end)[3:5] == (10, 2)
    assert read_term({"StartTime": "2026-11-24T10:00:00", "EndTime": "Unknown"}).length == float("inf")
    assert read_term({}).end == float("inf")


def shown(batch: Batch, monkeypatch: pytest.MonkeyPatch, start: float, end: float) -> None:
    words = [time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(one)) for one in (start, end)]
    monkeypatch.setattr(batch, "_shown", lambda: dict(zip(("StartTime", "EndTime"), words, strict=True)))


def test_a_missed_notice_is_noticed_and_a_job_without_time_refused(
    tmp_path: Path, miniature: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slurm's own end of the job decides, asked again once it is near: somebody may have moved it."""
    file = write_job(tmp_path, miniature, launcher__kind="slurm", slurm__notice=30)
    job = load(str(file), environment={}, families=("deepseek-v4",), launchers=("slurm",))
    here = Allocation.of({"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1"})
    batch, now = Batch(job, "export", gang=False, job_file=file, here=here), time.time()
    shown(batch, monkeypatch, now - 1000, now + 600)
    batch._refuse_short()
    assert not batch._overdue()
    shown(batch, monkeypatch, now - 1000, now + 20)
    assert not batch._overdue()  # not asked before its time
    batch._refuse_short()
    assert batch._overdue()
    shown(batch, monkeypatch, now - 1000, now + 600)
    assert not batch._overdue()
    shown(batch, monkeypatch, now, now + 90)
    with pytest.raises(UsageError, match="nothing would be done"):
        batch._refuse_short()
