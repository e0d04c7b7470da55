"""export and finalize: equal to the goldens, the same bytes for any number of workers, papers that tell the truth."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest

from dsqjob.amax.ledger import LEDGER, Ledger, Row
from dsqjob.amax.reference_import import read_files
from tests.harness import Tensor, digests, dsqjob, error_id, events, read_checkpoint, read_shard, worker, write_job

RATIO = np.float32(2688)


def export(folder: Path, release: Path, **settings: object) -> Path:
    job = write_job(folder, release, **settings)
    dsqjob("run", job, "--stage", "export", "--through", "finalize")
    return folder / "out"


def from_goldens(folder: Path, golden: Path, weights: str) -> Path:
    return export(
        folder,
        golden / "release",
        export__amax=golden / "amax-mp2",
        export__input_scale="calibrated",
        export__weights=weights,
    )


def same_but_for_zero_signs(a: Tensor, b: Tensor) -> bool:
    x, y = np.frombuffer(a.data, np.uint8), np.frombuffer(b.data, np.uint8)
    codes = np.stack([x & 15, x >> 4, y & 15, y >> 4])
    differ = codes[:2] != codes[2:]
    return bool(((codes[:2][differ] | 8) == 8).all() and ((codes[2:][differ] | 8) == 8).all())


def test_requantize_equals_the_reference(tmp_path: Path, golden: Path) -> None:
    made = read_checkpoint(from_goldens(tmp_path, golden, "requantize"))
    expected = read_checkpoint(golden / "nvfp4-requantize")
    assert made.keys() == expected.keys()
    assert [name for name in expected if made[name] != expected[name]] == []


def test_cast_equals_the_reference_but_for_the_sign_of_zero(tmp_path: Path, golden: Path) -> None:
    folder = from_goldens(tmp_path, golden, "cast")
    made, expected = read_checkpoint(folder), read_checkpoint(golden / "nvfp4-cast")
    assert made.keys() == expected.keys()
    differ = [name for name in expected if made[name] != expected[name]]
    assert all(name.endswith("weight") and same_but_for_zero_signs(made[name][1], expected[name][1]) for name in differ)
    release = read_checkpoint(golden / "release")
    unchanged = [name for name in differ if made[name][1].data == release[name][1].data]
    assert len(differ) - len(unchanged) <= 2  # the two projections with a block outside the window


def test_configs_equal_the_reference_but_for_the_producers_version(tmp_path: Path, golden: Path) -> None:
    folder = from_goldens(tmp_path, golden, "cast")
    for name in ("config.json", "hf_quant_config.json"):
        made, expected = (json.loads((root / name).read_text()) for root in (folder, golden / "nvfp4-cast"))
        for config in (made, expected):
            producer = config.get("producer") or config["quantization_config"]["producer"]
            assert producer["name"] == "modelopt"
            del producer["version"]
        assert made == expected


def test_the_lossless_count_comes_from_the_records(tmp_path: Path, golden: Path) -> None:
    job = write_job(tmp_path, golden / "release")
    done = dsqjob("run", job, "--stage", "export", "--through", "finalize")
    assert "[cast] lossless MXFP4->NVFP4 blocks: 73726/73728 (99.9973%)" in done.stdout
    again = dsqjob("run", job, "--stage", "export", "--through", "finalize")
    assert "[cast] lossless MXFP4->NVFP4 blocks: 73726/73728 (99.9973%)" in again.stdout
    assert json.loads((tmp_path / "out" / "dsqjob.json").read_text())["cast"] == {"blocks": 73728, "lossless": 73726}


def test_the_ledger_and_the_references_files_give_the_same_checkpoint(tmp_path: Path, golden: Path) -> None:
    reference = from_goldens(tmp_path / "a", golden, "requantize")
    read_files(sorted((golden / "amax-mp2").glob("*.pt"))).save(tmp_path / "ledger" / LEDGER)
    ours = export(
        tmp_path / "b",
        golden / "release",
        export__amax=tmp_path / "ledger",
        export__input_scale="calibrated",
        export__weights="requantize",
    )
    a, b = digests(reference), digests(ours)
    assert {name for name in a if name.endswith(".safetensors")} <= b.keys()
    assert [name for name in a if name.endswith(".safetensors") and a[name] != b[name]] == []


def test_input_scale_one_needs_no_amax(tmp_path: Path, miniature: Path) -> None:
    made = read_checkpoint(export(tmp_path, miniature))
    scales = {tensor.data for name, (_, tensor) in made.items() if name.endswith(".input_scale")}
    assert scales == {struct.pack("<f", 1.0)}
    assert len([name for name in made if name.endswith(".input_scale")]) == 4 * 16 * 3


def test_the_cast_keeps_bytes_and_pairs_w1_with_w3_across_shards(tmp_path: Path, miniature: Path) -> None:
    made, source = read_checkpoint(export(tmp_path, miniature)), read_checkpoint(miniature)
    changed = [
        name
        for name, (shard, tensor) in made.items()
        if name in source and (source[name][0] != shard or source[name][1].data != tensor.data)
    ]
    assert changed == ["layers.2.ffn.experts.3.w2.weight"]  # the one with blocks that do not survive
    for layer, expert in ((3, 7), (2, 5), (0, 0)):
        paths = [f"layers.{layer}.ffn.experts.{expert}.{kind}" for kind in ("w1", "w3")]
        largest = max(int(source[f"{path}.scale"][1].bytes_2d().max()) for path in paths) - 127
        for path in paths:
            assert made[f"{path}.weight_scale_2"][1].data == struct.pack("<f", 2.0 ** (largest - 8))
    assert source["layers.3.ffn.experts.7.w1.weight"][0] != source["layers.3.ffn.experts.7.w3.weight"][0]


@pytest.mark.parametrize("weights", ["cast", "requantize"])
def test_any_number_of_workers_gives_the_same_bytes(tmp_path: Path, miniature: Path, weights: str) -> None:
    one = export(tmp_path / "1", miniature, export__weights=weights)
    many = export(tmp_path / "3", miniature, export__weights=weights, launcher__workers=3, memory="2GiB")
    assert digests(one) == digests(many)


def test_requantize_without_amax_equals_requantize_with_derived_ones(tmp_path: Path, miniature: Path) -> None:
    """A weight amax equals the largest dequantized magnitude, so measuring and deriving give the same bytes."""
    derived = read_checkpoint(export(tmp_path / "derived", miniature, export__weights="requantize"))
    source = read_checkpoint(miniature)
    magnitude = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    rows = {}
    for name in source:
        if name.startswith("layers.") and ".experts." in name and name.endswith(".weight"):
            path = name.removesuffix(".weight")
            packed, scale = source[name][1].bytes_2d(), source[f"{path}.scale"][1].bytes_2d()
            codes = np.stack([packed & 7, (packed >> 4) & 7], -1).reshape(len(packed), -1)
            values = magnitude[codes] * np.exp2(scale.astype(float) - 127).repeat(32, 1)
            rows[path] = Row(1.0, float(values.max()))
    Ledger(rows).save(tmp_path / "ledger" / LEDGER)
    measured = read_checkpoint(
        export(
            tmp_path / "measured",
            miniature,
            export__amax=tmp_path / "ledger",
            export__input_scale="calibrated",
            export__weights="requantize",
        )
    )
    differ = {name for name in derived if derived[name] != measured[name] and not name.endswith("input_scale")}
    assert differ == set()
    assert measured["layers.0.ffn.experts.0.w1.input_scale"][1].data == (np.float32(1) / RATIO).tobytes()


def test_fallbacks_are_named_in_the_papers(tmp_path: Path, golden: Path) -> None:
    folder = from_goldens(tmp_path, golden, "cast")
    names = json.loads((folder / "dsqjob.json").read_text())["amax"]["fallback_inputs"]
    assert len(names) == 6 and all(".experts." in name for name in names)
    assert "6 projections saw no token" in (folder / "README.md").read_text()


def test_the_index_names_what_exists_and_its_size_is_true(tmp_path: Path, miniature: Path) -> None:
    folder = export(tmp_path, miniature)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    made = read_checkpoint(folder)
    assert index["weight_map"] == {name: shard for name, (shard, _) in made.items()}
    assert index["metadata"]["total_size"] == sum(len(tensor.data) for _, tensor in made.values())


def test_checksums_cover_everything_but_themselves(tmp_path: Path, miniature: Path) -> None:
    folder = export(tmp_path, miniature)
    lines = dict(reversed(line.split("  ", 1)) for line in (folder / "SHA256SUMS").read_text().splitlines())
    assert lines == {name: value for name, value in digests(folder).items() if name != "SHA256SUMS"}
    reads = [event for event in events(tmp_path / "work") if event["event"] == "unit" and event["stage"] == "finalize"]
    assert len(reads) == 1


def test_side_files_come_along_as_copies(tmp_path: Path, miniature: Path) -> None:
    folder = export(tmp_path, miniature)
    for name in ("tokenizer.json", "LICENSE", "encoding/encoding.py", "inference/config.json"):
        assert (folder / name).read_bytes() == (miniature / name).read_bytes()
        assert (folder / name).stat().st_ino != (miniature / name).stat().st_ino
        assert (folder / name).stat().st_nlink == 1
    assert "Its weights mean nothing" not in (folder / "README.md").read_text()
    assert not [path for path in folder.rglob("*") if "partial" in path.name or path.name.startswith(".")]


def test_stale_files_of_the_release_stay_behind(tmp_path: Path, miniature: Path) -> None:
    release = tmp_path / "release"
    shutil.copytree(miniature, release)
    for folder in (release, *release.rglob("*")):
        folder.chmod(0o755)
    (release / "consolidated.safetensors").write_bytes(b"stale")
    (release / ".cache" / "huggingface").mkdir(parents=True)
    (release / ".cache" / "huggingface" / "x.metadata").write_text("x")
    (release / "inference" / "__pycache__").mkdir()
    (release / "inference" / "__pycache__" / "model.pyc").write_bytes(b"x")
    folder = export(tmp_path, release)
    made = set(digests(folder))
    assert not {name for name in made if "cache" in name or name.startswith("consolidated")}


def test_files_have_the_umasks_mode(tmp_path: Path, miniature: Path) -> None:
    folder = export(tmp_path, miniature)
    assert {path.stat().st_mode & 0o777 for path in folder.rglob("*") if path.is_file()} == {0o644}


def test_a_shards_metadata_is_kept(tmp_path: Path, miniature: Path) -> None:
    for path in export(tmp_path, miniature).glob("*.safetensors"):
        raw = path.read_bytes()
        header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
        assert header["__metadata__"] == {"format": "pt"}


def test_a_finished_stage_is_recognised(tmp_path: Path, miniature: Path) -> None:
    job = write_job(tmp_path, miniature)
    dsqjob("run", job, "--stage", "export", "--through", "finalize")
    before = len(list(events(tmp_path / "work")))
    done = dsqjob("run", job, "--stage", "export", "--through", "finalize")
    assert done.stdout.count("already done") == 2
    assert len(list(events(tmp_path / "work"))) == before


def test_export_runs_without_torch(tmp_path: Path, miniature: Path, base_python: Path) -> None:
    job = write_job(tmp_path, miniature, export__weights="requantize")
    import subprocess

    command = [base_python, "-X", "importtime", *worker("export", job)[1:]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "numba" in imported and not imported & {"torch", "modelopt", "safetensors", "transformers"}


def test_a_layer_without_amax_is_refused_unless_named(tmp_path: Path, golden: Path) -> None:
    ledger = read_files(sorted((golden / "amax-mp2").glob("*.pt")))
    rows = {name: row for name, row in ledger.rows.items() if not name.startswith("layers.1.")}
    Ledger(rows).save(tmp_path / "ledger" / LEDGER)
    settings = {"export__amax": tmp_path / "ledger", "export__input_scale": "calibrated"}
    job = write_job(tmp_path, golden / "release", **settings)
    done = dsqjob("plan", job, code=65)
    assert error_id(done) == "amax-layer-missing" and "layers.1.ffn.experts" in done.stderr
    job = write_job(tmp_path, golden / "release", **settings, export__allow_uncalibrated=["layers.1.ffn.experts"])
    dsqjob("run", job, "--stage", "export")


@pytest.mark.parametrize("sampled", [True, False])
def test_amax_smaller_than_the_weights_are_refused(tmp_path: Path, golden: Path, sampled: bool) -> None:
    """By the sample that is taken before the work, or in the work."""
    rows = dict(sorted(read_files(sorted((golden / "amax-mp2").glob("*.pt"))).rows.items()))
    names = [name for name, row in rows.items() if row.weight_amax]
    first = {names[(n * len(names) // 8 + n) % len(names)] for n in range(8)}
    for name in names:
        if name.endswith(".w2") and (name in first) == sampled:
            rows[name] = rows[name]._replace(weight_amax=(rows[name].weight_amax or 0) / 2)
    Ledger(rows).save(tmp_path / "ledger" / LEDGER)
    job = write_job(
        tmp_path,
        golden / "release",
        export__amax=tmp_path / "ledger",
        export__input_scale="calibrated",
        export__weights="requantize",
    )
    done = dsqjob("run", job, "--stage", "export", code=65)
    assert error_id(done) == ("amax-other-weights" if sampled else "amax-too-small")
    assert not list((tmp_path / "out").glob("*partial*"))


def test_provenance_names_release_amax_and_code(tmp_path: Path, miniature: Path) -> None:
    folder = export(tmp_path, miniature)
    papers = json.loads((folder / "dsqjob.json").read_text())
    index = (miniature / "model.safetensors.index.json").read_bytes()
    assert papers["release"]["index"] == hashlib.sha256(index).hexdigest()
    assert papers["input_scale"] == "one" and papers["weights"] == "cast" and papers["amax"] is None
    names = sorted(path.name for path in (miniature / "inference").glob("*.py"))
    assert sorted(papers["vendor_code"]) == names


def test_shard_bytes_are_what_the_plan_said(tmp_path: Path, miniature: Path) -> None:
    job = write_job(tmp_path, miniature)
    planned = dsqjob("plan", job).stdout
    dsqjob("run", job, "--stage", "export", "--through", "finalize")
    total = sum(len(t.data) for path in (tmp_path / "out").glob("*.safetensors") for t in read_shard(path).values())
    assert f"tensors take {total:,} bytes" in planned


def test_a_kill_before_the_index_leaves_no_checkpoint(tmp_path: Path, miniature: Path) -> None:
    """The index is the commit: while it is missing, verify calls the folder unfinished."""
    folder = export(tmp_path, miniature)
    (folder / "model.safetensors.index.json").unlink()
    done = dsqjob("verify", folder, code=65)
    assert "unfinished" in done.stdout
    dsqjob("run", tmp_path / "job.yaml", "--stage", "export", "--through", "finalize")
    dsqjob("verify", folder)
