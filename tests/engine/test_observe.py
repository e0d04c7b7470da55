"""Status is a function of the events."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dsqjob.engine.events import EventLog, read_events
from dsqjob.engine.observe import observe


def event(time: float, kind: str, **fields: Any) -> dict[str, Any]:
    return {"time": time, "event": kind, "worker": "export-0/1", "host": "h", "stage": "export", **fields}


BEGIN = event(0, "stage", units=3, bytes=300, fingerprint="f")


def test_progress_rate_and_time_left() -> None:
    seen = observe(
        [BEGIN, event(0, "unit", unit="a"), event(10, "unit-done", unit="a", bytes=100, seconds=10),
         event(10, "unit", unit="b"), event(15, "progress", unit="b", bytes=50)], now=20)["export"]  # fmt: skip
    assert (seen.state, seen.units_done, seen.units, seen.bytes_done) == ("running", 1, 3, 150)
    assert seen.rate == 5.0 and seen.seconds_left == 30.0 and seen.workers == ["export-0/1 on h"]


def test_a_unit_done_twice_counts_once_and_another_run_goes_on() -> None:
    done = event(1, "unit-done", unit="a", bytes=100, seconds=1)
    seen = observe([BEGIN, done, event(2, "stage", units=3, bytes=300, fingerprint="f"), {**done, "time": 3}], 4)
    assert seen["export"].units_done == 1


def test_states() -> None:
    assert observe([BEGIN], 1000)["export"].state == "quiet"
    failed = observe([BEGIN, event(1, "error", id="x", what="w", where="p", code=65)], 2)["export"]
    assert failed.state == "failed" and "[x] w (p)" in failed.error
    assert observe([BEGIN, event(1, "error", id="i", what="", where="", code=75)], 2)["export"].state == "interrupted"
    assert observe([BEGIN, event(1, "error", id="i", code=75), {**BEGIN, "time": 2}], 3)["export"].state == "running"
    assert observe([BEGIN, event(1, "stage-done")], 2)["export"].state == "done"


def test_a_gang_on_two_nodes_is_one_attempt() -> None:
    gang = [event(at, "gang", attempt=name, node=node) for at, name, node in ((1, "a", 0), (1, "a", 1), (9, "b", 0))]
    assert observe([BEGIN, *gang], 10)["export"].attempts == 2


def test_a_gang_that_is_started_again_after_a_fault_runs() -> None:
    """Failed by the word of both nodes, running by the first word of the next attempt."""
    errors = [event(5, "error", id="rank-died", what="w", code=69, worker=f"export-node{node}") for node in (0, 1)]
    begun = [BEGIN, event(1, "gang", attempt="r-0", node=0), *errors]
    assert observe(begun, 6)["export"].state == "failed"
    told = [*begun, event(6, "again", what="[rank-died] w; starting again (1 of 3)", worker="launcher")]
    pause = observe(told, 6.5)["export"]
    assert (pause.state, pause.error) == ("starting", "[rank-died] w; starting again (1 of 3)")
    assert observe(told, 500)["export"].state == "quiet"
    again = observe([*told, event(7, "gang", attempt="r-1", node=1)], 8)["export"]
    assert (again.state, again.error, again.attempts) == ("running", "", 2)


def test_a_fault_after_the_end_leaves_a_stage_done() -> None:
    """A supervisor that stood still while the others finished; what is wrong with the stage itself still counts."""
    done = [BEGIN, event(1, "stage-done")]
    for code, state in ((69, "done"), (75, "done"), (65, "failed")):
        seen = observe([*done, event(2, "error", id="i", what="w", code=code)], 3)["export"]
        assert (seen.state, bool(seen.error)) == (state, state == "failed")
    late = [event(2, "error", id="i", what="w", code=69), event(3, "again", what="w; starting again (1 of 3)")]
    assert observe([*done, *late], 4)["export"].state == "done"
    again = [event(2, "gang", attempt="b"), event(3, "error", id="i", what="w", code=69)]
    assert observe([*done, *again], 4)["export"].state == "failed"


def test_a_restart_and_another_fingerprint_forget() -> None:
    done = event(1, "unit-done", unit="a", bytes=100, seconds=1)
    assert observe([BEGIN, done, event(2, "restart")], 3)["export"].units_done == 0
    other = event(2, "stage", units=2, bytes=10, fingerprint="g")
    assert observe([BEGIN, done, other], 3)["export"].units_done == 0


def test_a_torn_line_is_passed_over(tmp_path: Path) -> None:
    log = EventLog(tmp_path, worker="w", host="h")
    log.write("unit", unit="a")
    log.write("unit", unit="b")
    path = next(tmp_path.iterdir())
    path.write_text(path.read_text()[:-10])
    assert [found["unit"] for found in read_events(tmp_path)] == ["a"]
