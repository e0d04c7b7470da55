"""One routed projection: its four tensors, recomputed from the release."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dsqjob.checkpoint.release import Release
from dsqjob.verify.findings import Finding, ScaleFacts, bits_of, float_of
from dsqjob.verify.reading import Readers, ShardFile, row_ranges
from dsqjob.verify.settled import Expected, peers

if TYPE_CHECKING:
    from dsqjob.verify.plain import Mismatch

_DIVISOR = np.float32(2688.0)


class Checked(NamedTuple):
    findings: list[Finding]
    facts: ScaleFacts
    blocks: int = 0
    lossless: int = 0


class Source(NamedTuple):
    """An MXFP4 projection of the release: nibbles and E8M0 scales, wherever they lie."""

    nibbles: ShardFile
    scales: ShardFile
    path: str
    rows: int
    half: int

    def pieces(self, row_bytes: int, limit: int) -> Iterator[tuple[int, int]]:
        return row_ranges(self.rows, row_bytes, limit)


class ProjectionCheck:
    """Checks projections of one shard; what sharing projections have in common is computed once."""

    def __init__(
        self,
        shard: ShardFile,
        release: Release | None,
        expected: Expected | None,
        readers: Readers,
    ) -> None:
        self._shard, self._release, self._expected = shard, release, expected
        self._readers, self._chunk, self._tick = readers, readers.chunk_bytes, readers.tick
        self._exponents: dict[tuple[str, ...], int | None] = {}
        self._amaxes: dict[tuple[str, ...], float] = {}

    def check(self, path: str) -> Checked:
        """Findings and facts of the projection ``path``; missing and wrongly shaped tensors are left to others."""
        facts = ScaleFacts(self._scalar(f"{path}.weight_scale_2"), self._scalar(f"{path}.input_scale"))
        source, expected = self._source(path), self._expected
        if source is None or expected is None:
            done = self._look(path, facts)
            if expected is not None and self._release is not None and f"{path}.weight" in self._release.index:
                what = "the release's weight is not MXFP4 with its scale: nothing to compare with"
                done.findings.append(self._finding("source-unusable", what, f"{path}.weight"))
            return done
        scale_2 = self._tensor_scale(path)
        if scale_2 is None:
            what = "the release's E8M0 scales hold a NaN (255), or the weight amax gives no positive, finite scale"
            done = self._look(path, facts)
            done.findings.append(self._finding("source-unusable", what, f"{path}.weight"))
            return done
        if self._is_nvfp4(path) and self._shard.entry(f"{path}.weight").shape == (source.rows, source.half):
            done = self._recompute(path, source, expected, scale_2, facts)
        else:
            done = self._look(path, facts)._replace(findings=[])
        done.findings.extend(self._compare(f"{path}.weight_scale_2", scale_2, facts.weight_scale_2))
        done.findings.extend(self._check_input(path, expected, facts.input_scale))
        return done

    def _is_nvfp4(self, path: str) -> bool:
        tensors = self._shard.header.tensors
        weight, scale = tensors.get(f"{path}.weight"), tensors.get(f"{path}.weight_scale")
        if weight is None or scale is None or (weight.dtype, scale.dtype) != ("U8", "F8_E4M3"):
            return False
        if len(weight.shape) != 2 or 0 in weight.shape:
            return False
        return weight.shape[1] % 8 == 0 and scale.shape == (weight.shape[0], weight.shape[1] // 8)

    def _skip(self, path: str) -> None:
        for name in ("weight", "weight_scale"):
            entry = self._shard.header.tensors.get(f"{path}.{name}")
            self._tick(entry.nbytes if entry is not None else 0)

    def _scalar(self, name: str) -> int | None:
        entry = self._shard.header.tensors.get(name)
        if entry is None or entry.dtype != "F32" or entry.nbytes != 4:
            return None
        bits = int(self._shard.read(name, 0, 4).view("<u4")[0])
        self._tick(4)
        return bits

    def _source(self, path: str) -> Source | None:
        release = self._release
        if release is None:
            return None
        weight, scale = f"{path}.weight", f"{path}.scale"
        if weight not in release.index or scale not in release.index:
            return None
        entry, scales = release.entry(weight), release.entry(scale)
        if (entry.dtype, scales.dtype) != ("I8", "F8_E8M0") or len(entry.shape) != 2 or entry.shape[1] % 16:
            return None
        if scales.shape != (entry.shape[0], entry.shape[1] // 16):
            return None
        nibbles, e8m0 = self._release_file(release, weight), self._release_file(release, scale)
        return Source(nibbles, e8m0, path, entry.shape[0], entry.shape[1])

    def _release_file(self, release: Release, name: str) -> ShardFile:
        shard = release.index[name]
        return self._readers.get(release.root / shard, release.shards[shard])

    def _look(self, path: str, facts: ScaleFacts) -> Checked:
        """Without a source: scales that cannot be used."""
        if not self._is_nvfp4(path):
            self._skip(path)
            return Checked([], facts)
        from dsqjob.verify import plain

        rows, half = self._shard.entry(f"{path}.weight").shape
        counts = np.zeros(3, np.int64)
        for begin, count in row_ranges(rows, half + half // 8, self._chunk):
            nibbles, scales = self._ours(path, begin, count)
            counts += plain.sanity_of(nibbles, scales)
            self._tick(nibbles.size + scales.size)
        facts = facts._replace(nan=int(counts[0]), negative=int(counts[1]), zero=int(counts[2]))
        return Checked(list(self._unusable(path, facts)), facts)

    def _unusable(self, path: str, facts: ScaleFacts) -> Iterator[Finding]:
        for count, what in (
            (facts.nan, "block scales are NaN"),
            (facts.negative, "block scales have the sign bit set"),
            (facts.zero, "block scales are zero over values that are not"),
        ):
            if count:
                yield self._finding("scale-unusable", f"{count} {what}", f"{path}.weight_scale")
        for name, bits in (("weight_scale_2", facts.weight_scale_2), ("input_scale", facts.input_scale)):
            if bits is not None and not (math.isfinite(value := float_of(bits)) and value > 0):
                yield self._finding("scale-unusable", f"is {value!r}, not finite and positive", f"{path}.{name}")

    def _recompute(
        self, path: str, source: Source, expected: Expected, scale_2: np.float32, facts: ScaleFacts
    ) -> Checked:
        from dsqjob.verify import plain

        cast, k_max = self._is_cast(), self._exponent(path) or 0
        counts, lossless, largest = np.zeros(3, np.int64), 0, 0.0
        recorded = expected.recorded.get(path)
        worst: dict[str, tuple[int, Mismatch]] = {}
        for begin, count in source.pieces(2 * source.half + source.half // 16 + source.half // 8, self._chunk):
            theirs = source.nibbles.rows(f"{path}.weight", begin, count)
            e8m0 = source.scales.rows(f"{path}.scale", begin, count)
            nibbles, scales = self._ours(path, begin, count)
            if cast:
                done = plain.check_cast(theirs, e8m0, nibbles, scales, k_max)
            else:
                done = plain.check_requantize(theirs, e8m0, nibbles, scales, scale_2)
            lossless += done.lossless
            largest = max(largest, plain.amax_of(theirs, e8m0)) if recorded is not None else 0.0
            counts += plain.sanity_of(nibbles, scales)
            for name, found in (("weight_scale", done.scales), ("weight", done.nibbles)):
                if found is not None:
                    total, first = worst.get(name, (0, found._replace(row=found.row + begin)))
                    worst[name] = (total + found.wrong, first)
            self._tick(nibbles.size + scales.size)
        findings = [
            self._finding(f"{name.replace('_', '-')}-differs", _differs(name, *mismatch), f"{path}.{name}")
            for name, mismatch in worst.items()
        ]
        if recorded is not None and recorded != largest:
            what = f"the largest weight is {largest!r}, calibration recorded {recorded!r}: it saw other weights"
            findings.append(self._finding("amax-other-weights", what, f"{path}.weight"))
        facts = facts._replace(nan=int(counts[0]), negative=int(counts[1]), zero=int(counts[2]))
        return Checked(findings, facts, source.rows * source.half // 16 if cast else 0, lossless if cast else 0)

    def _check_input(self, path: str, expected: Expected, found: int | None) -> Iterator[Finding]:
        name = f"{path}.input_scale"
        if expected.input_scale == "one":
            yield from self._compare(name, np.float32(1.0), found)
        elif path in expected.input_amax:
            yield from self._compare(name, np.float32(expected.input_amax[path]) / _DIVISOR, found)
        else:
            what = "no input amax is known for it, nor for another projection of its kind"
            yield self._finding("amax-missing", what, name)

    def _compare(self, name: str, wanted: np.float32, found: int | None) -> Iterator[Finding]:
        if found is not None and found != bits_of(wanted):
            what = f"should be {float(wanted)!r}, is {float_of(found)!r}"
            yield self._finding(f"{name.rpartition('.')[2].replace('_', '-')}-differs", what, name)

    def _is_cast(self) -> bool:
        return self._expected is not None and self._expected.weights == "cast"

    def _tensor_scale(self, path: str) -> np.float32 | None:
        """``weight_scale_2`` as it should be; None where the source or its amax allows none."""
        k_max = self._exponent(path)
        if k_max is None or self._expected is None:
            return None
        if self._is_cast():
            return np.float32(math.ldexp(1.0, k_max - 8))
        amax = self._expected.weight_amax.get(path)
        value = np.float32(self._amax(path) if amax is None else amax) / _DIVISOR
        return value if np.isfinite(value) and value > 0 else None

    def _exponent(self, path: str) -> int | None:
        """Largest exponent over the sharing projections, 0 where every byte is 0; None where one is NaN (255)."""
        group = peers(path)
        if group not in self._exponents:
            largest = 0
            for source in filter(None, map(self._source, group)):
                for begin, count in source.pieces(source.half // 16, self._chunk):
                    largest = max(largest, int(source.scales.rows(f"{source.path}.scale", begin, count).max()))
                    self._tick(0)
            self._exponents[group] = None if largest == 255 else largest - 127 if largest else 0
        return self._exponents[group]

    def _amax(self, path: str) -> float:
        """max|w| over the sharing projections."""
        from dsqjob.verify import plain

        group = peers(path)
        if group not in self._amaxes:
            largest = 0.0
            for source in filter(None, map(self._source, group)):
                for begin, count in source.pieces(source.half + source.half // 16, self._chunk):
                    nibbles = source.nibbles.rows(f"{source.path}.weight", begin, count)
                    e8m0 = source.scales.rows(f"{source.path}.scale", begin, count)
                    largest = max(largest, plain.amax_of(nibbles, e8m0))
                    self._tick(0)
            self._amaxes[group] = largest
        return self._amaxes[group]

    def _ours(self, path: str, begin: int, count: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        return (
            self._shard.rows(f"{path}.weight", begin, count),
            self._shard.rows(f"{path}.weight_scale", begin, count),
        )

    def _finding(self, id: str, what: str, tensor: str) -> Finding:
        return Finding(id, "fail", what, self._shard.path.name, tensor)


def _differs(name: str, count: int, first: Mismatch) -> str:
    unit = "block scales" if name == "weight_scale" else "values"
    place = f"row {first.row}, {'block' if name == 'weight_scale' else 'column'} {first.column}"
    return f"{count} {unit} differ; the first, {place}, should be {first.expected:#x}, is {first.found:#x}"
