"""convert: release -> model-parallel checkpoint, one file a rank."""

from __future__ import annotations

from functools import cached_property

from dsqjob.dataplan.file_sink import pour_file
from dsqjob.dataplan.plan import FilePlan
from dsqjob.dataplan.sources import Sources
from dsqjob.engine.fingerprint import Fingerprint
from dsqjob.engine.publish import publish_bytes
from dsqjob.engine.stage import Context, Done, Output, PooledStage, Unit
from dsqjob.stages.inputs import FORMAT_VERSION, Inputs

_TOKENIZER = "tokenizer"


class Convert(PooledStage):
    """Units: the file of each rank, and the tokenizer."""

    name = "convert"
    owner = "convert"

    def __init__(self, inputs: Inputs) -> None:
        self._inputs = inputs
        self.folder = inputs.job.convert.output
        self._n = inputs.job.parallel.model_parallel
        release, family = inputs.release, inputs.family
        family.check_model_parallel(release, self._n)
        self._plans: dict[str, FilePlan] = {}
        units = []
        for rank in range(self._n):
            plan = family.mp_file(release, rank, self._n)
            self._plans[plan.name] = plan
            units.append(Unit(plan.name, (plan.name,), plan.bytes_in(), plan.tensor_bytes()))
        self._side_files = tuple(family.mp_side_files(release))
        if self._side_files:
            size = sum((release.root / name).stat().st_size for name in self._side_files)
            units.append(Unit(_TOKENIZER, self._side_files, size, size))
        self.units = units

    @cached_property
    def fingerprint(self) -> Fingerprint:
        return Fingerprint(
            {
                **self._inputs.release_parts(),
                "parallel.model_parallel": str(self._n),
                "checksums": str(self._inputs.job.checksums),
                "format": FORMAT_VERSION,
            }
        )

    def do(self, unit: Unit, context: Context) -> Done:
        root, checksum = self._inputs.release.root, self._inputs.job.checksums
        if unit.id == _TOKENIZER:
            outputs = []
            for name in self._side_files:
                data = (root / name).read_bytes()
                publish_bytes(self.folder / name, data, context.token)
                outputs.append(Output(name, len(data)))
            return Done(tuple(outputs))
        with Sources(root) as sources:
            poured = pour_file(self._plans[unit.id], self.folder / unit.id, sources, context, checksum=checksum)
        return Done((Output(unit.id, poured.nbytes, poured.sha256),))


def build(inputs: Inputs) -> Convert:
    return Convert(inputs)
