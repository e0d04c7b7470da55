"""What a calibration leaves: files that the reference and ours read alike, coverage, pictures; from every source."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from dsqjob.amax.ledger import LEDGER, load_ledger
from dsqjob.amax.reference_import import read_files
from dsqjob.miniature import write
from tests.calibration.gangs import Gang, amax_of, calibration_job
from tests.harness import digests, dsqjob, error_id, worker, write_job
from tests.warm import Warm

EXPERTS = [f"layers.{layer}.ffn.experts.{expert}" for layer in range(2) for expert in range(4)]


@pytest.fixture(scope="session")
def golden_run(
    tmp_path_factory: pytest.TempPathFactory, warm: Warm, golden: Path, golden_release: Path, golden_tokens: Path
) -> Path:
    """Folder of a job that calibrated the golden release on two ranks."""
    folder = tmp_path_factory.mktemp("golden-run")
    Gang(warm, calibration_job(folder, golden_release, golden_tokens, (1, 2)), 1).end(0)
    return folder


@pytest.fixture(scope="session")
def golden_tokens(tmp_path_factory: pytest.TempPathFactory, golden: Path) -> Path:
    """A few of the golden tokens, where a job looks for them."""
    from safetensors.numpy import load_file, save_file

    folder = tmp_path_factory.mktemp("golden-tokens")
    save_file({"input_ids": load_file(golden / "tokens.safetensors")["input_ids"][:4]}, folder / "tokens.safetensors")
    return folder


def rank_files(folder: Path) -> list[Path]:
    return [folder / "work" / "amax" / f"amax_dict_rank{rank}-mp2.pt" for rank in (0, 1)]


def test_our_model_parallel_files_give_the_same_amax_as_the_release(
    warm: Warm, tmp_path: Path, small: Path, small_tokens: Path, calm: Path
) -> None:
    settings = {"calibrate__source": "mp", "calibrate__batch_size": 1}
    job = calibration_job(tmp_path, small, small_tokens, (1, 2), **settings)
    subprocess.run(worker("convert", job), check=True, capture_output=True, timeout=120)
    Gang(warm, job, 1).end(0)
    assert amax_of(tmp_path) == amax_of(calm)


def test_the_vendors_model_parallel_files_give_the_same_amax_as_the_release(
    warm: Warm, tmp_path: Path, golden: Path, golden_release: Path, golden_tokens: Path, golden_run: Path
) -> None:
    settings = {"calibrate__source": "mp", "calibrate__mp_checkpoint": golden / "mp2"}
    Gang(warm, calibration_job(tmp_path, golden_release, golden_tokens, (1, 2), **settings), 1).end(0)
    assert amax_of(tmp_path) == amax_of(golden_run)


def test_the_manifest_is_the_references_and_the_weights_are_too(golden: Path, golden_run: Path) -> None:
    """Inputs differ: the goldens' kernels are others than the miniature's."""
    name = "quantized_layers_manifest.json"
    assert (golden_run / "work" / "amax" / name).read_bytes() == (golden / "amax-mp2" / name).read_bytes()
    ours, theirs = read_files(rank_files(golden_run)).rows, read_files(sorted((golden / "amax-mp2").glob("*.pt"))).rows
    common = ours.keys() & theirs.keys()
    assert len(common) > 0.8 * len(theirs)
    assert {name: ours[name].weight_amax for name in common} == {name: theirs[name].weight_amax for name in common}


def test_the_dictionaries_hold_bf16_scalars_of_reached_experts_and_give_the_ledgers_values(golden_run: Path) -> None:
    ledger = load_ledger(golden_run / "work" / "amax" / LEDGER)
    reached = {name for name, row in ledger.rows.items() if row.tokens}
    assert reached and len(reached) < len(ledger.rows)  # the golden release has an expert that sees no token
    seen = set()
    for path in rank_files(golden_run):
        for key, value in torch.load(path, weights_only=True).items():
            assert value.dtype == torch.bfloat16 and value.shape == () and value.device.type == "cpu"
            seen.add(key)
    assert seen == {f"{name}_{what}_quantizer._amax" for name in reached for what in ("input", "weight")}
    for name, row in read_files(rank_files(golden_run)).rows.items():
        assert row[:2] == ledger.rows[name][:2]


def test_the_summary_lists_every_quantizer_of_all_ranks_once(calm: Path) -> None:
    *lines, last = (calm / "work" / "amax" / ".quant_summary.txt").read_text().splitlines()
    names = [line.split(maxsplit=1)[0] for line in lines]
    assert len(set(names)) == len(names) and last == f"{len(lines)} TensorQuantizers found in model"
    for expert in EXPERTS:
        for kind in ("w1", "w2", "w3"):
            for what in ("input", "weight"):
                assert f"{expert}.{kind}_{what}_quantizer" in names
    shared = [line for line in lines if "shared_experts" in line or line.startswith("mtp.")]
    assert shared and all("disabled" in line for line in shared)
    routed = [line for line in lines if line.startswith(tuple(EXPERTS))]
    assert len(routed) == 6 * len(EXPERTS) and not any("disabled" in line for line in routed)


def test_coverage_names_the_experts_without_tokens_and_the_pictures_are_drawn(golden_run: Path) -> None:
    folder = golden_run / "work" / "amax"
    found = json.loads((folder / "coverage.json").read_text())
    rows = load_ledger(folder / LEDGER).rows
    without = sorted({name.rpartition(".")[0] for name, row in rows.items() if not row.tokens})
    assert without and sorted(name for layer in found["layers"] for name in layer["unreached"]) == without
    assert found["totals"]["unreached"] == len(without)
    course = json.loads((folder / "convergence.json").read_text())
    assert [batch["batch"] for batch in course["batches"]] == [1] and course["verdict"]
    for name in ("coverage.svg", "convergence.svg"):
        text = (golden_run / "work" / "reports" / name).read_text()
        assert text.startswith("<?xml") and "<svg" in text and text.endswith("</svg>\n")


def test_amax_of_another_release_are_refused(tmp_path: Path, calm: Path) -> None:
    """Told apart by config, index and headers first."""
    other = tmp_path / "other"
    write("deepseek-v4", other, seed=3, layers=2, experts=4, ratios=(0, 4, 0), vocab=384)
    (other / "config.json").write_text(
        (other / "config.json").read_text().replace('"rope_theta": 10000', '"rope_theta": 20000')
    )
    settings = {"export__amax": calm / "work" / "amax", "export__input_scale": "calibrated"}
    done = dsqjob("plan", write_job(tmp_path / "job", other, **settings), code=65)
    assert error_id(done) == "amax-other-release" and "amax" in done.stderr


@pytest.mark.parametrize("dictionaries", [False, True])
def test_amax_of_other_weights_are_refused_before_anything_is_written(
    tmp_path: Path, calm: Path, dictionaries: bool
) -> None:
    """A release of the same shape passes for this one by its headers; recorded weight maxima tell, in ledger and in
    dictionaries, under the cast, which has no use for them."""
    other, amax = tmp_path / "other", calm / "work" / "amax"
    write("deepseek-v4", other, seed=4, layers=2, experts=4, ratios=(0, 4, 0), vocab=384)
    if dictionaries:
        amax = tmp_path / "plain"
        amax.mkdir()
        for path in rank_files(calm):
            shutil.copy(path, amax)
    settings = {"export__amax": amax, "export__input_scale": "calibrated"}
    job = write_job(tmp_path / "job", other, **settings)
    for command in (("plan", job), ("run", job, "--stage", "export")):
        done = dsqjob(*command, code=65)
        assert error_id(done) == "amax-other-weights", done.stderr
        assert "it saw other weights" in done.stderr and str(amax) in done.stderr
    assert not (tmp_path / "job" / "out").exists()


def test_the_ledger_and_our_dictionaries_export_the_same_checkpoint(tmp_path: Path, small: Path, calm: Path) -> None:
    """Calibrated input scales and amax of our own, by both ways into the export."""
    plain = tmp_path / "plain"
    plain.mkdir()
    for path in rank_files(calm):
        (plain / path.name).write_bytes(path.read_bytes())
    made = []
    for name, amax in (("ledger", calm / "work" / "amax"), ("dictionaries", plain)):
        settings = {"export__amax": amax, "export__input_scale": "calibrated", "export__weights": "requantize"}
        job = write_job(tmp_path / name, small, **settings)
        subprocess.run(worker("export", job), check=True, capture_output=True, timeout=120)
        made.append({k: v for k, v in digests(tmp_path / name / "out").items() if k.endswith(".safetensors")})
    assert made[0] == made[1] and made[0]
