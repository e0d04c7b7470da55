"""Submitting again, at once, from inside a job, and while Slurm does not answer: nothing is lost or sent twice."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.harness import command, digests, error_id, events
from tests.slurm.running import Login
from tests.waiting import wait_until

pytestmark = [pytest.mark.needs("root"), pytest.mark.needs("slurmctld")]
HOLD: dict[str, Any] = {"slurm__workers": {"sbatch": ["--hold"]}}
WHOLE = ("--through", "verify")


def queue(login: Login, folder: Path) -> list[str]:
    """Jobs of the queue whose working folder is that workspace."""
    lines = login.cluster.run("squeue", "--noheader", "--format=%i %Z").splitlines()
    return [line.split()[0] for line in lines if line.split()[1] == str(folder / "work")]


def at_once(login: Login, *jobs: Path) -> list[tuple[int, str]]:
    """Submit all at the same time; how each ended and what it said."""
    runs = [
        subprocess.Popen(
            command("run", job, *WHOLE), env=login.cluster.environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for job in jobs
    ]  # fmt: skip
    said = [run.communicate(timeout=120)[0] for run in runs]
    return [(run.returncode, text) for run, text in zip(runs, said, strict=True)]


def test_two_submissions_at_once_send_one_pipeline(login: Login, small: Path, tmp_path: Path) -> None:
    job = login.job(tmp_path, small, **HOLD)
    for code, said in at_once(login, job, job, job):
        assert code == 0 or (code == 64 and "[submission-running]" in said), said
    assert len(queue(login, tmp_path)) == 3
    login.dsqjob("cancel", job)
    assert queue(login, tmp_path) == []


def test_workspaces_may_share_a_log_folder(login: Login, small: Path, tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    jobs = [login.job(tmp_path / name, small, slurm__logs=logs, **HOLD) for name in "abc"]
    assert [code for code, _ in at_once(login, *jobs)] == [0, 0, 0]
    assert [len(queue(login, tmp_path / name)) for name in "abc"] == [3, 3, 3]
    for job in jobs:
        login.dsqjob("cancel", job)
    assert [queue(login, tmp_path / name) for name in "abc"] == [[], [], []]


def test_a_job_that_we_run_in_gives_nothing_to_those_that_are_sent(login: Login, small: Path, tmp_path: Path) -> None:
    """Its array, its restarts, a user's defaults that the job file overrides."""
    job = login.job(tmp_path, small, launcher__workers=1, slurm__workers={"partition": "main"})
    inherited = {
        "SLURM_ARRAY_JOB_ID": "1", "SLURM_ARRAY_TASK_ID": "3", "SLURM_RESTART_COUNT": "7", "SLURM_NTASKS": "9",
        "SBATCH_JOB_NAME": "evil", "SBATCH_PARTITION": "high", "SBATCH_TIMELIMIT": "1", "SRUN_CPUS_PER_TASK": "99",
    }  # fmt: skip
    said = login.dsqjob("run", job, "--stage", "export", **inherited).stdout
    (export,) = re.findall(r"job (\d+)", said)
    assert login.wait(export) == ["COMPLETED"], login.said(export)
    (seen,) = login.tasks(export)
    assert (seen["JobName"], seen["Partition"], seen["TimeLimit"]) == ("test.export", "main", "00:10:00")
    (begun,) = [event for event in events(tmp_path / "work") if event["event"] == "batch"]
    assert (begun["job"], begun["restarts"]) == (export, 0)


def test_where_slurm_does_not_answer_nothing_is_taken_for_gone(login: Login, small: Path, tmp_path: Path) -> None:
    job = login.job(tmp_path / "a", small, launcher__workers=1)
    (export,) = login.run(job, "--stage", "export")["export"]
    assert login.wait(export) == ["COMPLETED"]
    held = login.job(tmp_path / "a", small, launcher__workers=1, **HOLD)
    login.run(held, *WHOLE)
    down = tmp_path / "down.conf"
    text = Path(login.cluster.environment["SLURM_CONF"]).read_text()
    down.write_text(re.sub(r"SlurmctldPort=\d+", "SlurmctldPort=1", text))
    before = digests(tmp_path / "a" / "out")
    for words in (("run", held, "--stage", "export", "--restart"), ("cancel", held), ("run", held, *WHOLE)):
        done = login.dsqjob(*words, code=69, SLURM_CONF=str(down))
        assert error_id(done) == "slurm-silent" and "try again later" in done.stderr
    assert digests(tmp_path / "a" / "out") == before and len(queue(login, tmp_path / "a")) == 2
    assert "contact" in login.dsqjob("status", held, SLURM_CONF=str(down)).stdout
    done = login.dsqjob("run", held, "--stage", "export", "--restart", code=64)
    assert error_id(done) == "restart-while-running" and "finalize, verify" in done.stderr
    assert digests(tmp_path / "a" / "out") == before
    login.dsqjob("cancel", tmp_path / "a" / "work")  # by the workspace alone
    assert queue(login, tmp_path / "a") == []
    assert "was cancelled" in login.dsqjob("status", tmp_path / "a" / "work").stdout


