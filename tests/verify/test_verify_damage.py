"""Whatever is damaged is found, and named."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from dataclasses import replace
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
from tests.harness import Tensor, read_shard
from tests.verify.pairs import (
    CHUNK,
    Pair,
    Shard,
    check_shards,
    edit_json,
    edit_shard,
    flip,
    flip_tensor,
    index_again,
    places,
    sums_again,
    unheard,
    verify,
    write_shard,
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


def drop(name: str) -> Callable[[Pair], None]:
    return lambda pair: (pair.checkpoint / name).unlink()


def add(name: str) -> Callable[[Pair], None]:
    return lambda pair: (pair.checkpoint / name).write_bytes(b"{}") and None


def double_a_key(pair: Pair) -> None:
    path = pair.checkpoint / "config.json"
    path.write_text(path.read_text().replace("{", '{"vocab_size": 512,', 1))


def foreign_shard(pair: Pair) -> None:
    write_shard(pair.checkpoint / "model-99999.safetensors", {"x": Tensor("U8", (1,), b"a")}, None)


def total_size(pair: Pair) -> None:
    edit_json(pair.checkpoint / INDEX, lambda index: index["metadata"].update(total_size=1))


def unnamed(pair: Pair) -> None:
    edit_json(pair.checkpoint / INDEX, lambda index: index["weight_map"].pop("norm.weight"))


def not_there(pair: Pair) -> None:
    edit_json(
        pair.checkpoint / INDEX,
        lambda index: index["weight_map"].update(ghost="model-00001-of-00005.safetensors"),
    )


def outside(pair: Pair) -> None:
    edit_json(pair.checkpoint / INDEX, lambda index: index["weight_map"].update(ghost="../model.safetensors"))


def lossless_count(pair: Pair) -> None:
    edit_json(pair.checkpoint / "dsqjob.json", lambda papers: papers["cast"].update(lossless=1))


def other_release(pair: Pair) -> None:
    edit_json(pair.checkpoint / "dsqjob.json", lambda papers: papers["release"].update(shards="0"))


FOLDER_DAMAGE: list[tuple[Callable[[Pair], None], tuple[str, str]]] = [
    (drop(INDEX), ("unfinished", INDEX)),
    (drop("config.json"), ("file-missing", "config.json")),
    (drop("hf_quant_config.json"), ("file-missing", "hf_quant_config.json")),
    (drop("README.md"), ("file-missing", "README.md")),
    (drop("dsqjob.json"), ("file-missing", "dsqjob.json")),
    (drop("inference/config.json"), ("file-missing", "inference/config.json")),
    (add(".dsqjob-owner"), ("unfinished", ".dsqjob-owner")),
    (add("config.json.partial-a1"), ("leftover", "config.json.partial-a1")),
    (add("quant_cfg.json"), ("file-extra", "quant_cfg.json")),
    (double_a_key, ("json-invalid", "config.json")),
    (foreign_shard, ("foreign-shard", "model-99999.safetensors")),
    (total_size, ("index-total-size", INDEX)),
    (unnamed, ("index-unnamed-tensor", "model-00005-of-00005.safetensors")),
    (not_there, ("index-missing-tensor", INDEX)),
    (outside, ("index-missing-shard", INDEX)),
    (lossless_count, ("provenance-differs", "dsqjob.json")),
    (other_release, ("provenance-differs", "dsqjob.json")),
]


@pytest.mark.parametrize(("damage", "finding"), FOLDER_DAMAGE, ids=[f"{f[0]}-{f[1]}" for _, f in FOLDER_DAMAGE])
def test_damage_to_the_folder_is_named(
    pairs: dict[str, Pair], tmp_path: Path, damage: Callable[[Pair], None], finding: tuple[str, str]
) -> None:
    pair = pairs["cast"].copy(tmp_path)
    damage(pair)
    sums_again(pair.checkpoint)
    report = verify(pair)
    assert finding in {(one.id, one.file) for one in report.findings}
    assert not report.passed


def test_a_file_that_the_checksums_do_not_list_is_named(pairs: dict[str, Pair], tmp_path: Path) -> None:
    pair = pairs["cast"].copy(tmp_path)
    (pair.checkpoint / "inference" / "extra.py").write_text("pass\n")
    found = verify(pair, alone=True).findings
    assert places(found) == {("sums-uncovered", "inference/extra.py", "")}


def test_without_checksums_there_is_a_warning_and_the_rest_passes(pairs: dict[str, Pair], tmp_path: Path) -> None:
    pair = pairs["cast"].copy(tmp_path)
    (pair.checkpoint / "SHA256SUMS").unlink()
    report = verify(pair)
    assert [(one.id, one.severity) for one in report.findings] == [("sums-missing", "warn")]
    assert report.passed


def without(name: str) -> Callable[[Shard], object]:
    return lambda shard: shard.pop(name)


def replaced(name: str, **fields: object) -> Callable[[Shard], object]:
    return lambda shard: shard.update({name: shard[name]._replace(**fields)})


W1 = f"{EXPERT}.w1"
SHARD_DAMAGE: list[tuple[str, Callable[[Shard], object], str]] = [
    ("tensor-missing", without(f"{W1}.input_scale"), f"{W1}.input_scale"),
    ("tensor-missing", without("layers.1.attn_norm.weight"), "layers.1.attn_norm.weight"),
    ("tensor-layout", replaced(f"{W1}.weight", dtype="I8"), f"{W1}.weight"),
    ("tensor-layout", replaced(f"{W1}.weight_scale_2", shape=(1,)), f"{W1}.weight_scale_2"),
    ("tensor-layout", replaced("layers.1.attn_norm.weight", shape=(2, 128)), "layers.1.attn_norm.weight"),
    ("tensor-extra", lambda shard: shard.update(ghost=Tensor("U8", (1,), b"a")), "ghost"),
    ("tensor-extra", lambda shard: shard.update({f"{W1}.scale": Tensor("U8", (1,), b"a")}), f"{W1}.scale"),
    ("tensor-misplaced", lambda shard: shard.update({"norm.weight": Tensor("U8", (1,), b"a")}), "norm.weight"),
]


@pytest.mark.parametrize(("id", "edit", "tensor"), SHARD_DAMAGE, ids=[f"{i}-{t}" for i, _, t in SHARD_DAMAGE])
def test_a_tensor_that_should_not_be_so_is_named(
    pairs: dict[str, Pair], tmp_path: Path, id: str, edit: Callable[[Shard], object], tensor: str
) -> None:
    pair = pairs["cast"].copy(tmp_path)
    shard = open_release(pair.release).index[f"{W1}.weight"]
    edit_shard(pair.checkpoint / shard, edit)
    release = open_release(pair.release)
    findings = [one for report in check_shards(pair, release, only=shard) for one in report.findings]
    assert (id, tensor) in {(one.id, one.tensor) for one in findings}
    assert {one.tensor for one in findings} == {tensor}


def test_a_shards_metadata_is_compared(pairs: dict[str, Pair], tmp_path: Path) -> None:
    pair = pairs["cast"].copy(tmp_path)
    path = pair.checkpoint / "model-00001-of-00005.safetensors"
    write_shard(path, read_shard(path), {"format": "np"})
    sums_again(pair.checkpoint)
    assert places(verify(pair).findings) == {("metadata", path.name, "")}


def test_gate_and_up_projection_share_their_exponent_across_shards(pairs: dict[str, Pair], tmp_path: Path) -> None:
    """w3, and apart from it w1's scale, lie in other shards than w1: everything still agrees."""
    pair = pairs["cast"].copy(tmp_path)
    release = Path(shutil.copytree(pair.release, tmp_path / "release"))
    home, last = open_release(release).index[f"{W1}.weight"], "model-00005-of-00005.safetensors"
    move(release, home, last, lambda name: name.startswith(f"{EXPERT}.w3") or name == f"{W1}.scale")
    move(pair.checkpoint, home, last, lambda name: name.startswith(f"{EXPERT}.w3"))
    papers = open_release(release).identity()
    edit_json(pair.checkpoint / "dsqjob.json", lambda value: value.update(release=papers))
    sums_again(pair.checkpoint)
    assert verify(pair._replace(release=release)).findings == ()


