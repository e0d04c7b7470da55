"""Whatever changes the output is a named part of a fingerprint; a touched time is not."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dsqjob.amax.ledger import LEDGER, Ledger, Row
from dsqjob.miniature import write
from tests.harness import digests, dsqjob, error_id, events, write_job

INDEX = "model.safetensors.index.json"
Change = Callable[[Path], dict[str, Any] | None]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small") / "release"
    write("deepseek-v4", folder, seed=3, layers=2, experts=4, ratios=(0, 4, 0), vocab=384)
    return folder


def ledger(folder: Path, value: float, skip: str = "") -> None:
    rows = {
        f"layers.{layer}.ffn.experts.{expert}.{kind}": Row(value, None)
        for layer in range(2)
        for expert in range(4)
        for kind in ("w1", "w2", "w3")
        if f"layers.{layer}" != skip
    }
    Ledger(rows).save(folder / "amax" / LEDGER)


def settings(folder: Path, **more: Any) -> dict[str, Any]:
    return {"export__amax": folder / "amax", "export__input_scale": "calibrated", **more}


def edit_json(path: Path, key: str, value: object) -> None:
    data = json.loads(path.read_text())
    data[key] = value
    path.write_text(json.dumps(data))


def rewrite_header(folder: Path) -> None:
    """The same tensors behind a header with another space."""
    path = folder / "release" / "model-00001-of-00004.safetensors"
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    path.write_bytes((length + 8).to_bytes(8, "little") + raw[8 : 8 + length] + b" " * 8 + raw[8 + length :])


def config(folder: Path) -> None:
    edit_json(folder / "release" / "config.json", "rope_theta", 5)


def index(folder: Path) -> None:
    edit_json(folder / "release" / INDEX, "metadata", {"total_size": 1})


CHANGES: dict[tuple[str, str], Change] = {
    ("convert", "release config"): config,  # type: ignore[dict-item]
    ("convert", "release index"): index,  # type: ignore[dict-item]
    ("convert", "release shards"): rewrite_header,  # type: ignore[dict-item]
    ("convert", "parallel.model_parallel"): lambda _: {
        "parallel": {"model_parallel": 1, "nodes": 1, "gpus_per_node": 1}
    },
    ("convert", "checksums"): lambda _: {"checksums": False},
    ("export", "release config"): config,  # type: ignore[dict-item]
    ("export", "release index"): index,  # type: ignore[dict-item]
    ("export", "release shards"): rewrite_header,  # type: ignore[dict-item]
    ("export", "export.amax"): lambda folder: ledger(folder, 3.0),
    ("export", "export.weights"): lambda _: {"export__weights": "requantize"},
    ("export", "export.allow_uncalibrated"): lambda _: {"export__allow_uncalibrated": ["layers.0.ffn.experts"]},
    ("export", "checksums"): lambda _: {"checksums": False},
    ("finalize", "export: export.amax"): lambda folder: ledger(folder, 3.0),
    ("finalize", "side files"): lambda folder: (folder / "release" / "LICENSE").write_text("other") and None,
    ("finalize", "papers"): lambda folder: (folder / "release" / "inference" / "model.py").write_text("#") and None,
}


def run(job: Path, stage: str, code: int = 0, *more: str) -> Any:
    last = () if stage == "convert" else ("--through", "finalize")
    return dsqjob("run", job, "--stage", "convert" if stage == "convert" else "export", *last, *more, code=code)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: f"{change[0]}-{change[1]}")
def test_a_changed_part_is_refused_by_name_and_restarted_on_demand(
    tmp_path: Path, small: Path, change: tuple[str, str]
) -> None:
    stage, part = change
    shutil.copytree(small, tmp_path / "release")
    ledger(tmp_path, 2.0)
    folder = tmp_path / ("work/mp" if stage == "convert" else "out")
    run(write_job(tmp_path, tmp_path / "release", **settings(tmp_path)), stage)
    (folder / "mine.txt").write_text("not dsqjob's")
    before = digests(folder)
    more = CHANGES[change](tmp_path) or {}
    job = write_job(tmp_path, tmp_path / "release", **settings(tmp_path, **more))
    done = dsqjob("run", job, "--stage", stage, code=64)
    assert error_id(done) == "fingerprint-changed"
    assert f"changed: {part}" in done.stderr or f", {part}" in done.stderr
    assert digests(folder) == before
    run(job, stage, 0, "--restart")
    assert (folder / "mine.txt").read_text() == "not dsqjob's"


@pytest.mark.parametrize("stage", ["convert", "export"])
def test_touched_times_change_nothing(tmp_path: Path, small: Path, stage: str) -> None:
    shutil.copytree(small, tmp_path / "release")
    ledger(tmp_path, 2.0)
    job = write_job(tmp_path, tmp_path / "release", **settings(tmp_path))
    run(job, stage)
    known = len(list(events(tmp_path / "work")))
    for path in [*(tmp_path / "release").rglob("*"), *(tmp_path / "amax").iterdir()]:
        os.utime(path, (1, 1))
    done = run(job, stage)
    assert "already done" in done.stdout and len(list(events(tmp_path / "work"))) == known


def test_restart_of_export_takes_the_index_away_first(tmp_path: Path, small: Path) -> None:
    job = write_job(tmp_path, small)
    run(job, "export")
    done = run(job, "export", 0, "--restart")
    removed = [line.rpartition("/")[2] for line in done.stdout.splitlines() if line.startswith("removed")]
    assert removed[0] == INDEX and {"config.json", "model-00001-of-00004.safetensors"} <= set(removed)


@pytest.mark.parametrize(
    ("through", "wrong", "id"),
    [
        ("export", {"export__input_scale": "calibrated", "export__amax": "/nonexistent"}, "amax-folder-empty"),
        ("tokens", {"tokens__data": [{"jsonl": "/nonexistent.jsonl"}]}, "source-missing"),
        ("verify", {"export__input_scale": "calibrated", "inference_dir": "/nonexistent"}, "vendor-code-missing"),
    ],
    ids=["amax", "tokens", "code of a later stage"],
)
def test_a_restart_that_cannot_begin_removes_nothing(
    tmp_path: Path, small: Path, through: str, wrong: dict[str, Any], id: str
) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "the wind"}\n' * 4)
    given = {"tokens__data": [{"jsonl": str(text)}], "tokens__sequence_length": 16}
    job = write_job(tmp_path, small, **given)
    dsqjob("run", job, "--stage", "tokens")
    dsqjob("run", job, "--stage", "export", "--through", "finalize")
    before = digests(tmp_path / "out"), digests(tmp_path / "work" / "tokens")
    job = write_job(tmp_path, small, **{**given, **wrong})
    words = ("--stage", through) if through != "verify" else ("--stage", "tokens", "--through", through)
    done = dsqjob("run", job, *words, "--restart", code=None)
    assert error_id(done) == id and "removed" not in done.stdout, done.stderr
    assert (digests(tmp_path / "out"), digests(tmp_path / "work" / "tokens")) == before