def test_what_waits_for_a_cancelled_job_is_sent_again(login: Login, small: Path, tmp_path: Path) -> None:
    job = login.job(tmp_path, small, **HOLD)
    first = login.run(job, *WHOLE)
    login.cluster.run("scancel", first["export"][0])
    second = login.run(job, *WHOLE)
    assert list(second) == ["export", "finalize", "verify"]
    waits = [login.tasks(second[stage][0])[0]["Dependency"].partition("(")[0] for stage in ("finalize", "verify")]
    assert waits == [f"afterok:{second['export'][0]}_*", f"afterok:{second['finalize'][0]}"]
    assert not {*first["finalize"], *first["verify"]} & set(queue(login, tmp_path))
    login.dsqjob("cancel", job)


def test_a_notice_during_setup_ends_nothing(login: Login, small: Path, tmp_path: Path) -> None:
    """And a line of setup that fails does."""
    job = login.job(tmp_path / "a", small, launcher__workers=1, slurm__setup=[f"touch {tmp_path}/begun", "sleep 4"])
    (export,) = login.run(job, "--stage", "export")["export"]
    wait_until((tmp_path / "begun").exists, what="setup does not begin")
    login.cluster.run("scancel", "--batch", "--signal=USR2", export)
    assert login.wait(export) == ["COMPLETED"], login.said(export)
    job = login.job(tmp_path / "b", small, launcher__workers=1, slurm__setup=["modul load cuda"])
    (export,) = login.run(job, "--stage", "export")["export"]
    assert login.wait(export) == ["FAILED"] and "modul" in login.said(export)


def test_a_killed_batch_process_is_told_in_words(login: Login, small: Path, tmp_path: Path) -> None:
    job = login.job(tmp_path, small, launcher__workers=1, slurm__setup=["echo $$$$ > $$SLURM_JOB_ID.pid", "sleep 60"])
    (export,) = login.run(job, "--stage", "export")["export"]
    file = tmp_path / "work" / f"{export}.pid"
    wait_until(lambda: file.exists() and bool(file.read_text().strip()), what="setup does not begin")
    login.cluster.on_node(login.tasks(export)[0]["NodeList"], "kill", "-KILL", file.read_text().strip())
    assert login.wait(export) == ["FAILED"]
    assert "killed by signal 9" in login.dsqjob("status", job).stdout


@pytest.mark.parametrize(
    ("settings", "id", "words"),
    [
        ({"slurm__gang": {"time": "2"}, "slurm__workers": {"time": "00:02:00"}, "slurm__notice": 120},
         "time-too-short", "slurm.workers.time, slurm.notice"),
        ({"slurm__logs": "/srv/per%jcent"}, "slurm-logs", "%"),
        ({"slurm__logs": "/proc/none"}, "slurm-logs", "/proc/none"),
        ({"slurm__workers": {"sbatch": ["--job-name=x"]}}, "job-invalid", "--job-name is decided by dsqjob"),
        ({"slurm__environment": {"A;B": "x"}}, "job-invalid", "slurm.environment"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_what_would_go_wrong_on_the_nodes_is_refused_here(
    login: Login, small: Path, tmp_path: Path, settings: dict[str, Any], id: str, words: str
) -> None:
    done = login.dsqjob("run", login.job(tmp_path, small, **settings), code=64)
    assert error_id(done) == id and words in done.stderr, done.stderr
    assert queue(login, tmp_path) == []


def test_a_damaged_handle_is_named(login: Login, small: Path, tmp_path: Path) -> None:
    job = login.job(tmp_path, small, **HOLD)
    login.run(job)
    file = tmp_path / "work" / "state" / "export" / "handle.json"
    text = file.read_text()
    file.write_text("{}")
    done = login.dsqjob("status", job, code=65)
    assert error_id(done) == "state-damaged" and str(file) in done.stderr
    file.write_text(text)
    login.dsqjob("cancel", job)
