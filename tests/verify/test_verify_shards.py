"""Tensors that are missing, misplaced or made otherwise, and how a pass over a shard behaves."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dsqjob.checkpoint.header import read_header
from dsqjob.checkpoint.release import open_release
from dsqjob.verify.shard import check_shard
from tests.harness import Tensor, read_shard
from tests.verify.pairs import (
    Pair,
    Shard,
    check_shards,
    edit_json,
    edit_shard,
    index_again,
    places,
    sums_again,
    verify,
    write_shard,
)

EXPERT = "layers.1.ffn.experts.3"


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


def test_a_projection_without_any_scale_above_zero_has_exponent_zero(pairs: dict[str, Pair], tmp_path: Path) -> None:
    pair = pairs["cast"].copy(tmp_path)
    release = Path(shutil.copytree(pair.release, tmp_path / "release"))
    name = f"{EXPERT}.w2"
    home = open_release(release).index[f"{name}.weight"]

    def fill(**data: bytes) -> Callable[[Shard], object]:
        def edit(shard: Shard) -> None:
            for what, byte in data.items():
                tensor = shard[f"{name}.{what}"]
                shard[f"{name}.{what}"] = tensor._replace(data=byte * (len(tensor.data) // len(byte)))

        return edit

    edit_shard(release / home, fill(weight=b"\x80", scale=b"\x00"))
    scale_2 = np.float32(2.0**-8).tobytes()
    edit_shard(pair.checkpoint / home, fill(weight=b"\x80", weight_scale=b"\x01", weight_scale_2=scale_2))
    unmeasured = {path: value for path, value in pair.expected.recorded.items() if path != name}
    changed = pair._replace(release=release, expected=replace(pair.expected, recorded=unmeasured))
    found = list(check_shards(changed, open_release(release), only=home))
    assert [one for report in found for one in report.findings] == []


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


@pytest.mark.parametrize("route", ["cast", "requantize"])
def test_a_recorded_weight_amax_that_is_not_the_weights_is_named(pairs: dict[str, Pair], route: str) -> None:
    """Every projection's own, also that of the smaller of two which share a scale."""
    pair = pairs[route]
    release, recorded = open_release(pair.release), pair.expected.recorded
    path = min((f"{EXPERT}.w1", f"{EXPERT}.w3"), key=lambda name: recorded[name])
    wrong = pair._replace(expected=replace(pair.expected, recorded={**recorded, path: recorded[path] * 1.0625}))
    found = [finding for report in check_shards(wrong, release) for finding in report.findings]
    assert [(finding.id, finding.tensor) for finding in found] == [("amax-other-weights", f"{path}.weight")]
    assert f"calibration recorded {recorded[path] * 1.0625!r}" in found[0].what
