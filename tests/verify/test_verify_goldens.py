"""Verification against what the reference made."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dsqjob.checkpoint.release import open_release
from dsqjob.verify.findings import ShardReport
from tests.harness import read_checkpoint
from tests.verify.pairs import Pair, check_shards, flip_tensor, verify

ROUTES = ("cast", "requantize")


@pytest.mark.parametrize("route", ROUTES)
def test_a_good_checkpoint_passes_without_a_finding(pairs: dict[str, Pair], route: str) -> None:
    report = verify(pairs[route])
    assert report.findings == ()
    assert report.passed


@pytest.mark.parametrize("route", ROUTES)
def test_a_good_checkpoint_passes_by_its_own_papers_alone(pairs: dict[str, Pair], route: str) -> None:
    report = verify(pairs[route], alone=True)
    assert report.findings == ()
    assert report.passed
    assert not report.compared


def test_lossless_blocks_are_counted_as_the_reference_counts_them(pairs: dict[str, Pair]) -> None:
    report = verify(pairs["cast"])
    assert (report.lossless, report.blocks) == (73726, 73728)


def test_of_the_references_cast_only_metadata_and_signs_of_zero_differ(golden: Path, pairs: dict[str, Pair]) -> None:
    pair = pairs["cast"]._replace(checkpoint=golden / "nvfp4-cast")
    findings = [finding for report in check_shards(pair, open_release(pair.release)) for finding in report.findings]
    signs = [finding for finding in findings if finding.id != "metadata"]
    assert {finding.id for finding in signs} == {"weight-differs"}
    assert all("should be 0x8, is 0x0" in finding.what for finding in signs)
    source = read_checkpoint(pair.release)
    with_signs = {
        name
        for name, (_, tensor) in source.items()
        if name.startswith("layers.") and tensor.dtype == "I8" and any(b & 15 == 8 or b >> 4 == 8 for b in tensor.data)
    }
    assert {finding.tensor for finding in signs} == with_signs


def test_of_the_references_requantization_only_metadata_differs(golden: Path, pairs: dict[str, Pair]) -> None:
    pair = pairs["requantize"]._replace(checkpoint=golden / "nvfp4-requantize")
    findings = [finding for report in check_shards(pair, open_release(pair.release)) for finding in report.findings]
    assert {finding.id for finding in findings} == {"metadata"}


def test_a_weight_amax_that_was_not_measured_is_taken_from_the_weights(pairs: dict[str, Pair]) -> None:
    pair = pairs["requantize"]
    known = [path for path, value in pair.expected.weight_amax.items() if value is not None]
    unknown = [path for path, value in pair.expected.weight_amax.items() if value is None]
    assert known
    assert unknown, "the goldens hold experts that saw no token"
    derived = pair._replace(expected=pair.expected.__class__("requantize", "calibrated", {}, pair.expected.input_amax))
    assert verify(derived).findings == ()


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("chunk_bytes", [3000, 1 << 30])
def test_the_size_of_pieces_changes_no_report(pairs: dict[str, Pair], route: str, chunk_bytes: int) -> None:
    release = open_release(pairs[route].release)
    shard = "model-00003-of-00005.safetensors"
    usual = list(check_shards(pairs[route], release, only=shard))
    assert list(check_shards(pairs[route], release, chunk_bytes=chunk_bytes, only=shard)) == usual


def test_a_report_survives_json(pairs: dict[str, Pair], tmp_path: Path) -> None:
    pair = pairs["cast"].copy(tmp_path)
    flip_tensor(pair.checkpoint, "layers.0.ffn.experts.0.w1.weight", 3)
    for report in check_shards(pair, open_release(pair.release)):
        assert ShardReport.from_json(json.loads(json.dumps(report.to_json()))) == report
