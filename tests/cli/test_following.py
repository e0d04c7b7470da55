"""``logs --follow`` and ``cancel`` from another shell, while a run of this machine is at work."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dsqjob.cli import following
from dsqjob.cli.following import cancel_jobs, print_logs
from dsqjob.engine.claims import Claims, whoami
from dsqjob.engine.events import EventLog
from dsqjob.engine.workspace import Workspace
from dsqjob.errors import PeerError
from dsqjob.launchers.slurm.handle import Handle
from dsqjob.launchers.slurm.watch import Observed
from tests.harness import command, dsqjob, write_job
from tests.waiting import wait_until

SLOW = """
import os, sys, time
while "worker" in sys.orig_argv and os.path.exists(os.environ["HOLD"]):
    time.sleep(0.01)
"""
"""Holds workers before they import anything."""


@pytest.fixture
def slow(tmp_path: Path) -> Iterator[dict[str, str]]:
    """An environment in which workers do not come to themselves while the file ``hold`` is there."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(SLOW)
    (tmp_path / "hold").touch()
    yield {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "HOLD": str(tmp_path / "hold")}
    (tmp_path / "hold").unlink(missing_ok=True)


@contextmanager
def running(*words: object, slow: dict[str, str], verb: str = "run") -> Iterator[subprocess.Popen[str]]:
    """A run that is held; its workers die with it."""
    with subprocess.Popen(command(verb, *words), env=slow, stderr=subprocess.PIPE, text=True) as run:
        try:
            yield run
        finally:
            run.kill()


def launches(work: Path) -> list[Path]:
    return sorted((work / "state" / "launch" / "claims").glob("run-*"))


def test_cancel_finds_a_run_whose_workers_hold_nothing_yet(
    tmp_path: Path, miniature: Path, slow: dict[str, str]
) -> None:
    """As in the ten seconds in which a gang imports torch."""
    job = write_job(tmp_path, miniature)
    with running(job, "--stage", "export", slow=slow) as run:
        wait_until(lambda: list((tmp_path / "work" / "logs").glob("export-*.log")))
        assert not list((tmp_path / "work" / "state" / "export" / "claims").iterdir())
        assert "no stage has begun" in dsqjob("status", job).stdout
        said = dsqjob("cancel", job).stdout
        assert said == f"run: process {run.pid} is asked to stop\nthe same command goes on from where it stopped\n"
        _, words = run.communicate(timeout=120)
    assert run.returncode == 75 and "stopped by SIGTERM" in words
    assert not launches(tmp_path / "work")
    assert dsqjob("cancel", job).stdout == "nothing is waiting or running\n"
    (tmp_path / "hold").unlink()
    assert "export: 6 units" in dsqjob("run", job, "--stage", "export").stdout


def test_cancel_finds_a_verification_whose_workers_hold_nothing_yet(
    tmp_path: Path, miniature: Path, slow: dict[str, str]
) -> None:
    job = write_job(tmp_path, miniature)
    dsqjob("run", job, "--stage", "export", "--through", "finalize")
    with running(job, verb="verify", slow=slow) as verify:
        wait_until(lambda: list((tmp_path / "work" / "logs").glob("verify-*.log")))
        assert f"run: process {verify.pid} is asked to stop" in dsqjob("cancel", job).stdout
        _, words = verify.communicate(timeout=120)
    assert verify.returncode == 75 and "stopped by SIGTERM" in words
    assert not launches(tmp_path / "work")


def test_a_restart_waits_for_a_run_whose_workers_hold_nothing_yet(
    tmp_path: Path, miniature: Path, slow: dict[str, str]
) -> None:
    job = write_job(tmp_path, miniature)
    dsqjob("run", job, "--stage", "export")
    with running(job, "--stage", "finalize", slow=slow) as run:
        wait_until(lambda: list((tmp_path / "work" / "logs").glob("finalize-*.log")))
        before = sorted((tmp_path / "out").iterdir())
        said = dsqjob("run", job, "--stage", "export", "--restart", code=64).stderr
        assert "[restart-while-running]" in said and f"process {run.pid} on" in said and "cancel" in said
        assert sorted((tmp_path / "out").iterdir()) == before
        assert "stop" in dsqjob("cancel", job).stdout
        run.communicate(timeout=120)
    (tmp_path / "hold").unlink()
    dsqjob("run", job, "--stage", "export", "--restart")


def test_what_a_killed_run_left_is_swept(tmp_path: Path, miniature: Path, slow: dict[str, str]) -> None:
    job = write_job(tmp_path, miniature)
    with running(job, "--stage", "export", slow=slow):
        wait_until(lambda: launches(tmp_path / "work"))
    (left,) = launches(tmp_path / "work")
    assert dsqjob("cancel", job).stdout == "nothing is waiting or running\n"
    partial = left.with_name("run-1-x.0.partial-dead")
    partial.touch()
    text = dsqjob("clean", job).stdout
    assert f"removed {left}\n" in text and f"removed {partial}\n" in text and not launches(tmp_path / "work")
    left.touch()
    os.utime(left, (1, 1))
    (tmp_path / "hold").unlink()
    dsqjob("run", job, "--stage", "export")
    assert not launches(tmp_path / "work")


@pytest.mark.parametrize("stage", ["tokens", "convert", "export"])
def test_a_refused_run_writes_nothing_into_the_release(tmp_path: Path, miniature: Path, stage: str) -> None:
    release = tmp_path / "release"
    shutil.copytree(miniature, release)
    before = sorted(release.rglob("*"))
    job = write_job(tmp_path, release, workspace=str(release / "work"), tokens__data=[{"jsonl": "none"}])
    assert "[output-inside-release]" in dsqjob("run", job, "--stage", stage, code=64).stderr
    assert sorted(release.rglob("*")) == before


