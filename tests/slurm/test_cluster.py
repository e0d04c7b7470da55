"""The pretended Slurm behaves as a real one does, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.machines import clean_environment
from tests.waiting import wait_until

CHECKOUT = Path(__file__).parent.parent.parent
pytestmark = [pytest.mark.needs("root"), pytest.mark.needs("slurmctld")]

SLEEP = f"sleep 600.{os.getpid()}"
TRAP = "trap 'echo got {name}; exit {code}' {name}; echo up $SLURM_RESTART_COUNT; " + SLEEP + " & wait"


def processes_about(text: str) -> list[str]:
    """Command lines of living processes that name ``text``."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if text in line:
            found.append(line)
    return found


def wait_for_text(file: Path, text: str) -> None:
    wait_until(lambda: file.exists() and text in file.read_text(), what=f"{file.name} does not say {text!r}")


@pytest.fixture(scope="module")
def limited(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A job of one minute with fifty seconds of notice, begun early because Slurm looks every half minute."""
    folder = tmp_path_factory.mktemp("limited")
    options = ("--time=1", "--signal=B:USR2@50", "--partition=high")
    return cluster.submit(TRAP.format(name="USR2", code=75), *options, folder=folder), folder


@pytest.mark.usefixtures("limited")
def test_a_step_over_two_nodes_sees_all_gpus_of_each(cluster: Cluster, tmp_path: Path) -> None:
    script = "srun sh -c 'echo \"$SLURM_PROCID $(hostname) $SLURMD_NODENAME $CUDA_VISIBLE_DEVICES\"'"
    job = cluster.submit(script, "--nodes=2", "--gpus-per-node=h200:8", "--exclusive=user", folder=tmp_path)
    assert cluster.wait(job)["JobState"] == "COMPLETED"
    gpus = "0,1,2,3,4,5,6,7"
    assert sorted((tmp_path / f"{job}.out").read_text().splitlines()) == [f"0 n1 n1 {gpus}", f"1 n2 n2 {gpus}"]


def test_half_a_node_sees_its_own_gpus(cluster: Cluster, tmp_path: Path) -> None:
    script = "srun sh -c 'echo $CUDA_VISIBLE_DEVICES; sleep 1'"
    jobs = [cluster.submit(script, "--gres=gpu:4", "--nodelist=n1", folder=tmp_path) for _ in range(2)]
    assert [cluster.wait(job)["JobState"] for job in jobs] == ["COMPLETED"] * 2
    assert {(tmp_path / f"{job}.out").read_text().strip() for job in jobs} == {"0,1,2,3", "4,5,6,7"}


def test_a_requeued_job_waits_and_starts_again(cluster: Cluster, tmp_path: Path) -> None:
    job = cluster.submit(TRAP.format(name="TERM", code=75), folder=tmp_path)
    wait_for_text(tmp_path / f"{job}.out", "up")
    cluster.run("scontrol", "requeue", job)
    waiting = cluster.wait(job, {"PENDING"})
    assert (waiting["Reason"], waiting["Restarts"]) == ("BeginTime", "1")
    wait_for_text(tmp_path / f"{job}.out", "up 1")
    cluster.run("scancel", job)
    assert cluster.wait(job)["JobState"] == "CANCELLED"


def test_a_higher_partition_preempts_and_the_job_comes_back(cluster: Cluster, tmp_path: Path) -> None:
    low = cluster.submit(
        TRAP.format(name="TERM", code=75), "--partition=low", "--nodelist=n2", "--gres=gpu:8", folder=tmp_path
    )
    wait_for_text(tmp_path / f"{low}.out", "up")
    high = cluster.submit("sleep 1", "--partition=high", "--nodelist=n2", "--gres=gpu:8", folder=tmp_path)
    assert cluster.wait(high)["JobState"] == "COMPLETED"
    cluster.wait(low, {"PENDING", "RUNNING"})
    wait_for_text(tmp_path / f"{low}.out", "up 1")
    cluster.run("scancel", low)


def test_a_lost_node_requeues_its_job(cluster: Cluster, tmp_path: Path) -> None:
    script = TRAP.format(name="TERM", code=75)
    kept = cluster.submit(script, "--nodelist=n2", "--requeue", folder=tmp_path)
    lost = cluster.submit(script, "--nodelist=n2", "--no-requeue", folder=tmp_path)
    for job in (kept, lost):
        wait_for_text(tmp_path / f"{job}.out", "up")
    sleepers = len(processes_about(SLEEP))
    cluster.kill_node("n2")
    assert len(processes_about(SLEEP)) == sleepers - 2
    assert cluster.wait(lost)["JobState"] == "NODE_FAIL"
    assert cluster.wait(kept, {"PENDING"})["Restarts"] == "1"
    cluster.start_node("n2")
    wait_for_text(tmp_path / f"{kept}.out", "up 1")
    cluster.run("scancel", kept)


def test_a_job_outlives_its_slurmd(cluster: Cluster, tmp_path: Path) -> None:
    job = cluster.submit("sleep 3; echo end", "--nodelist=n1", folder=tmp_path)
    cluster.wait(job, {"RUNNING"})
    cluster.kill_slurmd("n1")
    wait_for_text(tmp_path / f"{job}.out", "end")
    cluster.start_node("n1")
    assert cluster.wait(job)["JobState"] == "COMPLETED"


def test_notice_of_the_time_limit_is_given(cluster: Cluster, limited: tuple[str, Path]) -> None:
    job, folder = limited
    ended = cluster.wait(job)
    assert "got USR2" in (folder / f"{job}.out").read_text()
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "75:0")


@pytest.mark.needs("mariadbd")
def test_accounting_answers(tmp_path: Path) -> None:
    before = {path.name for path in Path("/run").iterdir()}
    with Cluster(nodes=1, gpus=2, accounting=True) as cluster:
        job = cluster.submit("exit 3", "--account=project", folder=tmp_path)
        cluster.wait(job)
        command = ("sacct", "-nPX", "-j", job, "-o", "State,ExitCode,Account")
        wait_until(lambda: cluster.run(*command).strip() == "FAILED|3:0|project", what="sacct does not know the end")
        assert "Invalid account" in cluster.run("sbatch", "--account=nobody", "--wrap=true", code=1)
    assert {path.name for path in Path("/run").iterdir()} == before
    assert (processes_about(str(cluster.root)), cluster.root.exists()) == ([], False)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_when_the_owner_is_killed(number: signal.Signals, tmp_path: Path) -> None:
    mark = f"6{os.getpid()}.{int(number)}"
    program = f"""
from pathlib import Path
from tests.slurm.cluster import Cluster
with Cluster(nodes=1, gpus=1) as cluster:
    job = cluster.submit("sleep {mark} & srun sleep {mark}", folder=Path({str(tmp_path)!r}))
    cluster.wait(job, {{"RUNNING"}})
    print(cluster.root, flush=True)
    cluster.wait(job)
"""
    environment = clean_environment(PYTHONPATH=str(CHECKOUT))
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, env=environment) as owner:
        assert owner.stdout is not None
        root = Path(owner.stdout.readline().decode().strip())
        wait_until(lambda: len(processes_about(f"sleep {mark}")) >= 2, what="the job does not sleep")
        owner.send_signal(number)
    wait_until(lambda: not processes_about(mark) and not processes_about(str(root)) and not root.exists(), what="left")
