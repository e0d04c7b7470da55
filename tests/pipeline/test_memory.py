"""Memory is bounded by the setting, whatever the size of a tensor."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dsqjob.checkpoint.header import TensorSpec, encode
from tests.harness import worker, write_job

LIMIT = 256 << 20
EXPERTS, DIM, INTER = 2, 16384, 12288


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One shard of 640 MB: projections of 107 MB, and a copied tensor of 400 MB of holes."""
    folder = tmp_path_factory.mktemp("wide") / "release"
    folder.mkdir()
    rng = np.random.default_rng(0)
    nibbles = rng.integers(0, 256, 1 << 20, np.uint8).tobytes()
    scales = rng.integers(110, 125, 1 << 18).astype(np.uint8).tobytes()
    specs = [TensorSpec("embed.weight", "BF16", (12800, DIM))]
    for expert in range(EXPERTS):
        for kind in ("w1", "w2", "w3"):
            out, width = (DIM, INTER) if kind == "w2" else (INTER, DIM)
            path = f"layers.0.ffn.experts.{expert}.{kind}"
            specs += [TensorSpec(f"{path}.weight", "I8", (out, width // 2))]
            specs += [TensorSpec(f"{path}.scale", "F8_E8M0", (out, width // 32))]
    name = "model-00001-of-00001.safetensors"
    with (folder / name).open("wb") as file:
        file.write(encode(specs))
        file.seek(12800 * DIM * 2, os.SEEK_CUR)
        for spec in specs[1:]:
            piece = nibbles if spec.dtype == "I8" else scales
            size = spec.shape[0] * spec.shape[1]
            file.write((piece * (size // len(piece) + 1))[:size])
    index = {"metadata": {}, "weight_map": {spec.name: name for spec in specs}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "model_type": "deepseek_v4", "num_hidden_layers": 1, "n_routed_experts": EXPERTS, "hidden_size": DIM,
        "moe_intermediate_size": INTER, "num_attention_heads": 8, "index_n_heads": 8, "o_groups": 8, "vocab_size": 512,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def peak(command: list[str]) -> int:
    """Largest resident size of a process, in bytes."""
    code = (
        "import resource, subprocess, sys; done = subprocess.run(sys.argv[1:]);"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss); sys.exit(done.returncode)"
    )

    done = subprocess.run(
        [sys.executable, "-c", code, *command], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1]) << 10


@pytest.mark.parametrize("weights", ["cast", "requantize"])
def test_peak_memory_stays_within_the_setting(tmp_path: Path, wide: Path, weights: str) -> None:
    """Resident memory of one worker (file cache is not in it), on tensors larger than the setting."""
    job = write_job(tmp_path, wide, memory=LIMIT, export__weights=weights)
    assert peak(worker("export", job)) < LIMIT
    assert peak(worker("finalize", job)) < LIMIT
    if weights == "cast":
        assert peak(worker("convert", job, "--mp", 1)) < LIMIT
    assert peak(worker("verify", job)) < LIMIT
