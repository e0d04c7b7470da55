"""On machines with GPUs (`make test-gpu`): the whole job, CPU against GPU, real geometry, deaths. It prints figures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from dsqjob.miniature import write_text
from tests.faults.processes import of_job
from tests.gpu import real_geometry
from tests.harness import command, digests, dsqjob, events, write_job

GPUS = torch.cuda.device_count()
SHAPES = [
    (nodes, ranks) for nodes, ranks in [(1, 1), (1, 2), (2, 1), (1, 4), (2, 2), (1, 8), (2, 4)] if nodes * ranks <= GPUS
]
LAST = "verify" if find_spec("numba") else "finalize"
"""verify needs numba, which the GPU machine may lack; everything before it is run all the same."""
LARGEST = max((ranks for nodes, ranks in SHAPES if nodes == 1), default=1)


def say(**what: object) -> None:
    print(json.dumps({"device": torch.cuda.get_device_name(), **what}), flush=True)


def shaped(folder: Path, release: Path, nodes: int, ranks: int, **settings: object) -> Path:
    parallel = {"model_parallel": nodes * ranks, "nodes": nodes, "gpus_per_node": ranks}
    given = {"parallel": parallel, "device": "cuda", "export__input_scale": "calibrated", "launcher__max_faults": 0}
    return write_job(folder, release, **{**given, **settings})


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    write_text(path)
    return path


def test_the_whole_job_on_gpus_of_every_shape(tmp_path: Path, miniature: Path, text: Path) -> None:
    """tokens .. verify over NCCL; amax are equal between one node and two."""
    made: dict[int, dict[str, str]] = {}
    for nodes, ranks in SHAPES:
        tokens = {"tokens__data": [{"jsonl": str(text)}], "tokens__sequence_length": 64}
        job = shaped(tmp_path / f"{nodes}x{ranks}", miniature, nodes, ranks, calibrate__generate="hello", **tokens)
        begun = time.monotonic()
        done = dsqjob("run", job, "--through", LAST)
        assert "[generate]" in done.stdout and (LAST == "finalize" or "passed" in done.stdout)
        amax = digests(job.parent / "work" / "amax")
        amax.pop(".dsqjob-owner", None)
        assert made.setdefault(nodes * ranks, amax) == amax
        say(what="whole job on a miniature", shape=f"{nodes}x{ranks}", seconds=round(time.monotonic() - begun, 1))


def test_cpu_and_gpu_measure_the_same(tmp_path: Path, miniature: Path) -> None:
    """Weight amax equal; input amax within 2 BF16 ulp, from the CPU's states and routing, layer by layer."""
    argv = [sys.executable, "-m", "tests.gpu.layers", str(miniature)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout.strip().splitlines()[-1], flush=True)


@pytest.mark.parametrize("experts", [48, 384])
def test_a_layer_of_real_geometry(experts: int) -> None:
    argv = [sys.executable, "-m", "tests.gpu.moe_layer", str(experts)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout.strip().splitlines()[-1], flush=True)


@pytest.fixture(scope="session")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("real")
    real_geometry.write(folder / "release", 1)
    real_geometry.write_tokens(folder / "ids.safetensors", 24, 512)
    return folder


def test_a_gang_on_real_geometry_from_the_release(tmp_path: Path, real: Path) -> None:
    """Load rate, tokens/s, and memory a rank against what `plan` says."""
    shapes = [(1, LARGEST)] + ([(2, LARGEST // 2)] if LARGEST > 1 else [])
    made = []
    for nodes, ranks in shapes:
        settings = {"tokens__data": [{"tokens": str(real / "ids.safetensors")}], "calibrate__batch_size": 4}
        job = shaped(tmp_path / f"{nodes}x{ranks}", real / "release", nodes, ranks, **settings)
        dsqjob("run", job, "--through", "calibrate")
        seen = list(events(job.parent / "work"))
        loaded = [event for event in seen if event["event"] == "loaded"]
        batches = [event for event in seen if event["event"] == "unit-done" and event["stage"] == "calibrate"]
        memory = [event for event in seen if event["event"] == "memory"]
        amax = digests(job.parent / "work" / "amax")
        amax.pop(".dsqjob-owner", None)
        made.append(amax)
        say(
            what="one layer of V4-Pro's geometry, 384 experts",
            shape=f"{nodes}x{ranks}",
            bytes_a_rank=loaded[0]["bytes"],
            load_gb_per_second_a_rank=[round(one["bytes"] / one["seconds"] / 1e9, 2) for one in loaded],
            tokens_per_second=[round(one["bytes"] / one["seconds"]) for one in batches],
            peak_gib=[round(one["peak"] / 2**30, 2) for one in memory],
            planned_gib=[round(one["planned"] / 2**30, 2) for one in memory],
        )
    assert all(one == made[0] for one in made)


@pytest.mark.parametrize("phase", ["load", "batch", "save"])
def test_a_rank_killed_on_a_gpu_frees_all_of_them(tmp_path: Path, real: Path, phase: str) -> None:
    """Seconds until no process holds a GPU; exit code and first line."""
    settings = {"tokens__data": [{"tokens": str(real / "ids.safetensors")}], "calibrate__batch_size": 1}
    job = shaped(tmp_path, real / "release", 1, LARGEST, **settings)
    dsqjob("run", job, "--stage", "tokens")
    run = subprocess.Popen(command("run", job, "--stage", "calibrate"), stderr=subprocess.PIPE, text=True)
    wanted = {"load": "load", "batch": "batch", "save": "batch"}[phase]
    victim = 0
    while not victim:
        time.sleep(0.02)
        assert run.poll() is None, run.communicate()[1]
        seen = list(events(tmp_path / "work")) if (tmp_path / "work/logs/events").is_dir() else []
        inside = [event for event in seen if event["event"] == "phase" and event["phase"] == wanted]
        enough = phase != "save" or sum(event["event"] == "unit-done" for event in seen) >= 3
        if inside and enough:
            ranks = [event["pid"] for event in seen if str(event.get("worker", "")).startswith("rank ")]
            victim = ranks[-1] if ranks else 0
    os.kill(victim, 9)
    killed = time.monotonic()
    _, said = run.communicate(timeout=90)
    gone = time.monotonic() - killed
    held = subprocess.run(
        ["nvidia-smi", "--query-compute-apps=pid", "--format=csv,noheader"], capture_output=True, text=True, check=True
    ).stdout.split()
    say(
        what=f"rank killed in {phase}",
        seconds_until_all_gone=round(gone, 1),
        code=run.returncode,
        first=said.split("\n")[0],
    )
    assert run.returncode == 69 and of_job(job) == [] and held == []
    assert "rank" in said.split("\n")[0]


def test_memory_too_small_is_said_before_weights_are_read(tmp_path: Path, real: Path) -> None:
    settings = {"tokens__data": [{"tokens": str(real / "ids.safetensors")}], "calibrate__batch_size": 4}
    job = shaped(tmp_path, real / "release", 1, 1, **settings)
    dsqjob("run", job, "--stage", "tokens")
    free = torch.cuda.mem_get_info()[0]
    hog = torch.empty(free - (4 << 30), dtype=torch.uint8, device="cuda")
    done = dsqjob("run", job, "--stage", "calibrate", code=64)
    del hog
    torch.cuda.empty_cache()
    assert "[device-memory]" in done.stderr or "[out-of-memory]" in done.stderr
