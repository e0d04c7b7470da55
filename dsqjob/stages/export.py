"""export: release + amax -> the shards of the NVFP4 checkpoint, each under its own name."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import cached_property

from dsqjob.checkpoint.header import Entry
from dsqjob.dataplan.file_sink import pour_file
from dsqjob.dataplan.projections import TensorScales
from dsqjob.dataplan.sources import Sources
from dsqjob.engine.fingerprint import Fingerprint, digest_of
from dsqjob.engine.stage import Context, Done, Output, PooledStage, Unit
from dsqjob.errors import DataError
from dsqjob.stages.inputs import FORMAT_VERSION, Inputs
from dsqjob.stages.provenance import recorded_files

_ENOUGH = 3
"""Files of recorded size that make a folder ours: one might be a coincidence, all would forbid mending."""
_SAMPLE = 8
"""Projections whose recorded weight amax are compared before anything is written; verify compares all."""


class Export(PooledStage):
    """Units: the release's shards. A shard's plan is laid out when its turn comes."""

    name = "export"
    owner = "export"

    def __init__(self, inputs: Inputs) -> None:
        self._inputs = inputs
        self.folder = inputs.job.export.output
        release = inputs.release
        grown: defaultdict[str, int] = defaultdict(int)
        self.projections = 0
        for target in inputs.targets():
            self.projections += 1
            scale = release.entry(f"{target.path}.scale")
            grown[target.shard] += target.out_features * target.in_features // 16 + 8
            grown[release.index[scale.name]] -= scale.nbytes
        units = []
        for shard, header in release.shards.items():
            size = sum(map(Entry.nbytes.fget, header.tensors.values()))  # type: ignore[attr-defined]
            units.append(Unit(shard, (shard,), size, size + grown[shard]))
        self.units = units
        self.total_bytes = sum(unit.bytes_out for unit in units)

    @cached_property
    def fingerprint(self) -> Fingerprint:
        return Fingerprint(
            {
                **self._inputs.release_parts(),
                "export.amax": self._inputs.amax_digest,
                "export.weights": self._inputs.route,
                "export.allow_uncalibrated": digest_of(sorted(self._inputs.job.export.allow_uncalibrated)),
                "checksums": str(self._inputs.job.checksums),
                "format": FORMAT_VERSION,
            }
        )

    def check(self) -> None:
        """DataError ``amax-other-weights`` where a recorded weight amax is not that of the weight."""
        inputs, ledger = self._inputs, self._inputs.ledger
        recorded = {} if ledger is None else {path: row.weight_amax for path, row in ledger.rows.items()}
        paths = sorted(path for path, value in recorded.items() if value and f"{path}.weight" in inputs.release.index)
        # one step on each time, so that all kinds are among them
        sample = {paths[(n * len(paths) // _SAMPLE + n) % len(paths)] for n in range(_SAMPLE) if paths}
        with Sources(inputs.release.root) as sources:
            for path in sorted(sample):
                found = TensorScales(sources).largest(inputs.family.projection(inputs.release, path))
                if found != recorded[path]:
                    raise DataError(
                        "amax-other-weights",
                        f"the largest weight of {path} is {found}, calibration recorded {recorded[path]}: it saw other "
                        "weights",
                        where=inputs.job.export.amax,
                        way_out="calibrate this release, or point export.amax at its amax",
                    )

    def do(self, unit: Unit, context: Context) -> Done:
        inputs = self._inputs
        plan = inputs.family.export_file(inputs.release, unit.id, inputs.route, inputs.settled)
        with Sources(inputs.release.root) as sources:
            path = self.folder / unit.id
            poured = pour_file(plan, path, sources, context, checksum=inputs.job.checksums)
        output = Output(unit.id, poured.nbytes, poured.sha256)
        return Done((output,), {"blocks": poured.blocks, "lossless": poured.lossless})

    def describe(self) -> Sequence[str]:
        grown = sum(unit.bytes_out - unit.bytes_in for unit in self.units)
        return [
            f"{self.projections} expert projections become NVFP4 by {self._inputs.route}",
            f"tensors take {self.total_bytes:,} bytes, {grown:+,}: a scale per 16 elements instead of one per 32",
            f"input scales: {self._input_scales()}",
        ]

    def _input_scales(self) -> str:
        if self._inputs.awaits_calibration:
            return "from the calibration that comes first"
        settled = self._inputs.settled
        if settled is None:
            return "1 everywhere (no calibration)"
        fallback = sum(value.fallback for value in settled.values())
        return f"from {self._inputs.job.export.amax}, {fallback} of {len(settled)} projections by fallback"

    def owned_before(self) -> bool:
        """Several of the files that our finalize recorded are there."""
        known = recorded_files(self._inputs.workspace)
        files = ((self.folder / output.path, output.bytes) for output in known)
        return sum(path.is_file() and path.stat().st_size == size for path, size in files) >= _ENOUGH


def build(inputs: Inputs) -> Export:
    return Export(inputs)
