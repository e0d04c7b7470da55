"""A live claim is never taken, a dead one by exactly one process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dsqjob.engine.claims import Claims, whoami

HOLD = """
import sys, time
from pathlib import Path
from dsqjob.engine.claims import Claims
assert Claims(Path(sys.argv[1])).take("u")
print("held", flush=True)
time.sleep(60)
"""


def holder(folder: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def foreign(folder: Path, age: float, unit: str = "u") -> Path:
    """A claim of another host, ``age`` seconds since its last heartbeat."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{unit}.0"
    path.write_text(json.dumps({**whoami(), "host": "elsewhere", "boot": "b", "token": "dead"}))
    os.utime(path, (time.time() - age, time.time() - age))
    return path


def test_a_live_claim_is_not_taken_and_a_dead_one_at_once(tmp_path: Path) -> None:
    process = holder(tmp_path)
    try:
        claims = Claims(tmp_path)
        assert claims.take("u") is None
        os.kill(process.pid, signal.SIGSTOP)
        assert claims.take("u") is None
    finally:
        process.kill()
    deadline = time.monotonic() + 10
    while (taken := claims.take("u")) is None:  # a zombie first, reaped never: dead either way
        assert time.monotonic() < deadline
    process.wait()
    claim, dead = taken
    assert claim.generation == 1 and len(dead) == 1
    assert Claims(tmp_path).take("u") is None


def test_a_reused_pid_is_not_the_holder(tmp_path: Path) -> None:
    tmp_path.joinpath("u.0").write_text(json.dumps({**whoami(), "started": "1", "token": "t"}))
    assert Claims(tmp_path).take("u") is not None


def test_another_hosts_claim_is_judged_by_its_age(tmp_path: Path) -> None:
    foreign(tmp_path, age=30)
    assert Claims(tmp_path).take("u") is None
    foreign(tmp_path, age=90)
    taken = Claims(tmp_path).take("u")
    assert taken is not None and taken[1] == ["dead"]


def test_another_pid_namespace_is_another_host(tmp_path: Path) -> None:
    tmp_path.joinpath("u.0").write_text(
        json.dumps({**whoami(), "namespace": "pid:[1]", "pid": 2**22 + 1, "token": "t"})
    )
    assert Claims(tmp_path).take("u") is None


def test_an_empty_claim_is_judged_by_its_age(tmp_path: Path) -> None:
    tmp_path.joinpath("u.0").touch()
    assert Claims(tmp_path).take("u") is None
    os.utime(tmp_path / "u.0", (1, 1))
    assert Claims(tmp_path).take("u") is not None


def test_of_many_rivals_for_a_dead_claim_one_wins(tmp_path: Path) -> None:
    for n in range(20):
        foreign(tmp_path, age=1000, unit=f"u{n}")
    results, report = os.pipe()
    children = []
    for _ in range(6):
        child = os.fork()
        if child == 0:
            claims = Claims(tmp_path)
            os.write(report, bytes([sum(claims.take(f"u{n}") is not None for n in range(20))]))
            signal.pause()  # a winner that ended would be dead, and its claims free
        children.append(child)
    won = b"".join(os.read(results, 1) for _ in children)
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert sum(won) == 20


def test_the_heartbeat_keeps_a_claim_young(tmp_path: Path) -> None:
    claims = Claims(tmp_path, heartbeat=0.05)
    taken = claims.take("u")
    assert taken is not None
    os.utime(taken[0].path, (1, 1))
    with claims.beating(taken[0]):
        deadline = time.monotonic() + 10
        while taken[0].path.stat().st_mtime < 100:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_releasing_an_overtaken_claim_leaves_the_new_one(tmp_path: Path) -> None:
    mine = Claims(tmp_path)
    taken = mine.take("u")
    assert taken is not None
    tmp_path.joinpath("u.1").write_text(json.dumps({**whoami(), "token": "other"}))
    assert mine.lost(taken[0])
    mine.release(taken[0])
    assert [path.name for path in tmp_path.iterdir()] == ["u.1"]


@pytest.mark.parametrize("unit", ["model-00001-of-00005.safetensors", "a[1].*", "u", "u.5"])
def test_units_do_not_meet_each_others_claims(tmp_path: Path, unit: str) -> None:
    claims = Claims(tmp_path)
    for other in ("u", "u.5", "a1.x", "model-00001-of-00005"):
        if other != unit:
            assert claims.take(other) is not None
    taken = claims.take(unit)
    assert taken is not None and taken[0].generation == 0
    assert claims.take(unit) is None
    claims.release(taken[0])
    assert claims.take(unit) is not None
