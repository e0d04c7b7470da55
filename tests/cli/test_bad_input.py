"""Each kind of bad input has its own id and place, exits 64 or 65, and leaves nothing behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dsqjob.amax.ledger import LEDGER, Ledger, Row
from dsqjob.miniature import write
from tests.checkpoint.hostile import CASES as SHARDS
from tests.harness import dsqjob, error_id, write_job

INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00004.safetensors", "model-00002-of-00004.safetensors"
EXPERT = "layers.0.ffn.experts.0.w1"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small") / "release"
    write("deepseek-v4", folder, seed=3, layers=2, experts=4, ratios=(0, 4, 0), vocab=384)
    return folder


@pytest.fixture
def release(tmp_path: Path, small: Path) -> Path:
    shutil.copytree(small, tmp_path / "release")
    return tmp_path / "release"


def edit_json(path: Path, change: Callable[[Any], None]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def edit_header(path: Path, change: Callable[[Any], None]) -> None:
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    table = json.loads(raw[8 : 8 + length])
    change(table)
    text = json.dumps(table).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


def rename_tensor(release: Path, old: str, new: str | None) -> None:
    """In its shard and in the index; None drops it from the index only."""
    shard = json.loads((release / INDEX).read_text())["weight_map"][old]
    if new is not None:
        edit_header(release / shard, lambda table: table.__setitem__(new, table.pop(old)))
        edit_json(release / INDEX, lambda index: index["weight_map"].__setitem__(new, shard))
    edit_json(release / INDEX, lambda index: index["weight_map"].pop(old))


def truncate(release: Path) -> None:
    with (release / SECOND).open("r+b") as file:
        file.truncate((release / SECOND).stat().st_size - 5)


def duplicate(release: Path) -> None:
    raw = (release / FIRST).read_bytes()
    (release / SECOND).write_bytes(raw)
    edit_json(release / INDEX, lambda index: index["weight_map"].update({"x": SECOND}))


RELEASES: dict[str, tuple[Callable[[Path], object], int, str, str]] = {
    "truncated shard": (truncate, 65, "shard-truncated", SECOND),
    "duplicate tensors": (duplicate, 65, "tensor-duplicate", "embed.weight"),
    "index outside": (
        lambda r: edit_json(r / INDEX, lambda i: i["weight_map"].update({"embed.weight": "../x.safetensors"})),
        65, "index-escape", "embed.weight",
    ),
    "index to a missing tensor": (
        lambda r: edit_json(r / INDEX, lambda i: i["weight_map"].update({"ghost": FIRST})), 65, "index-missing-tensor", "ghost",
    ),
    "another family": (
        lambda r: edit_json(r / "config.json", lambda c: c.update(model_type="deepseek_v3")), 65, "family-mismatch", "config",
    ),
    "config without experts": (
        lambda r: edit_json(r / "config.json", lambda c: c.pop("n_routed_experts")), 65, "config-field", "config.json",
    ),
    "more experts than config says": (
        lambda r: edit_json(r / "config.json", lambda c: c.update(n_routed_experts=3)), 65, "expert-unknown", "experts.3",
    ),
    "fewer experts than config says": (
        lambda r: edit_json(r / "config.json", lambda c: c.update(n_routed_experts=5)), 65, "expert-missing", "experts.4",
    ),
    "an expert's scale missing": (
        lambda r: rename_tensor(r, f"{EXPERT}.scale", f"{EXPERT}.other"), 65, "expert-missing", f"{EXPERT}.scale",
    ),
    "another width": (
        lambda r: edit_json(r / "config.json", lambda c: c.update(moe_intermediate_size=256)), 65, "expert-format", EXPERT,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", RELEASES)
def test_a_bad_release_is_refused_in_the_plan(tmp_path: Path, release: Path, case: str) -> None:
    damage, code, cause, place = RELEASES[case]
    damage(release)
    job = write_job(tmp_path / "job", release)
    for command in (("plan", job), ("run", job, "--stage", "export")):
        done = dsqjob(*command, code=code)
        assert error_id(done) == cause and place in done.stderr and "way out" in done.stderr
        assert "Traceback" not in done.stderr
    assert not (tmp_path / "job" / "out").exists()


@pytest.mark.parametrize("case", SHARDS)
def test_a_hostile_shard_is_refused_through_the_command_line(tmp_path: Path, release: Path, case: str) -> None:
    data, cause, name = SHARDS[case]
    (release / SECOND).write_bytes(data)
    done = dsqjob("plan", write_job(tmp_path / "job", release), code=65)
    assert error_id(done) == cause and SECOND in done.stderr and name in done.stderr and "Traceback" not in done.stderr


def test_a_base_release_is_refused_by_its_dtype(tmp_path: Path) -> None:
    write("deepseek-v4", tmp_path / "base", seed=1, layers=2, experts=4, ratios=(0, 4, 0), experts_dtype="fp8")
    done = dsqjob("plan", write_job(tmp_path / "job", tmp_path / "base"), code=65)
    assert error_id(done) == "release-fp8-base" and "experts.0.w1.weight" in done.stderr


@pytest.mark.parametrize("weights", ["cast", "requantize"])
def test_a_nan_scale_is_met_while_working_and_named(tmp_path: Path, release: Path, weights: str) -> None:
    raw = bytearray((release / SECOND).read_bytes())
    length = int.from_bytes(raw[:8], "little")
    table = json.loads(raw[8 : 8 + length])
    raw[8 + length + table[f"{EXPERT}.scale"]["data_offsets"][0]] = 255
    (release / SECOND).write_bytes(raw)
    done = dsqjob("run", write_job(tmp_path / "job", release, export__weights=weights), "--stage", "export", code=65)
    assert error_id(done) == "e8m0-nan" and f"{EXPERT}.scale" in done.stderr and SECOND in done.stderr
    assert not (tmp_path / "job" / "out" / SECOND).exists()
    assert not list((tmp_path / "job" / "out").glob("*.partial-*"))


def reference(folder: Path, **ranks: dict[str, Any]) -> Path:
    folder.mkdir(parents=True)
    for name, values in ranks.items():
        torch.save(values, folder / f"amax_dict_{name.replace('_', '-')}.pt")
    return folder


KEY = f"{EXPERT}_input_quantizer._amax"
AMAX: dict[str, tuple[Callable[[Path], Path], int, str, str]] = {
    "NaN": (lambda f: reference(f, rank0_mp1={KEY: torch.tensor(float("nan"))}), 65, "amax-value", KEY),
    "zero": (lambda f: reference(f, rank0_mp1={KEY: torch.tensor(0.0)}), 65, "amax-value", KEY),
    "negative": (lambda f: reference(f, rank0_mp1={KEY: torch.tensor(-1.0)}), 65, "amax-value", KEY),
    "mixed worlds": (
        lambda f: reference(f, rank0_mp1={KEY: torch.tensor(1.0)}, rank0_mp2={}), 65, "amax-mixed-worlds", "amax",
    ),
    "missing rank": (lambda f: reference(f, rank0_mp2={KEY: torch.tensor(1.0)}), 65, "amax-rank-missing", "rank1-mp2"),
    "not tensors": (lambda f: reference(f, rank0_mp1={KEY: "text"}), 65, "amax-pickle", "rank0-mp1"),
    "another key": (lambda f: reference(f, rank0_mp1={"head._amax": torch.tensor(1.0)}), 65, "amax-key", "head._amax"),
    "empty folder": (reference, 64, "amax-folder-empty", "amax"),
    "no folder": (lambda f: f, 64, "amax-folder-empty", "amax"),
}  # fmt: skip


@pytest.mark.parametrize("case", AMAX)
def test_bad_amax_are_refused_before_work(tmp_path: Path, small: Path, case: str) -> None:
    make, code, cause, place = AMAX[case]
    folder = make(tmp_path / "amax")
    job = write_job(tmp_path / "job", small, export__amax=folder, export__input_scale="calibrated")
    done = dsqjob("plan", job, code=code)
    assert error_id(done) == cause and place in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "job" / "out").exists()


def test_a_ledger_with_a_zero_or_nan_is_refused(tmp_path: Path, small: Path) -> None:
    Ledger({EXPERT: Row(float("nan"), 1.0)}).save(tmp_path / "amax" / LEDGER)
    job = write_job(tmp_path / "job", small, export__amax=tmp_path / "amax", export__input_scale="calibrated")
    done = dsqjob("plan", job, code=65)
    assert error_id(done) == "amax-value" and EXPERT in done.stderr


def test_a_foreign_output_folder_is_refused_and_untouched(tmp_path: Path, small: Path) -> None:
    (tmp_path / "job" / "out").mkdir(parents=True)
    (tmp_path / "job" / "out" / "theirs.txt").write_text("precious")
    done = dsqjob("run", write_job(tmp_path / "job", small), "--stage", "export", code=64)
    assert error_id(done) == "output-foreign"
    assert [path.name for path in (tmp_path / "job" / "out").iterdir()] == ["theirs.txt"]


def test_output_and_release_must_lie_apart(tmp_path: Path, release: Path) -> None:
    (tmp_path / "link").symlink_to(release)
    for output in (release, release / "nvfp4", release.parent, tmp_path / "link" / "x"):
        done = dsqjob("plan", write_job(tmp_path / "job", release, export__output=output), code=64)
        assert error_id(done) == "output-inside-release" and "export.output" in done.stderr
    done = dsqjob("plan", write_job(tmp_path / "job", release, workspace=release / "work"), code=64)
    assert error_id(done) == "output-inside-release" and "workspace" in done.stderr
    done = dsqjob("plan", write_job(tmp_path / "job", release, convert__output=release / "mp"), code=64)
    assert error_id(done) == "output-inside-release" and "convert.output" in done.stderr
    done = dsqjob("plan", write_job(tmp_path / "job", release, calibrate__output=release / "amax"), code=64)
    assert error_id(done) == "output-inside-release" and "calibrate.output" in done.stderr


def test_a_release_that_is_not_there(tmp_path: Path) -> None:
    done = dsqjob("plan", write_job(tmp_path / "job", tmp_path / "none"), code=65)
    assert error_id(done) == "release-missing"


def _job(change: Callable[[str], str]) -> Callable[[Path], tuple[object, ...]]:
    def damage(job: Path) -> tuple[object, ...]:
        job.write_text(change(job.read_text()))
        return ("plan", job)

    return damage


JOBS: dict[str, tuple[Callable[[Path], tuple[object, ...]], str, str, str]] = {
    "unknown key": (_job(lambda text: text + "exprot: {}\n"), "job-unknown-key", "exprot", "export"),
    "unknown key inside": (
        _job(lambda text: text.replace("input_scale:", "input_scael:")), "job-unknown-key", "export.input_scael", "input_scale",
    ),
    "doubled key": (_job(lambda text: text + "name: again\n"), "job-doubled-key", "job.yaml:", "remove"),
    "missing variable": (
        _job(lambda text: text.replace("release: ", "release: ${NOWHERE_SET}")), "variable-missing", "release", "NOWHERE_SET",
    ),
    "nodes that do not fill the gang": (
        _job(lambda text: text.replace("nodes: 1", "nodes: 3")), "job-invalid", "parallel", "schema",
    ),
    "nodes that do not divide": (lambda job: ("plan", job, "--nodes", 3), "nodes-divide", "--nodes", "--mp"),
    "no such job": (lambda job: ("plan", job.with_name("jbo.yaml")), "job-missing", "jbo.yaml", "readable job file"),
}  # fmt: skip


@pytest.mark.parametrize("case", JOBS)
def test_a_wrong_job_is_refused_through_the_command_line(tmp_path: Path, small: Path, case: str) -> None:
    damage, cause, place, help_word = JOBS[case]
    arguments = damage(write_job(tmp_path / "job", small))
    for command in (arguments, ("run", *arguments[1:])):
        done = dsqjob(*command, code=64)
        where, _, way_out = done.stderr.partition("way out")
        assert error_id(done) == cause and place in where and help_word in way_out + where
        assert "Traceback" not in done.stderr
    assert [path.name for path in (tmp_path / "job").iterdir()] == ["job.yaml"]
