"""Stopped at any batch, a calibration goes on with the batches that remain and leaves the same bytes."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from pathlib import Path

import pytest
import torch

from tests.calibration.gangs import BATCHES, Gang, Holds, amax_of, done, seen
from tests.harness import command, dsqjob, error_id
from tests.warm import Warm


@pytest.mark.parametrize(("number", "node"), [(signal.SIGTERM, 0), (signal.SIGINT, 1), (signal.SIGUSR2, 0)], ids=str)
def test_a_signal_ends_both_nodes_with_75_and_only_the_rest_runs_again(
    warm: Warm, job: Path, calm: Path, number: signal.Signals, node: int
) -> None:
    gang = Gang(warm, job)
    gang.until("unit-done", unit="batch-3")
    gang.supervisors[node].signal(number)
    said = gang.end(75, 30)
    assert f"stopped by {number.name}" in said and "resumes" in said
    first = done(job)
    assert 4 <= len(first) < 24
    Gang(warm, job, attempt="2").end(0)
    assert done(job) == BATCHES
    assert seen(job.parent, "unit")[len(first)]["unit"] == BATCHES[len(first)]
    assert amax_of(job.parent) == amax_of(calm)


@pytest.mark.parametrize("damage", ["cut", "flipped", "anothers", "older", "torch"])
def test_a_state_that_cannot_be_used_begins_again(warm: Warm, job: Path, holds: Holds, calm: Path, damage: str) -> None:
    """Both ranks of one node here; rank 1's file is spoiled."""
    holds.set("forward-2", 0)
    alone = Path(str(job)).with_name("alone.yaml")
    alone.write_text(job.read_text().replace("nodes: 2", "nodes: 1").replace("gpus_per_node: 1", "gpus_per_node: 2"))
    gang = Gang(warm, alone, 1, environment=holds.environment)
    gang.until("unit-done", unit="batch-1")
    gang.supervisors[0].kill_all()
    state = job.parent / "work" / "state" / "calibrate" / "ranks" / "rank1-mp2.safetensors"
    data = state.read_bytes()
    match damage:
        case "cut":
            state.write_bytes(data[:-8])
        case "anothers":
            state.write_bytes((calm / "work" / "state" / "calibrate" / "ranks" / state.name).read_bytes())
        case "older":
            state.write_bytes(data.replace(b"calibration state 2", b"calibration state 1"))
        case "flipped":
            state.write_bytes(data[:-8] + bytes([data[-8] ^ 1]) + data[-7:])
        case "torch":
            state.write_bytes(data.replace(f'"{torch.__version__}"'.encode(), f'"{torch.__version__[:-1]}~"'.encode()))
    assert state.read_bytes() != data
    Gang(warm, alone, 1, attempt="2").end(0)
    assert done(job) == [*BATCHES[:2], *BATCHES]
    (why,) = seen(job.parent, "state-unusable")
    assert why["rank"] == 1 and why["where"] == str(state)
    assert amax_of(job.parent) == amax_of(calm)


def test_status_tells_of_a_gang_at_work(warm: Warm, job: Path, holds: Holds, calm: Path) -> None:
    """From another process, in the middle of a batch; and a second gang is kept out meanwhile."""
    holds.set("forward-5", 0)
    gang = Gang(warm, job, environment=holds.environment)
    gang.until("unit-done", unit="batch-4")
    text = dsqjob("status", job).stdout
    assert "5/24 batches" in text and "tokens/s" in text and "phase batch" in text and "left" in text
    (stage,) = json.loads(dsqjob("status", job, "--json").stdout)["stages"]
    assert (stage["stage"], stage["state"], stage["phase"], stage["measure"]) == (
        "calibrate", "running", "batch", "tokens",
    )  # fmt: skip
    assert (stage["units"], stage["units_done"]) == (24, 5)
    assert stage["bytes"] == 24 * stage["bytes_done"] / 5 and stage["rate"] > 0 and stage["seconds_left"] > 0

    begun = len(seen(job.parent, "gang"))
    assert error_id(dsqjob("run", job, "--stage", "calibrate", code=64)) == "gang-running"
    assert len(seen(job.parent, "gang")) == begun  # before a supervisor was started
    second = Gang(warm, job, 1, "--nodes", 2, attempt="2")
    said = second.end(64)
    assert "[gang-running]" in said and "way out: wait for it" in said
    holds.release()
    gang.end(0)
    assert done(job) == BATCHES and amax_of(job.parent) == amax_of(calm)
    Gang(warm, job, attempt="3").end(0)
    assert done(job) == BATCHES  # nothing was left to do
    assert "24/24 batches" in dsqjob("status", job).stdout


def test_logs_and_cancel_from_another_shell(warm: Warm, job: Path, holds: Holds, calm: Path) -> None:
    """By the workspace alone: a rank's log, followed to the end of a gang that ``cancel`` stops."""
    holds.set("forward-3", 0)
    gang = Gang(warm, job, environment=holds.environment)
    gang.until("unit-done", unit="batch-2")
    logs = dsqjob("logs", job, "--rank", 1).stdout
    assert str(job.parent / "work" / "logs" / "calibrate-ranks" / "rank1.log") in logs and "attempt 1" in logs
    assert error_id(dsqjob("logs", job, "--rank", 7, code=64)) == "log-missing"
    with subprocess.Popen(command("logs", job, "--rank", 1, "--follow"), stdout=subprocess.PIPE, text=True) as follower:
        said = dsqjob("cancel", job).stdout
        assert re.fullmatch(r"calibrate: process \d+ is asked to stop\nthe same command goes on .*\n", said), said
        gang.end(75, 30)
        followed, _ = follower.communicate(timeout=120)
    assert "rank1.log" in followed and follower.returncode == 0
    assert "nothing is waiting or running" in dsqjob("cancel", job).stdout
    Gang(warm, job, attempt="2").end(0)
    assert amax_of(job.parent) == amax_of(calm)
