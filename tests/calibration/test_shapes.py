"""The same files for every split of a model-parallel degree over nodes; the same weights at every degree."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsqjob.amax.ledger import LEDGER, load_ledger
from dsqjob.miniature import write
from tests.calibration.conftest import make_tokens
from tests.calibration.gangs import Gang, amax_of, calibration_job
from tests.warm import Warm


def calibrated(warm: Warm, folder: Path, release: Path, tokens: Path, shape: tuple[int, int], **settings: int) -> Path:
    Gang(warm, calibration_job(folder, release, tokens, shape, **settings), shape[0]).end(0)
    return folder


def weights(folder: Path) -> dict[str, float]:
    rows = load_ledger(folder / "work" / "amax" / LEDGER).rows
    return {name: row.weight_amax for name, row in rows.items() if row.weight_amax is not None}


def test_ranks_of_one_node_and_of_two_leave_the_same_files(
    warm: Warm, tmp_path: Path, small: Path, small_tokens: Path, calm: Path
) -> None:
    one = calibrated(warm, tmp_path, small, small_tokens, (1, 2), calibrate__batch_size=1)
    assert amax_of(one) == amax_of(calm)


def test_four_ranks_split_either_way_leave_the_same_files_and_every_degree_the_same_weights(
    warm: Warm, tmp_path: Path, small: Path, small_tokens: Path, calm: Path
) -> None:
    shapes = [(1, 1), (1, 4), (2, 2)]
    whole, one, two = (calibrated(warm, tmp_path / f"{s[0]}x{s[1]}", small, small_tokens, s) for s in shapes)
    assert amax_of(one) == amax_of(two)
    found = [weights(folder) for folder in (whole, one, calm)]
    for other in found[1:]:
        common = found[0].keys() & other.keys()
        assert len(common) >= 0.9 * len(found[0])
        assert {name: other[name] for name in common} == {name: found[0][name] for name in common}


def test_sixteen_ranks_on_two_nodes(warm: Warm, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The degree that 80 GB cards need, on a release whose heads, groups and experts it divides."""
    release = tmp_path / "release"
    shape = {"heads": 16, "o_groups": 16, "index_heads": 16, "experts": 16}
    write("deepseek-v4", release, seed=5, layers=1, ratios=(4, 0), vocab=512, **shape)
    make_tokens(tmp_path, release, samples=2)
    alone = calibrated(warm, tmp_path / "1", release, tmp_path / "tokens", (1, 1))
    many = calibrated(warm, tmp_path / "16", release, tmp_path / "tokens", (2, 8))
    found, expected = weights(many), weights(alone)
    common = found.keys() & expected.keys()
    assert len(common) >= 0.8 * len(expected)
    assert {name: found[name] for name in common} == {name: expected[name] for name in common}
    assert len(list((many / "work" / "amax").glob("amax_dict_rank*-mp16.pt"))) == 16
