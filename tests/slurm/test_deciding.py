"""What a job does about its end: the table of causes and codes, and the fields that Slurm was seen to write."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsqjob.engine.workspace import Workspace
from dsqjob.launchers.slurm.cause import Cause, decide, fields, read_cause
from dsqjob.launchers.slurm.faults import Faults
from dsqjob.launchers.slurm.refusals import explained

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
        ("Node count specification invalid", "parallel.nodes"),
        ("Invalid --exclusive specification", "slurm.gang.exclusive"),
        ("sbatch: unrecognized option '--segment=2'", "slurm.segment"),
        ("srun: unrecognized option '--container-image=x'", "slurm.container"),
    ],
)
def test_texts_of_slurm_name_a_setting(said: str, setting: str) -> None:
    error = explained(said, gang=True)
    assert error.id == "slurm-refused" and setting in error.where and error.way_out
