"""What a calibration leaves to look at: coverage and convergence, as data and as pictures."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from dsqjob.calibration.coverage import History, convergence, coverage, expected_growth, summary_lines
from dsqjob.calibration.pictures import draw_convergence, draw_coverage
from dsqjob.errors import UsageError

CONTAINERS = ["layers.3.ffn.experts", "layers.4.ffn.experts"]
SVG = "{http://www.w3.org/2000/svg}"


def history(
    tokens: Sequence[Sequence[int]], grown: Sequence[Sequence[int]], reached: Sequence[Sequence[int]], each: int = 10
) -> History:
    layers = len(tokens)
    return History(
        np.array(tokens, np.int64),
        np.array(grown, np.int32).reshape(-1, layers),
        np.array(reached, np.int32).reshape(-1, layers),
        np.full(len(grown), each, np.int64),
    )


def small() -> History:
    return history([[4, 0, 6, 10], [0, 20, 0, 0]], [[6, 3], [3, 0], [0, 0]], [[2, 1], [3, 1], [3, 1]])


def one_layer(grown: Sequence[int], experts: int = 10) -> History:
    """All experts reached in the first batch."""
    return history([[7] * experts], [[count] for count in grown], [[experts]] * len(grown))


def like_batches(layers: int, experts: int, batches: int) -> History:
    """Largest values of batches that are all drawn alike, and a few experts that nothing reaches."""
    random = np.random.default_rng(5)
    values = random.random((batches, layers, experts, 3))
    values[:, random.random((layers, experts)) < 0.002] = 0
    before = np.maximum.accumulate(np.concatenate([np.zeros_like(values[:1]), values]))[:-1]
    alive = values[0, ..., 0] > 0
    return History(
        np.where(alive, random.lognormal(6, 2, (layers, experts)).astype(np.int64) + 1, 0),
        (values > before).sum((2, 3)).astype(np.int32),
        np.broadcast_to(alive.sum(1), (batches, layers)).astype(np.int32),
        np.full(batches, 4096, np.int64),
    )


def words(path: Path) -> str:
    return "\n".join(node.text or "" for node in ElementTree.parse(path).iter(f"{SVG}text"))  # noqa: S314


def test_experts_without_a_token_are_named() -> None:
    found = coverage(small(), CONTAINERS)
    assert [layer["unreached"] for layer in found["layers"]] == [
        ["layers.3.ffn.experts.1"],
        ["layers.4.ffn.experts.0", "layers.4.ffn.experts.2", "layers.4.ffn.experts.3"],
    ]


def test_coverage_counts_tokens_and_slots() -> None:
    found = json.loads(json.dumps(coverage(small(), CONTAINERS)))
    first, second = found["layers"]
    assert (first["experts"], first["reached"], first["routed_slots"]) == (4, 3, 20)
    assert first["tokens"] == {"min": 0, "median": 5.0, "max": 10}
    assert first["busiest"] == {"expert": "layers.3.ffn.experts.3", "share_of_routed_slots": 0.5}
    assert second["busiest"] == {"expert": "layers.4.ffn.experts.1", "share_of_routed_slots": 1.0}
    assert found["totals"] == {
        "layers": 2,
        "experts": 8,
        "reached": 4,
        "reached_share": 0.5,
        "unreached": 4,
        "routed_slots": 40,
        "batches": 3,
        "tokens": 30,
    }


def test_containers_of_another_number_than_the_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="shorter"):
        coverage(small(), CONTAINERS[:1])


def test_convergence_follows_the_batches() -> None:
    found = json.loads(json.dumps(convergence(small())))
    assert found["batches"] == [
        {"batch": 1, "tokens": 10, "grown": 9, "reached": 3},
        {"batch": 2, "tokens": 20, "grown": 3, "reached": 4},
        {"batch": 3, "tokens": 30, "grown": 0, "reached": 4},
    ]
    assert found["last_growth"] == 2


@pytest.mark.parametrize(
    ("grown", "verdict"),
    [
        ([30] + [0] * 19, "would change little"),
        ([30] * 10 + [1] * 8 + [0, 0], "would change little"),
        ([30] * 18 + [2, 1], "go on raising some"),
        ([30] * 18 + [5, 5], "has not settled"),
        ([30], "1 batch cannot show"),
        ([], "0 batches cannot show"),
    ],
)
def test_the_verdict_weighs_the_last_tenth(grown: list[int], verdict: str) -> None:
    assert verdict in convergence(one_layer(grown))["verdict"]


def test_growth_in_the_last_tenth_is_bounded_by_the_projections() -> None:
    tail = convergence(one_layer([30] * 40))["tail"]
    assert (tail["batches"], tail["projections"], tail["grown"], tail["share_grown"]) == (4, 30, 30, 1.0)
    assert tail["chance"] == pytest.approx(0.1)


def test_first_tokens_in_the_last_tenth_are_told() -> None:
    late = history([[9] * 10], [[24], [3], [3]], [[8], [9], [10]])
    found = convergence(late)
    assert found["tail"]["experts_first_reached"] == 1
    assert "1 expert saw a first token" in found["verdict"]


def test_like_batches_grow_as_often_as_chance_says() -> None:
    made = like_batches(4, 64, 100)
    assert made.grown.sum() == pytest.approx(expected_growth(made).sum(), rel=0.05)
    tail = convergence(made)["tail"]
    assert tail["share_grown"] == pytest.approx(tail["chance"], abs=0.02)


def test_the_summary_is_short_and_names_some() -> None:
    lines = summary_lines(small(), CONTAINERS)
    assert 3 <= len(lines) <= 6
    assert "30 tokens in 3 batches" in lines[0]
    assert "4 of 8 routed experts saw no token, in 2 of 2 layers" in lines[1]
    assert "layers.3.ffn.experts.1, layers.4.ffn.experts.0" in lines[2]
    full = summary_lines(one_layer([30, 1]), CONTAINERS[:1])
    assert "all of 10 routed experts saw a token" in full
    many = history([[0] * 384], [[0]], [[0]])
    assert "and 380 more" in "\n".join(summary_lines(many, CONTAINERS[:1]))


def test_the_heat_map_counts_experts_without_a_token(tmp_path: Path) -> None:
    draw_coverage(small(), tmp_path / "a.svg", "t", CONTAINERS)
    text = words(tmp_path / "a.svg")
    assert "4 of 8 routed experts saw no token, in 2 of 2 layers" in text
    assert {"no token", "layer", "expert", "tokens"} <= set(text.split("\n"))
    assert [path.name for path in tmp_path.iterdir()] == ["a.svg"]
    draw_coverage(one_layer([30]), tmp_path / "b.svg", "t")
    assert "no token" not in words(tmp_path / "b.svg").split("\n")


def test_the_heat_map_numbers_layers_as_the_release_does(tmp_path: Path) -> None:
    made = like_batches(61, 384, 2)
    draw_coverage(made, tmp_path / "a.svg", "t", [f"layers.{layer}.ffn.experts" for layer in range(3, 64)])
    text = words(tmp_path / "a.svg").split("\n")
    assert {"5", "60", "32", "352"} <= set(text)
    assert f"{int((made.tokens == 0).sum()):,} of 23,424 routed experts saw no token" in "\n".join(text)
    assert (tmp_path / "a.svg").stat().st_size < 300_000


def test_the_convergence_picture_tells_both_curves(tmp_path: Path) -> None:
    draw_convergence(small(), tmp_path / "a.svg", "t")
    text = words(tmp_path / "a.svg")
    assert "Projections whose input amax grew, of 24" in text
    assert "Experts reached: 4 of 8 routed experts saw no token" in text


DRAWINGS: list[Callable[[History, Path, str], None]] = [draw_coverage, draw_convergence]


@pytest.mark.parametrize("draw", DRAWINGS)
def test_the_same_data_gives_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, draw: Callable[[History, Path, str], None]
) -> None:
    import matplotlib

    draw(small(), tmp_path / "a.svg", "t")
    monkeypatch.setitem(matplotlib.rcParams, "font.size", 20)
    draw(small(), tmp_path / "b.svg", "another")
    assert matplotlib.rcParams["font.size"] == 20
    code = (
        "import sys; from pathlib import Path\n"
        "from dsqjob.calibration import pictures; from tests.calibration.test_coverage import small\n"
        f"pictures.{draw.__name__}(small(), Path(sys.argv[1]), 't')"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "c.svg")], check=True, cwd=Path(__file__).parents[2])
    data = (tmp_path / "a.svg").read_bytes()
    assert data == (tmp_path / "b.svg").read_bytes() == (tmp_path / "c.svg").read_bytes()
    assert b"dc:date" not in data


@pytest.mark.parametrize("draw", DRAWINGS)
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("case", ["no batch", "one of all", "equal counts"])
def test_the_smallest_histories_can_be_drawn(
    tmp_path: Path, draw: Callable[[History, Path, str], None], case: str
) -> None:
    made = {
        "no batch": history([[0] * 16] * 4, [], []),
        "one of all": history([[1]], [[3]], [[1]]),
        "equal counts": one_layer([30, 0]),
    }[case]
    draw(made, tmp_path / "a.svg", "t")
    ElementTree.parse(tmp_path / "a.svg")  # noqa: S314


@pytest.mark.parametrize("draw", DRAWINGS)
def test_without_matplotlib_the_way_out_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, draw: Any) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UsageError) as caught:
        draw(small(), tmp_path / "a.svg", "t")
    assert (caught.value.id, caught.value.way_out) == ("plot-missing", "pip install 'dsqjob[worker]'")
    assert list(tmp_path.iterdir()) == []


def test_coverage_needs_neither_torch_nor_matplotlib() -> None:
    code = (
        "import sys, dsqjob.calibration.coverage, dsqjob.calibration.pictures\n"
        "sys.exit(len({'torch', 'matplotlib'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