def move(folder: Path, source: str, target: str, chosen: Callable[[str], bool]) -> None:
    moved = {name: tensor for name, tensor in read_shard(folder / source).items() if chosen(name)}
    assert moved
    edit_shard(folder / source, lambda shard: [shard.pop(name) for name in moved])
    edit_shard(folder / target, lambda shard: shard.update(moved))
    index_again(folder)


def test_a_larger_exponent_in_the_other_shard_would_be_noticed(pairs: dict[str, Pair], tmp_path: Path) -> None:
    """The release's w3 gets a larger scale byte: w1's tensors no longer follow from it."""
    pair = pairs["cast"].copy(tmp_path)
    release = Path(shutil.copytree(pair.release, tmp_path / "release"))
    name = f"{EXPERT}.w3.scale"

    def enlarge(shard: Shard) -> None:
        data = bytearray(shard[name].data)
        data[0] = max(data) + 1
        shard[name] = shard[name]._replace(data=bytes(data))

    home = open_release(release).index[name]
    edit_shard(release / home, enlarge)
    found = check_shards(pair._replace(release=release), open_release(release), only=home)
    tensors = {one.tensor for report in found for one in report.findings}
    assert {f"{W1}.weight_scale_2", f"{W1}.weight_scale"} <= tensors


def test_a_nan_scale_in_the_release_is_reported(pairs: dict[str, Pair], tmp_path: Path) -> None:
    pair = pairs["cast"].copy(tmp_path)
    release = Path(shutil.copytree(pair.release, tmp_path / "release"))
    name = f"{EXPERT}.w2.scale"
    home = open_release(release).index[name]
    edit_shard(
        release / home, lambda shard: shard.update({name: shard[name]._replace(data=b"\xff" + shard[name].data[1:])})
    )
    found = check_shards(pair._replace(release=release), open_release(release), only=home)
    assert [one.id for report in found for one in report.findings] == ["source-unusable"]


