"""What is sent to Slurm, and what Slurm makes of it: stages without a gang."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness import digests, dsqjob, error_id, write_job
from tests.slurm.cluster import Cluster
from tests.slurm.running import Login, processes
from tests.waiting import wait_until

pytestmark = [pytest.mark.needs("root"), pytest.mark.needs("slurmctld")]


def test_a_pipeline_is_submitted_once_and_runs(login: Login, small: Path, tmp_path: Path) -> None:
    """Chained; not sent again while it waits; done afterwards; the bytes are those of a local run."""
    job = login.job(tmp_path / "a", small, launcher__workers=3)
    sent = login.run(job, "--through", "verify")
    assert list(sent) == ["export", "finalize", "verify"]
    assert login.tasks(sent["finalize"][0])[0]["Dependency"] == f"afterok:{sent['export'][0]}_*(unfulfilled)"
    assert login.run(job, "--through", "verify") == {}
    refused = login.dsqjob("run", job, "--through", "verify", "--set", "export.weights=cast", code=64)
    assert error_id(refused) == "queued-otherwise"
    assert error_id(login.dsqjob("run", job, "--restart", code=64)) == "restart-while-running"
    assert login.wait(sent["verify"][0]) == ["COMPLETED"] * 3
    again = login.dsqjob("run", job, "--through", "verify").stdout
    assert again.count("already done") == 3
    dsqjob("run", write_job(tmp_path / "b", small), "--through", "verify")
    assert digests(tmp_path / "a" / "out") == digests(tmp_path / "b" / "out")


def test_render_is_what_is_sent(login: Login, small: Path, tmp_path: Path) -> None:
    job = login.job(tmp_path, small)
    shown = login.dsqjob("render", "slurm", job).stdout
    assert not (tmp_path / "work").exists()
    sent = login.run(job)
    for stage, (number, *_) in sent.items():
        script = (tmp_path / "work" / "logs" / "slurm" / f"{number}_submission.sh").read_text()
        assert f"# {stage}.sh\n{script}" in shown
    login.wait(sent["finalize"][0])


def test_rendered_scripts_work_by_hand_twice(login: Login, small: Path, tmp_path: Path) -> None:
    """No pickle; `submit` chains them; the second round finds everything done."""
    job = login.job(tmp_path, small)
    login.dsqjob("render", "slurm", job, "--out", tmp_path / "scripts")
    assert sorted(path.name for path in (tmp_path / "scripts").iterdir()) == [
        "export.sh", "finalize.sh", "submit", "verify.sh",
    ]  # fmt: skip
    for _ in range(2):
        last = login.cluster.run(tmp_path / "scripts" / "submit").split()[-1]
        assert set(login.wait(last)) == {"COMPLETED"}
    assert (tmp_path / "out" / "model.safetensors.index.json").is_file()
    assert not list(tmp_path.rglob("*.pkl"))
    status = login.dsqjob("status", job).stdout
    assert status.count("ended well on n") == 3 and "COMPLETED" not in status  # as they are known once they run


@pytest.mark.parametrize(
    ("settings", "setting", "word"),
    [
        ({"slurm__workers": {"partition": "nope"}}, "slurm.workers.partition", "invalid partition"),
        ({"slurm__workers": {"partition": "short", "time": "11"}}, "slurm.workers.time", "time limit"),
        ({"slurm__workers": {"time": "soon"}}, "slurm.workers.time", "time"),
        ({"slurm__workers": {"cpus": 99}}, "slurm.workers.cpus", "processors"),
        ({"slurm__workers": {"memory": "9000G"}}, "slurm.workers.memory", "memory"),
        ({"slurm__reservation": "mine"}, "slurm.reservation", "reservation"),
        ({"slurm__constraint": "b300"}, "slurm.constraint", "feature"),
        ({"slurm__workers": {"sbatch": ["--segment=2"]}}, "slurm.segment", "segment"),
        ({"slurm__workers": {"sbatch": ["--frobnicate"]}}, "slurm.workers.sbatch", "unrecognized"),
    ],
)
def test_a_refusal_names_reason_and_setting(
    login: Login, small: Path, tmp_path: Path, settings: dict[str, object], setting: str, word: str
) -> None:
    done = login.dsqjob("run", login.job(tmp_path, small, **settings), code=64)
    assert error_id(done) == "slurm-refused"
    assert setting in done.stderr.partition("where:")[2] and word in done.stderr.lower(), done.stderr
    assert not list((tmp_path / "work" / "logs" / "slurm").glob(".submission*"))


def test_gpus_of_a_wrong_type_are_refused(login: Login, small: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "wind"}\n')
    job = login.job(
        tmp_path, small, export__input_scale="calibrated", slurm__gpu_type="b200", tokens__data=[{"jsonl": str(text)}]
    )
    done = login.dsqjob("run", job, "--stage", "tokens", "--through", "calibrate", code=64)
    assert error_id(done) == "slurm-refused" and "slurm.gpu_type" in done.stderr
    login.dsqjob("cancel", job)


def test_what_follows_a_failure_never_begins(login: Login, small: Path, tmp_path: Path) -> None:
    """65 ends the job at once; Slurm cancels what depends on it, and status says so."""
    release = tmp_path / "release"
    subprocess.run(["cp", "-r", small, release], check=True)
    job = login.job(tmp_path / "a", release, launcher__workers=1)
    sent = login.run(job, "--through", "verify")
    shard = sorted(release.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-100])
    assert login.wait(sent["export"][0]) == ["FAILED"]
    assert login.wait(sent["verify"][0]) == ["CANCELLED"]
    status = login.dsqjob("status", job).stdout
    assert "failed: exit 65" in status and "shard-truncated" in status and "it can never begin" in status
    assert login.tasks(sent["export"][0])[0]["Restarts"] == "0"


def test_a_killed_task_of_an_array_comes_back(login: Login, miniature: Path, tmp_path: Path) -> None:
    """One of three workers is killed in its unit: its task counts a fault and goes back into the queue."""
    job = login.job(tmp_path / "a", miniature, launcher__workers=3, slurm__environment={"DSQJOB_TEST": "1"})
    sent = login.run(job, "--through", "verify")
    (export,) = sent["export"]
    wait_until(lambda: bool(processes(f"{export}_1-0-0")), what="the worker does not appear")
    os.kill(processes(f"{export}_1-0-0")[0], signal.SIGKILL)
    assert login.wait(export) == ["COMPLETED"] * 3
    assert sorted(task["Restarts"] for task in login.tasks(export)) == ["0", "0", "1"]
    assert "69" in login.said(export) and "back into the queue" in login.said(export)
    assert login.wait(sent["verify"][0]) == ["COMPLETED"] * 3
    assert not list((tmp_path / "a" / "work" / "state" / "export" / "faults").glob("*"))


def test_faults_are_counted_and_the_node_is_left_out(login: Login, small: Path, tmp_path: Path) -> None:
    """A worker that dies at once: two restarts, the second one without the node, then 69 for good."""
    bad = tmp_path / "bad"
    bad.write_text("#!/bin/sh\necho 'pyxis: creating container filesystem ...'\nkill -9 $$\n")
    bad.chmod(0o755)
    job = login.job(
        tmp_path / "a", small, launcher__workers=1, launcher__max_faults=2,
        slurm__container={"kind": "apptainer", "image": "x.sif"},
        slurm__workers={"sbatch": ["--nodelist=n1"]}, slurm__setup=[f"export PATH={tmp_path / 'bin'}:$PATH"],
    )  # fmt: skip
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "apptainer").symlink_to(bad)  # stands for a node whose programs die
    (export,) = login.run(job, "--stage", "export")["export"]
    wait_until(lambda: login.tasks(export)[0]["ExcNodeList"] == "n1", what="the node is not left out")
    assert login.tasks(export)[0]["Restarts"] == "2"
    assert "nodes with two faults are left out: n1" in login.said(export)
    login.dsqjob("cancel", job)


def test_status_logs_and_cancel_from_another_shell(login: Login, small: Path, tmp_path: Path) -> None:
    job = login.job(tmp_path, small, slurm__workers={"sbatch": ["--hold"]})
    sent = login.run(job, "--through", "verify")
    status = login.dsqjob("status", job).stdout
    assert f"job {sent['finalize'][0]} waits: for the job before it" in status or "held by its user" in status
    assert "held by its user" in status
    answered = json.loads(login.dsqjob("status", "--json", job).stdout)["slurm"]
    assert answered["export"][0]["state"] == "PENDING" and answered["export"][0]["alive"]
    assert error_id(login.dsqjob("logs", job, "--stage", "export", code=64)) == "log-missing"
    said = login.dsqjob("cancel", job).stdout
    assert re.findall(r"^(\w+): job \d+ is cancelled", said, re.M) == ["verify", "finalize", "export"]
    assert "was cancelled" in login.dsqjob("status", job).stdout
    assert "nothing is waiting" in login.dsqjob("cancel", job).stdout
    assert login.run(job) != {}  # the next submission resumes
    login.dsqjob("cancel", job)


def test_status_answers_without_slurm(login: Login, small: Path, tmp_path: Path) -> None:
    job = login.job(tmp_path, small)
    sent = login.run(job)
    assert login.wait(sent["finalize"][0]) == ["COMPLETED"]
    gone = login.dsqjob("status", job, PATH="/nonexistent", SLURM_CONF="")
    assert re.search(r"^export +done", gone.stdout, re.M) and "there is no scontrol" in gone.stdout
    assert "exit 0 (done)" in login.dsqjob("logs", job, "--stage", "export", PATH="/nonexistent").stdout


def test_the_login_side_needs_no_torch(login: Login, small: Path, tmp_path: Path, base_python: Path) -> None:
    """With the interpreter of the base environment; torch is not even looked for."""
    job = login.job(tmp_path, small, slurm__python=sys.executable, slurm__workers={"sbatch": ["--hold"]})
    commands = (
        ("render", "slurm", job),
        ("run", job),
        ("status", job),
        ("logs", job, "--stage", "export"),
        ("cancel", job),
    )
    for command in commands:
        done = subprocess.run(
            [base_python, "-X", "importtime", "-m", "dsqjob", *map(str, command)],
            env=login.cluster.environment, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == (64 if command[0] == "logs" else 0), done.stderr[-2000:]
        modules = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
        assert not modules & {"torch", "modelopt", "transformers"}, command


@pytest.mark.needs("mariadbd")
def test_a_bad_account_is_refused_and_accounts_remember(small: Path, tmp_path: Path) -> None:
    """With accounting: sbatch's reason and the setting; long afterwards, sacct knows what slurmctld forgot."""
    with Cluster(nodes=1, gpus=2, accounting=True, settings={"MinJobAge": 2}) as cluster:
        login = Login(cluster)
        job = login.job(tmp_path, small, slurm__account="nobody")
        done = login.dsqjob("run", job, code=64)
        assert error_id(done) == "slurm-refused" and "slurm.account" in done.stderr and "Invalid account" in done.stderr
        done = login.dsqjob("run", job, "--set", "slurm.account=project", "--set", "slurm.qos=nope", code=64)
        assert "slurm.qos" in done.stderr and "Invalid qos" in done.stderr
        given = ("--set", "slurm.account=project", "--set", "slurm.qos=urgent")
        (export,) = login.run(job, "--stage", "export", *given)["export"]
        for _ in range(120):
            said = login.dsqjob("status", job).stdout
            if cluster.run("scontrol", "show", "job", export, code=None).startswith("slurm_load_jobs error"):
                break
        assert "ended well on n1" in said and "done" in said, said
