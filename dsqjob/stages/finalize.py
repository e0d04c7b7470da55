"""finalize: configs, side files, provenance, and last the index, which makes the folder a checkpoint."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path

from dsqjob.checkpoint.header import read_header
from dsqjob.checkpoint.release import CONFIG, INDEX, side_files
from dsqjob.engine.fingerprint import Fingerprint, digest_of
from dsqjob.engine.publish import publish_bytes, publishing, write_all
from dsqjob.engine.stage import Context, Done, Output, PooledStage, Record, StageState, Unit
from dsqjob.engine.workspace import OWNER
from dsqjob.errors import BugError, UsageError
from dsqjob.stages.export import Export
from dsqjob.stages.inputs import Inputs
from dsqjob.stages.provenance import PROVENANCE, SUMS, json_text, lossless_line, model_card, producer, provenance

_CARD = "README.md"
_PIECE = 8 << 20


class Finalize(PooledStage):
    """One unit. Everything is written in one order, the index at the end."""

    name = "finalize"
    owner = "export"

    def __init__(self, inputs: Inputs) -> None:
        self._inputs = inputs
        self._export = Export(inputs)
        self.folder = self._export.folder
        release = inputs.release
        self._configs = inputs.family.config_files(release, producer())
        written = {*self._configs, INDEX, _CARD, PROVENANCE, SUMS, OWNER, CONFIG}
        self._side_files = [name for name in side_files(release.root) if name not in written]
        sizes = {name: (release.root / name).stat().st_size for name in self._side_files}
        outputs = [*self._side_files, *self._configs, _CARD, PROVENANCE]
        outputs += [SUMS] if inputs.job.checksums else []
        size = sum(sizes.values())
        self.units = [Unit("checkpoint", (*outputs, INDEX), size, size)]

    @cached_property
    def fingerprint(self) -> Fingerprint:
        root = self._inputs.release.root
        card = root / _CARD
        return Fingerprint(
            {
                **{f"export: {name}": value for name, value in self._export.fingerprint.parts.items()},
                "side files": digest_of({name: _file_digest(root / name) for name in self._side_files}),
                "papers": digest_of(
                    [producer(), provenance(self._inputs, {}), _file_digest(card) if card.is_file() else ""]
                ),
            }
        )

    def check(self) -> None:
        self._export_records()

    def do(self, unit: Unit, context: Context) -> Done:  # noqa: ARG002 (there is one)
        records = self._export_records()
        self._sweep()
        outputs = [self._copy(name, context) for name in self._side_files]
        for name, data in self._written(records):
            outputs.append(self._publish(name, data, context))
        if self._inputs.job.checksums:
            sums = {output.path: output.sha256 for record in records for output in record.outputs}
            sums |= {output.path: output.sha256 for output in outputs}
            index = self._index()
            sums[INDEX] = hashlib.sha256(index).hexdigest()
            text = "".join(f"{sums[name]}  {name}\n" for name in sorted(sums))
            outputs.append(self._publish(SUMS, text.encode(), context))
        outputs.append(self._publish(INDEX, self._index(), context))
        return Done(tuple(outputs), totals_of(records))

    def settle(self) -> None:
        with suppress(FileNotFoundError):
            (self.folder / OWNER).unlink()

    def summary(self, records: Sequence[Record]) -> Sequence[str]:
        return [lossless_line(totals_of(records))] if self._inputs.route == "cast" else []

    def owned_before(self) -> bool:
        return self._export.owned_before()

    def _export_records(self) -> list[Record]:
        state = StageState(self._inputs.workspace, self._export)
        state.compare()
        records = [state.record(unit) for unit in self._export.units]
        missing = sum(record is None for record in records)
        if missing:
            raise UsageError(
                "export-unfinished",
                f"{missing} of {len(records)} shards are not exported yet",
                where=self.folder,
                way_out="run the export stage first: dsqjob run JOB --stage export",
            )
        return [record for record in records if record is not None]

    def _sweep(self) -> None:
        """Partials of dead workers, wherever they lie under the folder."""
        StageState(self._inputs.workspace, self._export).sweep_all()

    def _written(self, records: list[Record]) -> Iterator[tuple[str, bytes]]:
        papers = provenance(self._inputs, totals_of(records))
        for name, value in self._configs.items():
            yield name, json_text(value)
        yield _CARD, model_card(self._inputs, papers).encode()
        yield PROVENANCE, json_text(papers)

    def _index(self) -> bytes:
        """The index of the shards as they are, compared with what was planned."""
        weight_map, total = {}, 0
        for unit in self._export.units:
            header = read_header(self.folder / unit.id)
            for entry in header.tensors.values():
                weight_map[entry.name] = unit.id
                total += entry.nbytes
        if total != self._export.total_bytes:
            raise BugError(
                "total-size", f"{total} bytes of tensors, {self._export.total_bytes} planned", where=self.folder
            )
        ordered = dict(sorted(weight_map.items()))
        return json_text({"metadata": {"total_size": total}, "weight_map": ordered})

    def _copy(self, name: str, context: Context) -> Output:
        target = self.folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.parent.resolve().is_relative_to(self.folder.resolve()):
            raise UsageError(
                "output-foreign",
                "a folder of the checkpoint is a link to somewhere else",
                where=target.parent,
                way_out="remove the link",
            )
        digest, size = hashlib.sha256(), 0
        with (self._inputs.release.root / name).open("rb") as source, publishing(target, context.token) as fd:
            while piece := source.read(_PIECE):
                write_all(fd, piece, size)
                digest.update(piece)
                size += len(piece)
                context.tick(len(piece))
        return Output(name, size, digest.hexdigest())

    def _publish(self, name: str, data: bytes, context: Context) -> Output:
        context.tick(len(data))
        publish_bytes(self.folder / name, data, context.token)
        return Output(name, len(data), hashlib.sha256(data).hexdigest())


def totals_of(records: Sequence[Record]) -> dict[str, int]:
    """Source blocks and lossless ones, added up."""
    return {name: sum(int(record.counts.get(name, 0)) for record in records) for name in ("blocks", "lossless")}


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def build(inputs: Inputs) -> Finalize:
    return Finalize(inputs)
