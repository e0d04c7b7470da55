"""Releases of real geometry with made-up weights: 29 experts a shard make 1 GB."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from dsqjob.amax.ledger import LEDGER, Ledger, Row
from dsqjob.checkpoint.header import TensorSpec, encode

DIM, INTER, EXPERTS = 7168, 3072, 29
KINDS = {"w1": (INTER, DIM), "w2": (DIM, INTER), "w3": (INTER, DIM)}


def _config(layers: int, experts: int, dim: int, inter: int) -> str:
    return json.dumps({
        "model_type": "deepseek_v4", "num_hidden_layers": layers, "n_routed_experts": experts, "hidden_size": dim,
        "moe_intermediate_size": inter, "num_attention_heads": 128, "index_n_heads": 64, "o_groups": 16,
        "vocab_size": 129280, "quantization_config": {"quant_method": "fp8", "scale_fmt": "ue8m0"},
    })  # fmt: skip


def write_release(folder: Path, shards: int) -> None:
    """A layer a shard. Tensors lie as safetensors' own writer lays them: scales, then weights, each in a run."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    nibbles = rng.integers(0, 256, 1 << 24, np.uint8).tobytes()
    scales = rng.integers(110, 125, 1 << 20).astype(np.uint8).tobytes()
    weight_map = {}
    for layer in range(shards):
        paths = [
            (f"layers.{layer}.ffn.experts.{e}.{kind}", shape) for e in range(EXPERTS) for kind, shape in KINDS.items()
        ]
        specs = [TensorSpec(f"layers.{layer}.attn_norm.weight", "BF16", (DIM,))]
        specs += [TensorSpec(f"{path}.scale", "F8_E8M0", (out, width // 32)) for path, (out, width) in paths]
        specs += [TensorSpec(f"{path}.weight", "I8", (out, width // 2)) for path, (out, width) in paths]
        name = f"model-{layer + 1:05d}-of-{shards:05d}.safetensors"
        with (folder / name).open("wb") as file:
            file.write(encode(specs, {"format": "pt"}) + bytes(2 * DIM))
            for spec in specs[1:]:
                file.write((scales if spec.dtype == "F8_E8M0" else nibbles)[: spec.shape[0] * spec.shape[1]])
        weight_map |= {spec.name: name for spec in specs}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(_config(shards, EXPERTS, DIM, INTER))


def write_amax(folder: Path, shards: int) -> None:
    """Amax that cover the synthetic weights: 6 * 2**-3, the largest that their scales can give."""
    rows = {
        f"layers.{layer}.ffn.experts.{e}.{kind}": Row(1.0, 6 * 2.0**-3)
        for layer in range(shards)
        for e in range(EXPERTS)
        for kind in KINDS
    }
    Ledger(rows).save(folder / LEDGER)


def write_hollow_release(folder: Path, shards: int = 64, tensors: int = 150_000) -> None:
    """Headers of a large release over files that are holes: 64 shards, 150,000 tensors."""
    folder.mkdir(parents=True)
    experts = tensors // (shards * 6)
    weight_map = {}
    for layer in range(shards):
        specs = []
        for expert in range(experts):
            for kind, (out, width) in {"w1": (64, 64), "w2": (64, 64), "w3": (64, 64)}.items():
                path = f"layers.{layer}.ffn.experts.{expert}.{kind}"
                specs.append(TensorSpec(f"{path}.weight", "I8", (out, width // 2)))
                specs.append(TensorSpec(f"{path}.scale", "F8_E8M0", (out, width // 32)))
        name = f"model-{layer + 1:05d}-of-{shards:05d}.safetensors"
        header = encode(specs)
        with (folder / name).open("wb") as file:
            file.write(header)
            file.truncate(len(header) + sum(spec.shape[0] * spec.shape[1] for spec in specs))
        weight_map |= {spec.name: name for spec in specs}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(_config(shards, experts, 64, 64))
