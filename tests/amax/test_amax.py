"""The ledger, what it settles to, and the reference's files."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsqjob.amax.ledger import LEDGER, Ledger, Row, load_ledger
from dsqjob.amax.reference import amax_identity, load_amax, rank_files
from dsqjob.amax.reference_import import read_files
from dsqjob.amax.settle import Sharing, settle
from dsqjob.errors import DataError, UsageError

KEY = "layers.0.ffn.experts.0.w1_input_quantizer._amax"


def expert(layer: int, number: int) -> list[Sharing]:
    container = f"layers.{layer}.ffn.experts"
    groups = {"w1": ("w1", "w3"), "w2": ("w2",), "w3": ("w1", "w3")}
    return [
        Sharing(f"{container}.{number}.{kind}", container, kind, tuple(f"{container}.{number}.{one}" for one in group))
        for kind, group in groups.items()
    ]


amax = st.one_of(st.none(), st.floats(2.0**-100, 2.0**100, width=32))


rows_of_ledgers = st.dictionaries(
    st.text("abc.0", min_size=1), st.builds(Row, amax, amax, st.one_of(st.none(), st.integers(0, 1 << 40))), min_size=1
)


@given(rows=rows_of_ledgers)
def test_a_ledger_reads_back_and_has_one_spelling(
    tmp_path_factory: pytest.TempPathFactory, rows: dict[str, Row]
) -> None:
    folder = tmp_path_factory.mktemp("ledger")
    Ledger(rows, {"batches": "3"}).save(folder / "a")
    Ledger(dict(reversed(rows.items())), {"batches": "3"}).save(folder / "b")
    assert load_ledger(folder / "a") == Ledger(rows, {"batches": "3"})
    assert (folder / "a").read_bytes() == (folder / "b").read_bytes()


@pytest.mark.parametrize("damage", ["format", "value", "shape", "truncated"])
def test_a_damaged_ledger_is_refused(tmp_path: Path, damage: str) -> None:
    path = tmp_path / LEDGER
    Ledger({"a": Row(1.0, 2.0), "b": Row(3.0, None)}).save(path)
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    expected = {"format": "ledger-invalid", "value": "amax-value", "shape": "ledger-invalid"}
    if damage == "format":
        data = data.replace(b"ledger 1", b"ledger 9")
    elif damage == "value":
        table = json.loads(data[8 : 8 + length])
        start = 8 + length + table["input_amax"]["data_offsets"][0]
        data[start : start + 4] = b"\x00\x00\xc0\x7f"
    elif damage == "shape":
        data = data.replace(b"a\nb", b"a\na")
    else:
        del data[-1]
    path.write_bytes(data)
    with pytest.raises(DataError) as caught:
        load_ledger(path)
    assert caught.value.id == expected.get(damage, "shard-truncated")


def test_w1_and_w3_share_the_larger_and_w2_keeps_its_own() -> None:
    rows = {"w1": Row(2.0, 5.0), "w3": Row(3.0, 4.0), "w2": Row(9.0, 1.0)}
    found = settle(Ledger({f"layers.0.ffn.experts.0.{kind}": row for kind, row in rows.items()}), expert(0, 0))
    assert [(value.input, value.weight) for value in found.values()] == [(3.0, 5.0), (9.0, 1.0), (3.0, 5.0)]


def test_a_fallback_is_the_largest_of_its_kind_after_sharing() -> None:
    rows = {
        "layers.0.ffn.experts.0.w1": Row(2.0, 1.0), "layers.0.ffn.experts.0.w3": Row(7.0, 1.0),
        "layers.0.ffn.experts.0.w2": Row(4.0, 1.0),
        "layers.1.ffn.experts.0.w1": Row(5.0, 1.0), "layers.1.ffn.experts.0.w3": Row(5.0, 1.0),
        "layers.1.ffn.experts.0.w2": Row(6.0, 1.0),
    }  # fmt: skip
    found = settle(Ledger(rows), [*expert(0, 0), *expert(0, 1), *expert(1, 0)])
    missing = [found[f"layers.0.ffn.experts.1.{kind}"] for kind in ("w1", "w2", "w3")]
    assert [(value.input, value.weight, value.fallback) for value in missing] == [
        (7.0, None, True), (6.0, None, True), (7.0, None, True),
    ]  # fmt: skip


def test_a_weight_amax_that_one_of_two_lacks_is_derived() -> None:
    rows = {"layers.0.ffn.experts.0.w1": Row(2.0, 5.0), "layers.0.ffn.experts.0.w3": Row(3.0, None),
            "layers.0.ffn.experts.0.w2": Row(9.0, 1.0)}  # fmt: skip
    assert settle(Ledger(rows), expert(0, 0))["layers.0.ffn.experts.0.w1"].weight is None


def test_a_layer_without_inputs_is_refused_unless_named() -> None:
    rows = {f"layers.0.ffn.experts.0.{kind}": Row(1.0, 1.0) for kind in ("w1", "w2", "w3")}
    targets = [*expert(0, 0), *expert(1, 0)]
    with pytest.raises(DataError) as caught:
        settle(Ledger(rows), targets, where="folder")
    assert caught.value.id == "amax-layer-missing" and "layers.1.ffn.experts" in caught.value.what
    found = settle(Ledger(rows), targets, allow_uncalibrated=["layers.1.ffn.experts"])
    assert found["layers.1.ffn.experts.0.w2"].fallback


def test_amax_of_another_release_are_refused() -> None:
    rows = {f"layers.{layer}.ffn.experts.0.{kind}": Row(1.0, 1.0) for layer in (0, 1) for kind in ("w1", "w2", "w3")}
    with pytest.raises(DataError) as caught:
        settle(Ledger(rows), expert(0, 0), where="folder")
    assert caught.value.id == "amax-unknown" and "layers.1.ffn.experts.0.w1" in caught.value.where


def test_nothing_to_fall_back_on_is_refused() -> None:
    rows = {"layers.0.ffn.experts.0.w1": Row(1.0, 1.0)}
    with pytest.raises(DataError) as caught:
        settle(Ledger(rows), expert(0, 0))
    assert caught.value.id == "amax-missing" and "w2" in caught.value.where


def test_the_references_files_are_read(golden: Path) -> None:
    files = rank_files(golden / "amax-mp2")
    ledger = read_files(files)
    stored: dict[str, Any] = {}
    for file in files:
        stored |= torch.load(file, weights_only=True)
    for key, value in stored.items():
        path, _, quantizer = key.rpartition("_quantizer._amax")[0].rpartition("_")
        row = ledger.rows[path]
        assert float(value) == (row.input_amax if quantizer == "input" else row.weight_amax)
    assert len(ledger.rows) * 2 == len(stored)


def save(folder: Path, rank: int, world: int, values: Any) -> Path:
    folder.mkdir(exist_ok=True)
    torch.save(values, folder / f"amax_dict_rank{rank}-mp{world}.pt")
    return folder


def one(value: float = 1.0) -> Any:
    return torch.tensor(value, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("values", "cause"),
    [
        ({KEY: one(float("nan"))}, "amax-value"),
        ({KEY: one(float("inf"))}, "amax-value"),
        ({KEY: one(0.0)}, "amax-value"),
        ({KEY: one(-1.0)}, "amax-value"),
        ({"layers.0.attn.wq_a_input_quantizer._amax": one()}, "amax-key"),
        ({"layers.0.ffn.experts.0.w4_input_quantizer._amax": one()}, "amax-key"),
        ({KEY: torch.ones(2)}, "amax-pickle"),
        ({KEY: torch.tensor(3)}, "amax-pickle"),
        ({KEY: 1.0}, "amax-pickle"),
        ([one()], "amax-pickle"),
    ],
)
def test_wrong_values_are_refused(tmp_path: Path, values: Any, cause: str) -> None:
    folder = save(tmp_path / "amax", 0, 1, values)
    with pytest.raises(DataError) as caught:
        load_amax(folder, tmp_path / "imports")
    assert caught.value.id == cause and caught.value.way_out and "rank0" in caught.value.where


def test_draft_layers_are_ignored_and_ranks_may_not_repeat_a_key(tmp_path: Path) -> None:
    folder = save(tmp_path / "amax", 0, 2, {KEY: one(), "mtp.0.ffn.experts.0.w1_input_quantizer._amax": one(5)})
    save(folder, 1, 2, {KEY.replace("experts.0", "experts.1"): one(2)})
    ledger = load_amax(folder, tmp_path / "imports")
    assert {name: row.input_amax for name, row in ledger.rows.items()} == {
        "layers.0.ffn.experts.0.w1": 1.0, "layers.0.ffn.experts.1.w1": 2.0,
    }  # fmt: skip
    save(folder, 1, 2, {KEY: one(2)})
    with pytest.raises(DataError) as caught:
        load_amax(folder, tmp_path / "imports")
    assert caught.value.id == "amax-duplicate"


class Bomb:
    """A pickle that would run a command."""

    def __reduce__(self) -> Any:
        return (Path.touch, (Path("ran"),))


def test_a_pickle_that_is_not_tensors_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "amax").mkdir()
    for data in (pickle.dumps({KEY: Bomb()}), b"not a pickle"):
        (tmp_path / "amax" / "amax_dict_rank0-mp1.pt").write_bytes(data)
        with pytest.raises(DataError) as caught:
            load_amax(tmp_path / "amax", tmp_path / "imports")
        assert caught.value.id == "amax-pickle"
    assert not (tmp_path / "ran").exists()


def test_mixed_worlds_missing_ranks_and_empty_folders(tmp_path: Path, golden: Path) -> None:
    folder = tmp_path / "amax"
    shutil.copytree(golden / "amax-mp2", folder)
    before = amax_identity(folder)
    (folder / "amax_dict_rank0-mp2.pt").touch()
    assert amax_identity(folder) == before
    shutil.copy(folder / "amax_dict_rank1-mp2.pt", folder / "amax_dict_rank1-mp4.pt")
    with pytest.raises(DataError) as caught:
        rank_files(folder)
    assert caught.value.id == "amax-mixed-worlds"
    (folder / "amax_dict_rank1-mp4.pt").unlink()
    (folder / "amax_dict_rank0-mp2.pt").unlink()
    with pytest.raises(DataError) as caught:
        rank_files(folder)
    assert caught.value.id == "amax-rank-missing" and "rank0-mp2" in caught.value.where
    (folder / "amax_dict_rank1-mp2.pt").unlink()
    with pytest.raises(UsageError) as usage:
        amax_identity(folder)
    assert usage.value.id == "amax-folder-empty"


def test_importing_without_torch_says_so(tmp_path: Path, golden: Path, base_python: Path) -> None:
    files = [str(path) for path in rank_files(golden / "amax-mp2")]
    command = [str(base_python), "-m", "dsqjob.amax.reference_import", *files, str(tmp_path / "ledger")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 64 and done.stderr.startswith("torch-missing\t")
