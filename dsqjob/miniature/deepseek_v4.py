"""A miniature DeepSeek-V4 release, with the edges that real ones have or may have (2-deepseek-interface, section 6)."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dsqjob.checkpoint.header import DTYPE_BITS, TensorSpec, encode
from dsqjob.checkpoint.release import INDEX
from dsqjob.formats import e2m1, e4m3
from dsqjob.miniature.deepseek_v4_config import Geometry, hub_config, inference_config
from dsqjob.miniature.tokenizer import tokenizer_files

_BIAS = 127
_CODE = "deepseek_v4_inference"
"""Package data: inference code of our own, plain PyTorch, that only miniatures carry."""
_CARD = "---\nlicense: mit\nlibrary_name: transformers\n---\n# A miniature release\n\nIts weights mean nothing.\n"
_ENCODING = '''"""Turns messages into text."""


def encode(messages):
    return "".join(f"{message['role']}: {message['content']}\\n" for message in messages)
'''


class Drawn(NamedTuple):
    """A tensor of the release: name, dtype, shape, bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: NDArray[Any]


def write_files(folder: Path, *, seed: int, experts_dtype: str = "mxfp4", **geometry: Any) -> None:
    """All files of the release. ``experts_dtype="fp8"`` makes a ``-Base`` one, whose experts are FP8."""
    g = Geometry(**geometry)
    drawer = _Drawer(g, np.random.Generator(np.random.PCG64(seed)), experts_dtype)
    tensors = {tensor.name: tensor for tensor in drawer.all()}
    if experts_dtype == "mxfp4":
        _make_edges(tensors, g)
    _write_shards(folder, tensors, g)
    _write_json(folder / "config.json", hub_config(g, experts_dtype), 2)
    _write_json(folder / "generation_config.json", {"bos_token_id": 0, "eos_token_id": 1, "do_sample": True}, 2)
    for name, value in tokenizer_files(g.vocab).items():
        _write_json(folder / name, value, 2)
    _write_text(folder / "LICENSE", "Miniature licence: made up numbers, for tests. Do with them as you like.\n")
    _write_text(folder / "README.md", _CARD)
    (folder / "encoding").mkdir()
    _write_text(folder / "encoding" / "encoding.py", _ENCODING)
    _write_json(folder / "encoding" / "example.json", {"messages": [{"role": "user", "content": "hello"}]}, 2)
    (folder / "inference").mkdir()
    _write_json(folder / "inference" / "config.json", inference_config(g, experts_dtype), None)
    _write_text(folder / "inference" / "requirements.txt", "torch>=2.10\n")
    for source in resources.files("dsqjob.miniature").joinpath(_CODE).iterdir():
        if source.name.endswith(".py"):
            _write_text(folder / "inference" / source.name, source.read_text(encoding="utf-8"))


