"""TERM, INT and USR2 end a gang with 75 on all nodes, whenever they come."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import pytest

from tests.gang.gangs import Gang
from tests.waiting import wait_until

Make = Callable[..., Gang]
SOON = 10.0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2], ids=lambda one: one.name)
def test_signal_to_one_supervisor(gang: Make, number: signal.Signals) -> None:
    """Ranks of both nodes end at their next look, some of them inside collectives of those that are gone."""
    made = gang("reduce", 2, 2 if number == signal.SIGTERM else 1, as_host=True).start().ready()
    made.signal(1, number)
    for line in made.ends(75, within=SOON):
        assert line == f"[interrupted] stopped by {number.name} on host1 (node 1)"


def test_rank_that_does_not_look(gang: Make) -> None:
    """It is killed after the grace, although it ignores SIGTERM."""
    made = gang("deaf", 2, 1, limits={"grace": 2.0}).start().ready()
    begun = time.monotonic()
    made.signal(0, signal.SIGTERM)
    made.ends(75, within=SOON)
    assert time.monotonic() - begun > 2


def test_signal_to_all_processes(gang: Make) -> None:
    """As a terminal's Ctrl-C, or a scheduler that signals every process."""
    made = gang("reduce", 1, 2).start().ready()
    for pid in made.supervisors[0].processes():
        os.kill(pid, signal.SIGINT)
    made.ends(75, within=SOON)
    made = gang("reduce", 1, 2).start().ready()
    for pid in made.supervisors[0].processes():
        os.kill(pid, signal.SIGTERM)
    made.ends(75, within=SOON)


def test_two_signals(gang: Make) -> None:
    made = gang("reduce", 2, 1).start().ready()
    for _ in range(3):
        for index in (0, 1):
            made.signal(index, signal.SIGUSR2)
            made.signal(index, signal.SIGTERM)
    made.ends(75, within=SOON)


def test_signal_while_a_node_is_awaited(gang: Make) -> None:
    made = gang("sum", 2, 1).start([0])
    wait_until((made.folder / "shared").exists)
    time.sleep(0.5)
    made.signal(0, signal.SIGTERM)
    made.ends(75, within=5)


def test_signal_at_any_instant(gang: Make) -> None:
    """While nodes gather, elastic joins them, ranks are forked and meet: within seconds, whatever the grace."""
    delays = [0.05, 0.4, 0.7, 1.0, 1.3, 1.6, 2.0, 2.5]
    made = [gang("reduce", 2, 1, limits={"grace": 20.0}) for _ in delays]
    for one, delay in zip(made, delays, strict=True):
        one.start()
        time.sleep(delay)
        one.signal(0, signal.SIGTERM)
    for one in made:
        one.ends(75, within=SOON)


def test_signal_and_the_other_supervisor_is_gone(gang: Make) -> None:
    made = gang("load", 2, 1, limits={"silence": 60.0, "grace": 1.0}).start().ready()
    made.supervisors[1].kill_all()
    made.signal(0, signal.SIGTERM)
    made.ends(75, within=SOON, nodes=[0])


def test_supervisor_that_hangs(gang: Make) -> None:
    """A supervisor whose main thread hangs leaves, with its ranks, some seconds after their grace."""
    made = gang("load", 1, 2, limits={"grace": 0.5}, hang_main=0).start().ready()
    wait_until((made.folder / "hung").exists)
    made.signal(0, signal.SIGTERM)
    made.ends(75, within=6)
