"""A release is opened once a shard, and everything in it must agree."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from dsqjob.checkpoint.release import open_release, side_files
from dsqjob.errors import DataError
from tests.checkpoint.hostile import GOOD, entry, shard

INDEX = "model.safetensors.index.json"


def make(folder: Path) -> Path:
    """Two shards, four tensors."""
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "m1.safetensors").write_bytes(shard(GOOD))
    (folder / "m2.safetensors").write_bytes(shard({"c": entry(0, 8)}))
    weight_map = {"a": "m1.safetensors", "b": "m1.safetensors", "c": "m2.safetensors"}
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 16}, "weight_map": weight_map}))
    return folder


def edit_index(**changes: str | None) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        for name, value in changes.items():
            if value is None:
                del index["weight_map"][name]
            else:
                index["weight_map"][name] = value
        (folder / INDEX).write_text(json.dumps(index))

    return edit


def write(name: str, data: bytes) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        (folder / name).write_bytes(data)

    return edit


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


CASES: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "parent folder": (edit_index(a="../m1.safetensors"), "index-escape", "a"),
    "absolute path": (edit_index(a="/etc/m1.safetensors"), "index-escape", "a"),
    "subfolder": (edit_index(a="sub/m1.safetensors"), "index-escape", "a"),
    "hidden file": (edit_index(a=".m1.safetensors"), "index-escape", "a"),
    "not a shard": (edit_index(a="config.json"), "index-escape", "a"),
    "missing shard": (edit_index(a="m3.safetensors"), "shard-missing", "m3.safetensors"),
    "missing tensor": (edit_index(z="m2.safetensors"), "index-missing-tensor", "z"),
    "tensor in another shard": (edit_index(c="m1.safetensors", z="m2.safetensors"), "index-missing-tensor", "c"),
    "unnamed tensor": (edit_index(b=None), "index-unnamed-tensor", "b"),
    "duplicate tensor": (write("m2.safetensors", shard({"a": entry(0, 4), "c": entry(4, 8)})), "tensor-duplicate", "a"),
    "no index": (remove(INDEX), "index-missing", INDEX),
    "no config": (remove("config.json"), "config-missing", "config.json"),
    "config is no JSON": (write("config.json", b"{,}"), "json-invalid", "config.json"),
    "config is a list": (write("config.json", b"[]"), "json-invalid", "config.json"),
    "doubled key in the index": (write(INDEX, b'{"weight_map":{"a":"x","a":"y"}}'), "json-invalid", INDEX),
    "index without a map": (write(INDEX, b'{"metadata":{}}'), "index-invalid", INDEX),
    "index of numbers": (write(INDEX, b'{"weight_map":{"a":1}}'), "index-invalid", INDEX),
}


@pytest.mark.parametrize("case", CASES)
def test_a_release_that_disagrees_with_itself_is_refused(tmp_path: Path, case: str) -> None:
    edit, cause, place = CASES[case]
    folder = make(tmp_path / "release")
    edit(folder)
    with pytest.raises(DataError) as caught:
        open_release(folder)
    assert caught.value.id == cause and place in caught.value.where and caught.value.way_out


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        open_release(tmp_path / "none")
    assert caught.value.id == "release-missing"


def test_each_shard_is_opened_once(tmp_path: Path) -> None:
    folder = make(tmp_path / "release")
    opened: Counter[str] = Counter()
    watching = [True]

    def watch(event: str, arguments: tuple) -> None:
        if watching and event == "open" and str(arguments[0]).endswith(".safetensors"):
            opened[os.path.basename(arguments[0])] += 1

    sys.addaudithook(watch)
    open_release(folder)
    watching.clear()
    assert opened == {"m1.safetensors": 1, "m2.safetensors": 1}


def test_identity_changes_with_content_not_with_time(tmp_path: Path) -> None:
    folder = make(tmp_path / "release")
    before = open_release(folder).identity()
    for path in folder.iterdir():
        os.utime(path, (1, 1))
    assert open_release(folder).identity() == before
    (folder / "m2.safetensors").write_bytes(shard({"c": entry(0, 8, [2, 4])}))
    after = open_release(folder).identity()
    assert {name for name in before if before[name] != after[name]} == {"shards"}


def test_a_linked_folder_is_refused_a_linked_file_is_not(tmp_path: Path) -> None:
    folder = make(tmp_path / "release")
    (tmp_path / "blob").write_text("x")
    (folder / "tokenizer.json").symlink_to(tmp_path / "blob")
    assert "tokenizer.json" in side_files(folder)
    (folder / "inference").symlink_to(tmp_path)
    with pytest.raises(DataError) as caught:
        side_files(folder)
    assert caught.value.id == "folder-link" and "inference" in caught.value.where


def test_side_files_leave_out_what_is_not_the_releases(tmp_path: Path) -> None:
    folder = make(tmp_path / "release")
    for name in ("old.safetensors", "x.partial-1", "y.incomplete", ".cache/h",
                 "inference/__pycache__/m.pyc", ".git/HEAD",
                 "tokenizer.json", "inference/model.py", "inference/extra.safetensors", ".gitattributes"):  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    assert side_files(folder) == [
        ".gitattributes", "config.json", "inference/extra.safetensors", "inference/model.py", "tokenizer.json",
    ]  # fmt: skip
