"""config.json and hf_quant_config.json against what this release's export should write."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from dsqjob.checkpoint.release import Release
from dsqjob.verify.findings import Finding
from dsqjob.verify.papers import CONFIG, HF_QUANT_CONFIG, Papers

_CONTAINER = re.compile(r"(layers\.\d+\.ffn\.experts)\.\d+\.w[123]\.weight")
_EXCLUDED = ["*.attn.*", "*.ffn.shared_experts.*", "head", "mtp.*"]
_ABSENT = object()


def check_configs(papers: Papers, release: Release | None) -> Iterator[Finding]:
    """Both config files against the release's, recomputed; without a release only against one another."""
    if release is not None:
        if papers.config is not None:
            producer = _producer(papers.config.get("quantization_config"))
            yield from _compare(CONFIG, _expected_config(release, producer), papers.config)
        if papers.hf_quant_config is not None:
            producer = _producer(papers.hf_quant_config)
            yield from _compare(HF_QUANT_CONFIG, _expected_hf(release, producer), papers.hf_quant_config)
    if papers.config is not None and papers.hf_quant_config is not None:
        inline = papers.config.get("quantization_config")
        here = inline.get("producer") if isinstance(inline, dict) else None
        there = papers.hf_quant_config.get("producer")
        if here != there:
            what = f"producer is {there!r}, in {CONFIG} it is {here!r}"
            yield Finding("config-differs", "fail", what, HF_QUANT_CONFIG)


def _producer(said: Any) -> dict[str, str]:
    """The producer that must be named, of whatever version the file says."""
    producer = said.get("producer") if isinstance(said, dict) else None
    version = producer.get("version") if isinstance(producer, dict) else None
    return {"name": "modelopt", "version": version if isinstance(version, str) and version else "(some version)"}


def _containers(names: Iterable[str]) -> list[str]:
    found = {match[1] for name in names if (match := _CONTAINER.fullmatch(name))}
    return sorted(found, key=lambda name: int(name.split(".")[1]))


def _shared(release: Release) -> dict[str, Any]:
    layers = {name: {"quant_algo": "NVFP4", "group_size": 16} for name in _containers(release.index)}
    return {
        "quant_algo": "MIXED_PRECISION",
        "kv_cache_quant_algo": None,
        "group_size": 16,
        "quantized_layers": layers,
    }


def _expected_config(release: Release, producer: Mapping[str, str]) -> dict[str, Any]:
    source = release.config.get("quantization_config")
    source = source if isinstance(source, dict) else {}
    numbers = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
    quantization = {
        "quant_method": "fp8",
        "activation_scheme": source.get("activation_scheme", "dynamic"),
        "weight_block_size": source.get("weight_block_size", [128, 128]),
        "moe_quant_algo": "NVFP4",
        "producer": producer,
        "ignore": _EXCLUDED,
        "config_groups": {"group_0": {"input_activations": numbers, "weights": numbers, "targets": ["Linear"]}},
        **{key: source[key] for key in ("fmt", "scale_fmt") if key in source},
        **_shared(release),
    }
    return {**release.config, "quantization_config": quantization}


def _expected_hf(release: Release, producer: Mapping[str, str]) -> dict[str, Any]:
    return {"producer": producer, "quantization": {**_shared(release), "exclude_modules": _EXCLUDED}}


def _compare(file: str, wanted: Mapping[str, Any], found: Mapping[str, Any]) -> Iterator[Finding]:
    for key, should, value in _differences(wanted, found, ""):
        if should is _ABSENT:
            what = f"{key} should not be there"
        elif value is _ABSENT:
            what = f"{key} is missing, should be {_short(should)}"
        else:
            what = f"{key} should be {_short(should)}, is {_short(value)}"
        yield Finding("config-differs", "fail", what, file)


def _differences(wanted: Any, found: Any, at: str) -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, wanted, found) of everything that differs; types count, order of keys does not."""
    if isinstance(wanted, dict) and isinstance(found, dict):
        for key in dict.fromkeys([*wanted, *found]):
            name = f"{at}.{key}" if at else key
            yield from _differences(wanted.get(key, _ABSENT), found.get(key, _ABSENT), name)
    elif wanted is _ABSENT or found is _ABSENT or _canonical(wanted) != _canonical(found):
        yield at, wanted, found


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
