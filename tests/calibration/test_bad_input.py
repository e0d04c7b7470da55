"""What is wrong with a calibration's inputs is said in words, with an id and a place, before or in the gang."""

from __future__ import annotations

import builtins
import hashlib
import io
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from dsqjob.checkpoint.header import TensorSpec, encode
from dsqjob.dataplan.mp_checkpoint import mp_identity
from dsqjob.errors import DataError
from dsqjob.miniature import write
from tests.calibration.bad import rename_tensor
from tests.calibration.gangs import Gang, calibration_job
from tests.harness import dsqjob, error_id, worker
from tests.warm import Warm

EXPERT = "layers.1.ffn.experts.0.w1.weight"


def refused(warm: Warm, job: Path, code: int, id: str, *where: str) -> None:
    """Both by the supervisor, with the ids of no rank left, and by ``plan`` where that can know."""
    said = Gang(warm, job, 1).end(code, 60)
    line = next(line for line in said.splitlines() if line.startswith(f"[{id}]"))
    assert all(word in said for word in where), said
    assert "way out: " in said and line


def alone(tmp_path: Path, release: Path, tokens: Path, **settings: Any) -> Path:
    return calibration_job(tmp_path / "job", release, tokens, (1, 1), **settings)


def ids_file(folder: Path, ids: np.ndarray) -> Path:
    folder.mkdir()
    save_file({"input_ids": ids}, folder / "tokens.safetensors")
    return folder


def test_a_token_that_the_model_lacks(warm: Warm, tmp_path: Path, small: Path) -> None:
    ids = np.zeros((3, 8), np.int64)
    ids[2, 5] = 384
    job = alone(tmp_path, small, ids_file(tmp_path / "tokens", ids))
    refused(warm, job, 65, "token-id", "token 384 of sample 2", "384", "tokens.safetensors")
    done = dsqjob("plan", job, code=65)
    assert error_id(done) == "token-id" and "tokens.safetensors" in done.stderr


def test_an_empty_data_set(warm: Warm, tmp_path: Path, small: Path) -> None:
    job = alone(tmp_path, small, ids_file(tmp_path / "tokens", np.zeros((0, 8), np.int64)))
    refused(warm, job, 65, "tokens-empty", "tokens.safetensors")
    (tmp_path / "empty.jsonl").write_text("\n")
    settings = {"tokens__data": [{"jsonl": str(tmp_path / "empty.jsonl")}]}
    done = dsqjob("run", alone(tmp_path / "2", small, tmp_path / "made", **settings), "--through", "calibrate", code=65)
    assert error_id(done) == "tokens-empty" and "tokens.data" in done.stderr and "Traceback" not in done.stderr


def test_samples_longer_than_the_model_allows(warm: Warm, tmp_path: Path, small: Path) -> None:
    job = alone(tmp_path, small, ids_file(tmp_path / "tokens", np.zeros((1, 1025), np.int64)))
    refused(warm, job, 64, "sequence-too-long", "1025", "1024", "tokens.sequence_length")
    done = dsqjob("plan", job, "--set", "tokens.sequence_length=2000", code=64)
    assert error_id(done) == "sequence-too-long" and "2000" in done.stderr and "1024" in done.stderr


def test_tokens_that_were_not_made(warm: Warm, tmp_path: Path, small: Path) -> None:
    job = alone(tmp_path, small, tmp_path / "nothing")
    refused(warm, job, 64, "tokens-missing", "nothing", "--stage tokens")
    assert error_id(dsqjob("run", job, "--stage", "calibrate", code=64)) == "tokens-missing"


@pytest.mark.parametrize(
    ("geometry", "what"),
    [
        ({"heads": 7, "o_groups": 7}, "7 attention heads"),
        ({"index_heads": 7}, "7 index heads"),
        ({"o_groups": 1}, "1 o_groups"),
        ({"vocab": 385}, "385 vocabulary"),
        ({"experts": 5}, "5 routed experts"),
    ],
)
def test_a_degree_that_does_not_divide_the_model(tmp_path: Path, geometry: dict[str, int], what: str) -> None:
    whole = {"layers": 2, "experts": 4, "ratios": (0, 4, 0), "vocab": 384, **geometry}
    write("deepseek-v4", tmp_path / "release", seed=3, **whole)
    job = calibration_job(tmp_path / "job", tmp_path / "release", tmp_path / "tokens")
    for words in (("plan", job), ("run", job, "--stage", "calibrate")):
        done = dsqjob(*words, code=64)
        assert error_id(done) == "model-parallel-divide" and what in done.stderr
        assert "parallel.model_parallel" in done.stderr


