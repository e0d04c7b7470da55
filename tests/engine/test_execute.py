"""The worker's loop over a toy stage, in real processes where it matters."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dsqjob.engine.claims import whoami
from dsqjob.engine.events import read_events
from dsqjob.engine.execute import StopRequest
from dsqjob.engine.stage import Context, Done, StageState, Unit
from dsqjob.engine.workspace import Workspace
from dsqjob.errors import Interrupted, UsageError
from tests.engine.toy import Toy, content, work


def complete(root: Path, units: int = 6) -> bool:
    return all((root / "out" / f"u{n}.bin").read_bytes() == content(n) for n in range(1, units + 1))


def start(root: Path, index: int, count: int, seconds: float) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tests.engine.toy", str(root), str(index), str(count), str(seconds)]
    return subprocess.Popen(command, cwd=Path(__file__).parent.parent.parent)


def test_every_unit_is_done_once_and_a_finished_stage_is_left_alone(tmp_path: Path) -> None:
    toy = Toy(tmp_path)
    state = work(tmp_path, toy)
    assert complete(tmp_path) and sorted(toy.begun) == [f"u{n}" for n in range(1, 7)]
    assert not list(state.workspace.claims("toy").iterdir())
    again = Toy(tmp_path)
    work(tmp_path, again)
    assert again.begun == []


def test_a_worker_begins_with_its_own_share(tmp_path: Path) -> None:
    toy = Toy(tmp_path)
    work(tmp_path, toy, 1, 2)
    assert toy.begun[0] == "u4" and sorted(toy.begun) == [f"u{n}" for n in range(1, 7)]


def test_a_missing_or_shortened_output_is_made_again(tmp_path: Path) -> None:
    work(tmp_path, Toy(tmp_path))
    (tmp_path / "out" / "u2.bin").unlink()
    (tmp_path / "out" / "u5.bin").write_bytes(b"short")
    toy = Toy(tmp_path)
    work(tmp_path, toy)
    assert sorted(toy.begun) == ["u2", "u5"] and complete(tmp_path)


def test_another_fingerprint_is_refused_by_the_parts_name(tmp_path: Path) -> None:
    work(tmp_path, Toy(tmp_path))
    with pytest.raises(UsageError) as caught:
        work(tmp_path, Toy(tmp_path, version="2"))
    assert caught.value.id == "fingerprint-changed" and "version" in caught.value.what
    assert complete(tmp_path)


def test_a_disposable_stage_begins_again_by_itself(tmp_path: Path) -> None:
    work(tmp_path, Toy(tmp_path))
    toy = Toy(tmp_path, version="2")
    toy.disposable = True
    work(tmp_path, toy)
    assert len(toy.begun) == 6 and complete(tmp_path)


def test_restart_removes_what_the_records_name_and_nothing_else(tmp_path: Path) -> None:
    state = work(tmp_path, Toy(tmp_path))
    (tmp_path / "out" / "mine.txt").write_text("keep")
    removed = state.restart()
    assert sorted(path.name for path in removed) == [f"u{n}.bin" for n in range(1, 7)]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"mine.txt", ".dsqjob-owner"}
    (tmp_path / "out" / "mine.txt").unlink()
    work(tmp_path, Toy(tmp_path))
    state.restart()
    assert not list((tmp_path / "out").iterdir())


def test_restart_is_refused_while_a_worker_lives(tmp_path: Path) -> None:
    state = work(tmp_path, Toy(tmp_path))
    (state.workspace.claims("toy") / "u1.0").write_text(json.dumps({**whoami(), "token": "t"}))
    with pytest.raises(UsageError) as caught:
        state.restart()
    assert caught.value.id == "restart-while-running" and complete(tmp_path)


def test_a_sweep_spares_what_another_stage_is_writing(tmp_path: Path) -> None:
    """Export's last workers sweep while finalize already writes into the same folder."""
    state = work(tmp_path, Toy(tmp_path))
    other = state.workspace.claims("other")
    other.mkdir(parents=True)
    (other / "u.0").write_text(json.dumps({**whoami(), "token": "alive"}))
    for token in ("alive", "dead"):
        (tmp_path / "out" / f"config.json.partial-{token}").touch()
    assert [path.name for path in state.sweep_all()] == ["config.json.partial-dead"]


def test_a_sweep_removes_what_gangs_told_each_other_and_spares_one_that_lives(tmp_path: Path) -> None:
    toy = work(tmp_path, Toy(tmp_path))
    folders = {name: toy.workspace.gang("toy", name) for name in ("ended", "lives", "strange")}
    for name, folder in folders.items():
        folder.mkdir(parents=True)
        for node in (0, 1):
            (folder / f"node{node}.json").touch()
        for path in [*folder.iterdir(), folder]:
            os.utime(path, (1e9, 1e9))
        if name == "lives":
            (folder / "node1.json").touch()
    (folders["strange"] / "mine.txt").touch()
    assert folders["ended"] in toy.sweep_all()
    assert not folders["ended"].exists() and len(list(folders["lives"].iterdir())) == 2
    assert (folders["strange"] / "mine.txt").exists()


def test_a_foreign_folder_is_refused_and_untouched(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "theirs").write_text("x")
    with pytest.raises(UsageError) as caught:
        work(tmp_path, Toy(tmp_path))
    assert caught.value.id == "output-foreign"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["theirs"]


def test_another_workspace_may_not_write_the_same_folder(tmp_path: Path) -> None:
    work(tmp_path, Toy(tmp_path))
    other = Toy(tmp_path)
    (tmp_path / "second").mkdir()
    with pytest.raises(UsageError) as caught:
        work(tmp_path / "second", other)
    assert caught.value.id == "output-foreign" and other.begun == []


