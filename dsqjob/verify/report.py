"""What verification says in the end: for machines and for people."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsqjob.verify.facts import Facts
from dsqjob.verify.findings import Finding, ShardReport, failures
from dsqjob.verify.folder import FolderReport
from dsqjob.verify.servers import CONDITIONS, LOADS, Verdict

_SHOWN = 100
_WITHOUT_RELEASE = ("A1", "A2", "A3", "A5", "A6")
_MARK = {"F": "fails to load", "S": "silently wrong", "W": "warning"}


@dataclass(frozen=True)
class Report:
    """All findings and verdicts. ``compared`` says whether the release was at hand to compare with."""

    checkpoint: str
    compared: bool
    shards: int
    tensors: int
    nbytes: int
    blocks: int
    lossless: int
    findings: tuple[Finding, ...]
    verdicts: tuple[Verdict, ...]
    required: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """No finding fails, and every required server loads the checkpoint and serves it right."""
        good = {verdict.server for verdict in self.verdicts if verdict.outcome == LOADS}
        return not failures(self.findings) and good.issuperset(self.required)

    def to_json(self) -> dict[str, Any]:
        return {
            "passed": self.passed,
            "checkpoint": self.checkpoint,
            "compared_with_release": self.compared,
            "shards": self.shards,
            "tensors": self.tensors,
            "bytes": self.nbytes,
            "blocks": self.blocks,
            "lossless": self.lossless,
            "findings": [finding._asdict() for finding in self.findings],
            "servers": [
                {**verdict._asdict(), "broken": [one._asdict() for one in verdict.broken]} for verdict in self.verdicts
            ],
            "required_servers": list(self.required),
        }


def conclude(
    checkpoint: Path,
    reports: Sequence[ShardReport],
    folder: FolderReport,
    facts: Facts,
    verdicts: Sequence[Verdict],
    *,
    required: Iterable[str] = (),
) -> Report:
    """Merge everything. Without a release the conditions that any server has on tensors count as findings."""
    compared = facts.release_config is not None
    findings = [*folder.findings, *(finding for report in reports for finding in report.findings)]
    if not compared:
        findings += _structural(facts)
    order = {"fail": 0, "warn": 1}
    findings.sort(key=lambda finding: (order[finding.severity], finding.file, finding.tensor, finding.id))
    return Report(
        str(checkpoint),
        compared,
        len(reports),
        sum(report.tensors for report in reports),
        sum(report.nbytes for report in reports),
        sum(report.blocks for report in reports),
        sum(report.lossless for report in reports),
        tuple(findings),
        tuple(verdicts),
        tuple(required),
    )


def _structural(facts: Facts) -> Iterator[Finding]:
    for condition in CONDITIONS:
        if condition.id in _WITHOUT_RELEASE:
            for problem in condition.check(facts):
                yield Finding(f"condition-{condition.id}", "fail", problem.what, ".")


def write_report(report: Report, folder: Path) -> tuple[Path, Path]:
    """Write ``report.json`` and ``report.md`` into ``folder``; their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(report.to_json(), indent=2, ensure_ascii=False) + "\n"
    return _replace(folder / "report.json", text), _replace(folder / "report.md", markdown(report))


def _replace(path: Path, text: str) -> Path:
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    return partial.replace(path)


def markdown(report: Report) -> str:
    """The report as a page."""
    lines = [
        f"# Verification: {'passed' if report.passed else 'FAILED'}",
        "",
        f"- checkpoint: `{report.checkpoint}`",
        f"- {report.shards} shards, {report.tensors} tensors, {report.nbytes:,} bytes",
        f"- {_compared(report)}",
    ]
    if report.blocks:
        percent = 100 * report.lossless / report.blocks
        lines.append(f"- lossless MXFP4 blocks: {report.lossless} of {report.blocks} ({percent:.4f}%)")
    return "\n".join([*lines, "", *_finding_lines(report), *_server_lines(report)]) + "\n"


def _compared(report: Report) -> str:
    if report.compared:
        return "every tensor recomputed from, or compared with, the release"
    return "without the release: checksums, headers, papers and scales only"


def _finding_lines(report: Report) -> Iterator[str]:
    failed = len(failures(report.findings))
    yield f"## Findings: {failed} failed, {len(report.findings) - failed} warnings"
    yield ""
    for finding in report.findings[:_SHOWN]:
        place = f"`{finding.file}`" + (f" `{finding.tensor}`" if finding.tensor else "")
        yield f"- **{finding.severity}** {place}: {finding.what} ({finding.id})"
    if len(report.findings) > _SHOWN:
        yield f"- and {len(report.findings) - _SHOWN} more in report.json"
    yield "Nothing was found." if not report.findings else ""
    yield ""


def _server_lines(report: Report) -> Iterator[str]:
    for verdict in report.verdicts:
        yield f"## {verdict.server}: {verdict.outcome}"
        yield ""
        yield f"- needs {verdict.needs}"
        yield f"- draft layers: {verdict.drafts}"
        for one in verdict.broken:
            yield f"- **{one.id}** ({_MARK[one.severity]}): {one.what}"
        yield ""
