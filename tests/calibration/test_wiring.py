"""The vendor's model under our quantizers, against its own forward and against plain arithmetic."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.harness import worker, write_job
from tests.warm import Warm

PROGRAMS = "tests.calibration.programs"


def test_the_loop_over_blocks_equals_the_vendors_forward(warm: Warm, tmp_path: Path, miniature: Path) -> None:
    warm.call(f"{PROGRAMS}:blocks_equal_the_vendors_forward", str(miniature), said=tmp_path / "said")


def test_a_quantized_expert_computes_what_the_vendors_does(warm: Warm, tmp_path: Path, miniature: Path) -> None:
    warm.call(f"{PROGRAMS}:experts_equal_the_vendors", str(miniature), said=tmp_path / "said")


@pytest.mark.parametrize("cursor", range(5))
def test_measuring_resumes_at_any_batch(warm: Warm, tmp_path: Path, small: Path, cursor: int) -> None:
    warm.call(f"{PROGRAMS}:resuming_equals_one_run", str(small), cursor, said=tmp_path / "said")


def test_weights_are_the_values_of_their_formats(warm: Warm, tmp_path: Path, miniature: Path) -> None:
    warm.call(f"{PROGRAMS}:weights_are_their_formats_values", str(miniature), said=tmp_path / "said")


@pytest.mark.parametrize("rank", [0, 1])
def test_slices_of_the_release_fill_a_rank_as_our_files_do(warm: Warm, tmp_path: Path, small: Path, rank: int) -> None:
    subprocess.run(worker("convert", write_job(tmp_path, small)), check=True, capture_output=True, timeout=120)
    program = f"{PROGRAMS}:both_sources_fill_the_same"
    warm.call(program, str(small), str(tmp_path / "work" / "mp"), rank, 2, said=tmp_path / "said")


@pytest.mark.parametrize("rank", [0, 1])
def test_slices_of_the_release_fill_a_rank_as_the_vendors_files_do(
    warm: Warm, tmp_path: Path, golden: Path, golden_release: Path, rank: int
) -> None:
    program = f"{PROGRAMS}:both_sources_fill_the_same"
    warm.call(program, str(golden_release), str(golden / "mp2"), rank, 2, said=tmp_path / "said")


def test_a_nan_names_the_expert(warm: Warm, tmp_path: Path, miniature: Path) -> None:
    warm.call(f"{PROGRAMS}:nan_names_the_expert", str(miniature), said=tmp_path / "said")


def test_code_and_weights_of_other_models_are_refused(warm: Warm, tmp_path: Path, miniature: Path) -> None:
    warm.call(f"{PROGRAMS}:wrong_models_are_refused", str(miniature), str(tmp_path), said=tmp_path / "said")


def test_another_module_in_the_vendors_place_is_refused(warm: Warm, tmp_path: Path, small: Path) -> None:
    program = f"{PROGRAMS}:another_module_of_that_name_is_refused"
    warm.call(program, str(small), str(tmp_path), said=tmp_path / "said")
