"""``dsqjob verify``: a job's checkpoint against its inputs, or a folder by its own papers."""

from __future__ import annotations

from pathlib import Path

import click

from dsqjob.cli.view import Progress, launching
from dsqjob.engine.stage import StageState
from dsqjob.errors import DataError
from dsqjob.job.schema import Job
from dsqjob.pipeline import Command, WorkersFailed, restart, run_stage
from dsqjob.stages.inputs import Inputs
from dsqjob.stages.verify import Verify
from dsqjob.verify.facts import gather_facts
from dsqjob.verify.findings import failures
from dsqjob.verify.folder import check_folder, read_shards
from dsqjob.verify.report import Report, conclude, markdown, write_report
from dsqjob.verify.servers import SERVERS, judge
from dsqjob.verify.shard import check_shard

_CHUNK = 32 << 20


def verify_job(job: Job, name: str, sets: tuple[str, ...], server: str | None, tensor_parallel: int | None) -> None:
    """Read everything again and print the report's page; DataError ``verification-failed``."""
    inputs = Inputs(job)
    restart(inputs, ("verify",))
    try:
        with launching(inputs.workspace) as stop, Progress("verify", inputs) as progress:
            run_stage(inputs, "verify", Command(name, sets), stop=stop, watch=progress)
    except WorkersFailed as error:
        if error.exit_code != DataError.exit_code:
            raise
    stage = Verify(inputs)
    state = StageState(inputs.workspace, stage)
    records = [record for unit in stage.units if (record := state.record(unit)) is not None]
    if len(records) < len(stage.units):
        raise DataError(
            "verification-unfinished",
            "a shard could not be read to its end",
            where=inputs.workspace.logs,
            way_out="see the workers' logs",
        )
    report = stage.report(records, (server,) if server else SERVERS, tensor_parallel)
    _, page = write_report(report, stage.folder)
    _conclude(report, str(page))


def verify_folder(folder: Path, server: str | None, tensor_parallel: int | None) -> None:
    """What the folder's own papers allow, without release and workspace."""
    shards = read_shards(folder)
    reports = []
    for name, header in shards.headers.items():
        reports.append(check_shard(folder / name, header, None, None, chunk_bytes=_CHUNK, tick=lambda _: None))
    found = check_folder(folder, None, None, shards, reports, tick=lambda _: None)
    facts = gather_facts(found, shards, reports, None)
    servers = (server,) if server else SERVERS
    verdicts = [judge(facts, one, tensor_parallel) for one in servers]
    required = servers if server else ()
    _conclude(conclude(folder, reports, found, facts, verdicts, required=required), str(folder))


def _conclude(report: Report, where: str) -> None:
    click.echo(markdown(report))
    if not report.passed:
        raise DataError(
            "verification-failed",
            f"{len(failures(report.findings))} findings fail; servers: "
            + ", ".join(f"{verdict.server} {verdict.outcome}" for verdict in report.verdicts),
            where=where,
            way_out="the page above lists them; export again what is damaged",
        )
