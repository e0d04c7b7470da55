"""DeepSeek-V4: names, splits, targets and config files, as 2a-deepseek-v4 and 1-formats describe them."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dsqjob.amax.settle import Settled, Sharing
from dsqjob.checkpoint.header import Entry, TensorSpec, nbytes_of
from dsqjob.checkpoint.release import CONFIG, Release
from dsqjob.dataplan.plan import (
    Cast,
    Constant,
    Copy,
    FilePlan,
    Item,
    MultiplyOut,
    Mxfp4,
    Region,
    Requantize,
    region_of,
    take_columns,
    take_rows,
)
from dsqjob.errors import DataError, UsageError
from dsqjob.families.face import Family, Target

_EXPERT = re.compile(r"((layers|mtp)\.(\d+)\.ffn\.experts)\.(\d+)\.(w[123])\.(\w+)")
_SPLIT_ROWS = frozenset({"embed", "head", "wq_b", "wo_a", "attn_sink", "weights_proj"})
_SPLIT_COLUMNS = frozenset({"wo_b"})
_GROUP = {"w1": ("w1", "w3"), "w3": ("w1", "w3"), "w2": ("w2",)}
_GROUP_SIZE = 16
_IGNORE = ("*.attn.*", "*.ffn.shared_experts.*", "head", "mtp.*")
_CAST, _REQUANTIZE = "cast", "requantize"
_ONE = struct.pack("<f", 1.0)
_LAYER_BUFFER = 370
"""Bytes a token and layer of caches and rotary tables (5.8 MiB a layer of ratio 4 at 4 x 4096)."""
_LEAST_LENGTH = 4096
"""The vendor's caches are at least that long."""
_DEQUANTIZING = 4
"""Copies of a projection in BF16 that are alive while it is dequantized and its maximum is taken."""
_ACTIVATION, _ACTIVATION_SHARED = 100, 365
"""Bytes a token and hidden channel at the peak, on every rank and divided among them (heads, logits): a line through
two runs of one layer of V4-Pro's geometry at 4 x 512 tokens with plain PyTorch kernels, at model_parallel 1 and 2. The
vendor's fused kernels need less."""


class Geometry(NamedTuple):
    """What config.json says of the model."""

    layers: int
    experts: int
    dim: int
    inter: int
    heads: int
    index_heads: int
    o_groups: int
    vocab: int


def geometry(release: Release) -> Geometry:
    """DataError ``family-mismatch`` or ``config-field`` naming the field."""
    config, where = release.config, release.root / CONFIG
    if config.get("model_type") != "deepseek_v4":
        raise DataError(
            "family-mismatch",
            f"the release is a {config.get('model_type')!r}, the job says deepseek-v4",
            where=where,
            way_out="set `family` to the release's family, or `release` to a DeepSeek-V4 folder",
        )
    names = {
        "layers": "num_hidden_layers",
        "experts": "n_routed_experts",
        "dim": "hidden_size",
        "inter": "moe_intermediate_size",
        "heads": "num_attention_heads",
        "index_heads": "index_n_heads",
        "o_groups": "o_groups",
        "vocab": "vocab_size",
    }
    for name in names.values():
        if type(config.get(name)) is not int or config[name] <= 0:
            raise DataError(
                "config-field",
                f"{name} must be a positive integer, is {config.get(name)!r}",
                where=where,
                way_out="download config.json again",
            )
    if not isinstance(config.get("quantization_config", {}), dict):
        raise DataError(
            "config-field",
            "quantization_config must be an object",
            where=where,
            way_out="download config.json again",
        )
    return Geometry(**{field: config[name] for field, name in names.items()})


def _region(release: Release, key: str) -> Region:
    shard = release.index[key]
    return region_of(release.shards[shard], shard, key)


def _mxfp4(release: Release, path: str) -> Mxfp4:
    return Mxfp4(path, _region(release, f"{path}.weight"), _region(release, f"{path}.scale"))