@contextmanager
def claimed(folder: Path) -> Iterator[Path]:
    """A claim of this very process."""
    claims = Claims(folder)
    taken = claims.take("one")
    assert taken is not None
    yield taken[0].path
    claims.release(taken[0])


def test_a_run_elsewhere_must_be_stopped_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    work = Workspace(tmp_path)
    for folder in (work.launches, work.claims("export")):
        folder.mkdir(parents=True)
        (folder / "run-7-x.0").write_text(json.dumps({**whoami(), "host": "elsewhere", "pid": 7, "token": "t"}))
    cancel_jobs(tmp_path)
    assert capsys.readouterr().out == (
        "run: process 7 on elsewhere must be stopped there\nexport: process 7 on elsewhere must be stopped there\n"
    )


def test_a_run_of_another_user(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill(pid: int, number: int) -> None:
        assert (pid, number) == (os.getpid(), signal.SIGTERM)
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "kill", kill)
    with claimed(Workspace(tmp_path).launches):
        cancel_jobs(tmp_path)
    assert capsys.readouterr().out == f"run: process {os.getpid()} is another user's, who must stop it\n"


class Follower:
    """``logs --follow`` in a thread."""

    def __init__(self, root: Path, stage: str | None = None) -> None:
        which = {"stage": stage, "rank": None, "follow": True}
        self._thread = threading.Thread(target=print_logs, args=(root,), kwargs=which, daemon=True)
        self._thread.start()

    def goes_on(self) -> bool:
        """Whether it still does after some looks."""
        self._thread.join(0.3)
        return self._thread.is_alive()

    def ends(self) -> None:
        self._thread.join(10)
        assert not self._thread.is_alive()


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "_LOOK", 0.02)


def log_of(root: Path, stage: str, text: str = "one\n") -> Path:
    root.joinpath("logs").mkdir(exist_ok=True)
    path = root / "logs" / f"{stage}-0.log"
    path.write_text(text)
    return path


@pytest.mark.usefixtures("often")
def test_following_outlives_the_pause_between_two_stages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    events = EventLog(tmp_path / "logs" / "events", worker="w")
    log_of(tmp_path, "tokens")
    events.write("stage-done", stage="tokens")
    with claimed(Workspace(tmp_path).launches):
        follower, named = Follower(tmp_path), Follower(tmp_path, "tokens")
        named.ends()
        assert follower.goes_on()
        log_of(tmp_path, "convert", "two\n")
        events.write("stage", stage="convert", units=1, bytes=1, fingerprint="f")
        assert follower.goes_on()
        events.write("stage-done", stage="convert")
        assert follower.goes_on()
    follower.ends()
    said = capsys.readouterr().out
    assert said.count("one\n") == 2 and said.count("convert-0.log <==\ntwo\n") == 1


@pytest.mark.usefixtures("often")
@pytest.mark.parametrize("folder", ["launch", "calibrate"])
@pytest.mark.parametrize("stage", [None, "calibrate"])
def test_following_outlives_a_fault(tmp_path: Path, folder: str, stage: str | None) -> None:
    """A gang that is started again has failed for some seconds; of several workers one may fail."""
    events = EventLog(tmp_path / "logs" / "events", worker="w")
    events.write("error", stage="calibrate", id="rank-died", what="gone", where="", code=69)
    with claimed(Workspace(tmp_path).claims(folder)):
        follower = Follower(tmp_path, stage)
        assert follower.goes_on()
    follower.ends()


@pytest.mark.usefixtures("often")
def test_following_outlives_a_silent_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    EventLog(tmp_path / "logs" / "events", worker="w").write("stage-done", stage="tokens")
    Handle("tokens", ("7",), "n", 0.0, "", "", 1, str(tmp_path)).keep(Workspace(tmp_path))
    Handle("export", ("8",), "n", 0.0, "", "", 1, str(tmp_path)).keep(Workspace(tmp_path))
    state = {"7": "COMPLETED", "8": "PENDING"}
    reason = ["Dependency"]
    silent = [True]

    def observed(job: str) -> list[Observed]:
        if silent[0]:
            raise PeerError("slurm-silent", "busy")
        return [Observed(job, state[job], reason[0], "", 0, "")]

    monkeypatch.setattr(following, "observed", observed)
    follower = Follower(tmp_path)
    assert follower.goes_on()
    silent[0] = False
    assert follower.goes_on()
    Follower(tmp_path, "tokens").ends()
    reason[0] = "DependencyNeverSatisfied"
    follower.ends()


@pytest.mark.usefixtures("often")
def test_what_comes_while_it_is_read_is_printed_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it comes between looking at the size and reading, or cuts a character in two."""
    log = log_of(tmp_path, "export", "")
    text = "".join(f"line {number} π≈3 𝄞\n" for number in range(300))
    real = Path.stat

    def stat(path: Path, **more: bool) -> os.stat_result:
        found = real(path, **more)
        if path == log:
            time.sleep(0.005)  # its writer goes on meanwhile
        return found

    monkeypatch.setattr(Path, "stat", stat)
    monkeypatch.setattr(following, "_LOOK", 0.0)
    with claimed(Workspace(tmp_path).claims("export")):
        follower = Follower(tmp_path, "export")
        with log.open("ab", buffering=0) as stream:
            data = text.encode()
            for begin in range(0, len(data), 7):
                stream.write(data[begin : begin + 7])
                time.sleep(0.0005)
        assert follower.goes_on()
    EventLog(tmp_path / "logs" / "events", worker="w").write("stage-done", stage="export")
    follower.ends()
    said = capsys.readouterr().out
    assert re.sub(r"^==> .* <==\n", "", said) == text
