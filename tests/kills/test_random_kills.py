"""Twenty kills at random instants over a whole pipeline; then rivals that share a workspace and die."""

from __future__ import annotations

import random
import subprocess
import time
from pathlib import Path

import pytest

from tests.faults.processes import kill_all
from tests.harness import command, digests, events, worker, write_job

SEED = 20
OWNER = ".dsqjob-owner"


def outputs(folder: Path) -> dict[str, str]:
    return {f"out/{name}": value for name, value in digests(folder / "out").items()} | {
        f"mp/{name}": value for name, value in digests(folder / "work" / "mp").items() if name != OWNER
    }


def test_twenty_random_kills_of_a_pipeline_change_nothing(tmp_path: Path, miniature: Path) -> None:
    """Launcher and workers die together by SIGKILL; the same command resumes every time."""
    settings = {"launcher__workers": 2, "export__weights": "requantize"}
    whole = ("--stage", "convert", "--through", "verify")
    calm = write_job(tmp_path / "calm", miniature, **settings)
    begun = time.monotonic()
    subprocess.run(command("run", calm, *whole), check=True, capture_output=True, timeout=300)
    duration = time.monotonic() - begun

    job = write_job(tmp_path / "killed", miniature, **settings)
    rng = random.Random(SEED)
    kills = attempts = 0
    while kills < 20:
        attempts += 1
        process = subprocess.Popen(command("run", job, *whole), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(rng.uniform(0.3, duration / 2))
            # finished before its kill: damage a random output, so that there is work again
            victim = rng.choice(sorted((tmp_path / "killed" / "out").glob("*.safetensors")))
            victim.unlink()
        except subprocess.TimeoutExpired:
            kills += kill_all(job) > 0
            process.wait()
    done = subprocess.run(command("run", job, *whole), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    print(f"seed {SEED}: {kills} kills in {attempts} runs; a calm run took {duration:.1f} s")
    assert outputs(tmp_path / "killed") == outputs(tmp_path / "calm")
    assert not list((tmp_path / "killed").rglob("*.partial-*"))


@pytest.mark.parametrize("count", [2, 4])
def test_workers_killed_and_started_again_share_one_workspace(tmp_path: Path, miniature: Path, count: int) -> None:
    calm = write_job(tmp_path / "calm", miniature)
    subprocess.run(worker("export", calm), check=True, capture_output=True, timeout=120)
    job = write_job(tmp_path / "shared", miniature)
    rng = random.Random(SEED + count)

    def start(index: int) -> subprocess.Popen[bytes]:
        return subprocess.Popen(worker("export", job, index=index, count=count), stderr=subprocess.PIPE)

    workers = [start(index) for index in range(count)]
    for _ in range(3 * count):
        time.sleep(rng.uniform(0.1, 0.6))
        victim = rng.randrange(count)
        workers[victim].kill()
        workers[victim].communicate()
        workers[victim] = start(victim)
    for process in workers:
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said.decode()
    records = {path.stem for path in (tmp_path / "shared/work/state/export/records").iterdir()}
    assert len(records) == 6
    made, expected = digests(tmp_path / "shared" / "out"), digests(tmp_path / "calm" / "out")
    assert {k: v for k, v in made.items() if k != OWNER} == {k: v for k, v in expected.items() if k != OWNER}
    assert_no_live_claim_was_taken(tmp_path / "shared" / "work")


def assert_no_live_claim_was_taken(workspace: Path) -> None:
    """A unit that two processes began was left by the first one: its last word came before the second's first."""
    last: dict[int, float] = {}
    begun: dict[str, list[tuple[float, int]]] = {}
    for event in events(workspace):
        last[event["pid"]] = max(last.get(event["pid"], 0), event["time"])
        if event["event"] == "unit":
            begun.setdefault(event["unit"], []).append((event["time"], event["pid"]))
    for unit, starts in begun.items():
        for (_, pid), (time_after, _) in zip(sorted(starts), sorted(starts)[1:], strict=False):
            assert last[pid] <= time_after, f"{unit} was taken from {pid}, which was still at work"
