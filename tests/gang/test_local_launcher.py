"""The local launcher starts a gang's supervisors, and a gang that ended with 69 again as a whole."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from dsqjob.engine.execute import StopRequest
from dsqjob.launchers import local

SUPERVISOR = """
import os, signal, sys, time
node, attempt, folder, plan = int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4]
open(f"{folder}/{attempt}-{node}", "w").write(os.environ.get("CUDA_VISIBLE_DEVICES", "none"))
code = plan.split(",")[int(attempt.rpartition("-")[2])].split("/")[node]
if code == "hang":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    time.sleep(1000)
if code == "late":
    time.sleep(3)
    code = "74"
print("said by", node, attempt, flush=True)
if code == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(int(code))
"""


FIGURES = local._TOLD_KILL_AFTER, local._GANG_KILL_AFTER


def run(
    folder: Path,
    plan: str,
    *,
    max_faults: int = 3,
    patience: float = 0.5,
    stop: StopRequest | None = None,
    again: list[str] | None = None,
) -> tuple[int, str]:
    """``plan``: of each attempt the codes of all nodes, as ``69/69,0/0``."""
    nodes = range(plan.partition(",")[0].count("/") + 1)

    def commands(rendezvous: str, attempt: str) -> Sequence[Sequence[str]]:
        seen.append((rendezvous, attempt))
        return [[sys.executable, "-c", SUPERVISOR, str(node), attempt, str(folder), plan] for node in nodes]

    seen: list[tuple[str, str]] = []
    said = [] if again is None else again
    found = local.run_gang(
        commands, [folder / f"log-{node}" for node in nodes], run="r", gpus_per_node=2, patience=patience,
        max_faults=max_faults, stop=stop or StopRequest(), watch=lambda: None, again=said.append,
    )  # fmt: skip
    assert [attempt for _, attempt in seen] == [f"r-{number}" for number in range(len(seen))]
    assert len({rendezvous for rendezvous, _ in seen}) == len(seen)
    return found


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "_GANG_KILL_AFTER", 1.0)
    monkeypatch.setattr(local, "_TOLD_KILL_AFTER", 1.0)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_a_peer_fault_starts_the_whole_gang_again(tmp_path: Path) -> None:
    assert run(tmp_path, "69/69,killed/69,0/0")[0] == 0
    assert {path.name for path in tmp_path.glob("r-*")} == {f"r-{n}-{node}" for n in range(3) for node in (0, 1)}
    assert [(tmp_path / f"r-0-{node}").read_text() for node in (0, 1)] == ["0,1", "2,3"]


def test_faults_are_counted(tmp_path: Path) -> None:
    code, said = run(tmp_path, "69/69,69/69,0/0", max_faults=1)
    assert (code, said) == (69, "said by 0 r-1")


@pytest.mark.parametrize("code", [64, 65, 70, 74, 75])
def test_other_codes_do_not_start_it_again(tmp_path: Path, code: int) -> None:
    assert run(tmp_path, f"{code}/69,0/0")[0] == code


@pytest.mark.parametrize("plan", ["65/hang", "killed/65/hang"])
def test_a_supervisor_that_outlives_one_that_ended_by_itself_is_not_waited_for(tmp_path: Path, plan: str) -> None:
    begun = time.monotonic()
    assert run(tmp_path, plan, patience=30)[0] == 65
    assert time.monotonic() - begun < 15


def test_whoever_outlives_one_that_was_killed_has_the_time_to_notice(tmp_path: Path) -> None:
    assert run(tmp_path, "killed/late", patience=30)[0] == 74
    begun = time.monotonic()
    assert run(tmp_path, "killed/hang", patience=1, max_faults=0)[0] == 69
    assert time.monotonic() - begun < 15


def test_the_whole_gang_is_gone_within_a_minute_whoever_ends_first() -> None:
    """At default limits; what a supervisor takes at most after a fault is in its ``_conclude``."""
    from dsqjob.gang import supervisor
    from dsqjob.gang.node import Limits

    limits, told, killed = Limits(), *FIGURES
    assert told >= supervisor._GONE + supervisor._LEAVE + supervisor._WORD
    longest = supervisor._SETTLE_VICTIMS + limits.silence + limits.grace + supervisor._WORD
    assert longest + told < 60 and limits.silence + killed < 60


def test_every_new_start_is_told(tmp_path: Path) -> None:
    said: list[str] = []
    run(tmp_path, "69/69,killed/0,69/69", max_faults=2, again=said)
    first, second = said
    assert first in {f"said by {node} r-0; starting again (1 of 2)" for node in (0, 1)}
    assert "was killed by SIGKILL (log: " in second and second.endswith("; starting again (2 of 2)")


def test_every_new_start_of_a_pooled_worker_is_told(tmp_path: Path) -> None:
    script = (
        "import pathlib, sys; seen = pathlib.Path(sys.argv[1]); again = seen.exists(); seen.touch(); "
        "print('[x] why'); print('more'); sys.exit(0 if again else 69)"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "seen")]
    said: list[str] = []
    code, _ = local.run_workers(
        [command], [tmp_path / "log"], max_faults=3, stop=StopRequest(), watch=lambda: None, again=said.append
    )
    assert (code, said) == (0, ["[x] why; starting again (1 of 3)"])


def test_a_signal_is_passed_on(tmp_path: Path) -> None:
    with StopRequest().listening() as stop:
        threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
        begun = time.monotonic()
        code, said = run(tmp_path, "hang/hang,0/0", stop=stop)
    assert code == 75
    assert "SIGTERM" in said
    assert time.monotonic() - begun < 5