def test_a_moved_workspace_is_the_same_one(tmp_path: Path) -> None:
    work(tmp_path, Toy(tmp_path))
    (tmp_path / "out" / "u3.bin").unlink()
    (tmp_path / "work").rename(tmp_path / "moved")
    (tmp_path / "moved").rename(tmp_path / "work")
    work(tmp_path, Toy(tmp_path))
    assert complete(tmp_path)


class Failing(Toy):
    """Fails ``times`` with ``code`` before each unit is done."""

    def __init__(self, root: Path, code: int, times: int) -> None:
        super().__init__(root)
        self.code, self.left = code, dict.fromkeys((unit.id for unit in self.units), times)

    def do(self, unit: Unit, context: Context) -> Done:
        if self.left[unit.id]:
            self.left[unit.id] -= 1
            raise OSError(self.code, os.strerror(self.code))
        return super().do(unit, context)


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE])
def test_a_passing_storage_fault_is_tried_again(tmp_path: Path, code: int) -> None:
    work(tmp_path, Failing(tmp_path, code, 2))
    assert complete(tmp_path)


def test_a_lasting_storage_fault_ends_the_worker_and_frees_the_unit(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="Input/output"):
        work(tmp_path, Failing(tmp_path, errno.EIO, 3))
    assert not list((tmp_path / "work" / "state" / "toy" / "claims").iterdir())
    work(tmp_path, Toy(tmp_path))
    assert complete(tmp_path)


class Stopped(Toy):
    """Asked to stop in the middle of unit ``u3``."""

    def __init__(self, root: Path, stop: StopRequest) -> None:
        super().__init__(root)
        self.stop = stop

    def do(self, unit: Unit, context: Context) -> Done:
        if unit.id == "u3":
            self.stop.signal = signal.SIGTERM
        return super().do(unit, context)


def test_an_interrupted_worker_leaves_no_partial_and_no_claim(tmp_path: Path) -> None:
    stop = StopRequest()
    with pytest.raises(Interrupted):
        work(tmp_path, Stopped(tmp_path, stop), stop=stop)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [".dsqjob-owner", "u1.bin", "u2.bin"]
    assert not list((tmp_path / "work" / "state" / "toy" / "claims").iterdir())


class Overtaken(Toy):
    """While it works on ``u2``, another process judges it dead, sweeps its partial and does the unit."""

    def do(self, unit: Unit, context: Context) -> Done:
        if unit.id == "u2" and "u2" not in self.begun:
            self.begun.append("u2")
            claims = self.folder.parent / "work" / "state" / "toy" / "claims"
            (claims / "u2.1").write_text(json.dumps({**whoami(), "token": "other"}))
            raise FileNotFoundError(errno.ENOENT, "the partial was swept")
        if unit.id == "u3" and (claim := self.folder.parent / "work/state/toy/claims/u2.1").exists():
            claim.unlink()
        return super().do(unit, context)


def test_an_overtaken_worker_gives_the_unit_up_and_goes_on(tmp_path: Path) -> None:
    work(tmp_path, Overtaken(tmp_path))
    assert complete(tmp_path)
    kinds = [event["event"] for event in read_events(Workspace(tmp_path / "work").events)]
    assert kinds.count("claim-lost") == 1


@pytest.mark.parametrize("count", [2, 4])
def test_workers_killed_and_started_again_at_random_finish_the_work(tmp_path: Path, count: int) -> None:
    rng = random.Random(count)
    workers = [start(tmp_path, index, count, 0.04) for index in range(count)]
    for _ in range(3 * count):
        time.sleep(rng.uniform(0.05, 0.35))
        victim = rng.randrange(count)
        workers[victim].kill()
        workers[victim].wait()
        workers[victim] = start(tmp_path, victim, count, 0.04)
    assert [worker.wait(60) for worker in workers] == [0] * count
    assert complete(tmp_path)
    records = tmp_path / "work" / "state" / "toy" / "records"
    assert len(list(records.iterdir())) == 6
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        ".dsqjob-owner",
        *(f"u{n}.bin" for n in range(1, 7)),
    ]


def test_no_unit_is_worked_on_by_two_living_workers(tmp_path: Path) -> None:
    workers = [start(tmp_path, index, 4, 0.02) for index in range(4)]
    assert [worker.wait(60) for worker in workers] == [0] * 4
    begun = [event["unit"] for event in read_events(Workspace(tmp_path / "work").events) if event["event"] == "unit"]
    assert sorted(begun) == [f"u{n}" for n in range(1, 7)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2])
def test_a_signal_ends_a_worker_with_75(tmp_path: Path, number: signal.Signals) -> None:
    process = start(tmp_path, 0, 1, 0.3)
    deadline = time.monotonic() + 30
    while not list((tmp_path / "out").glob("*.partial-*")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(number)
    assert process.wait(10) == 75
    assert not list((tmp_path / "out").glob("*.partial-*"))


def test_a_stage_that_made_nothing_yet_takes_other_settings(tmp_path: Path) -> None:
    StageState(Workspace(tmp_path / "work"), Toy(tmp_path, version="1")).begin()
    changed = StageState(Workspace(tmp_path / "work"), Toy(tmp_path, version="2"))
    assert not changed.compare()
    changed.begin()
    assert changed.compare()
    work(tmp_path, Toy(tmp_path, version="2"))
    with pytest.raises(UsageError):
        StageState(Workspace(tmp_path / "work"), Toy(tmp_path, version="1")).compare()
