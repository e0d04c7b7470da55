"""Gangs that end well: all shapes, our numbering, quiet."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.gang.gangs import Gang

Make = Callable[..., Gang]


@pytest.mark.parametrize(
    ("nodes", "ranks", "order"),
    [(1, 1, [0]), (1, 2, [0]), (1, 4, [0]), (2, 1, [0, 1]), (2, 2, [1, 0]), (3, 1, [2, 1, 0])],
    ids=lambda value: str(value).replace(" ", ""),
)
def test_ranks_add_up_under_our_numbers(gang: Make, nodes: int, ranks: int, order: list[int]) -> None:
    """Rank r lies on node r // ranks, in whatever order the nodes come."""
    made = gang("sum", nodes, ranks, port=0 if nodes == 1 else None).start(order, pause=0.3 if nodes > 1 else 0)
    assert made.ends(0, within=25) == ["well"] * nodes
    size = nodes * ranks
    total = size * (size + 1) // 2
    expected = [f"{total} {rank // ranks} {rank} {rank % ranks} {size}" for rank in range(size)]
    assert made.trace("sum") == expected
    for supervisor in made.supervisors.values():
        assert supervisor.said() == "well\n"
    for rank in range(size):
        assert len(made.log(rank).splitlines()) == 1, made.log(rank)


def test_a_node_that_ended_well_waits_for_the_others(gang: Make) -> None:
    """The store's server lives in a supervisor: that of node 0, whose ranks are done first, outlives the others."""
    made = gang("sum", 2, 1, linger=2.0).start()
    assert made.ends(0, within=25) == ["well", "well"]


def test_a_thread_that_is_left_behind(gang: Make) -> None:
    gang("leave_a_thread", 2, 1).start().ends(0, within=20)


def test_two_gangs_at_once(gang: Make) -> None:
    made = [gang("sum", 2, 1).start() for _ in range(2)]
    for one in made:
        one.ends(0, within=30)
        assert [line.split()[0] for line in one.trace("sum")] == ["3", "3"]


def test_the_same_attempt_again(gang: Make) -> None:
    """Files of an earlier start, which ended badly, neither end the new one nor count as an arrival."""
    first = gang("bug", 2, 1, "same", job="again").start()
    first.ends(70, within=20)
    late = gang("sum", 2, 1, "same", job="again")
    late.start_node(1)
    time.sleep(1.5)
    assert late.supervisors[1].processes()
    late.start_node(0)
    late.ends(0, within=25)


def test_a_killed_supervisor_and_a_quick_second_start(gang: Make) -> None:
    """The survivor of the first start does not end the second one."""
    first = gang("load", 2, 1, "same", job="quick", limits={"silence": 3.0}).start().ready()
    first.supervisors[0].kill_all()
    second = gang("sum", 2, 1, "same", job="quick")
    second.start_node(0)
    first.ends(69, within=20, nodes=[1])
    second.start_node(1)
    second.ends(0, within=25)


def test_a_node_that_is_started_twice(gang: Make) -> None:
    """The second process is refused; the gang does not notice it."""
    first = gang("load", 2, 1, "same", job="twice").start().ready()
    second = gang("sum", 2, 1, "same", job="twice")
    second.start_node(1)
    (line,) = second.ends(64, within=15)
    assert line.startswith("[node-twice] node 1 of attempt 0 is at work already, on "), line
    time.sleep(1.5)
    assert all(one.processes() for one in first.supervisors.values())
    first.signal(0, signal.SIGTERM)
    first.ends(75, within=10)


def test_nothing_is_left_in_the_temporary_folder(gang: Make, temporary: Path) -> None:
    gang("sum", 1, 2, port=0).start().ends(0, within=20)
    assert not list(temporary.iterdir())
