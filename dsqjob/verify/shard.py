"""One shard of a checkpoint, tensor by tensor, against the release and what was measured."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from dsqjob.checkpoint.header import Header
from dsqjob.checkpoint.release import Release
from dsqjob.verify.findings import Finding, ScaleFacts, ShardReport
from dsqjob.verify.projection import ProjectionCheck
from dsqjob.verify.reading import FileHash, Readers, ShardFile, Tick, pieces
from dsqjob.verify.settled import PROJECTION, Expected

_OUTPUTS = ("weight", "weight_scale", "weight_scale_2", "input_scale")
_OUTPUT_SET = frozenset(_OUTPUTS)


class Layout(NamedTuple):
    """Dtype and shape of a tensor; ``path`` names the routed projection that it belongs to."""

    dtype: str
    shape: tuple[int, ...]
    path: str = ""


def check_shard(
    path: Path, header: Header, release: Release | None, expected: Expected | None, *, chunk_bytes: int, tick: Tick
) -> ShardReport:
    """Check the shard at ``path``, whose folder is the checkpoint.

    With ``release`` and ``expected`` every tensor is recomputed or compared byte for byte; without them the scales
    are only looked at. At most ``chunk_bytes`` of tensors are held at a time; ``tick`` is told the bytes of the shard
    after each piece (0 while only the release is read) and may raise to stop. Problems of the shard are findings;
    OSError and, where a file shrinks meanwhile, DataError are raised.
    """
    with FileHash(path, chunk_bytes) as file_hash, Readers(chunk_bytes, tick) as readers:
        check = _Check(readers.get(path, header), release, expected, readers)
        check.run()
        digest = file_hash.result(tick)
    return ShardReport(
        path.name,
        header.file_size,
        digest,
        len(header.tensors),
        tuple(check.findings),
        check.blocks,
        check.lossless,
        check.projections,
    )


class _Check:
    def __init__(
        self,
        shard: ShardFile,
        release: Release | None,
        expected: Expected | None,
        readers: Readers,
    ) -> None:
        self._shard, self._release, self._readers = shard, release, readers
        self._tick = readers.tick
        self._name = shard.path.name
        self._projection = ProjectionCheck(shard, release, expected, readers)
        self.findings: list[Finding] = []
        self.projections: dict[str, ScaleFacts] = {}
        self.blocks = self.lossless = 0

    def run(self) -> None:
        layouts = self._layouts()
        paths = dict.fromkeys(path for name in self._shard.header.tensors if (path := _projection(name)))
        for path in paths:
            done = self._projection.check(path)
            self.findings += done.findings
            self.projections[path] = done.facts
            self.blocks += done.blocks
            self.lossless += done.lossless
        for name in self._shard.header.tensors:
            layout = layouts.get(name)
            if layout is not None and not layout.path and self._release is not None:
                self._compare_bytes(name, self._release)
            elif not _projection(name):
                self._tick(self._shard.entry(name).nbytes)

    def _layouts(self) -> dict[str, Layout]:
        """The tensors that this shard should hold and holds as they should be; findings for all others."""
        release = self._release
        if release is None:
            return {}
        if self._name not in release.shards:
            self._fail("shard-extra", "the release has no shard of this name")
        wanted = dict(_layouts(release, self._name))
        tensors = self._shard.header.tensors
        self._compare_metadata(release)
        for name in wanted.keys() - tensors.keys():
            self._fail("tensor-missing", "the shard lacks this tensor", name)
        for name in tensors.keys() - wanted.keys():
            self._misplaced(name, release)
        kept = {}
        for name, layout in wanted.items():
            if name not in tensors:
                continue
            entry = tensors[name]
            if (entry.dtype, entry.shape) == (layout.dtype, layout.shape):
                kept[name] = layout
            else:
                should = f"should be {layout.dtype} {list(layout.shape)}"
                self._fail("tensor-layout", f"{should}, is {entry.dtype} {list(entry.shape)}", name)
        self.findings.sort(key=lambda finding: finding.tensor)
        return kept

    def _compare_metadata(self, release: Release) -> None:
        source = release.shards.get(self._name)
        if source is not None and (source.metadata or {}) != (self._shard.header.metadata or {}):
            self._fail("metadata", f"__metadata__ should be {source.metadata}, is {self._shard.header.metadata}")

    def _misplaced(self, name: str, release: Release) -> None:
        path = _projection(name)
        home = release.index.get(f"{path}.weight" if path else name)
        if home is None:
            self._fail("tensor-extra", "the release has no such tensor", name)
        elif path and name.removeprefix(f"{path}.") not in _OUTPUT_SET:
            self._fail("tensor-extra", "an NVFP4 projection has no such tensor", name)
        elif home != self._name:
            self._fail("tensor-misplaced", f"belongs into {home}", name)
        else:
            self._fail("tensor-extra", "should not be here", name)

    def _compare_bytes(self, name: str, release: Release) -> None:
        shard = release.index[name]
        source = self._readers.get(release.root / shard, release.shards[shard])
        wrong, first = 0, -1
        for begin, count in pieces(self._shard.entry(name).nbytes, self._readers.chunk_bytes // 3):
            ours, theirs = self._shard.read(name, begin, count), source.read(name, begin, count)
            differs = ours != theirs
            if differs.any():
                first = begin + int(differs.argmax()) if first < 0 else first
                wrong += int(differs.sum())
            self._tick(count)
        if wrong:
            self._fail("bytes-differ", f"{wrong} bytes differ from the release's, the first at {first}", name)

    def _fail(self, id: str, what: str, tensor: str = "") -> None:
        self.findings.append(Finding(id, "fail", what, self._name, tensor))


def _projection(name: str) -> str:
    """Path of the routed projection that a tensor belongs to, or nothing."""
    path = name.rpartition(".")[0]
    return path if ".ffn.experts." in path and PROJECTION.fullmatch(path) else ""


def _layouts(release: Release, shard: str) -> Iterator[tuple[str, Layout]]:
    """What the shard of this name should hold."""
    if shard not in release.shards:
        return
    for entry in release.shards[shard].tensors.values():
        path = _projection(entry.name)
        kind = entry.name.removeprefix(f"{path}.") if path else ""
        if kind == "weight":
            rows, half = entry.shape
            shapes = (("U8", (rows, half)), ("F8_E4M3", (rows, half // 8)), ("F32", ()), ("F32", ()))
            for output, (dtype, shape) in zip(_OUTPUTS, shapes, strict=True):
                yield f"{path}.{output}", Layout(dtype, shape, path)
        elif kind != "scale":
            yield entry.name, Layout(entry.dtype, entry.shape)


def routed_projections(release: Release) -> list[str]:
    """Every projection of the release that should have become NVFP4."""
    found = (name.removesuffix(".weight") for name in release.index if name.endswith(".weight"))
    return [path for path in found if PROJECTION.fullmatch(path)]
