"""What a calibration leaves: our ledger, the reference's files, coverage and convergence (1-formats, section 6)."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from dsqjob.amax.ledger import LEDGER, Ledger, Row, file_digest
from dsqjob.calibration.coverage import History, convergence, coverage
from dsqjob.calibration.snapshot import Snapshot
from dsqjob.engine.publish import json_bytes, publish_bytes
from dsqjob.engine.stage import Output
from dsqjob.stages.calibrate import rank_file

_LAYER_CONFIG = {"num_bits": [2, 1], "block_size": 16, "scale_bits": [4, 3]}


@dataclass(frozen=True)
class RankResult:
    """What one rank hands to rank 0. ``experts`` are names by layer; ``weight_amax`` FP32 [layers, experts, kinds]."""

    experts: list[list[str]]
    kinds: Sequence[str]
    snapshot: Snapshot
    weight_amax: NDArray[np.float32]
    quantizers: list[str]

    @property
    def containers(self) -> list[str]:
        """Name of each layer's list of experts."""
        return [layer[0].rpartition(".")[0] for layer in self.experts]


def leave(
    results: Sequence[RankResult], history: History, folder: Path, about: Mapping[str, str], token: str
) -> tuple[Output, ...]:
    """Publish every file into ``folder``, the ledger last; the same results give the same bytes."""
    files: dict[str, bytes] = {}
    for rank, result in enumerate(results):
        files[rank_file(rank, len(results))] = _tensors(result)
    names = sorted(f"{name}.{kind}" for one in results for layer in one.experts for name in layer for kind in one.kinds)
    manifest = {
        "quantization_format": "NVFP4_W4A4",
        "quantized_layers": names,
        "world_size": len(results),
        "layer_cfg": _LAYER_CONFIG,
    }
    files["quantized_layers_manifest.json"] = json.dumps(manifest, indent=2).encode()
    files[".quant_summary.txt"] = _summary([one.quantizers for one in results])
    files["coverage.json"] = json_bytes(coverage(history, results[0].containers))
    files["convergence.json"] = json_bytes(convergence(history))
    for name, data in files.items():
        publish_bytes(folder / name, data, token)
    ledger = Ledger({name: row for one in results for name, row in _rows(one)}, about)
    ledger.save(folder / LEDGER)
    return tuple(Output(name, (folder / name).stat().st_size, file_digest(folder / name)) for name in (*files, LEDGER))


def _rows(result: RankResult) -> list[tuple[str, Row]]:
    rows = []
    for layer, names in enumerate(result.experts):
        for expert, name in enumerate(names):
            tokens = int(result.snapshot.tokens[layer, expert])
            for kind, suffix in enumerate(result.kinds):
                x = float(result.snapshot.input_amax[layer, expert, kind])
                w = float(result.weight_amax[layer, expert, kind])
                rows.append((f"{name}.{suffix}", Row(x or None, w or None, tokens)))
    return rows


def _tensors(result: RankResult) -> bytes:
    """The reference's dictionary: both amax of every projection that saw a token, 0-d BF16."""
    values: dict[str, torch.Tensor] = {}
    for name, row in _rows(result):
        if row.input_amax is not None:
            for what, value in (("input", row.input_amax), ("weight", row.weight_amax)):
                values[f"{name}_{what}_quantizer._amax"] = torch.tensor(value, dtype=torch.bfloat16, device="cpu")
    stream = io.BytesIO()
    torch.save(values, stream)
    return stream.getvalue()


def _summary(ranks: Sequence[Sequence[str]]) -> bytes:
    """ModelOpt's summary over all ranks: a quantizer that several ranks have stands once."""
    lines: dict[str, str] = {}
    for rank in ranks:
        for line in rank:
            lines.setdefault(line.split(maxsplit=1)[0], line)
    return "\n".join([*lines.values(), f"{len(lines)} TensorQuantizers found in model", ""]).encode()
