"""The miniature is a whole release, has the edges it promises, and runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dsqjob.errors import UsageError
from dsqjob.miniature import write
from tests.harness import digests, dsqjob, read_checkpoint, write_job

SMALL = {"layers": 2, "experts": 4, "ratios": (0, 4, 0)}

FORWARD = Path(__file__).with_name("forward.py")


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        write("deepseek-v4", tmp_path / name, seed=seed, **SMALL)
    assert digests(tmp_path / "a") == digests(tmp_path / "b") != digests(tmp_path / "c")


def test_a_folder_with_files_is_refused_and_untouched(tmp_path: Path) -> None:
    (tmp_path / "keep").write_text("mine")
    with pytest.raises(UsageError) as caught:
        write("deepseek-v4", tmp_path, seed=1)
    assert caught.value.id == "folder-not-empty" and digests(tmp_path).keys() == {"keep"}


def test_a_negative_seed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        write("deepseek-v4", tmp_path / "release", seed=-1)
    assert caught.value.id == "usage" and not list(tmp_path.iterdir())


def test_keys_dtypes_and_shapes_are_those_of_a_release(miniature: Path) -> None:
    tensors = {name: tensor[:2] for name, (_, tensor) in read_checkpoint(miniature).items()}
    expected = {
        "embed.weight": ("BF16", (512, 256)),
        "hc_head_fn": ("F32", (4, 1024)),
        "layers.0.hc_attn_fn": ("F32", (24, 1024)),
        "layers.0.attn.attn_sink": ("F32", (8,)),
        "layers.0.attn.wo_a.weight": ("F8_E4M3", (1024, 128)),
        "layers.0.attn.wo_a.scale": ("F8_E8M0", (8, 1)),
        "layers.1.attn.compressor.ape": ("F32", (4, 256)),
        "layers.1.attn.indexer.wq_b.weight": ("F8_E4M3", (1024, 128)),
        "layers.1.attn.indexer.weights_proj.weight": ("BF16", (8, 256)),
        "layers.2.attn.compressor.wkv.weight": ("BF16", (128, 256)),
        "layers.0.ffn.gate.tid2eid": ("I32", (512, 2)),
        "layers.1.ffn.gate.bias": ("F32", (16,)),
        "layers.3.ffn.experts.15.w1.weight": ("I8", (128, 128)),
        "layers.3.ffn.experts.15.w1.scale": ("F8_E8M0", (128, 8)),
        "layers.3.ffn.experts.15.w2.weight": ("I8", (256, 64)),
        "mtp.0.e_proj.weight": ("F8_E4M3", (256, 256)),
        "mtp.0.emb.tok_emb.weight": ("BF16", (512, 256)),
        "mtp.0.head.weight": ("BF16", (512, 256)),
    }
    assert {name: tensors[name] for name in expected} == expected
    assert "layers.0.ffn.gate.bias" not in tensors and "layers.0.attn.compressor.ape" not in tensors


def test_the_index_is_true(miniature: Path) -> None:
    index = json.loads((miniature / "model.safetensors.index.json").read_text())
    tensors = read_checkpoint(miniature)
    assert index["weight_map"] == {name: shard for name, (shard, _) in tensors.items()}
    assert index["metadata"]["total_size"] == sum(len(tensor.data) for _, tensor in tensors.values())


def test_the_edges_are_there(miniature: Path) -> None:
    tensors = read_checkpoint(miniature)
    hashed = np.frombuffer(tensors["layers.0.ffn.gate.tid2eid"][1].data, "<i4").reshape(512, 2)
    assert set(range(16)) - set(hashed.ravel().tolist()) == {14, 15}
    bias = np.frombuffer(tensors["layers.1.ffn.gate.bias"][1].data, "<f4")
    assert bias.min() < -1000

    path = "layers.2.ffn.experts.3.w2"
    scale = tensors[f"{path}.scale"][1].bytes_2d().astype(int)
    nibbles = tensors[f"{path}.weight"][1].bytes_2d().reshape(256, -1, 16)
    outside = scale.max() - scale > 17
    zero = ((nibbles & 0x77) == 0).all(-1)
    assert (outside & zero).any() and (outside & ~zero).any()
    assert ((scale == 0) & zero).any() and ((scale == 0) & ~zero).any()
    assert (nibbles[outside & zero] == 0x80).any()
    codes = np.stack([nibbles & 15, nibbles >> 4], -1).reshape(*scale.shape, 32)
    values = np.array([0.0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    finer = values[codes] * 2.0 ** (scale - scale.max() + 17)[..., None]  # in units of the smallest scale
    survives = np.isin(finer, values).all(-1)
    assert (outside & ~zero & survives).any() and (outside & ~zero & ~survives).any()
    assert (codes[~outside] == 8).any()

    def exponent(path: str) -> int:
        return int(tensors[f"{path}.scale"][1].bytes_2d().max())

    assert exponent("layers.2.ffn.experts.5.w1") != exponent("layers.2.ffn.experts.5.w3")
    shard = {name: shard for name, (shard, _) in tensors.items()}
    assert shard["layers.3.ffn.experts.7.w1.weight"] != shard["layers.3.ffn.experts.7.w3.weight"]
    assert shard["layers.3.ffn.experts.8.w2.weight"] != shard["layers.3.ffn.experts.8.w2.scale"]
    assert shard["layers.3.attn.wo_a.weight"] != shard["layers.3.attn.wo_a.scale"]
    assert {s for n, s in shard.items() if ".experts." in n} < set(shard.values())


def test_the_tokenizer_loads_and_gives_text_back(miniature: Path) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(miniature / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 512
    text = "the routed experts, naïve and 東京"
    ids = tokenizer.encode(text).ids
    assert max(ids) < 512 and min(ids) > 1 and tokenizer.decode(ids) == text


def test_experts_of_a_base_release_are_fp8(tmp_path: Path) -> None:
    write("deepseek-v4", tmp_path / "base", seed=1, experts_dtype="fp8", **SMALL)
    tensors = read_checkpoint(tmp_path / "base")
    assert tensors["layers.0.ffn.experts.0.w1.weight"][1].dtype == "F8_E4M3"
    for name in ("config.json", "inference/config.json"):
        assert "expert_dtype" not in json.loads((tmp_path / "base" / name).read_text())


def forward(folder: Path, miniature: Path, degree: int, *states: Path) -> list[Path]:
    """What every rank saw, by processes of their own, from the MP files that convert makes."""
    parallel = {"model_parallel": degree, "nodes": 1, "gpus_per_node": degree}
    dsqjob("run", write_job(folder, miniature, parallel=parallel), "--stage", "convert")
    ranks = [
        subprocess.Popen(
            [sys.executable, FORWARD, miniature / "inference", folder, str(rank), str(degree), *states],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(degree)
    ]
    try:
        for process in ranks:
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    return [folder / f"states{rank}.npz" for rank in range(degree)]


def test_the_model_runs_on_the_converted_weights(tmp_path: Path, miniature: Path) -> None:
    """On one rank; and each block on two, from the same input, gives the same but for the order of sums."""
    (file,) = forward(tmp_path / "mp1", miniature, 1)
    alone = np.load(file)
    logits = alone["logits"]
    assert logits.shape == (2, 512) and logits.dtype == np.float32
    assert np.isfinite(logits).all() and 0.1 < logits.std() < 10
    assert np.corrcoef(logits)[0, 1] < 0.9, "the two texts are answered alike"

    first, second = (np.load(path) for path in forward(tmp_path / "mp2", miniature, 2, file))
    assert len(first) == 9 and all(np.array_equal(first[name], second[name]) for name in first)
    for name in first:
        error = np.linalg.norm(first[name] - alone[name]) / np.linalg.norm(alone[name])
        assert error < (0.01 if name.startswith("attn") else 0.06), name
