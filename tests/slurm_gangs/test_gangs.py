"""Calibration as a Slurm job: two nodes of CPU ranks, disturbed in every way, leave the bytes of a quiet local run."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.harness import command, digests, dsqjob, events, write_job
from tests.slurm.gangs import amax, batches, settings
from tests.slurm.running import Login, processes
from tests.waiting import wait_until

pytestmark = [pytest.mark.needs("root"), pytest.mark.needs("slurmctld")]
SAMPLES = 60


@pytest.fixture(scope="session")
def quiet(small: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What two supervisors of one rank each leave on this machine, undisturbed."""
    folder = tmp_path_factory.mktemp("quiet")
    job = write_job(folder / "a", small, **settings(folder, samples=SAMPLES, nodes=2, ranks=1))
    dsqjob("run", job, "--through", "calibrate")
    return amax(folder / "a" / "work")


@pytest.fixture
def begun(login: Login, small: Path, tmp_path: Path) -> Callable[..., tuple[Path, Path, list[str]]]:
    """Submit a calibration and wait until batches go by: job file, workspace, ids of its jobs."""

    def begin(name: str = "a", **more: object) -> tuple[Path, Path, list[str]]:
        given = settings(tmp_path / name, samples=SAMPLES, nodes=2, ranks=1)
        job = login.job(tmp_path / name, small, **{**given, **more})
        ids = login.run(job, "--through", "calibrate")["calibrate"]
        work = tmp_path / name / "work"
        wait_until(lambda: batches(work) > 5, what="no batch is done")
        return job, work, ids

    return begin


def test_the_pipeline_on_two_nodes_equals_the_local_run(login: Login, small: Path, tmp_path: Path) -> None:
    """2 nodes x 2 ranks; every file of the checkpoint and of the calibration, byte for byte."""
    given = settings(tmp_path, samples=6, nodes=2, ranks=2)
    job = login.job(tmp_path / "slurm", small, **given)
    sent = login.run(job, "--through", "verify")
    assert list(sent) == ["tokens", "calibrate", "export", "finalize", "verify"]
    assert set(login.wait(sent["verify"][0])) == {"COMPLETED"}, login.said(sent["calibrate"][0])
    assert login.tasks(sent["calibrate"][0])[0]["NodeList"] == "n[1-2]"
    hosts = {event["host"] for event in events(tmp_path / "slurm" / "work") if event["event"] == "gang"}
    assert hosts == {"n1", "n2"}
    dsqjob("run", write_job(tmp_path / "local", small, **given), "--through", "verify")
    assert digests(tmp_path / "slurm" / "out") == digests(tmp_path / "local" / "out")
    assert amax(tmp_path / "slurm" / "work") == amax(tmp_path / "local" / "work")
    assert "attempt" in login.dsqjob("logs", job, "--rank", "3").stdout
    assert re.search(r"calibrate +done +6/6 batches", login.dsqjob("status", job).stdout)


def test_preemption_in_a_short_job(
    login: Login, tmp_path: Path, begun: Callable[..., tuple[Path, Path, list[str]]], quiet: dict[str, str]
) -> None:
    """Nine minutes long; the higher partition takes both nodes; the gang stops within the grace and comes back."""
    job, work, (calibrate,) = begun(slurm__gang={"partition": "low", "time": "9"})
    high = login.cluster.submit("sleep 1", "--partition=high", "--nodes=2", "--exclusive", folder=tmp_path)
    assert login.wait(high) == ["COMPLETED"]
    assert login.wait(calibrate) == ["COMPLETED"]
    status = login.dsqjob("status", job).stdout
    assert "restarted 1 times" in status and amax(work) == quiet
    ends = [event for event in events(work) if event["event"] == "batch-end" and event["of"] == "calibrate"]
    assert [end["code"] for end in ends] == [75, 0] and batches(work) <= 2 * (SAMPLES + 2)


def test_a_dead_rank_and_a_dead_supervisor_are_faults(
    login: Login, begun: Callable[..., tuple[Path, Path, list[str]]], quiet: dict[str, str]
) -> None:
    """69 and not 75, although srun ends the other supervisor by a signal; the node is named; the gang comes back."""
    _, work, (calibrate,) = begun()
    faults = work / "state" / "calibrate" / "faults"
    for attempt, host, which in ((f"{calibrate}-0-0", "n2", max), (f"{calibrate}-1-0", "n1", min)):
        done = batches(work)
        wait_until(lambda done=done: batches(work) > done + 3, what="no batch is done")
        os.kill(which(processes(attempt, host=host)), signal.SIGKILL)
        wait_until((faults / f"{attempt}.json").exists, what="no fault")
        assert json.loads((faults / f"{attempt}.json").read_text()) == {"nodes": [host]}, login.said(calibrate)
        wait_until(lambda attempt=attempt: not processes(attempt), what="the old gang is still there")
    assert login.wait(calibrate) == ["COMPLETED"]
    assert amax(work) == quiet and not list(faults.iterdir())


