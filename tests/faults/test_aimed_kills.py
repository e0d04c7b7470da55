"""Every publishing system call of every stage, killed once: another process resumes to the same bytes.

strace kills the worker before the call; the worker runs as one process, and the product has no hook for it.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dsqjob.miniature import write
from tests.harness import digests, events, worker, write_job

CALLS = ("rename", "link", "unlink", "fsync", "ftruncate", "copy_file_range", "write", "pwrite64", "pwritev")
EVERY = {"write": 20, "pwrite64": 20, "pwritev": 20}
OWNER = ".dsqjob-owner"  # names the workspace
STAGES = ("convert", "export", "finalize")

pytestmark = pytest.mark.needs("strace")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release of two layers and four experts: five shards."""
    folder = tmp_path_factory.mktemp("small") / "release"
    write("deepseek-v4", folder, seed=3, layers=2, experts=4, ratios=(0, 4, 0), vocab=384)
    return folder


def prepare(folder: Path, release: Path, stage: str) -> Path:
    """A job whose earlier stages are done."""
    job = write_job(folder, release)
    if stage == "finalize":
        subprocess.run(worker("export", job), check=True, capture_output=True, timeout=120)
    return job


def outputs(folder: Path) -> dict[str, str]:
    found = {}
    for name in ("out", "work/mp"):
        if (folder / name).is_dir():
            found |= {f"{name}/{path}": value for path, value in digests(folder / name).items() if path != OWNER}
    return found


def traced(stage: str, job: Path, log: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = ["strace", "-f", "-qq", "-o", str(log), *options, *worker(stage, job)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("stage", STAGES)
def test_a_kill_at_any_publishing_call_is_resumed_to_the_same_bytes(tmp_path: Path, small: Path, stage: str) -> None:
    template = tmp_path / "template"
    prepare(template, small, stage)
    calm = tmp_path / "calm"
    shutil.copytree(template, calm)
    job = write_job(calm, small)
    log = tmp_path / "trace"
    done = traced(stage, job, log, "-e", f"trace={','.join(CALLS)}")
    assert done.returncode == 0, done.stderr
    expected = outputs(calm)
    counts = {call: len(re.findall(rf"^\d+ +{call}\(", log.read_text(), re.M)) for call in CALLS}
    assert all(counts[call] for call in ("rename", "link", "unlink", "fsync", "write", "pwrite64")), counts

    def kill_and_resume(call: str, nth: int) -> str:
        folder = tmp_path / f"{call}-{nth}"
        shutil.copytree(template, folder)
        job = write_job(folder, small)
        inject = f"inject={call}:signal=KILL:when={nth}"
        killed = traced(stage, job, folder / "trace", "-e", f"trace={call}", "-e", inject)
        if killed.returncode == 0:
            return f"{call} {nth}: was not killed"
        recorded = len(list((folder / "work" / "state" / stage / "records").glob("*.json")))
        begun = sum(event["event"] == "unit" and event["stage"] == stage for event in events(folder / "work"))
        resumed = subprocess.run(worker(stage, job), capture_output=True, text=True, timeout=120, check=False)
        if resumed.returncode:
            return f"{call} {nth}: resuming failed: {resumed.stderr}"
        again = sum(event["event"] == "unit" and event["stage"] == stage for event in events(folder / "work")) - begun
        units = len(list((folder / "work" / "state" / stage / "records").glob("*.json")))
        if again > units - recorded:
            return f"{call} {nth}: {again} units were read again, {units - recorded} were unfinished"
        if outputs(folder) != expected:
            return f"{call} {nth}: other bytes: {set(outputs(folder).items()) ^ set(expected.items())}"
        if left := list(folder.rglob("*.partial-*")) + list((folder / "work").glob("state/*/claims/*")):
            return f"{call} {nth}: left {left}"
        shutil.rmtree(folder)
        return ""

    aims = [(call, nth) for call in CALLS for nth in range(1, counts[call] + 1, EVERY.get(call, 1))]
    with ThreadPoolExecutor(2) as pool:
        failures = [text for text in pool.map(lambda aim: kill_and_resume(*aim), aims) if text]
    print(f"{stage}: {len(aims)} kills: {counts}")
    assert failures == []
