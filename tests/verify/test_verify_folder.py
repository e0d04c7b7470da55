"""Damage to the folder around the shards: papers, index, side files, leftovers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from dsqjob.checkpoint.release import INDEX
from tests.harness import Tensor
from tests.verify.pairs import (
    Pair,
    edit_json,
    index_again,
    places,
    sums_again,
    verify,
    write_shard,
)


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


def lose_a_shard(pair: Pair) -> None:
    (pair.checkpoint / "model-00001-of-00005.safetensors").unlink()
    index_again(pair.checkpoint)


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
    (lose_a_shard, ("shard-missing", "model-00001-of-00005.safetensors")),
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
