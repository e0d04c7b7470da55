"""A checkpoint folder as a whole: index, configs, side files, checksums, leftovers."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsqjob.checkpoint.header import Header, read_header
from dsqjob.checkpoint.release import Release
from dsqjob.errors import DataError
from dsqjob.verify.configs import check_configs
from dsqjob.verify.findings import Finding, Severity, ShardReport
from dsqjob.verify.papers import CONFIG, HF_QUANT_CONFIG, INDEX, PROVENANCE, Papers, read_object
from dsqjob.verify.reading import Tick
from dsqjob.verify.settled import Expected

SUMS = "SHA256SUMS"
README = "README.md"
OWNER = ".dsqjob-owner"
_WRITTEN = frozenset({CONFIG, HF_QUANT_CONFIG, README, PROVENANCE, SUMS, INDEX, OWNER})
_IGNORED_FOLDERS = frozenset({".cache", ".git", "__pycache__"})
_SUM_LINE = re.compile(r"([0-9a-f]{64})  ([^\n]+)")
_PIECE = 4 << 20
_PARTIAL = ".partial-"


@dataclass(frozen=True)
class Shards:
    """The readable headers by shard name, and a finding for each file that is none."""

    headers: Mapping[str, Header]
    findings: tuple[Finding, ...]


@dataclass(frozen=True)
class FolderReport:
    """What the folder's papers say, and all findings outside of shards. A paper that cannot be read is None."""

    findings: tuple[Finding, ...]
    papers: Papers
    files: frozenset[str]
    index_problems: tuple[str, ...] = field(default=())


def read_shards(checkpoint: Path) -> Shards:
    """The header of every ``*.safetensors`` in the folder; a broken one is a finding, the others are still read."""
    headers, findings = {}, []
    for path in sorted(checkpoint.glob("*.safetensors")):
        if not path.is_file():
            findings.append(Finding("not-a-file", "fail", "is no regular file", path.name))
            continue
        try:
            headers[path.name] = read_header(path)
        except DataError as error:
            tensor = error.where.removeprefix(f"{path}").removeprefix(": ")
            findings.append(Finding(error.id, "fail", error.what, path.name, tensor))
    return Shards(headers, tuple(findings))


def check_folder(
    checkpoint: Path,
    release: Release | None,
    expected: Expected | None,
    shards: Shards,
    reports: Sequence[ShardReport],
    *,
    tick: Tick,
) -> FolderReport:
    """Check everything outside of the shards' data; ``reports`` are of all readable shards.

    Files other than shards are read and hashed here; the shards' hashes come from their reports. ``tick`` is told
    the bytes read and may raise to stop.
    """
    files = frozenset(_walk(checkpoint, frozenset()))
    papers, findings = Papers.read(checkpoint, files)
    findings += shards.findings
    findings += _leftovers(files)
    index_findings = list(_check_index(papers.index, shards, files)) if papers.index is not None else []
    findings += index_findings
    findings += check_configs(papers, release)
    if README not in files:
        findings.append(_fail("file-missing", "there is no model card", README))
    if release is not None:
        absent = sorted(name for name in release.shards if name not in files)
        findings += [_fail("shard-missing", "the release has a shard of this name", name) for name in absent]
        findings += _check_side_files(checkpoint, release, files, tick)
    else:
        findings += _check_other_json(checkpoint, files)
    findings += _check_sums(checkpoint, files, reports, tick)
    findings += _check_provenance(papers, release, expected, reports)
    problems = tuple(f"{finding.tensor or finding.file}: {finding.what}" for finding in index_findings)
    return FolderReport(tuple(findings), papers, files, problems)


def _walk(root: Path, ignored: frozenset[str] = _IGNORED_FOLDERS) -> Iterator[str]:
    """Relative POSIX paths of all files and of linked folders; of a release, caches left out."""
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in ignored]
        for name in names + [name for name in folders if Path(folder, name).is_symlink()]:
            yield Path(folder, name).relative_to(root).as_posix()


def _leftovers(files: Iterable[str]) -> Iterator[Finding]:
    for name in sorted(files):
        base = name.rpartition("/")[2]
        if base == OWNER:
            yield _fail("unfinished", "a stage is still writing into this folder, or was stopped", name)
        elif _PARTIAL in base:
            yield _fail("leftover", "half a file that a stopped worker left", name)


def _check_index(index: Mapping[str, Any], shards: Shards, files: frozenset[str]) -> Iterator[Finding]:
    """Every disagreement between the index and the shards (servers' condition E1)."""
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        yield _fail("index-invalid", "weight_map must map tensor names to shard names", INDEX)
        return
    held: dict[str, str] = {}
    total = 0
    for shard, header in shards.headers.items():
        for entry in header.tensors.values():
            total += entry.nbytes
            if entry.name in held:
                yield _fail("tensor-duplicate", f"the tensor is also in {held[entry.name]}", shard, entry.name)
            elif weight_map.get(entry.name) is None:
                yield _fail("index-unnamed-tensor", "the index does not name it", shard, entry.name)
            elif weight_map[entry.name] != shard:
                what = f"the index puts it into {weight_map[entry.name]!r}"
                yield _fail("index-wrong-shard", what, shard, entry.name)
            held[entry.name] = shard
    for name, shard in weight_map.items():
        if "/" in shard or shard not in files or not shard.endswith(".safetensors"):
            yield _fail("index-missing-shard", f"the index puts it into {shard!r}, which is not there", INDEX, name)
        elif shard in shards.headers and name not in shards.headers[shard].tensors:
            yield _fail("index-missing-tensor", f"the index puts it into {shard}, which lacks it", INDEX, name)
    for shard in sorted(name for name in files if name.endswith(".safetensors") and "/" not in name):
        if shard not in weight_map.values():
            yield _fail("foreign-shard", "the index does not name this file", shard)
    metadata = index.get("metadata")
    stated = metadata.get("total_size") if isinstance(metadata, dict) else None
    if len(shards.headers) and not shards.findings and (type(stated) is not int or stated != total):
        yield _fail("index-total-size", f"metadata.total_size should be {total}, is {stated!r}", INDEX)