def test_model_parallel_files_of_another_degree_or_model_and_without_a_tensor(
    warm: Warm, tmp_path: Path, small: Path, miniature: Path, small_tokens: Path
) -> None:
    job = alone(tmp_path, small, small_tokens, calibrate__source="mp")
    refused(warm, job, 65, "mp-missing", "model0-mp1.safetensors", "calibrate.source")
    subprocess.run(worker("convert", job), check=True, capture_output=True, timeout=120)
    two = calibration_job(tmp_path / "two", small, small_tokens, (1, 2), calibrate__source="mp")
    two.write_text(two.read_text().replace("source: mp", f"source: mp\n  mp_checkpoint: {tmp_path}/job/work/mp"))
    refused(warm, two, 65, "mp-missing", "model0-mp2.safetensors")

    other = alone(tmp_path / "other", miniature, small_tokens, calibrate__source="mp")
    subprocess.run(worker("convert", other), check=True, capture_output=True, timeout=120)
    settings = {"calibrate__source": "mp", "calibrate__mp_checkpoint": tmp_path / "other/job/work/mp"}
    refused(warm, alone(tmp_path / "3", small, small_tokens, **settings), 65, "mp-format", "model0-mp1.safetensors")

    file = tmp_path / "job" / "work" / "mp" / "model0-mp1.safetensors"
    rename_tensor(file, EXPERT, EXPERT.replace("experts.0", "experts.9"))
    refused(warm, job, 65, "mp-tensor-missing", f"{file}: {EXPERT}", "convert")


def test_model_parallel_files_of_another_release_of_the_same_shape(
    warm: Warm, tmp_path: Path, small: Path, small_tokens: Path
) -> None:
    """Headers and sizes are equal; times say nothing."""
    job = alone(tmp_path, small, small_tokens, calibrate__source="mp")
    write("deepseek-v4", tmp_path / "release", seed=4, layers=2, experts=4, ratios=(0, 4, 0), vocab=384)
    other = alone(tmp_path / "other", tmp_path / "release", small_tokens)
    for one in (job, other):
        subprocess.run(worker("convert", one), check=True, capture_output=True, timeout=120)
    Gang(warm, job, 1).end(0)
    name = "work/mp/model0-mp1.safetensors"
    os.utime(job.parent / name, (1, 1))
    assert "already done" in dsqjob("run", job, "--stage", "calibrate").stdout
    assert (job.parent / name).stat().st_size == (other.parent / name).stat().st_size
    shutil.copyfile(other.parent / name, job.parent / name)
    done = dsqjob("run", job, "--stage", "calibrate", code=64)
    assert error_id(done) == "fingerprint-changed" and "changed: mp checkpoint\n" in done.stderr, done.stderr


