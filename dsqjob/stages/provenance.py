"""The checkpoint's own papers: where it comes from, how it was made, what it lost. The same inputs, the same bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from dsqjob import __version__
from dsqjob.checkpoint.release import Release
from dsqjob.engine.stage import Output, Record
from dsqjob.engine.workspace import Workspace, read_state
from dsqjob.families.known_code import code_digests
from dsqjob.stages.inputs import Inputs

PROVENANCE = "dsqjob.json"
SUMS = "SHA256SUMS"
_FRONT = "---\n"
_HUB_METADATA = Path(".cache/huggingface/download/config.json.metadata")


def producer() -> dict[str, str]:
    """Loaders look for the name; the version says who wrote it."""
    return {"name": "modelopt", "version": f"dsqjob-{__version__}"}


def provenance(inputs: Inputs, totals: Mapping[str, int]) -> dict[str, Any]:
    """The content of ``dsqjob.json``: nothing that depends on the machine, the time, or who did which unit."""
    job, release = inputs.job, inputs.release
    ledger = inputs.ledger if totals else None
    papers: dict[str, Any] = {
        "format": 1,
        "dsqjob": __version__,
        "family": job.family,
        "release": {"name": release.root.name, "revision": _revision(release), **release.identity()},
        "vendor_code": code_digests(job.inference_dir),
        "weights": inputs.route,
        "input_scale": job.export.input_scale,
        "amax": None if not inputs.calibrated else {"digest": inputs.amax_digest},
        "cast": None,
    }
    if inputs.route == "cast":
        papers["cast"] = {name: totals[name] for name in totals}
    if ledger is not None:
        settled = inputs.settled or {}
        papers["amax"]["about"] = dict(ledger.about)
        papers["amax"]["fallback_inputs"] = sorted(path for path, value in settled.items() if value.fallback)
        papers["amax"]["allow_uncalibrated"] = sorted(job.export.allow_uncalibrated)
    return papers


def json_text(value: Mapping[str, Any]) -> bytes:
    """JSON as a checkpoint's files have it: two spaces, the order of the value."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def lossless_line(totals: Mapping[str, int]) -> str:
    """The count that the cast prints, in 32-element source blocks."""
    blocks, lossless = totals["blocks"], totals["lossless"]
    percent = 100.0 if blocks == 0 else 100.0 * lossless / blocks
    return f"[cast] lossless MXFP4->NVFP4 blocks: {lossless}/{blocks} ({percent:.4f}%)"


def model_card(inputs: Inputs, papers: Mapping[str, Any]) -> str:
    """README.md in place of the release's."""
    release = papers["release"]
    front = _front_matter(inputs.release)
    keep = {key: front[key] for key in ("license", "license_name", "license_link") if key in front}
    matter: dict[str, Any] = {**keep, "library_name": "Model Optimizer", "tags": ["nvfp4", "modelopt"]}
    lines = [
        _FRONT + yaml.safe_dump(matter) + _FRONT,
        f"# {release['name']}, routed experts in NVFP4",
        "",
        f"Made from the release `{release['name']}` (revision {release['revision'] or 'not recorded'}) by "
        f"dsqjob {papers['dsqjob']}. The release's licence applies to this checkpoint; it is copied along.",
        "",
        "## What was changed",
        "",
        "Routed experts (`layers.*.ffn.experts.*`) are NVFP4: E2M1 values, one E4M3 scale per 16 of them, one FP32 "
        "scale per projection. Every other tensor is the release's, byte for byte.",
        "",
    ]
    if papers["cast"] is not None:
        lines += ["Weights were cast from MXFP4, without loss where that is possible:", ""]
        lines += [f"    {lossless_line(papers['cast'])}", ""]
    else:
        lines += ["Weights were requantized from MXFP4 by each projection's largest magnitude.", ""]
    lines += ["## Input scales", "", *_input_lines(papers)]
    lines += ["## Checking it", "", f"    sha256sum -c {SUMS}" if inputs.job.checksums else "    dsqjob verify .", ""]
    return "\n".join(lines)


def _input_lines(papers: Mapping[str, Any]) -> list[str]:
    amax = papers["amax"]
    if amax is None:
        return ["Every `input_scale` is 1: nothing was calibrated.", ""]
    lines = [f"Calibrated; amax digest `{amax['digest']}`."]
    lines += [f"{name}: {value}" for name, value in sorted(amax["about"].items())]
    names = amax["fallback_inputs"]
    lines.append(
        f"{len(names)} projections saw no token and take the largest input amax of their kind"
        + (f", such as `{names[0]}`; all are listed in `dsqjob.json`." if names else ".")
    )
    return ["\n\n".join(lines), ""]


def _front_matter(release: Release) -> Mapping[str, Any]:
    """YAML front matter of the release's README, empty where there is none to read."""
    path = release.root / "README.md"
    text = path.read_text(errors="replace") if path.is_file() else ""
    if not text.startswith(_FRONT):
        return {}
    try:
        front = yaml.safe_load(text[len(_FRONT) :].partition("\n---")[0])
    except yaml.YAMLError:
        return {}
    return front if isinstance(front, dict) else {}


def _revision(release: Release) -> str | None:
    """The commit that the Hub's downloader noted, if it did."""
    path = release.root / _HUB_METADATA
    lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
    return lines[0].strip() if lines else None


def recorded_files(workspace: Workspace) -> tuple[Output, ...]:
    """What finalize recorded, if it ran in this workspace."""
    path = workspace.records("finalize") / "checkpoint.json"
    return Record.from_json(read_state(path)).outputs if path.is_file() else ()
