"""tokens: calibration texts -> token ids that a gang reads without network, tokenizer or torch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from dsqjob.amax.ledger import file_digest
from dsqjob.checkpoint.release import CONFIG, read_json
from dsqjob.engine.fingerprint import Fingerprint
from dsqjob.engine.publish import json_bytes, partial_path, publish_bytes
from dsqjob.engine.stage import Context, Done, Output, PooledStage, Record, Unit
from dsqjob.errors import DataError, UsageError
from dsqjob.job.schema import TokenSource
from dsqjob.stages.inputs import Inputs
from dsqjob.tokens.file import TOKENS, ids_digest, publish_tokens, read_rows
from dsqjob.tokens.gather import Gathered, Ids, refuse_outside
from dsqjob.tokens.hub import fetch
from dsqjob.tokens.samples import read_samples
from dsqjob.tokens.tokenizer import ReleaseTokenizer, release_chat, tokenizer_digest

SAMPLES = "samples.json"
_FORMAT = "1"
_ID_BYTES = 8
_IDS_PER_BYTE = 0.5


class Tokens(PooledStage):
    """One unit: ``tokens.safetensors`` and ``samples.json``, which says where every row comes from: row i is sample i,
    or, packed, ``rows`` lists the samples of each.

    Of the release it reads config and tokenizer only. UsageError ``sequence-too-long``, ``output-inside-release``;
    DataError ``config-missing``, ``config-field``.
    """

    name = "tokens"
    owner = "tokens"

    def __init__(self, inputs: Inputs) -> None:
        job = inputs.job
        self._settings, self._release, self._checksums = job.tokens, job.release, job.checksums
        self.folder = job.tokens.output
        self._vocabulary = self._limit("vocab_size")
        self._refuse_settings()
        read = sum(_size(source) for source in self._settings.data)
        written = sum(self._expected(source) for source in self._settings.data)
        self.units = [Unit(self.name, (SAMPLES, TOKENS), read, written)]

    def _limit(self, field: str) -> int:
        path = self._release / CONFIG
        value = read_json(path, "config-missing")[0].get(field)
        if not isinstance(value, int) or value < 1:
            raise DataError(
                "config-field", f"{field} is {value!r}, not a number", where=path, way_out="download this file again"
            )
        return value

    def _refuse_settings(self) -> None:
        limit, length = self._limit("max_position_embeddings"), self._settings.sequence_length
        if length > limit:
            raise UsageError(
                "sequence-too-long",
                f"tokens.sequence_length is {length}, max_position_embeddings of the model is {limit}",
                where="tokens.sequence_length",
                way_out=f"set it to {limit} at most",
            )
        if self.folder.resolve().is_relative_to(self._release.resolve()):
            raise UsageError(
                "output-inside-release",
                "release and output folder must lie apart",
                where=f"tokens.output: {self.folder}",
                way_out="choose an output folder outside the release",
            )

    def _expected(self, source: TokenSource) -> int:
        """Bytes of ids, roughly, which nobody knows before tokenizing."""
        bound = (source.samples or 0) * self._settings.sequence_length * _ID_BYTES
        if source.dataset is not None:
            return bound
        guess = _size(source) if source.tokens is not None else int(_size(source) * _IDS_PER_BYTE * _ID_BYTES)
        return max(_ID_BYTES, min(guess, bound or guess))

    @cached_property
    def fingerprint(self) -> Fingerprint:
        parts = {
            "tokenizer": tokenizer_digest(self._release),
            "vocabulary": str(self._vocabulary),
            "tokens.sequence_length": str(self._settings.sequence_length),
            "tokens.packing": str(self._settings.packing),
            "tokens.data": str(len(self._settings.data)),
            "checksums": str(self._checksums),
            "format": _FORMAT,
        }
        for number, source in enumerate(self._settings.data):
            what, samples = self._contents[number], source.samples or "all"
            parts[f"tokens.data[{number}]"] = f"{what} samples {samples}"
        return Fingerprint(parts)

    @cached_property
    def _contents(self) -> list[str]:
        """What each source is: a digest of its content, or a data set's name."""
        return [
            f"dataset {source.dataset}" if source.dataset is not None else f"{kind} {_digest(path)}"
            for source in self._settings.data
            for kind, path in [_file(source)]
        ]

    def check(self) -> None:
        """UsageError ``source-missing``, DataError ``tokenizer-missing``."""
        self.fingerprint  # noqa: B018

    def do(self, unit: Unit, context: Context) -> Done:  # noqa: ARG002
        """Tokenize all sources. What can be wrong with them is said by ``dsqjob.tokens``; here UsageError
        ``tokens-too-long`` for a token file that is wider than ``tokens.sequence_length``."""
        tokenizer = ReleaseTokenizer(self._release)
        gathered = Gathered(tokenizer, self._settings.sequence_length, packing=self._settings.packing)
        sources = []
        for number, source in enumerate(self._settings.data):
            taken = self._add(gathered, number, source, context)
            name = str(source.dataset or _file(source)[1])
            asked = source.samples
            sources.append({"source": name, "content": self._contents[number], "asked": asked, **taken})
        ids = gathered.joined()
        places = gathered.places(len(ids))
        refuse_outside(ids, self._vocabulary, lambda row: _place(gathered, sources, places[row]))
        counts: dict[str, Any] = {
            "n": ids.shape[0],
            "s": ids.shape[1],
            "digest": ids_digest(ids),
            "tokenizer": tokenizer.digest,
        }
        papers = {
            **counts,
            "options": self._settings.model_dump(include={"sequence_length", "packing"}),
            "sources": sources,
            "samples": [sample.to_json() for sample in gathered.samples],
        }
        if self._settings.packing:
            papers["rows"] = places
        context.tick(0)
        return self._publish(ids, json_bytes(papers), {**counts, "sources": sources}, context.token)

    def _publish(self, ids: Ids, papers: bytes, counts: dict[str, Any], token: str) -> Done:
        publish_bytes(self.folder / SAMPLES, papers, token)
        size, digest = publish_tokens(self.folder / TOKENS, ids, token)
        digests = (hashlib.sha256(papers).hexdigest(), digest) if self._checksums else (None, None)
        outputs = (Output(SAMPLES, len(papers), digests[0]), Output(TOKENS, size, digests[1]))
        return Done(outputs, counts)

    def _add(self, gathered: Gathered, number: int, source: TokenSource, context: Context) -> dict[str, int]:
        work = self._expected(source)
        if source.tokens is not None:
            counts = gathered.rows(number, self._rows(source.tokens))
            context.tick(work)
            return counts
        if source.jsonl is not None:
            return self._add_lines(gathered, number, source.jsonl, source.samples, work, context)
        aside = partial_path(self.folder / f"dataset-{number}.jsonl", context.token)
        try:
            fetch(str(source.dataset), source.samples or 0, self._release, aside, lambda: context.tick(0))
            return self._add_lines(gathered, number, aside, None, work, context)
        finally:
            with suppress(FileNotFoundError):
                aside.unlink()

    def _add_lines(
        self, gathered: Gathered, number: int, path: Path, samples: int | None, work: int, context: Context
    ) -> dict[str, int]:
        size, told = path.stat().st_size, 0

        def moved(end: int) -> None:
            nonlocal told
            now = work * end // max(1, size)
            context.tick(now - told)
            told = now

        counts = gathered.texts(number, read_samples(path, samples, release_chat(self._release)), moved)
        moved(size)
        return counts

    def _rows(self, path: Path) -> Ids:
        ids = read_rows(path)
        if ids.shape[1] > self._settings.sequence_length:
            raise UsageError(
                "tokens-too-long",
                f"rows of {ids.shape[1]} tokens, tokens.sequence_length is {self._settings.sequence_length}",
                where=path,
                way_out="raise tokens.sequence_length, or cut the rows yourself",
            )
        return ids

    def describe(self) -> Sequence[str]:
        shape = "packed rows of" if self._settings.packing else "a row a sample, at most"
        return [f"{shape} {self._settings.sequence_length} tokens", *map(_asked, self._settings.data)]

    def summary(self, records: Sequence[Record]) -> Sequence[str]:
        lines = []
        for record in records:
            counts = record.counts
            lines.append(f"{counts['n']:,} rows of {counts['s']:,} tokens, digest {counts['digest'][:12]}")
            for source in counts["sources"]:
                if source["asked"] is not None and source["taken"] < source["asked"]:
                    lines.append(f"{source['source']} gave {source['taken']} samples, {source['asked']} were asked for")
                if source["empty"]:
                    lines.append(f"{source['source']}: {source['empty']} empty samples left no row")
        return lines


def _file(source: TokenSource) -> tuple[str, Path]:
    return ("tokens", source.tokens) if source.tokens is not None else ("jsonl", source.jsonl or Path())


def _size(source: TokenSource) -> int:
    """Bytes of a source's file; 0 where there is none."""
    path = _file(source)[1]
    return path.stat().st_size if source.dataset is None and path.is_file() else 0


def _digest(path: Path) -> str:
    if not path.is_file():
        raise UsageError(
            "source-missing", "this source of tokens is no file", where=path, way_out="correct tokens.data in the job"
        )
    return file_digest(path)


def _place(gathered: Gathered, sources: Sequence[dict[str, Any]], samples: Sequence[int]) -> str:
    first = gathered.samples[samples[0]]
    return f"{sources[first.source]['source']}: row {first.number}"


def _asked(source: TokenSource) -> str:
    if source.tokens is not None:
        return f"all rows of {source.tokens}"
    return f"{f'{source.samples} samples' if source.samples else 'all samples'} of {source.dataset or source.jsonl}"


def build(inputs: Inputs) -> Tokens:
    return Tokens(inputs)