def test_a_killed_slurmd_requeues_the_gang(
    login: Login, begun: Callable[..., tuple[Path, Path, list[str]]], quiet: dict[str, str]
) -> None:
    """Slurm gives the node up; what still runs there ends by itself; the job comes back when the node does."""
    _, work, (calibrate,) = begun()
    login.cluster.kill_slurmd("n2")
    try:
        os.kill(max(processes(f"{calibrate}-0-0", host="n1")), signal.SIGSTOP)  # the gang must not end before
        wait_until(lambda: login.tasks(calibrate)[0]["Restarts"] == "1", what="Slurm does not notice")
        wait_until(lambda: not processes(f"{calibrate}-0-0"), what="the old gang is still there")
    finally:
        login.cluster.start_node("n2")
    assert login.wait(calibrate) == ["COMPLETED"]
    assert amax(work) == quiet


def test_spare_jobs_where_requeue_is_forbidden(
    login: Login, begun: Callable[..., tuple[Path, Path, list[str]]], quiet: dict[str, str]
) -> None:
    """The notice of the time limit (here sent by hand) ends the first job; the second goes on, the last tells the next
    stage."""
    job, work, ids = begun(slurm__requeue=False, slurm__spares=3)
    assert len(ids) == 4
    (export,) = login.run(job, "--stage", "export")["export"][:1]
    login.cluster.run("scancel", "--batch", "--signal=USR2", ids[0])
    assert login.wait(ids[0]) == ["FAILED"]
    assert "USR2: the time limit is near" in login.said(ids[0]) and "the next spare job goes on" in login.said(ids[0])
    assert [login.wait(number)[0] for number in ids[1:]] == ["COMPLETED", "CANCELLED", "COMPLETED"]
    assert amax(work) == quiet
    assert set(login.wait(export)) == {"COMPLETED"}
    login.dsqjob("cancel", job)


def test_a_cancelled_gang_leaves_nothing_and_is_resumed(
    login: Login, begun: Callable[..., tuple[Path, Path, list[str]]], quiet: dict[str, str]
) -> None:
    job, work, (calibrate,) = begun()
    follower = subprocess.Popen(
        command("logs", job, "--follow"), env=login.cluster.environment, stdout=subprocess.PIPE, text=True
    )
    assert f"job {calibrate} is cancelled" in login.dsqjob("cancel", job).stdout
    assert login.wait(calibrate) == ["CANCELLED"]
    wait_until(lambda: not processes(f"{calibrate}-0-0"), what="the gang is still there")
    assert "the job was cancelled" in follower.communicate(timeout=60)[0]
    done = batches(work)
    (again,) = login.run(job, "--through", "calibrate")["calibrate"]
    assert login.wait(again) == ["COMPLETED"]
    assert amax(work) == quiet and batches(work) - done < 2 * SAMPLES


def test_two_pipelines_share_the_nodes(
    login: Login, begun: Callable[..., tuple[Path, Path, list[str]]], quiet: dict[str, str]
) -> None:
    _, first, (one,) = begun("a")
    _, second, (two,) = begun("b")
    assert login.wait(one) == login.wait(two) == ["COMPLETED"]
    assert amax(first) == amax(second) == quiet


def test_an_allocation_that_does_not_fit_is_refused(login: Login, small: Path, tmp_path: Path) -> None:
    """The rendered script, sent by hand with fewer nodes or GPUs than model_parallel needs."""
    given = settings(tmp_path, samples=2, nodes=2, ranks=2)
    job = login.job(tmp_path / "a", small, **{**given, "device": "cuda"})
    login.dsqjob("run", job, "--stage", "tokens", "--set", "launcher.kind=local")
    login.dsqjob("render", "slurm", job, "--stage", "calibrate", "--out", tmp_path / "out")
    for options, why in ((["--nodes=1"], "allocation-nodes"), (["--gpus-per-node=1"], "allocation-gpus")):
        sent = login.cluster.run("sbatch", "--parsable", *options, tmp_path / "out" / "calibrate.sh").strip()
        assert login.wait(sent) == ["FAILED"] and login.tasks(sent)[0]["ExitCode"] == "64:0"
        assert why in login.said(sent), login.said(sent)
