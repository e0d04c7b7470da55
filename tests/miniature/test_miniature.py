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

FORWARD = """
import json, sys
sys.path.insert(0, sys.argv[1])
import torch, model
torch.set_num_threads(1)
torch.set_default_dtype(torch.bfloat16)
args = model.ModelArgs(**json.load(open(sys.argv[1] + "/config.json")))
net = model.Transformer(args)
parameters = dict(net.named_parameters(remove_duplicate=False))
raw = open(sys.argv[2], "rb").read()
length = int.from_bytes(raw[:8], "little")
table = json.loads(raw[8 : 8 + length])
kinds = {"BF16": torch.bfloat16, "F32": torch.float32, "I32": torch.int32}
for name, item in table.items():
    begin, end = item["data_offsets"]
    data = torch.frombuffer(bytearray(raw[8 + length + begin : 8 + length + end]), dtype=torch.uint8)
    parameter = parameters.pop(name).data
    if item["dtype"] in kinds:
        assert list(parameter.shape) == item["shape"], name
        parameter.copy_(data.view(kinds[item["dtype"]]).view(item["shape"]))
    else:
        parameter.view(torch.uint8).copy_(data.view(parameter.shape))
assert set(parameters) == {"mtp.0.embed.weight", "mtp.0.head.weight"}, sorted(parameters)
ids = torch.randint(0, args.vocab_size, (2, 140), generator=torch.Generator().manual_seed(0))
logits = net(ids)
assert logits.shape == (2, args.vocab_size) and logits.dtype == torch.float32
assert bool(logits.isfinite().all()) and 0.1 < float(logits.std()) < 10
"""


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        write("deepseek-v4", tmp_path / name, seed=seed, **SMALL)
    assert digests(tmp_path / "a") == digests(tmp_path / "b") != digests(tmp_path / "c")


def test_a_folder_with_files_is_refused_and_untouched(tmp_path: Path) -> None:
    (tmp_path / "keep").write_text("mine")
    with pytest.raises(UsageError) as caught:
        write("deepseek-v4", tmp_path, seed=1)
    assert caught.value.id == "folder-not-empty" and digests(tmp_path).keys() == {"keep"}


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


def test_the_model_runs_on_the_converted_weights(tmp_path: Path, miniature: Path) -> None:
    job = write_job(tmp_path, miniature, parallel={"model_parallel": 1, "nodes": 1, "gpus_per_node": 1})
    dsqjob("run", job, "--stage", "convert")
    weights = tmp_path / "work" / "mp" / "model0-mp1.safetensors"
    command = [sys.executable, "-c", FORWARD, str(miniature / "inference"), str(weights)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
