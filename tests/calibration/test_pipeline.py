"""The whole job by cold processes, as a user starts it: tokens, a gang of two supervisors, export, verify."""

from __future__ import annotations

import json
import random
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.calibration.gangs import TEXT, Gang, amax_of, calibration_job, seen
from tests.faults.processes import kill_all, of_job
from tests.harness import command, digests, dsqjob, error_id
from tests.warm import CHECKOUT, Warm

WHOLE = ("--through", "verify")
PROMPT = "the wind \U0001f600 costs $5, or ${NOTHING}"


def whole_job(folder: Path, release: Path, shape: tuple[int, int] = (2, 1)) -> Path:
    settings: dict[str, Any] = {"tokens__data": [{"jsonl": str(TEXT), "samples": 8}], "calibrate__batch_size": 1}
    return calibration_job(folder, release, folder / "work" / "tokens", shape, **settings)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, small: Path) -> Path:
    """A job that the make target brought to its amax, by two supervisors, and ``run`` to its end."""
    job = whole_job(tmp_path_factory.mktemp("finished"), small, (1, 2))
    made = subprocess.run(["make", "-s", "calibrate-v4", "NODES=2", f"JOB={job}"], cwd=CHECKOUT, capture_output=True,
                          text=True, timeout=300, check=False)  # fmt: skip
    assert made.returncode == 0 and "calibrated on 512 tokens in 8 batches" in made.stdout, made.stdout + made.stderr
    assert {event["worker"] for event in seen(job.parent, "gang")} == {"calibrate-node0", "calibrate-node1"}
    assert not (job.parent / "out").exists()
    said = dsqjob("run", job, *WHOLE)
    assert "calibrate: already done" in said.stdout and "passed" in said.stdout and said.stderr == "", said.stderr
    assert "routed experts saw no token" in said.stdout and "picture: " in said.stdout
    return job


def test_the_whole_job_runs_and_a_second_time_finds_everything_done(finished: Path) -> None:
    before = amax_of(finished.parent), digests(finished.parent / "out")
    gangs = len(seen(finished.parent, "gang"))
    said = dsqjob("run", finished, *WHOLE).stdout
    assert all(f"{stage}: already done" in said for stage in ("tokens", "calibrate", "export", "finalize", "verify"))
    assert (amax_of(finished.parent), digests(finished.parent / "out")) == before
    assert len(seen(finished.parent, "gang")) == gangs and of_job(finished) == []
    logs = dsqjob("logs", finished, "--stage", "calibrate").stdout
    assert all(f"calibrate-node{node}.log <==" in logs for node in range(2))
    assert "coverage.svg" in said and (finished.parent / "work" / "reports" / "coverage.svg").is_file()


def test_a_prompt_is_continued_after_calibration_without_calibrating_again(finished: Path) -> None:
    """Through the quantized forward; asked again, the answer is there. A prompt is the user's text, dollars and all."""
    done = dsqjob("run", finished, "--stage", "calibrate", "--generate", "wind " * 1100, code=64)
    assert error_id(done) == "prompt-too-long"
    before, measured = amax_of(finished.parent), len(seen(finished.parent, "unit-done", stage="calibrate"))
    first = dsqjob("run", finished, "--stage", "calibrate", "--generate", PROMPT).stdout
    assert f"[generate] prompt: {PROMPT!r}" in first and "[generate] completion: " in first
    assert len(json.loads((finished.parent / "work" / "reports" / "generated.json").read_text())["ids"]) == 16
    assert amax_of(finished.parent) == before
    assert len(seen(finished.parent, "unit-done", stage="calibrate")) == measured
    again = dsqjob("run", finished, "--stage", "calibrate", "--generate", PROMPT).stdout
    assert "already done" in again
    assert [line for line in again.splitlines() if "[generate]" in line] == [
        line for line in first.splitlines() if "[generate]" in line
    ]


def test_made_up_weights_try_the_wiring_and_export_refuses_their_amax(
    warm: Warm, tmp_path: Path, small: Path, small_tokens: Path
) -> None:
    job = calibration_job(tmp_path, small, small_tokens, (1, 2))
    Gang(warm, job, 1, "--set", "calibrate.dummy_weights=true").end(0)
    assert len(amax_of(tmp_path)) == 7
    done = dsqjob("run", job, "--stage", "export", code=64)
    assert error_id(done) == "amax-dummy" and "work/amax" in done.stderr


@pytest.mark.parametrize("seed", [3])
def test_twenty_random_kills_of_a_whole_job_change_nothing(
    tmp_path: Path, small: Path, finished: Path, seed: int
) -> None:
    """Launcher, supervisors and ranks die together by SIGKILL at random instants, every third time once the gang has
    begun; a finished run loses a random file, so that there is work again."""
    job = whole_job(tmp_path, small)
    rng = random.Random(seed)
    kills = attempts = ranks = 0
    begun = time.monotonic()
    while kills < 20:
        attempts += 1
        run = subprocess.Popen(command("run", job, *WHOLE), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        if attempts % 3 == 0:
            gangs = len(seen(tmp_path, "phase", phase="start"))
            while run.poll() is None and len(seen(tmp_path, "phase", phase="start")) == gangs:
                time.sleep(0.1)
        try:
            run.wait(rng.uniform(0, 2) if attempts % 3 == 0 else rng.uniform(0.3, 4))
            victims = [*(tmp_path / "out").glob("*.safetensors"), *(tmp_path / "work" / "amax").glob("amax*")]
            rng.choice(sorted(victims)).unlink()
        except subprocess.TimeoutExpired:
            killed = kill_all(job)
            kills, ranks = kills + (killed > 0), ranks + (killed >= 5)
            run.wait()
    done = subprocess.run(command("run", job, *WHOLE), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    took = time.monotonic() - begun
    print(f"seed {seed}: {kills} kills in {attempts} runs, {ranks} of whole gangs, {took:.0f} s")
    assert amax_of(tmp_path) == amax_of(finished.parent)
    assert digests(tmp_path / "out") == digests(finished.parent / "out")
    assert not list(tmp_path.rglob("*.partial-*")) and of_job(job) == []
