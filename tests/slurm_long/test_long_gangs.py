"""What takes minutes on a Slurm: time limits, power cuts, eight ranks."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.harness import command, digests, dsqjob, events, write_job
from tests.slurm.gangs import amax, batches, settings
from tests.slurm.running import Login, processes
from tests.waiting import wait_until

pytestmark = [pytest.mark.needs("root"), pytest.mark.needs("slurmctld")]


@pytest.mark.timeout(1800)
def test_time_limits_in_mid_calibration(login: Login, small: Path, tmp_path: Path) -> None:
    """Two minutes a run, thirty seconds of notice, more batches than fit: requeued by itself until it is done."""
    given = settings(tmp_path, samples=2500, nodes=2, ranks=1)
    job = login.job(tmp_path / "slurm", small, slurm__gang={"time": "2"}, **given)
    work = tmp_path / "slurm" / "work"
    (calibrate,) = login.run(job, "--through", "calibrate")["calibrate"]
    assert login.wait(calibrate, 1000) == ["COMPLETED"], login.said(calibrate)
    said, restarts = login.said(calibrate), int(login.tasks(calibrate)[0]["Restarts"])
    assert restarts >= 1 and said.count("USR2: the time limit is near") == restarts
    ends = [event["code"] for event in events(work) if event["event"] == "batch-end" and event["of"] == "calibrate"]
    assert ends == [75] * restarts + [0] and not list((work / "state" / "calibrate").glob("faults/*"))
    assert 2500 <= batches(work) <= 2500 + 2 * restarts + 2  # a batch in work is done again, no more
    local = command("run", write_job(tmp_path / "local", small, **given), "--through", "calibrate")
    subprocess.run(local, check=True, capture_output=True, timeout=900)
    assert amax(work) == amax(tmp_path / "local" / "work")


@pytest.mark.timeout(600)
def test_a_node_loses_power_in_mid_calibration(login: Login, small: Path, tmp_path: Path) -> None:
    """Everything on it is gone at once; Slurm requeues; the bytes are those of a quiet run."""
    given = settings(tmp_path, samples=200, nodes=2, ranks=1)
    job = login.job(tmp_path / "slurm", small, **given)
    work = tmp_path / "slurm" / "work"
    (calibrate,) = login.run(job, "--through", "calibrate")["calibrate"]
    wait_until(lambda: batches(work) > 5, what="no batch is done")
    login.cluster.kill_node("n2")
    try:
        wait_until(lambda: login.tasks(calibrate)[0]["Restarts"] == "1", what="Slurm does not notice")
        wait_until(lambda: not processes(f"{calibrate}-0-0"), what="the old gang is still there")
    finally:
        login.cluster.start_node("n2")
    assert login.wait(calibrate, 400) == ["COMPLETED"], login.said(calibrate)
    dsqjob("run", write_job(tmp_path / "local", small, **given), "--through", "calibrate")
    assert amax(work) == amax(tmp_path / "local" / "work")


@pytest.mark.timeout(600)
def test_two_nodes_of_four_ranks_equal_the_local_run(login: Login, miniature: Path, tmp_path: Path) -> None:
    """2 nodes x 4 ranks: the whole pipeline, byte for byte."""
    given = settings(tmp_path, samples=4, nodes=2, ranks=4)
    sent = login.run(login.job(tmp_path / "slurm", miniature, **given), "--through", "verify")
    assert set(login.wait(sent["verify"][0], 400)) == {"COMPLETED"}, login.said(sent["calibrate"][0])
    dsqjob("run", write_job(tmp_path / "local", miniature, **given), "--through", "verify")
    assert digests(tmp_path / "slurm" / "out") == digests(tmp_path / "local" / "out")
    assert amax(tmp_path / "slurm" / "work") == amax(tmp_path / "local" / "work")
