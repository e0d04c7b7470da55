"""What servers demand of a checkpoint's configs: the conditions B1 to B7. Problems as in ``conditions``."""

from __future__ import annotations

import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any

from dsqjob.verify.conditions import Problem
from dsqjob.verify.facts import Facts

_QUANT_CFG = "quant_cfg.json"
_SHARED_KEYS = ("quant_algo", "kv_cache_quant_algo", "group_size")
_ABSENT = "nothing"


def b1_base(facts: Facts) -> Iterator[Problem]:
    """The FP8 base: model type, method, activation scheme (case 0); block size and scale format (case 1)."""
    inline = facts.quantization
    if facts.config.get("model_type") != "deepseek_v4":
        yield Problem(f"model_type is {facts.config.get('model_type')!r}, not 'deepseek_v4'")
    if inline.get("quant_method") != "fp8":
        yield Problem(f"quant_method is {inline.get('quant_method')!r}, not 'fp8'")
    if not isinstance(inline.get("activation_scheme"), str):
        yield Problem("activation_scheme is missing")
    if inline.get("weight_block_size") != [128, 128]:
        yield Problem(f"weight_block_size is {inline.get('weight_block_size')!r}, not [128, 128]", 1)
    if facts.release_config is not None:
        source = facts.release_config.get("quantization_config")
        wanted = source.get("scale_fmt") if isinstance(source, dict) else None
        if inline.get("scale_fmt") != wanted:
            yield Problem(f"scale_fmt is {inline.get('scale_fmt')!r}, the release's is {wanted!r}", 1)


def b2_experts(facts: Facts) -> Iterator[Problem]:
    """The experts' format: ``expert_dtype`` (case 0), ``moe_quant_algo`` (case 1)."""
    if facts.config.get("expert_dtype", "fp4") != "fp4":
        yield Problem(f"expert_dtype is {facts.config['expert_dtype']!r}, neither 'fp4' nor absent")
    if facts.quantization.get("moe_quant_algo") != "NVFP4":
        yield Problem(f"moe_quant_algo is {facts.quantization.get('moe_quant_algo')!r}, not 'NVFP4'", 1)


def b3_mixed(facts: Facts) -> Iterator[Problem]:
    """``quant_algo`` and ``ignore`` (case 0), ``group_size`` (case 1)."""
    inline = facts.quantization
    if inline.get("quant_algo") != "MIXED_PRECISION":
        yield Problem(f"quant_algo is {inline.get('quant_algo')!r}, not 'MIXED_PRECISION'")
    ignore = inline.get("ignore")
    if not isinstance(ignore, list) or not all(isinstance(pattern, str) for pattern in ignore):
        yield Problem("ignore is not a list of strings")
    if type(inline.get("group_size")) is not int or inline["group_size"] != 16:
        yield Problem(f"group_size is {inline.get('group_size')!r}, not the integer 16", 1)


def b4_copies(facts: Facts) -> Iterator[Problem]:
    """hf_quant_config.json is there (case 0) and equals the inline copy (case 0; exclusions and layers case 1)."""
    separate = facts.hf_quant_config
    if separate is None:
        yield Problem("hf_quant_config.json is missing or cannot be read")
        return
    inline = facts.quantization
    nested = separate.get("quantization")
    there = nested if isinstance(nested, dict) else {}
    for name, said in (("hf_quant_config.json", separate), ("config.json", inline)):
        producer = said.get("producer")
        if not isinstance(producer, dict) or producer.get("name") != "modelopt":
            yield Problem(f"{name}: producer.name is not 'modelopt'")
    for key in _SHARED_KEYS:
        if there.get(key, _ABSENT) != inline.get(key, _ABSENT):
            yield Problem(f"{key} is {there.get(key, _ABSENT)!r}, inline {inline.get(key, _ABSENT)!r}")
    if _strings(there.get("exclude_modules")) != _strings(inline.get("ignore")):
        yield Problem("exclude_modules and the inline ignore differ", 1)
    if _count(there.get("quantized_layers")) != _count(inline.get("quantized_layers")):
        yield Problem("quantized_layers of both files differ in number", 1)


def b5_no_nested(facts: Facts) -> Iterator[Problem]:
    """No key ``quantization`` inside the inline config: with producer modelopt it means another format to vLLM."""
    if "quantization" in facts.quantization:
        yield Problem("quantization_config holds a key 'quantization'")


def b6_not_ignored(facts: Facts) -> Iterator[Problem]:
    """No ignore pattern matches a main layer's experts, under SGLang's matcher and any spelling of their names."""
    layers = sorted({int(path.split(".")[1]) for path in facts.paths()})
    spellings = [f"{prefix}layers.{{}}.{block}.experts" for prefix in ("", "model.") for block in ("ffn", "mlp")]
    modules = [spelling.format(layer) for layer in layers for spelling in spellings]
    hf = facts.hf_quant_config or {}
    nested = hf.get("quantization")
    excluded = nested.get("exclude_modules") if isinstance(nested, dict) else None
    for pattern in sorted(_strings(facts.quantization.get("ignore")) | _strings(excluded)):
        hit = next((name for name in modules if _matches(pattern, name)), None)
        if hit is not None:
            yield Problem(f"the ignore pattern {pattern!r} matches {hit}")


def _matches(pattern: str, module: str) -> bool:
    """The whole prefix of a module or of one of its experts, or a dotted part."""
    names = (module, f"{module}.0", f"{module}.0.w1")
    part = re.escape(pattern).replace(r"\*", "[^.]*")
    return any(fnmatchcase(name, pattern) for name in names) or re.search(rf"(^|\.){part}(\.|$)", module) is not None


def b7_no_overlay(facts: Facts) -> Iterator[Problem]:
    """No quant_cfg.json, which TensorRT-LLM would lay over the mixed precision."""
    if _QUANT_CFG in facts.files:
        yield Problem(f"{_QUANT_CFG} is in the folder")


def _strings(value: Any) -> frozenset[str]:
    return frozenset(item for item in value if isinstance(item, str)) if isinstance(value, list) else frozenset()


def _count(value: Any) -> int:
    return len(value) if isinstance(value, dict) else -1
