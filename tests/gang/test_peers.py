"""What supervisors tell each other, where a file that is no word of ours lies among theirs."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from dsqjob.errors import UsageError
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


def never() -> bool:
    return False


def peers(folder: Path, index: int) -> Peers:
    return Peers(folder, Node(index, 2, 1, "127.0.0.1:1", "a", "job"), f"host{index}", LIMITS)


@pytest.mark.parametrize("word", STRANGE, ids=str)
def test_a_file_that_is_no_word_of_ours_says_nothing_and_stops_nobody(tmp_path: Path, word: object) -> None:
    here, there = peers(tmp_path, 0), peers(tmp_path, 1)
    here.open(never)
    try:
        (tmp_path / "node1.json").write_text(json.dumps(word))
        wait_until(lambda: here.told)
        time.sleep(1)  # two looks
        assert here.missing == [1] and not here.reports
        there.open(never)
        wait_until(lambda: here.hosts == {1: "host1"} and there.hosts == {0: "host0"})
        there.publish(Report("SIGTERM", (Ending(75, rank=1),), well=False))
        wait_until(lambda: here.reports)
        assert here.reports[1].endings[0].code == 75 and here.reports[1].asked == "SIGTERM"
    finally:
        here.close()
        there.close()


@pytest.mark.parametrize("torn", [False, True])
def test_of_two_with_the_same_number_the_second_is_refused(tmp_path: Path, torn: bool) -> None:
    """Also where it comes while the first one writes, or after its last word."""
    first, second = peers(tmp_path, 1), peers(tmp_path, 1)
    first.open(never)
    try:
        first.publish(Report(well=True))
        wait_until(lambda: first.told)
        word = (tmp_path / "node1.json").read_text()
        if torn:
            (tmp_path / "node1.json").write_text(word[:40])
        with pytest.raises(UsageError, match="node 1 of attempt a is at work already, on ") as caught:
            second.open(never)
        assert caught.value.id == "node-twice" and not second.arrived
        assert first.twice is None and (tmp_path / "node1.json").read_text() == (word[:40] if torn else word)
    finally:
        first.close()


def test_after_a_killed_one_a_new_process_arrives_and_of_two_one_leaves(tmp_path: Path) -> None:
    """Both found that nobody touches the old file; the other's word is written last here."""
    (tmp_path / "node1.json").write_text(json.dumps(GOOD))
    given_up, here = peers(tmp_path, 1), peers(tmp_path, 1)
    given_up.open(lambda: True)
    assert not given_up.arrived
    here.open(never)
    try:
        assert here.arrived and here.twice is None and here.told
        (tmp_path / "node1.json").write_text(json.dumps({**GOOD, "host": "host9"}))
        wait_until(lambda: here.twice)
        assert "on host9" in str(here.twice)
        here.publish(Report())
        assert here.told and json.loads((tmp_path / "node1.json").read_text())["token"] == GOOD["token"]
    finally:
        here.close()


def test_a_word_that_was_swept_is_told_again(tmp_path: Path) -> None:
    """As of a node that stood still for long."""
    here = peers(tmp_path / "a", 0)
    here.open(never)
    try:
        (tmp_path / "a").rename(tmp_path / "swept")
        wait_until((tmp_path / "a" / "node0.json").exists)
        wait_until(lambda: here.told)
        assert here.twice is None
    finally:
        here.close()