class _Drawer:
    """Draws every tensor in the order of the names below; the order is part of the seed's meaning."""

    def __init__(self, g: Geometry, rng: np.random.Generator, experts_dtype: str) -> None:
        self.g, self._rng, self._experts_dtype = g, rng, experts_dtype

    def all(self) -> Iterator[Drawn]:
        g = self.g
        embed = self._bf16("embed.weight", (g.vocab, g.dim), 1.0)
        yield embed
        for layer in range(g.layers):
            yield from self._layer(f"layers.{layer}", g.ratios[layer], layer < g.hash_layers)
        yield self._norm("norm.weight", g.dim)
        head = self._bf16("head.weight", (g.vocab, g.dim), g.dim**-0.5)
        yield head
        yield from self._hyper_head("hc_head")
        for number in range(g.mtp_layers):
            prefix = f"mtp.{number}"
            yield from self._layer(prefix, g.ratios[g.layers + number], False)
            yield from self._fp8(f"{prefix}.e_proj", (g.dim, g.dim))
            yield from self._fp8(f"{prefix}.h_proj", (g.dim, g.dim))
            for norm in ("enorm", "hnorm", "norm"):
                yield self._norm(f"{prefix}.{norm}.weight", g.dim)
            yield from self._hyper_head(f"{prefix}.hc_head")
            yield embed._replace(name=f"{prefix}.emb.tok_emb.weight")
            yield head._replace(name=f"{prefix}.head.weight")

    def _layer(self, prefix: str, ratio: int, hashed: bool) -> Iterator[Drawn]:
        g = self.g
        mixes = (2 + g.hc) * g.hc
        for part in ("attn", "ffn"):
            yield self._norm(f"{prefix}.{part}_norm.weight", g.dim)
            yield self._f32(f"{prefix}.hc_{part}_fn", (mixes, g.hc * g.dim), (g.hc * g.dim) ** -0.5)
            yield self._f32(f"{prefix}.hc_{part}_base", (mixes,), 0.5)
            yield self._f32(f"{prefix}.hc_{part}_scale", (3,), 0.2)
        yield from self._attention(f"{prefix}.attn", ratio)
        yield self._bf16(f"{prefix}.ffn.gate.weight", (g.experts, g.dim), g.dim**-0.5)
        if hashed:
            # the last two experts are never picked
            order = np.argsort(self._rng.random((g.vocab, max(g.active, g.experts - 2))), axis=1)
            yield Drawn(f"{prefix}.ffn.gate.tid2eid", "I32", (g.vocab, g.active), order[:, : g.active].astype("<i4"))
        else:
            yield self._f32(f"{prefix}.ffn.gate.bias", (g.experts,), 0.05)
        for expert in range(g.experts):
            for kind in ("w1", "w2", "w3"):
                yield from self._expert(f"{prefix}.ffn.experts.{expert}.{kind}", kind)
        for kind in ("w1", "w2", "w3"):
            yield from self._fp8(f"{prefix}.ffn.shared_experts.{kind}", self._ffn_shape(kind))

    def _attention(self, prefix: str, ratio: int) -> Iterator[Drawn]:
        g = self.g
        yield self._f32(f"{prefix}.attn_sink", (g.heads,), 0.5)
        yield from self._fp8(f"{prefix}.wq_a", (g.q_lora, g.dim))
        yield self._norm(f"{prefix}.q_norm.weight", g.q_lora)
        yield from self._fp8(f"{prefix}.wq_b", (g.heads * g.head_dim, g.q_lora))
        yield from self._fp8(f"{prefix}.wkv", (g.head_dim, g.dim))
        yield self._norm(f"{prefix}.kv_norm.weight", g.head_dim)
        yield from self._fp8(f"{prefix}.wo_a", (g.o_groups * g.o_lora, g.heads * g.head_dim // g.o_groups))
        yield from self._fp8(f"{prefix}.wo_b", (g.dim, g.o_groups * g.o_lora))
        if ratio:
            yield from self._compressor(f"{prefix}.compressor", ratio, g.head_dim)
        if ratio == 4:
            yield from self._fp8(f"{prefix}.indexer.wq_b", (g.index_heads * g.index_dim, g.q_lora))
            yield self._bf16(f"{prefix}.indexer.weights_proj.weight", (g.index_heads, g.dim), g.dim**-0.5)
            yield from self._compressor(f"{prefix}.indexer.compressor", ratio, g.index_dim)

    def _compressor(self, prefix: str, ratio: int, width: int) -> Iterator[Drawn]:
        channels = width * (2 if ratio == 4 else 1)
        yield self._f32(f"{prefix}.ape", (ratio, channels), 0.1)
        for name in ("wkv", "wgate"):
            yield self._bf16(f"{prefix}.{name}.weight", (channels, self.g.dim), self.g.dim**-0.5)
        yield self._norm(f"{prefix}.norm.weight", width)

    def _hyper_head(self, prefix: str) -> Iterator[Drawn]:
        g = self.g
        yield self._f32(f"{prefix}_fn", (g.hc, g.hc * g.dim), (g.hc * g.dim) ** -0.5)
        yield self._f32(f"{prefix}_base", (g.hc,), 0.5)
        yield self._f32(f"{prefix}_scale", (1,), 0.2)

    def _ffn_shape(self, kind: str) -> tuple[int, int]:
        return (self.g.dim, self.g.inter) if kind == "w2" else (self.g.inter, self.g.dim)

    def _expert(self, path: str, kind: str) -> Iterator[Drawn]:
        shape = self._ffn_shape(kind)
        if self._experts_dtype == "fp8":
            yield from self._fp8(path, shape)
            return
        w = self._normal(shape, shape[1] ** -0.5) * np.exp2(self._rng.integers(-2, 3, (shape[0], 1)))
        blocks = w.reshape(shape[0], -1, 32)
        exponent = np.frexp(np.abs(blocks).max(axis=-1))[1] - 3
        codes = e2m1.encode(np.ldexp(blocks, -exponent[..., None]).reshape(shape).astype(np.float32))
        yield Drawn(f"{path}.weight", "I8", (shape[0], shape[1] // 2), e2m1.pack(codes))
        yield Drawn(f"{path}.scale", "F8_E8M0", exponent.shape, (exponent + _BIAS).astype(np.uint8))

    def _fp8(self, path: str, shape: tuple[int, int]) -> Iterator[Drawn]:
        w = self._normal(shape, shape[1] ** -0.5)
        blocks = tuple(math.ceil(n / 128) for n in shape)
        scale = np.empty(blocks, np.uint8)
        codes = np.empty(shape, np.uint8)
        for i, j in np.ndindex(*blocks):
            part = np.s_[i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128]
            exponent = math.ceil(math.log2(float(np.abs(w[part]).max()) / 448))
            scale[i, j] = exponent + _BIAS
            scaled = np.ldexp(w[part], -exponent)
            codes[part] = e4m3.encode_scale(np.abs(scaled)) | ((scaled < 0).astype(np.uint8) << 7)
        yield Drawn(f"{path}.weight", "F8_E4M3", shape, codes)
        yield Drawn(f"{path}.scale", "F8_E8M0", blocks, scale)

    def _normal(self, shape: tuple[int, ...], sigma: float) -> NDArray[np.float32]:
        return (self._rng.standard_normal(shape, np.float32) * np.float32(sigma)).astype(np.float32)

    def _f32(self, name: str, shape: tuple[int, ...], sigma: float) -> Drawn:
        return Drawn(name, "F32", shape, self._normal(shape, sigma).astype("<f4"))

    def _bf16(self, name: str, shape: tuple[int, ...], sigma: float, mean: float = 0.0) -> Drawn:
        bits = (self._normal(shape, sigma) + np.float32(mean)).view(np.uint32)
        return Drawn(name, "BF16", shape, ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2"))

    def _norm(self, name: str, width: int) -> Drawn:
        return self._bf16(name, (width,), 0.05, 1.0)


def _make_edges(tensors: dict[str, Drawn], g: Geometry) -> None:
    """What careless code gets wrong, planted in a few experts (layers and experts counted from the end where small
    geometries have fewer)."""
    last, middle = g.layers - 1, g.layers // 2
    if g.layers > g.hash_layers:
        bias = tensors[f"layers.{g.hash_layers}.ffn.gate.bias"].data
        bias[g.experts - 1] = -1e4  # a score-routed expert that no token reaches
    path = f"layers.{middle}.ffn.experts.{3 % g.experts}.w2"
    scale, packed = tensors[f"{path}.scale"].data, tensors[f"{path}.weight"].data
    k_max = int(scale.max()) - _BIAS
    scale[0, 0], packed[0, :16] = k_max - 40 + _BIAS, 0x21  # outside the E4M3 window, lost
    scale[1, 0], packed[1, :16] = k_max - 40 + _BIAS, 0x80  # outside, zeros and negative zeros
    scale[2, 0], packed[2, :16] = k_max - 18 + _BIAS, 0xC2  # outside, yet its values survive
    scale[3, 0], packed[3, :16] = 0, 0x08  # byte 0, zeros of both signs
    scale[4, 0], packed[4, :16] = 0, 0x17  # byte 0, not zero
    tensors[f"layers.{middle}.ffn.experts.{5 % g.experts}.w3.scale"].data[:] += 6  # w1 and w3 differ in k_max
    zero = f"layers.{last}.ffn.experts.{2 % g.experts}.w1"
    tensors[f"{zero}.scale"].data[5] = 0  # a row of zeros
    tensors[f"{zero}.weight"].data[5] = 0


def _shard_of(name: str, g: Geometry) -> int:
    """Shard number from 1: embed; a shard a layer; draft layers and head. A few tensors lie apart from their kin."""
    last = g.layers - 1
    apart = {
        f"layers.{last}.ffn.experts.{7 % g.experts}.w3.weight",
        f"layers.{last}.ffn.experts.{7 % g.experts}.w3.scale",
        f"layers.{last}.ffn.experts.{8 % g.experts}.w2.scale",
        f"layers.{last}.attn.wo_a.scale",
    }
    if name in apart:
        return 2
    if name.startswith("layers."):
        return 2 + int(name.split(".")[1])
    return 1 if name.startswith("embed") else 2 + g.layers


def _write_shards(folder: Path, tensors: dict[str, Drawn], g: Geometry) -> None:
    count = 2 + g.layers
    weight_map: dict[str, str] = {}
    total = 0
    for number in range(1, count + 1):
        name = f"model-{number:05d}-of-{count:05d}.safetensors"
        mine = [tensor for tensor in tensors.values() if _shard_of(tensor.name, g) == number]
        mine.sort(key=lambda tensor: (-DTYPE_BITS[tensor.dtype], tensor.dtype, tensor.name))
        with (folder / name).open("wb") as file:
            file.write(encode([TensorSpec(*tensor[:3]) for tensor in mine], {"format": "pt"}))
            for tensor in mine:
                file.write(np.ascontiguousarray(tensor.data).tobytes())
                total += tensor.data.nbytes
        weight_map |= {tensor.name: name for tensor in mine}
    _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}, 2)


def _write_json(path: Path, value: Any, indent: int | None) -> None:
    _write_text(path, json.dumps(value, indent=indent, ensure_ascii=False) + "\n")


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")