@pytest.mark.parametrize(("tensors", "nbytes"), [(3000, 1 << 16), (5, 1 << 16), (5, 3), (5, 0), (0, 0)])
def test_the_identity_of_a_model_parallel_file_opens_it_once_and_reads_little(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tensors: int, nbytes: int
) -> None:
    path = tmp_path / "model0-mp1.safetensors"
    head = encode(TensorSpec(f"t{number:04}", "U8", (nbytes,)) for number in range(tensors))
    path.write_bytes(head)
    os.truncate(path, len(head) + tensors * nbytes)
    opened: list[Any] = []
    for module in (builtins, io):
        monkeypatch.setattr(module, "open", _listing(opened, module.open))
    before = _read_by_this_process()
    first = mp_identity(tmp_path, [path.name])
    read = _read_by_this_process() - before
    assert opened.count(path) == 1
    assert read <= len(head) + min(tensors, 1024) * min(nbytes, 4096) + 8192  # the last is /proc itself
    for number, seen in ((0, True), (1, tensors == 5)) if nbytes else ():
        with path.open("r+b") as file:
            file.seek(len(head) + number * nbytes + nbytes // 2)
            file.write(b"x")
        again = mp_identity(tmp_path, [path.name])
        assert (again != first) is seen
        first = again


@pytest.mark.parametrize(
    ("data", "id"), [(b"", "header-truncated"), (b"\xff" * 99, "header-length"), (b"\2" + bytes(7) + b"{}x",
     "shard-trailing-bytes"), (b"version https://git-lfs.github.com/spec", "git-lfs-pointer")],
)  # fmt: skip
def test_the_identity_of_what_is_no_model_parallel_file(tmp_path: Path, data: bytes, id: str) -> None:
    (tmp_path / "model0-mp1.safetensors").write_bytes(data)
    with pytest.raises(DataError) as raised:
        mp_identity(tmp_path, ["model0-mp1.safetensors"])
    assert raised.value.id == id and "model0-mp1.safetensors" in raised.value.where
    with pytest.raises(DataError, match="lacks this file"):
        mp_identity(tmp_path, ["model1-mp2.safetensors"])


def _listing(opened: list[Any], original: Any) -> Any:
    def listed(path: Any, *more: Any, **named: Any) -> Any:
        opened.append(path)
        return original(path, *more, **named)

    return listed


def _read_by_this_process() -> int:
    """Bytes that were asked of the kernel so far."""
    return int(Path("/proc/self/io").read_text().split()[1])


def test_code_that_is_missing_or_that_nobody_vouches_for(
    warm: Warm, tmp_path: Path, small: Path, small_tokens: Path
) -> None:
    (tmp_path / "nothing").mkdir()
    settings = {"inference_dir": tmp_path / "nothing", "inference_config": small / "inference" / "config.json"}
    missing = alone(tmp_path / "missing", small, small_tokens, **settings)
    refused(warm, missing, 64, "vendor-code-missing", "nothing/model.py", "inference_dir")

    done = dsqjob("run", alone(tmp_path, small, small_tokens), "--stage", "calibrate", "--require-known-code", code=64)
    assert error_id(done) == "vendor-code-unknown" and "model.py" in done.stderr
    hashes = [hashlib.sha256((small / "inference" / f"{name}.py").read_bytes()).hexdigest() for name in ("model",)]
    settings = {"calibrate__require_known_code": True, "calibrate__known_code": hashes}
    half = alone(tmp_path / "half", small, small_tokens, **settings)
    refused(warm, half, 64, "vendor-code-unknown", "kernel.py", "calibrate.known_code")
    hashes.append(hashlib.sha256((small / "inference" / "kernel.py").read_bytes()).hexdigest())
    settings["calibrate__known_code"] = hashes
    Gang(warm, alone(tmp_path / "vouched", small, small_tokens, **settings), 1).end(0)


@pytest.mark.parametrize(
    ("change", "code", "id", "where"),
    [
        ({"warp_factor": 9}, 65, "inference-config", "warp_factor"),
        ({"n_routed_experts": 8}, 65, "model-tensor-missing", "layers.0.ffn.experts.4."),
        (None, 64, "inference-config-missing", "config.json"),
    ],
    ids=["a field that the code does not know", "of another model", "missing"],
)
def test_a_model_configuration_that_does_not_fit(
    warm: Warm, tmp_path: Path, small: Path, small_tokens: Path, change: dict[str, int] | None, code: int, id: str,
    where: str,
) -> None:  # fmt: skip
    config = tmp_path / "config.json"
    if change is not None:
        config.write_text(json.dumps({**json.loads((small / "inference" / "config.json").read_text()), **change}))
    refused(warm, alone(tmp_path, small, small_tokens, inference_config=config), code, id, where)


def test_the_plan_says_what_a_rank_needs_and_what_would_be_done(
    tmp_path: Path, small: Path, small_tokens: Path
) -> None:
    job = calibration_job(tmp_path, small, small_tokens, calibrate__batch_size=5)
    said = " ".join(dsqjob("plan", job).stdout.split())
    assert "a gang of 2 x 1 ranks, each" in said and "GiB: weights" in said and "activations" in said
    assert "5 batches of 5: 24 samples of" in said and "vendor code model.py" in said
    assert not (tmp_path / "work").exists()
    assert error_id(dsqjob("plan", job, "--mp", 3, code=64)) == "model-parallel-divide"
