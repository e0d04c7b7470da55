"""What the servers' conditions look at, gathered from headers, papers and the shards' reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from dsqjob.checkpoint.release import Release
from dsqjob.verify.findings import ScaleFacts, ShardReport
from dsqjob.verify.folder import FolderReport, Shards
from dsqjob.verify.settled import PROJECTION


class Stored(NamedTuple):
    """A tensor as a header describes it."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Facts:
    """A checkpoint as a server meets it. Papers that cannot be read are empty.

    ``release_config`` is the release's config.json where the release is at hand. ``tensors`` are those of all
    readable shards, ``projections`` the scales by projection path, ``files`` relative paths.
    """

    config: Mapping[str, Any]
    hf_quant_config: Mapping[str, Any] | None
    release_config: Mapping[str, Any] | None
    tensors: Mapping[str, Stored]
    projections: Mapping[str, ScaleFacts]
    files: frozenset[str]
    index_problems: tuple[str, ...]

    @property
    def quantization(self) -> Mapping[str, Any]:
        """The inline ``quantization_config``, empty where there is none."""
        value = self.config.get("quantization_config")
        return value if isinstance(value, dict) else {}

    def number(self, key: str) -> int | None:
        """A positive integer of config.json."""
        value = self.config.get(key)
        return value if type(value) is int and value > 0 else None

    def paths(self) -> list[str]:
        """Every projection that the config calls for, or, where it does not say, that has a tensor."""
        layers, experts = self.number("num_hidden_layers"), self.number("n_routed_experts")
        if layers is None or experts is None:
            return sorted(path for path in self.stored_paths())
        return [
            f"layers.{layer}.ffn.experts.{expert}.{kind}"
            for layer in range(layers)
            for expert in range(experts)
            for kind in ("w1", "w2", "w3")
        ]

    def stored_paths(self) -> set[str]:
        """Projections of main layers that have at least one tensor."""
        paths = {name.rpartition(".")[0] for name in self.tensors if ".ffn.experts." in name}
        return {path for path in paths if PROJECTION.fullmatch(path)}


def gather_facts(
    folder: FolderReport, shards: Shards, reports: Sequence[ShardReport], release: Release | None
) -> Facts:
    """Facts of a checkpoint whose shards and folder were checked."""
    tensors = {
        entry.name: Stored(entry.dtype, entry.shape)
        for header in shards.headers.values()
        for entry in header.tensors.values()
    }
    projections: dict[str, ScaleFacts] = {}
    for report in reports:
        for path, facts in report.projections.items():
            projections[path] = _joined(projections[path], facts) if path in projections else facts
    return Facts(
        folder.papers.config or {},
        folder.papers.hf_quant_config,
        release.config if release is not None else None,
        tensors,
        projections,
        folder.files,
        folder.index_problems,
    )


def _joined(one: ScaleFacts, other: ScaleFacts) -> ScaleFacts:
    """Facts of a projection whose tensors lie in two shards."""
    return ScaleFacts(
        one.weight_scale_2 if one.weight_scale_2 is not None else other.weight_scale_2,
        one.input_scale if one.input_scale is not None else other.input_scale,
        one.nan + other.nan,
        one.negative + other.negative,
        one.zero + other.zero,
    )
