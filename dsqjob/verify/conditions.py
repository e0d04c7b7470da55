"""What servers demand of a checkpoint's tensors: the conditions A1 to A7, C1, E1 and E2.

Each condition yields a problem for everything that breaks it. A problem's ``case`` picks among the severities that a
server gives to one condition: 0 the first, 1 the second.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from statistics import median
from typing import NamedTuple

from dsqjob.verify.facts import Facts, Stored
from dsqjob.verify.findings import float_of
from dsqjob.verify.settled import PROJECTION

_TENSORS = {"weight": "U8", "weight_scale": "F8_E4M3", "weight_scale_2": "F32", "input_scale": "F32"}
_LEFTOVERS = ("scale", "weight_scale_inv")
_SPREAD = 64
_GROUP = 16
_HIDDEN_TILE, _INTERMEDIATE_TILE, _SHARED_TILE = 512, 64, 128
_DRAFT_EXPERT = re.compile(r"mtp\.\d+\.ffn\.experts\.\d+\.w[123]\.(weight|scale|weight_scale)")


class Problem(NamedTuple):
    what: str
    case: int = 0


def a1_complete(facts: Facts) -> Iterator[Problem]:
    """Every expert projection of every main layer has exactly its four tensors."""
    wanted = facts.paths()
    for path in wanted:
        missing = [name for name in _TENSORS if f"{path}.{name}" not in facts.tensors]
        if missing:
            yield Problem(f"{path} lacks {', '.join(missing)}")
    known = set(wanted)
    for path in sorted(facts.stored_paths() - known):
        yield Problem(f"{path} is beyond the layers and experts of config.json")
    for name in facts.tensors:
        path, _, kind = name.rpartition(".")
        if path in known and kind not in _TENSORS and kind not in _LEFTOVERS:
            yield Problem(f"{name} does not belong to an NVFP4 projection")


def a2_layout(facts: Facts) -> Iterator[Problem]:
    """Dtypes and shapes. Case 0: a shape, or a weight that is none; case 1: only a dtype."""
    hidden, inter = facts.number("hidden_size"), facts.number("moe_intermediate_size")
    for path in sorted(facts.stored_paths()):
        weight = facts.tensors.get(f"{path}.weight")
        out_features, in_features = (hidden, inter) if path.endswith("w2") else (inter, hidden)
        if weight is not None and len(weight.shape) == 2:
            out_features = out_features or weight.shape[0]
            in_features = in_features or weight.shape[1] * 2
        for name, dtype in _TENSORS.items():
            stored = facts.tensors.get(f"{path}.{name}")
            if stored is None or out_features is None or in_features is None:
                continue
            width = {"weight": in_features // 2, "weight_scale": in_features // _GROUP}.get(name)
            shapes = ((out_features, width),) if width is not None else ((), (1,))
            if stored.shape not in shapes:
                yield Problem(f"{path}.{name} is {list(stored.shape)}, should be {list(shapes[0])}")
            elif stored.dtype != dtype:
                yield Problem(f"{path}.{name} is {stored.dtype}, should be {dtype}", 1)


def a3_leftovers(facts: Facts) -> Iterator[Problem]:
    """No scale of the release beside an NVFP4 projection."""
    for path in sorted(facts.stored_paths()):
        for name in _LEFTOVERS:
            if f"{path}.{name}" in facts.tensors:
                yield Problem(f"{path}.{name} is left over and would overwrite the real scale")


def a4_values(facts: Facts) -> Iterator[Problem]:
    """Scales are finite and positive; no block scale is NaN, signed, or zero over values."""
    for path, scales in facts.projections.items():
        for name, bits in (("weight_scale_2", scales.weight_scale_2), ("input_scale", scales.input_scale)):
            if bits is not None and not (math.isfinite(value := float_of(bits)) and value > 0):
                yield Problem(f"{path}.{name} is {value!r}")
        for count, what in ((scales.nan, "NaN"), (scales.negative, "signed"), (scales.zero, "zero over values")):
            if count:
                yield Problem(f"{path}.weight_scale: {count} block scales are {what}")


def a5_weight_scales_shared(facts: Facts) -> Iterator[Problem]:
    """w1 and w3 of an expert have the same ``weight_scale_2``, bit for bit."""
    yield from _unshared(facts, "weight_scale_2")


def a6_input_scales_shared(facts: Facts) -> Iterator[Problem]:
    """w1 and w3 of an expert have the same ``input_scale``, bit for bit."""
    yield from _unshared(facts, "input_scale")


def _unshared(facts: Facts, name: str) -> Iterator[Problem]:
    for path, scales in facts.projections.items():
        peer = facts.projections.get(f"{path[:-1]}3") if path.endswith(".w1") else None
        one, other = getattr(scales, name), getattr(peer, name, None)
        if one is not None and other is not None and one != other:
            yield Problem(f"{path}.{name} is {float_of(one)!r}, that of w3 {float_of(other)!r}")


def a7_spread(facts: Facts) -> Iterator[Problem]:
    """No expert's ``input_scale`` is far above its layer's median: kernels take one maximum for a whole GEMM."""
    groups: defaultdict[tuple[int, str], dict[str, float]] = defaultdict(dict)
    for path, scales in facts.projections.items():
        match = PROJECTION.fullmatch(path)
        if match is not None and scales.input_scale is not None:
            value = float_of(scales.input_scale)
            if math.isfinite(value) and value > 0:
                groups[int(match[2]), "w2" if match[4] == "w2" else "w1 and w3"][path] = value
    for (layer, kinds), values in sorted(groups.items()):
        path, largest = max(values.items(), key=lambda item: item[1])
        ratio = largest / median(values.values())
        if ratio > _SPREAD:
            yield Problem(f"layer {layer}, {kinds}: the input_scale of {path} is {ratio:.0f} times the median")


def e1_index(facts: Facts) -> Iterator[Problem]:
    """The index names exactly the tensors that exist, and its total size is true."""
    for sentence in facts.index_problems:
        yield Problem(sentence)


def e2_divisible(facts: Facts, tensor_parallel: int | None) -> Iterator[Problem]:
    """Dimensions that the kernels can cut; what depends on the tensor-parallel size only where it is named."""
    hidden, inter = facts.number("hidden_size"), facts.number("moe_intermediate_size")
    if hidden is None or inter is None:
        yield Problem("config.json does not say hidden_size and moe_intermediate_size")
        return
    for name, value in (("hidden_size", hidden), ("moe_intermediate_size", inter)):
        if value % (2 * _GROUP):
            yield Problem(f"{name} {value} is no multiple of {2 * _GROUP}")
    if hidden % _HIDDEN_TILE:
        yield Problem(f"hidden_size {hidden} is no multiple of {_HIDDEN_TILE}, which the TRTLLM kernels want")
    if tensor_parallel is None:
        return
    shared = inter * (facts.number("n_shared_experts") or 0)
    for name, value, tile in (
        ("moe_intermediate_size", inter, _INTERMEDIATE_TILE),
        ("the shared expert's intermediate size", shared, _SHARED_TILE),
    ):
        if value % (tensor_parallel * tile):
            yield Problem(f"{name} {value} over {tensor_parallel} ranks is no multiple of {tile}")


def draft_layers(facts: Facts) -> tuple[str, str]:
    """(kind, census) of the draft layers' experts: ``none``, ``mxfp4``, ``nvfp4`` or ``other`` (condition C1)."""
    drafts = {name: stored for name, stored in facts.tensors.items() if name.startswith("mtp.")}
    if not drafts:
        return "none", "no draft layers"
    stages = sorted({name.split(".")[1] for name in drafts})
    dtypes = Counter(stored.dtype for stored in drafts.values())
    census = ", ".join(f"{count} {dtype}" for dtype, count in sorted(dtypes.items()))
    experts = {name: stored for name, stored in drafts.items() if _DRAFT_EXPERT.fullmatch(name)}
    return _draft_kind(experts), f"mtp.{', mtp.'.join(stages)}: {census}"


def _draft_kind(experts: dict[str, Stored]) -> str:
    kinds = {(name.rpartition(".")[2], stored.dtype) for name, stored in experts.items()}
    if kinds == {("weight", "I8"), ("scale", "F8_E8M0")}:
        return "mxfp4"
    if kinds == {("weight", "U8"), ("weight_scale", "F8_E4M3")}:
        return "nvfp4"
    return "other"