class DeepSeekV4(Family):
    """Routed experts are MXFP4 and become NVFP4; everything else stays as it is."""

    name = "deepseek-v4"

    def check(self, release: Release) -> None:
        g = geometry(release)
        for layer in range(g.layers):
            for expert in range(g.experts):
                for kind in _GROUP:
                    _check_projection(release, f"layers.{layer}.ffn.experts.{expert}.{kind}", kind, g)
        for name in release.index:
            if (parts := _split(name)) and parts.main and (parts.layer >= g.layers or parts.expert >= g.experts):
                raise DataError(
                    "expert-unknown",
                    f"config.json speaks of {g.layers} layers and {g.experts} experts",
                    where=f"{release.root / release.index[name]}: {name}",
                    way_out="config.json and shards are of different releases: download the release again",
                )

    def check_model_parallel(self, release: Release, n: int) -> None:
        g = geometry(release)
        for what, count in (
            ("attention heads", g.heads),
            ("index heads", g.index_heads),
            ("o_groups", g.o_groups),
            ("vocabulary", g.vocab),
            ("routed experts", g.experts),
        ):
            if count % n:
                raise UsageError(
                    "model-parallel-divide",
                    f"model_parallel {n} does not divide the {count} {what}",
                    where="parallel.model_parallel",
                    way_out="take a power of two that divides them all",
                )

    def containers(self, release: Release) -> Sequence[str]:
        return [f"layers.{layer}.ffn.experts" for layer in range(geometry(release).layers)]

    def check_tokens(self, release: Release, ids: NDArray[np.int64], where: str) -> None:
        vocab, longest = geometry(release).vocab, release.config.get("max_position_embeddings")
        outside = np.argwhere((ids < 0) | (ids >= vocab))
        if len(outside):
            row, column = outside[0]
            raise DataError(
                "token-id",
                f"token {ids[row, column]} of sample {row} is not among the model's {vocab}",
                where=where,
                way_out="make the tokens with this release's tokenizer",
            )
        if type(longest) is int and ids.shape[1] > longest:
            raise UsageError(
                "sequence-too-long",
                f"samples of {ids.shape[1]} tokens, the model's max_position_embeddings is {longest}",
                where="tokens.sequence_length",
                way_out=f"set tokens.sequence_length to {longest} or less",
            )

    def rank_memory(self, release: Release, n: int, batch_size: int, length: int) -> Mapping[str, int]:
        g = geometry(release)
        tokens = batch_size * length
        specs = [spec for item in self.mp_file(release, 0, n).items for spec in item.outputs]
        return {
            "weights": sum(nbytes_of(spec.dtype, spec.shape) * _widening(spec) for spec in specs),
            "buffers": g.layers * _LAYER_BUFFER * batch_size * max(length, _LEAST_LENGTH),
            "one projection in BF16": 2 * _DEQUANTIZING * g.dim * g.inter,
            "activations": tokens * g.dim * (_ACTIVATION + _ACTIVATION_SHARED // n),
        }

    def mp_file(self, release: Release, rank: int, n: int) -> FilePlan:
        per_rank = geometry(release).experts // n
        items = []
        for shard, header in release.shards.items():
            for entry in header.tensors.values():
                if entry.name.startswith("mtp.") and ("emb" in entry.name or entry.name.endswith("head.weight")):
                    continue
                parts = _split(entry.name)
                if parts is not None and parts.expert // per_rank != rank:
                    continue
                item = _mp_item(release, shard, entry, parts is not None, rank, n)
                if item is not None:
                    items.append(item)
        return FilePlan(f"model{rank}-mp{n}.safetensors", None, tuple(items))

    def mp_side_files(self, release: Release) -> Sequence[str]:
        return [name for name in ("tokenizer.json", "tokenizer_config.json") if (release.root / name).is_file()]

    def targets(self, release: Release) -> Iterator[Target]:
        g = geometry(release)
        for layer in range(g.layers):
            container = f"layers.{layer}.ffn.experts"
            for expert in range(g.experts):
                paths = {kind: f"{container}.{expert}.{kind}" for kind in _GROUP}
                groups = {group: tuple(paths[kind] for kind in group) for group in _GROUP.values()}
                for kind, path in paths.items():
                    rows, half = release.entry(f"{path}.weight").shape
                    sharing = Sharing(path, container, kind, groups[_GROUP[kind]])
                    yield Target(sharing, release.index[f"{path}.weight"], rows, half * 2)

    def projection(self, release: Release, path: str) -> Mxfp4:
        return _mxfp4(release, path)

    def routes(self, release: Release) -> Sequence[str]:  # noqa: ARG002 (check() refuses all other dtypes)
        return (_CAST, _REQUANTIZE)

    def export_file(self, release: Release, shard: str, route: str, amax: Mapping[str, Settled] | None) -> FilePlan:
        header = release.shards[shard]
        items = []
        for entry in header.tensors.values():
            parts = _split(entry.name)
            if parts is None or not parts.main:
                spec = TensorSpec(entry.name, entry.dtype, entry.shape)
                items.append(Item((spec,), Copy(region_of(header, shard, entry.name))))
            elif parts.what == "weight":
                items += _projection_items(release, parts, route, amax)
        return FilePlan(shard, header.metadata, tuple(items))

    def config_files(self, release: Release, producer: Mapping[str, str]) -> Mapping[str, Mapping[str, Any]]:
        layers = {
            f"layers.{layer}.ffn.experts": {"quant_algo": "NVFP4", "group_size": _GROUP_SIZE}
            for layer in range(geometry(release).layers)
        }
        shared = {"quant_algo": "MIXED_PRECISION", "kv_cache_quant_algo": None, "group_size": _GROUP_SIZE}
        source = release.config.get("quantization_config") or {}
        kept = {key: source[key] for key in ("fmt", "scale_fmt") if key in source}
        tensors = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": _GROUP_SIZE}
        inline = {
            "quant_method": "fp8",
            **kept,
            "activation_scheme": source.get("activation_scheme", "dynamic"),
            "weight_block_size": source.get("weight_block_size", [128, 128]),
            "moe_quant_algo": "NVFP4",
            **shared,
            "producer": dict(producer),
            "quantized_layers": layers,
            "ignore": list(_IGNORE),
            "config_groups": {"group_0": {"input_activations": tensors, "weights": tensors, "targets": ["Linear"]}},
        }
        separate = {**shared, "quantized_layers": layers, "exclude_modules": list(_IGNORE)}
        return {
            CONFIG: {**release.config, "quantization_config": inline},
            "hf_quant_config.json": {"producer": dict(producer), "quantization": separate},
        }


FAMILY = DeepSeekV4()


def _widening(spec: TensorSpec) -> int:
    """How much larger the vendor's parameter is than the file's tensor: it holds some BF16 ones in FP32."""
    *module, last = spec.name.split(".")
    component = module[-1] if module else last
    wide = (
        component.endswith("norm") or component == "head" or (component in ("wkv", "wgate") and "compressor" in module)
    )
    return 2 if wide and spec.dtype == "BF16" else 1


class _Parts(NamedTuple):
    container: str
    main: bool
    layer: int
    expert: int
    kind: str
    what: str

    @property
    def path(self) -> str:
        return f"{self.container}.{self.expert}.{self.kind}"


def _split(name: str) -> _Parts | None:
    """The parts of a routed expert's tensor name."""
    if ".experts." not in name:
        return None
    match = _EXPERT.fullmatch(name)
    if match is None:
        return None
    return _Parts(match[1], match[2] == "layers", int(match[3]), int(match[4]), match[5], match[6])


def _check_projection(release: Release, path: str, kind: str, g: Geometry) -> None:
    for key in (f"{path}.weight", f"{path}.scale"):
        if key not in release.index:
            raise DataError(
                "expert-missing",
                "the release lacks this tensor of a routed expert",
                where=f"{release.root}: {key}",
                way_out="download the release again",
            )
    weight, scale = release.entry(f"{path}.weight"), release.entry(f"{path}.scale")
    where = f"{release.root / release.index[weight.name]}: {weight.name}"
    if weight.dtype == "F8_E4M3":
        raise DataError(
            "release-fp8-base",
            "the routed experts are FP8: this is a `-Base` release, which has no lossless way to NVFP4",
            where=where,
            way_out="use the release whose experts are MXFP4 (DeepSeek-V4-Pro, DeepSeek-V4-Flash)",
        )
    rows, columns = (g.dim, g.inter) if kind == "w2" else (g.inter, g.dim)
    for entry, dtype, shape in (
        (weight, "I8", (rows, columns // 2)),
        (scale, "F8_E8M0", (rows, columns // 32)),
    ):
        if entry.dtype != dtype or entry.shape != shape or columns % 32:
            raise DataError(
                "expert-format",
                f"should be {dtype} {list(shape)}, is {entry.dtype} {list(entry.shape)}",
                where=f"{release.root / release.index[entry.name]}: {entry.name}",
                way_out="check that config.json and shards are of one release",
            )


def _projection_items(release: Release, parts: _Parts, route: str, amax: Mapping[str, Settled] | None) -> list[Item]:
    path = parts.path
    source = _mxfp4(release, path)
    sharing = tuple(_mxfp4(release, f"{parts.container}.{parts.expert}.{kind}") for kind in _GROUP[parts.kind])
    rows, half = release.entry(f"{path}.weight").shape
    settled = amax[path] if amax is not None else None
    op = Cast(source, sharing) if route == _CAST else Requantize(source, sharing, settled.weight if settled else None)
    outputs = (
        TensorSpec(f"{path}.weight", "U8", (rows, half)),
        TensorSpec(f"{path}.weight_scale", "F8_E4M3", (rows, half * 2 // _GROUP_SIZE)),
        TensorSpec(f"{path}.weight_scale_2", "F32", ()),
    )
    data = _ONE if settled is None else _input_scale(settled.input)
    return [Item(outputs, op), Item((TensorSpec(f"{path}.input_scale", "F32", ()),), Constant(data))]


def _input_scale(amax: float) -> bytes:
    """``amax / 2688`` in FP32."""
    from dsqjob.formats import nvfp4

    return struct.pack("<f", nvfp4.input_scale(amax))


def _mp_item(release: Release, shard: str, entry: Entry, routed: bool, rank: int, n: int) -> Item | None:
    """What becomes of a tensor in a rank's file; None for a scale that is multiplied out."""
    region = region_of(release.shards[shard], shard, entry.name)
    if routed:
        if entry.dtype == "I8":
            rows, half = entry.shape
            return Item((TensorSpec(entry.name, "F4", (rows, half * 2)),), Copy(region))
        return Item((TensorSpec(entry.name, entry.dtype, entry.shape),), Copy(region))
    *module, last = entry.name.split(".")
    component = module[-1] if last in ("weight", "scale", "bias") and module else last
    scale_key = entry.name.removesuffix("weight") + "scale"
    multiplied = component == "wo_a" and f"{'.'.join(module)}.scale" in release.index
    if multiplied and last == "scale":
        return None
    shape = list(entry.shape)
    if component in _SPLIT_ROWS:
        shape[0] = _share(entry, 0, n)
        region = take_rows(region, rank * shape[0], (rank + 1) * shape[0])
    elif component in _SPLIT_COLUMNS:
        width = _share(entry, 1, n) * (region.width // entry.shape[1])
        shape[1] //= n
        region = take_columns(region, rank * width, (rank + 1) * width)
    if not multiplied:
        return Item((TensorSpec(entry.name, entry.dtype, tuple(shape)),), Copy(region))
    blocks = _share(release.entry(scale_key), 0, n)
    if n > 1 and shape[0] != blocks * 128:
        raise UsageError(
            "model-parallel-divide",
            f"a rank's {shape[0]} rows are not whole blocks of 128",
            where=entry.name,
            way_out="take a smaller model_parallel",
        )
    scale = take_rows(_region(release, scale_key), rank * blocks, (rank + 1) * blocks)
    return Item((TensorSpec(entry.name, "BF16", tuple(shape)),), MultiplyOut(region, scale))


def _share(entry: Entry, dim: int, n: int) -> int:
    """A rank's part of a dimension; UsageError ``model-parallel-divide``."""
    if len(entry.shape) <= dim or entry.shape[dim] % n:
        raise UsageError(
            "model-parallel-divide",
            f"model_parallel {n} does not divide dimension {dim} of {list(entry.shape)}",
            where=entry.name,
            way_out="take a smaller power of two",
        )
    return entry.shape[dim] // n