def test_an_input_scale_of_one_is_demanded_where_the_job_says_so(pairs: dict[str, Pair]) -> None:
    pair = pairs["cast"]
    pair = pair._replace(expected=replace(pair.expected, input_scale="one", input_amax={}))
    findings = [one for report in check_shards(pair, open_release(pair.release)) for one in report.findings]
    assert {one.id for one in findings} == {"input-scale-differs"}
    assert len(findings) == 3 * 8 * 3


def test_an_unknown_input_amax_is_a_finding(pairs: dict[str, Pair]) -> None:
    pair = pairs["cast"]
    pair = pair._replace(expected=replace(pair.expected, input_amax={}))
    findings = [one for report in check_shards(pair, open_release(pair.release)) for one in report.findings]
    assert {one.id for one in findings} == {"amax-missing"}


class StopError(Exception):
    pass


def test_a_tick_that_raises_stops_the_pass(pairs: dict[str, Pair]) -> None:
    pair = pairs["cast"]
    seen: list[int] = []

    def tick(nbytes: int) -> None:
        seen.append(nbytes)
        if sum(seen) > 100_000:
            raise StopError

    path = pair.checkpoint / "model-00003-of-00005.safetensors"
    with pytest.raises(StopError):
        check_shard(path, read_header(path), open_release(pair.release), pair.expected, chunk_bytes=4096, tick=tick)
    assert sum(seen) < path.stat().st_size / 2


def test_ticks_add_up_to_the_shards_tensors(pairs: dict[str, Pair]) -> None:
    pair = pairs["requantize"]
    path = pair.checkpoint / "model-00003-of-00005.safetensors"
    header, seen = read_header(path), []
    check_shard(path, header, open_release(pair.release), pair.expected, chunk_bytes=4096, tick=seen.append)
    assert sum(seen) == path.stat().st_size - header.data_start


@pytest.mark.parametrize(
    ("tensor", "byte", "what"),
    [("weight_scale", 0x7F, "NaN"), ("weight_scale", 0x90, "sign"), ("weight_scale", 0, "zero")],
)
def test_unusable_block_scales_are_found_without_the_release(
    pairs: dict[str, Pair], tmp_path: Path, tensor: str, byte: int, what: str
) -> None:
    pair = pairs["requantize"].copy(tmp_path)
    name = f"{W1}.{tensor}"
    shard = open_release(pair.release).index[f"{W1}.weight"]
    data = bytes([byte])
    edit_shard(
        pair.checkpoint / shard,
        lambda tensors: tensors.update({name: tensors[name]._replace(data=data + tensors[name].data[1:])}),
    )
    sums_again(pair.checkpoint)
    found = verify(pair, alone=True).findings
    assert places(found) == {("scale-unusable", shard, name)}
    assert what in found[0].what
