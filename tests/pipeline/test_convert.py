"""convert equals the vendor's script tensor for tensor, at every degree, and resumes file by file."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from tests.harness import Tensor, digests, dsqjob, events, read_checkpoint, read_shard, write_job

E4M3 = np.array(
    [
        (-1.0 if code & 0x80 else 1.0)
        * ((code & 7) * 2.0**-9 if not code & 0x78 else (1 + (code & 7) / 8) * 2.0 ** (((code >> 3) & 15) - 7))
        for code in range(256)
    ],
    np.float32,
)


def plain_mp(release: Path, rank: int, n: int, experts: int) -> dict[str, Tensor]:
    """2-deepseek-interface, section 4, on whole tensors: a second implementation to compare with."""
    source = {name: tensor for name, (_, tensor) in read_checkpoint(release).items()}
    found = {}
    for name, tensor in source.items():
        if name.startswith("mtp.") and ("emb" in name or name.endswith("head.weight")):
            continue
        dtype, shape, data = tensor
        expert = re.search(r"\.experts\.(\d+)\.", name)
        component = name.split(".")[-2] if name.endswith((".weight", ".scale", ".bias")) else name.split(".")[-1]
        if expert:
            if int(expert[1]) // (experts // n) != rank:
                continue
            if dtype == "I8":
                dtype, shape = "F4", (shape[0], shape[1] * 2)
        elif component == "wo_a":
            if name.endswith(".scale"):
                continue
            scale = source[name.removesuffix("weight") + "scale"].bytes_2d()
            factor = np.exp2(scale.astype(np.float32) - 127).repeat(128, 0).repeat(128, 1)
            product = E4M3[tensor.bytes_2d()] * factor[: shape[0], : shape[1]]
            bits = product.view(np.uint32)
            rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
            part = rounded.reshape(n, -1)[rank]
            dtype, shape, data = "BF16", (shape[0] // n, shape[1]), part.tobytes()
        elif component in ("embed", "head", "wq_b", "attn_sink", "weights_proj"):
            data = np.frombuffer(data, np.uint8).reshape(n, -1)[rank].tobytes()
            shape = (shape[0] // n, *shape[1:])
        elif component == "wo_b":
            columns = tensor.bytes_2d().reshape(shape[0], n, -1)[:, rank]
            data, shape = np.ascontiguousarray(columns).tobytes(), (shape[0], shape[1] // n)
        found[name] = Tensor(dtype, shape, data)
    return found


def convert(tmp_path: Path, release: Path, n: int) -> Path:
    job = write_job(tmp_path, release, parallel={"model_parallel": n, "nodes": 1, "gpus_per_node": n})
    dsqjob("run", job, "--stage", "convert")
    return tmp_path / "work" / "mp"


def test_convert_equals_the_vendors_files(tmp_path: Path, golden: Path) -> None:
    made = convert(tmp_path, golden / "release", 2)
    for rank in range(2):
        name = f"model{rank}-mp2.safetensors"
        expected, found = read_shard(golden / "mp2" / name), read_shard(made / name)
        assert found.keys() == expected.keys()
        assert [key for key in expected if found[key] != expected[key]] == []
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (made / name).read_bytes() == (golden / "mp2" / name).read_bytes()


@pytest.mark.parametrize("n", [1, 2, 4, 8])
def test_convert_of_a_miniature_equals_the_plain_rules_at_every_degree(tmp_path: Path, miniature: Path, n: int) -> None:
    made = convert(tmp_path, miniature, n)
    for rank in range(n):
        expected = plain_mp(miniature, rank, n, 16)
        found = read_shard(made / f"model{rank}-mp{n}.safetensors")
        assert found.keys() == expected.keys()
        assert [key for key in expected if found[key] != expected[key]] == []


def test_convert_resumes_by_output_file(tmp_path: Path, miniature: Path) -> None:
    job = write_job(tmp_path, miniature, parallel={"model_parallel": 4, "nodes": 1, "gpus_per_node": 4})
    dsqjob("run", job, "--stage", "convert")
    made = tmp_path / "work" / "mp"
    before = digests(made)
    (made / "model2-mp4.safetensors").unlink()
    begun = sum(event["event"] == "unit" for event in events(tmp_path / "work"))
    dsqjob("run", job, "--stage", "convert")
    assert digests(made) == before
    again = [event["unit"] for event in events(tmp_path / "work") if event["event"] == "unit"][begun:]
    assert again == ["model2-mp4.safetensors"]


def test_a_degree_that_does_not_divide_is_refused(tmp_path: Path, miniature: Path) -> None:
    job = write_job(tmp_path, miniature, parallel={"model_parallel": 3, "nodes": 1, "gpus_per_node": 3})
    done = dsqjob("run", job, "--stage", "convert", code=64)
    assert "model-parallel-divide" in done.stderr and "parallel.model_parallel" in done.stderr
