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
print("said by", node, attempt, flush=True)
if code == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(int(code))
"""


def run(folder: Path, plan: str, *, max_faults: int = 3, stop: StopRequest | None = None) -> tuple[int, str]:
    """``plan``: of each attempt the codes of both nodes, as ``69/69,0/0``."""

    def commands(rendezvous: str, attempt: str) -> Sequence[Sequence[str]]:
        seen.append((rendezvous, attempt))
        return [[sys.executable, "-c", SUPERVISOR, str(node), attempt, str(folder), plan] for node in (0, 1)]

    seen: list[tuple[str, str]] = []
    found = local.run_gang(
        commands, [folder / "log-0", folder / "log-1"], run="r", gpus_per_node=2, patience=0.5,
        max_faults=max_faults, stop=stop or StopRequest(), watch=lambda: None,
    )  # fmt: skip
    assert [attempt for _, attempt in seen] == [f"r-{number}" for number in range(len(seen))]
    assert len({rendezvous for rendezvous, _ in seen}) == len(seen)
    return found


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "_GANG_KILL_AFTER", 1.0)
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


def test_a_supervisor_that_outlives_the_gang_is_killed(tmp_path: Path) -> None:
    assert run(tmp_path, "65/hang,0/0")[0] == 65


def test_a_signal_is_passed_on(tmp_path: Path) -> None:
    with StopRequest().listening() as stop:
        threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
        begun = time.monotonic()
        code, said = run(tmp_path, "hang/hang,0/0", stop=stop)
    assert code == 75
    assert "SIGTERM" in said
    assert time.monotonic() - begun < 5
