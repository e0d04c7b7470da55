"""The JSON papers of a checkpoint, read strictly."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsqjob.verify.findings import Finding, Severity

INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
HF_QUANT_CONFIG = "hf_quant_config.json"
PROVENANCE = "dsqjob.json"


@dataclass(frozen=True)
class Papers:
    """Each paper as an object, None where it is missing or cannot be read."""

    index: Mapping[str, Any] | None
    config: Mapping[str, Any] | None
    hf_quant_config: Mapping[str, Any] | None
    provenance: Mapping[str, Any] | None

    @classmethod
    def read(cls, checkpoint: Path, files: frozenset[str]) -> tuple[Papers, list[Finding]]:
        """The papers, and a finding for each that is missing or no JSON object."""
        found, findings = [], []
        for name in (INDEX, CONFIG, HF_QUANT_CONFIG, PROVENANCE):
            value, problem = read_object(checkpoint, name) if name in files else (None, _missing(name))
            found.append(value)
            findings += [problem] if problem is not None else []
        return cls(*found), findings


def read_object(
    checkpoint: Path, name: str, *, severity: Severity = "fail"
) -> tuple[dict[str, Any] | None, Finding | None]:
    """A JSON object without doubled keys, or the finding that says why it is none."""
    try:
        value = json.loads(
            (checkpoint / name).read_bytes().decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse
        )
    except (ValueError, RecursionError) as error:
        return None, Finding("json-invalid", severity, f"is not valid JSON: {error}", name)
    if not isinstance(value, dict):
        return None, Finding("json-object", severity, f"holds a {type(value).__name__}, not an object", name)
    return value, None


def _missing(name: str) -> Finding:
    if name == INDEX:
        return Finding("unfinished", "fail", "there is no index: the checkpoint is unfinished", name)
    return Finding("file-missing", "fail", "a checkpoint carries this file", name)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} stands twice")
        found[key] = value
    return found


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")
