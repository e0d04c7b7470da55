"""A flipped bit, wherever it lies, is found and named."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from dsqjob.checkpoint.header import read_header
from dsqjob.checkpoint.release import INDEX, open_release
from dsqjob.errors import DataError
from dsqjob.verify.configs import check_configs
from dsqjob.verify.findings import Finding
from dsqjob.verify.folder import check_folder, read_shards
from dsqjob.verify.papers import Papers
from dsqjob.verify.shard import check_shard
from tests.verify.pairs import (
    CHUNK,
    Pair,
    check_shards,
    flip,
    flip_tensor,
    places,
    sums_again,
    unheard,
    verify,
)

EXPERT = "layers.1.ffn.experts.3"
SIDE_FILES = ("tokenizer.json", "tokenizer_config.json", "inference/config.json")
COPIED = (
    "embed.weight",
    "head.weight",
    "norm.weight",
    "hc_head_fn",
    "layers.0.ffn.gate.tid2eid",
    "layers.1.ffn.gate.bias",
    "layers.1.attn.wq_a.weight",
    "layers.1.attn.wq_a.scale",
    "layers.1.ffn.shared_experts.w1.weight",
    "mtp.0.ffn.experts.0.w1.weight",
    "mtp.0.ffn.experts.0.w1.scale",
)
WRITTEN = ("weight", "weight_scale", "weight_scale_2", "input_scale")


@pytest.mark.parametrize("name", COPIED)
def test_a_flipped_bit_in_a_copied_tensor_is_named(pairs: dict[str, Pair], tmp_path: Path, name: str) -> None:
    pair = pairs["cast"].copy(tmp_path)
    shard = flip_tensor(pair.checkpoint, name, 77 if name != "layers.1.attn.wq_a.scale" else 5)
    sums_again(pair.checkpoint)
    assert places(verify(pair).findings) == {("bytes-differ", shard, name)}


@pytest.mark.parametrize("route", ["cast", "requantize"])
@pytest.mark.parametrize("kind", ["w1", "w2", "w3"])
@pytest.mark.parametrize("tensor", WRITTEN)
def test_a_flipped_bit_in_a_written_tensor_is_named(
    pairs: dict[str, Pair], tmp_path: Path, route: str, kind: str, tensor: str
) -> None:
    pair = pairs[route].copy(tmp_path)
    name = f"{EXPERT}.{kind}.{tensor}"
    shard = flip_tensor(pair.checkpoint, name, 9)
    release = open_release(pair.release)
    findings = [one for report in check_shards(pair, release, only=shard) for one in report.findings]
    assert [(one.id, one.tensor) for one in findings] == [(f"{tensor.replace('_', '-')}-differs", name)]


def test_every_bit_of_a_small_shards_header_is_seen(pairs: dict[str, Pair], tmp_path: Path) -> None:
    release, shard = open_release(pairs["cast"].release), "model-00001-of-00005.safetensors"
    path = Path(shutil.copy(pairs["cast"].checkpoint / shard, tmp_path))
    size = read_header(path).data_start
    original = path.read_bytes()[:size]
    for bit in range(size * 8):
        head = bytearray(original)
        head[bit // 8] ^= 1 << (bit % 8)
        with path.open("r+b") as file:
            file.write(head)
        try:
            header = read_header(path)
        except DataError as error:
            assert shard in error.where, bit
            continue
        expected = pairs["cast"].expected
        found = check_shard(path, header, release, expected, chunk_bytes=CHUNK, tick=unheard).findings
        assert found, f"bit {bit} of the header"


def test_a_broken_header_is_named_and_the_rest_is_still_checked(pairs: dict[str, Pair], tmp_path: Path) -> None:
    pair = pairs["cast"].copy(tmp_path)
    shard = flip_tensor(pair.checkpoint, "norm.weight", 0)
    broken = pair.checkpoint / "model-00002-of-00005.safetensors"
    length = int.from_bytes(broken.read_bytes()[:8], "little")
    data = broken.read_bytes()
    text = data[8 : 8 + length].replace(b'"F8_E4M3"', b'"F9_E4M3"', 1)
    broken.write_bytes(data[:8] + text + data[8 + length :])
    sums_again(pair.checkpoint)
    found = verify(pair).findings
    header = next(one for one in found if one.id == "header-dtype")
    assert header.file == broken.name
    assert header.tensor.startswith("layers.")
    assert ("bytes-differ", shard, "norm.weight") in places(found)


def test_bits_of_the_config_files_are_seen(pairs: dict[str, Pair], tmp_path: Path) -> None:
    pair = pairs["cast"].copy(tmp_path)
    release = open_release(pair.release)
    files = frozenset(path.name for path in pair.checkpoint.iterdir())
    assert not [
        *Papers.read(pair.checkpoint, files)[1],
        *check_configs(Papers.read(pair.checkpoint, files)[0], release),
    ]
    for name in ("hf_quant_config.json", "config.json"):
        path = pair.checkpoint / name
        original = path.read_bytes()
        for bit in random.Random(1).sample(range(len(original) * 8), 1000):
            flip(path, bit)
            papers, findings = Papers.read(pair.checkpoint, files)
            findings += check_configs(papers, release)
            assert any(one.file in ("hf_quant_config.json", "config.json") for one in findings), f"bit {bit} of {name}"
            path.write_bytes(original)


def test_bits_of_the_index_are_seen(pairs: dict[str, Pair], tmp_path: Path) -> None:
    pair = pairs["cast"].copy(tmp_path)
    (pair.checkpoint / "SHA256SUMS").unlink()
    path = pair.checkpoint / INDEX
    assert [one.id for one in folder_findings(pair)] == ["sums-missing"]
    original = path.read_bytes()
    for bit in random.Random(2).sample(range(len(original) * 8), 150):
        flip(path, bit)
        assert "fail" in {one.severity for one in folder_findings(pair)}, f"bit {bit}"
        path.write_bytes(original)


@pytest.mark.parametrize("name", [*SIDE_FILES, "README.md", "dsqjob.json", "config.json", INDEX])
def test_a_flipped_bit_in_any_file_breaks_its_checksum(pairs: dict[str, Pair], tmp_path: Path, name: str) -> None:
    pair = pairs["cast"].copy(tmp_path)
    flip(pair.checkpoint / name, 100)
    assert ("sha256-differs", name, "") in {(one.id, one.file, one.tensor) for one in folder_findings(pair)}


@pytest.mark.parametrize("name", SIDE_FILES)
def test_a_side_file_that_differs_from_the_releases_is_named(pairs: dict[str, Pair], tmp_path: Path, name: str) -> None:
    pair = pairs["cast"].copy(tmp_path)
    flip(pair.checkpoint / name, 100)
    sums_again(pair.checkpoint)
    assert places(verify(pair).findings) == {("file-differs", name, "")}


def test_bits_of_the_checksums_are_seen(pairs: dict[str, Pair], tmp_path: Path) -> None:
    pair = pairs["cast"].copy(tmp_path)
    path = pair.checkpoint / "SHA256SUMS"
    original = path.read_bytes()
    release, shards = open_release(pair.release), read_shards(pair.checkpoint)
    reports = list(check_shards(pair, release))
    for bit in random.Random(3).sample(range(len(original) * 8), 150):
        flip(path, bit)
        report = check_folder(pair.checkpoint, release, pair.expected, shards, reports, tick=unheard)
        assert {one.id for one in report.findings} & {
            "sums-invalid",
            "sha256-differs",
            "sums-missing-file",
            "sums-uncovered",
        }, f"bit {bit}"
        path.write_bytes(original)


def folder_findings(pair: Pair) -> tuple[Finding, ...]:
    """Findings outside of the shards' data, without the release."""
    shards = read_shards(pair.checkpoint)
    return check_folder(pair.checkpoint, None, None, shards, [], tick=unheard).findings
