"""Ranks and supervisors die at every place of a calibration; then one resume leaves the bytes of a calm run."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from tests.calibration.bad import overwrite
from tests.calibration.gangs import BATCHES, Gang, Holds, amax_of, calibration_job, done, seen
from tests.waiting import wait_until
from tests.warm import Warm


@pytest.fixture
def job(job: Path) -> Path:
    """Nodes are not waited for long."""
    settings = yaml.safe_load(job.read_text())
    settings["calibrate"]["timeouts"] = {"silence": 6}
    job.write_text(yaml.safe_dump(settings))
    return job


def held(warm: Warm, job: Path, holds: Holds, place: str, rank: int) -> Gang:
    """A gang whose ``rank`` waits at that place."""
    holds.set(place, rank)
    gang = Gang(warm, job, environment=holds.environment)
    wait_until(lambda: holds.reached(place, rank))
    return gang


def accused(said: str) -> list[str]:
    """First lines of the errors that were printed."""
    return [line for line in said.splitlines() if line.startswith("[") and "]" in line and not line.startswith("[W")]


def resumed(warm: Warm, job: Path, calm: Path) -> None:
    """The same command again ends well, with the same bytes."""
    Gang(warm, job, attempt="2").end(0)
    assert amax_of(job.parent) == amax_of(calm)


@contextmanager
def rename_held(pid: int, which: int, log: Path) -> Iterator[None]:
    """strace keeps the ``which``-th rename of a process from happening; what is to be published is written by then."""
    hold = ["-e", "trace=rename", "-e", f"inject=rename:delay_enter=60000000:when={which}"]
    tracer = subprocess.Popen(["strace", "-f", "-qq", "-o", str(log), *hold, "-p", str(pid)])
    try:
        wait_until(lambda: b"TracerPid:\t0" not in Path(f"/proc/{pid}/status").read_bytes())
        yield
    finally:
        tracer.kill()
        tracer.wait()


@pytest.mark.parametrize(
    ("place", "waiting", "killed", "phase"),
    [("load", 1, 1, "load"), ("forward-3", 1, 0, "batch")],
    ids=["while loading", "inside a collective"],
)
def test_a_killed_rank_is_named_and_the_rest_resumes(
    warm: Warm, job: Path, holds: Holds, calm: Path, place: str, waiting: int, killed: int, phase: str
) -> None:
    """Held in the fourth batch, a rank keeps the other one waiting in a collective: that one is killed."""
    gang = held(warm, job, holds, place, waiting)
    if phase == "batch":
        gang.until("unit", unit="batch-3")
    os.kill(gang.ranks()[killed], signal.SIGKILL)
    said = gang.end(69, 60)
    for line in accused(said):
        assert line.startswith("[rank-died]") and "SIGKILL" in line
        assert f"rank {killed} on {socket.gethostname()} in phase {phase}" in line
    assert len(accused(said)) == 2
    before = len(done(job))
    resumed(warm, job, calm)
    assert done(job) == BATCHES and before == (3 if phase == "batch" else 0)


@pytest.mark.needs("strace")
def test_a_rank_killed_in_its_state_save_costs_one_batch(warm: Warm, job: Path, holds: Holds, calm: Path) -> None:
    """The other rank is a batch ahead then; counts of tokens must not count it twice."""
    log = job.with_name("trace")
    gang = held(warm, job, holds, "forward-3", 1)
    rank = gang.ranks()[1]
    with rename_held(rank, 1, log):
        holds.release()
        wait_until(lambda: "rename(" in log.read_text())
        gang.until("unit-done", unit="batch-3")
        os.kill(rank, signal.SIGKILL)
    said = gang.end(69, 60)
    assert all("rank 1 on" in line and "in phase batch" in line for line in accused(said)) and accused(said)
    assert done(job) == BATCHES[:4]
    resumed(warm, job, calm)
    assert done(job) == [*BATCHES[:4], *BATCHES[3:]]


@pytest.mark.needs("strace")
def test_rank_0_killed_in_the_final_save_leaves_no_half_calibration(
    warm: Warm, job: Path, holds: Holds, calm: Path
) -> None:
    """Its renames: the state, then file by file; it dies with the third one written and not yet named."""
    log = job.with_name("trace")
    gang = held(warm, job, holds, "forward-23", 0)
    rank = gang.ranks()[0]
    with rename_held(rank, 4, log):
        holds.release()
        gang.until("phase", phase="save")
        wait_until(lambda: log.read_text().count("rename(") == 4)
        os.kill(rank, signal.SIGKILL)
    said = gang.end(69, 60)
    assert all("rank 0 on" in line and "in phase save" in line for line in accused(said)) and accused(said)
    folder = job.parent / "work" / "amax"
    assert list(folder.glob("*.partial-*")) and not (folder / "amax-ledger.safetensors").exists()
    assert not seen(job.parent, "stage-done", stage="calibrate")
    resumed(warm, job, calm)
    assert done(job) == BATCHES  # nothing was measured again


@pytest.mark.parametrize("node", [0, 1])
def test_a_killed_supervisor_takes_its_ranks_along_and_the_other_node_ends_with_69(
    warm: Warm, job: Path, holds: Holds, calm: Path, node: int
) -> None:
    gang = held(warm, job, holds, "forward-3", 1 - node)
    dead, other = gang.supervisors[node], gang.supervisors[1 - node]
    dead.signal(signal.SIGKILL)
    assert other.wait(60) == 69 and dead.wait() == -signal.SIGKILL
    wait_until(lambda: not dead.processes() and not other.processes(), 5)
    assert accused(other.said()) and f"node {node}" in other.said(), other.said()
    if node == 0:
        resumed(warm, job, calm)
        assert done(job) == BATCHES


def test_a_nan_in_the_weights_names_layer_and_expert_on_both_nodes(
    warm: Warm, tmp_path: Path, small: Path, small_tokens: Path
) -> None:
    release = tmp_path / "release"
    shutil.copytree(small, release)
    overwrite(release, "layers.1.attn_norm.weight", b"\xc0\x7f")
    gang = Gang(warm, calibration_job(tmp_path / "job", release, small_tokens))
    said = gang.end(65)
    assert len(accused(said)) == 2 and all(line.startswith("[activation-nan]") for line in accused(said))
    assert said.count("where: layers.1.ffn.experts.") == 2
    assert not amax_of(tmp_path / "job")


def test_a_rank_out_of_memory_says_what_it_needs_and_what_to_change(
    warm: Warm, tmp_path: Path, small: Path, small_tokens: Path, holding: Path
) -> None:
    """The model is built with buffers for a long sequence, and rank 1 may not take that much."""
    config = tmp_path / "config.json"
    text = (holding / "config.json").read_text()
    config.write_text(text.replace('"max_seq_len": 256', '"max_seq_len": 400000'))
    assert config.read_text() != text
    settings = {"inference_dir": holding, "inference_config": config}
    job = calibration_job(tmp_path / "job", small, small_tokens, **settings)
    holds = Holds(tmp_path / "holds")
    gang = held(warm, job, holds, "load", 1)
    rank = gang.ranks()[1]
    pages = int(Path(f"/proc/{rank}/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + (64 << 20)
    resource.prlimit(rank, resource.RLIMIT_AS, (limit, limit))
    holds.release()
    said = gang.end(64)
    for line in accused(said):
        assert line.startswith("[out-of-memory]") and "rank 1 needs about" in line and "weights" in line
    assert accused(said) and "larger model_parallel" in said and "calibrate.batch_size" in said
