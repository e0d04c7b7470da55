"""What supervisors tell each other, where a file that is no word of ours lies among theirs."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from dsqjob.gang.ending import Ending, Report
from dsqjob.gang.node import Limits, Node
from dsqjob.gang.peers import Peers
from tests.waiting import wait_until

LIMITS = Limits(rendezvous=10, silence=5)
GOOD = {"token": "t", "host": "h", "seen": {}, "asked": "", "report": None}
STRANGE = [
    [],
    {"version": 2},
    {**GOOD, "seen": 3},
    {**GOOD, "report": {"asked": "", "well": True, "endings": [{"another": "release"}]}},
    {**GOOD, "report": {"endings": []}},
    {**GOOD, "report": "done"},
]


def peers(folder: Path, index: int) -> Peers:
    return Peers(folder, Node(index, 2, 1, "127.0.0.1:1", "a", "job"), f"host{index}", LIMITS)


@pytest.mark.parametrize("word", STRANGE, ids=str)
def test_a_file_that_is_no_word_of_ours_says_nothing_and_stops_nobody(tmp_path: Path, word: object) -> None:
    here, there = peers(tmp_path, 0), peers(tmp_path, 1)
    here.open(bool)
    try:
        (tmp_path / "node1.json").write_text(json.dumps(word))
        wait_until(lambda: here.told)
        time.sleep(1)  # two looks
        assert here.missing == [1] and not here.reports
        there.open(bool)
        wait_until(lambda: here.hosts == {1: "host1"} and there.hosts == {0: "host0"})
        there.publish(Report("SIGTERM", (Ending(75, rank=1),), well=False))
        wait_until(lambda: here.reports)
        assert here.reports[1].endings[0].code == 75 and here.reports[1].asked == "SIGTERM"
    finally:
        here.close()
        there.close()


def test_of_two_at_once_with_the_same_number_the_first_writer_leaves(tmp_path: Path) -> None:
    """Both looked before either wrote."""
    first, second = peers(tmp_path, 1), peers(tmp_path, 1)
    second.open(bool)
    (tmp_path / "node1.json").unlink()
    first.open(bool)
    try:
        wait_until(lambda: second.twice)
        assert "node 1 of attempt a is at work already, on host1" in str(second.twice)
        second.publish(Report())
        assert second.told and first.twice is None
        wait_until(lambda: first.told)
        assert not first.reports
    finally:
        first.close()
        second.close()