def _check_side_files(checkpoint: Path, release: Release, files: frozenset[str], tick: Tick) -> Iterator[Finding]:
    """Side files equal the release's byte for byte; nothing else was added."""
    wanted = {name for name in _walk(release.root) if _is_side_file(name)}
    for name in sorted(wanted):
        if not (release.root / name).is_file():
            continue
        if name not in files:
            yield _fail("file-missing", "the release has this file", name)
        else:
            first = _first_difference(checkpoint / name, release.root / name, tick)
            if first is not None:
                yield _fail("file-differs", f"differs from the release's from byte {first} on", name)
    for name in sorted(files - wanted - _WRITTEN):
        if not (name.endswith(".safetensors") and "/" not in name) and _PARTIAL not in name:
            yield _fail("file-extra", "neither the release's nor written by an export", name)


def _is_side_file(name: str) -> bool:
    base = name.rpartition("/")[2]
    if name in _WRITTEN or _PARTIAL in base or base.endswith(".incomplete"):
        return False
    return "/" in name or not base.endswith((".safetensors", ".safetensors.index.json"))


def _first_difference(ours: Path, theirs: Path, tick: Tick) -> int | None:
    """First byte at which two files differ; None where they are equal."""
    position = 0
    with ours.open("rb", buffering=0) as one, theirs.open("rb", buffering=0) as other:
        while True:
            a, b = one.read(_PIECE), other.read(_PIECE)
            if a != b:
                same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
                return position + same
            if not a:
                return None
            position += len(a)
            tick(len(a))


def _check_other_json(checkpoint: Path, files: frozenset[str]) -> Iterator[Finding]:
    for name in sorted(files - _WRITTEN):
        if name.endswith(".json") and _PARTIAL not in name:
            _, problem = read_object(checkpoint, name, severity="warn")
            if problem is not None and problem.id == "json-invalid":
                yield problem


def _check_sums(
    checkpoint: Path, files: frozenset[str], reports: Sequence[ShardReport], tick: Tick
) -> Iterator[Finding]:
    """SHA256SUMS covers exactly all files but itself, and every hash is right."""
    if SUMS not in files:
        what = "there are no checksums: a changed bit in the papers stays unseen"
        yield _fail("sums-missing", what, SUMS, severity="warn")
        return
    stated: dict[str, str] = {}
    for number, line in enumerate((checkpoint / SUMS).read_bytes().decode(errors="replace").splitlines(), 1):
        match = _SUM_LINE.fullmatch(line)
        if match is None:
            yield _fail("sums-invalid", f"line {number} is not a SHA-256, two spaces and a name: {line[:80]!r}", SUMS)
        elif match[2] in stated:
            yield _fail("sums-invalid", f"line {number}: {match[2]} stands twice", SUMS)
        else:
            stated[match[2]] = match[1]
    covered = {name for name in files if name not in (SUMS, OWNER) and _PARTIAL not in name}
    for name in sorted(covered - stated.keys()):
        yield _fail("sums-uncovered", "SHA256SUMS does not list this file", name)
    for name in sorted(stated.keys() - covered):
        yield _fail("sums-missing-file", f"SHA256SUMS lists {name}, which is not there", SUMS)
    known = {report.shard: report.sha256 for report in reports}
    for name in sorted(covered & stated.keys()):
        found = known.get(name) or _sha256(checkpoint / name, tick)
        if found != stated[name]:
            yield _fail("sha256-differs", f"SHA256SUMS says {stated[name]}, the file has {found}", name)


def _sha256(path: Path, tick: Tick) -> str:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
            tick(len(piece))
    return digest.hexdigest()


def _check_provenance(
    papers: Papers, release: Release | None, expected: Expected | None, reports: Sequence[ShardReport]
) -> Iterator[Finding]:
    """What dsqjob.json says of the release, the route and the count of lossless blocks."""
    said = papers.provenance
    if said is None:
        return
    wanted: dict[str, Any] = {}
    if release is not None:
        wanted |= {f"release.{name}": value for name, value in release.identity().items()}
    if expected is not None:
        wanted |= {"weights": expected.weights, "input_scale": expected.input_scale}
    if release is not None and expected is not None and expected.weights == "cast":
        wanted["cast.blocks"] = sum(report.blocks for report in reports)
        wanted["cast.lossless"] = sum(report.lossless for report in reports)
    for key, value in wanted.items():
        found: Any = said
        for part in key.split("."):
            found = found.get(part) if isinstance(found, dict) else None
        if found != value:
            yield _fail("provenance-differs", f"{key} should be {value!r}, is {found!r}", PROVENANCE)


def _fail(id: str, what: str, file: str, tensor: str = "", severity: Severity = "fail") -> Finding:
    return Finding(id, severity, what, file, tensor)
