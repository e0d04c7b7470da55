"""verify: every shard recomputed by independent formulas; then papers, side files and what servers demand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, cast

from dsqjob.engine.fingerprint import Fingerprint, digest_of
from dsqjob.engine.stage import Context, Done, PooledStage, Record, StageState, Unit
from dsqjob.errors import DataError, UsageError
from dsqjob.stages.inputs import FORMAT_VERSION, Inputs
from dsqjob.stages.provenance import PROVENANCE, json_text, model_card, provenance
from dsqjob.verify.facts import gather_facts
from dsqjob.verify.findings import Finding, ShardReport, failures
from dsqjob.verify.folder import check_folder, read_shards
from dsqjob.verify.report import Report, conclude, write_report
from dsqjob.verify.servers import SERVERS, judge
from dsqjob.verify.settled import Expected, settle
from dsqjob.verify.shard import check_shard, routed_projections


class Verify(PooledStage):
    """Units: the checkpoint's shards. Beginning again costs reading only, so a changed checkpoint is simply read
    again."""

    name = "verify"
    disposable = True

    def __init__(self, inputs: Inputs) -> None:
        self._inputs = inputs
        self.checkpoint = inputs.job.export.output
        self.folder = inputs.workspace.reports
        self._shards = read_shards(self.checkpoint)
        self.units = [Unit(name, (), header.file_size, 0) for name, header in self._shards.headers.items()]

    @cached_property
    def fingerprint(self) -> Fingerprint:
        return Fingerprint(
            {
                **self._inputs.release_parts(),
                "checkpoint": digest_of(self._files()),
                "export.amax": self._inputs.amax_digest,
                "export.weights": self._inputs.route,
                "format": FORMAT_VERSION,
            }
        )

    def check(self) -> None:
        if not self.checkpoint.is_dir():
            raise UsageError(
                "checkpoint-missing",
                "there is no checkpoint yet",
                where=self.checkpoint,
                way_out="export first: dsqjob run JOB --stage export --through finalize",
            )

    def do(self, unit: Unit, context: Context) -> Done:
        report = check_shard(
            self.checkpoint / unit.id,
            self._shards.headers[unit.id],
            self._inputs.release,
            self._expected(),
            chunk_bytes=context.chunk_bytes,
            tick=context.tick,
        )
        return Done((), report.to_json())

    def settle(self) -> None:
        """Write the report. DataError ``verification-failed``."""
        state = StageState(self._inputs.workspace, self)
        records = [record for unit in self.units if (record := state.record(unit)) is not None]
        report = self.report(records)
        _, page = write_report(report, self.folder)
        if not report.passed:
            worst = failures(report.findings)
            raise DataError(
                "verification-failed",
                f"{len(worst)} findings, the first: {worst[0]}",
                where=page,
                way_out="the report lists all; export again what is damaged",
            )

    def report(
        self, records: Sequence[Record], servers: Sequence[str] = SERVERS, tensor_parallel: int | None = None
    ) -> Report:
        """Everything that was found. A single server that is asked for must load the checkpoint."""
        inputs = self._inputs
        reports = [ShardReport.from_json(cast(dict[str, Any], record.counts)) for record in records]
        folder = check_folder(
            self.checkpoint, inputs.release, self._expected(), self._shards, reports, tick=lambda _: None
        )
        folder = replace(folder, findings=(*folder.findings, *self._papers(reports)))
        facts = gather_facts(folder, self._shards, reports, inputs.release)
        verdicts = [judge(facts, server, tensor_parallel) for server in servers]
        required = servers if len(servers) == 1 else ()
        return conclude(self.checkpoint, reports, folder, facts, verdicts, required=required)

    def _papers(self, reports: Sequence[ShardReport]) -> Iterator[Finding]:
        """Provenance and model card are what this job's inputs give."""
        totals = {"blocks": sum(one.blocks for one in reports), "lossless": sum(one.lossless for one in reports)}
        papers = provenance(self._inputs, totals)
        written = ((PROVENANCE, json_text(papers)), ("README.md", model_card(self._inputs, papers).encode()))
        for name, should in written:
            path = self.checkpoint / name
            if path.is_file() and path.read_bytes() != should:
                yield Finding("paper-differs", "fail", "is not what these inputs and settings give", name)

    def summary(self, records: Sequence[Record]) -> Sequence[str]:
        report = self.report(records)
        lines = [f"{'passed' if report.passed else 'FAILED'}: {report.tensors} tensors, {report.nbytes:,} bytes"]
        return lines + [f"{verdict.server}: {verdict.outcome}" for verdict in report.verdicts]

    def _expected(self) -> Expected:
        inputs = self._inputs
        route = cast(Any, inputs.route)
        if inputs.ledger is None:
            return Expected(route, "one")
        rows = {path: (row.input_amax, row.weight_amax) for path, row in inputs.ledger.rows.items()}
        weight, measured = settle(rows, routed_projections(inputs.release))
        recorded = {path: value for path, (_, value) in rows.items() if value is not None}
        return Expected(route, "calibrated", weight, measured, recorded)

    def _files(self) -> dict[str, list[int]]:
        paths = sorted(path for path in self.checkpoint.rglob("*") if path.is_file())
        return {str(path.relative_to(self.checkpoint)): [(s := path.stat()).st_size, s.st_mtime_ns] for path in paths}


def build(inputs: Inputs) -> Verify:
    return Verify(inputs)
