"""Asked to stop, everything stops within ten seconds, exits 75, and leaves no process behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dsqjob.miniature import write
from tests.faults.processes import kill_all, of_job
from tests.harness import command, digests, dsqjob, error_id, events, worker, write_job
from tests.waiting import wait_until

SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small") / "release"
    write("deepseek-v4", folder, seed=3, layers=2, experts=4, ratios=(0, 4, 0), vocab=384)
    return folder


def begun(folder: Path) -> bool:
    return bool(list((folder / "out").glob("*.partial-*")))


@pytest.mark.parametrize("number", SIGNALS)
def test_a_run_stops_its_workers_and_resumes(tmp_path: Path, miniature: Path, number: signal.Signals) -> None:
    job = write_job(tmp_path / "a", miniature, launcher__workers=2)
    run = subprocess.Popen(command("run", job, "--through", "verify"), stderr=subprocess.PIPE, text=True)
    wait_until(lambda: begun(tmp_path / "a"))
    asked = time.monotonic()
    run.send_signal(number)
    _, said = run.communicate(timeout=20)
    assert run.returncode == 75 and time.monotonic() - asked < 10
    assert number.name in said and of_job(job) == []
    assert not list((tmp_path / "a" / "work" / "state" / "export" / "claims").iterdir())
    assert not list((tmp_path / "a" / "out").glob("*.partial-*"))
    subprocess.run(command("run", job, "--through", "verify"), check=True, capture_output=True, timeout=120)
    calm = write_job(tmp_path / "b", miniature)
    subprocess.run(command("run", calm, "--through", "verify"), check=True, capture_output=True, timeout=120)
    assert digests(tmp_path / "a" / "out") == digests(tmp_path / "b" / "out")


@pytest.mark.parametrize("number", SIGNALS)
def test_a_worker_alone_stops_and_another_resumes(tmp_path: Path, small: Path, number: signal.Signals) -> None:
    """SIGSTOP first, so that the signal certainly comes while a unit is under way."""
    job = write_job(tmp_path, small)
    process = subprocess.Popen(worker("export", job), stderr=subprocess.PIPE, text=True)
    claims = tmp_path / "work" / "state" / "export" / "claims"
    wait_until(lambda: claims.is_dir() and any(claims.glob("model-*")))
    process.send_signal(signal.SIGSTOP)
    process.send_signal(number)
    process.send_signal(signal.SIGCONT)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 75 and number.name in said and "way out" in said
    assert not list(claims.iterdir()) and not list((tmp_path / "out").glob("*.partial-*"))
    subprocess.run(worker("export", job), check=True, capture_output=True, timeout=120)


@pytest.mark.needs("strace")
def test_a_live_workers_unit_is_spared_by_clean_and_forbids_a_restart(tmp_path: Path, small: Path) -> None:
    """strace holds the worker at its first rename: the shard is whole, but not yet published."""
    job = write_job(tmp_path, small)
    log = tmp_path / "trace"
    hold = ["-e", "trace=rename", "-e", "inject=rename:delay_enter=60000000"]
    traced = subprocess.Popen(["strace", "-f", "-qq", "-o", str(log), *hold, *worker("export", job)])
    folders = tmp_path / "out", tmp_path / "work" / "state" / "export" / "claims"
    try:
        wait_until(lambda: log.exists() and "rename(" in log.read_text())
        before = [digests(folder) for folder in folders]
        assert any(".partial-" in name for name in before[0]) and len(before[1]) == 1
        assert "nothing to clean" in dsqjob("clean", job).stdout
        done = dsqjob("run", job, "--stage", "export", "--restart", code=64)
        assert error_id(done) == "restart-while-running" and "claims" in done.stderr
        assert [digests(folder) for folder in folders] == before
    finally:  # the worker goes before strace, which would let it run on
        for pid in of_job(job):
            if pid != traced.pid:
                os.kill(pid, signal.SIGKILL)
        traced.kill()
        traced.wait()
        kill_all(job)
    assert "2 leftovers removed" in dsqjob("clean", job).stdout
    dsqjob("run", job, "--stage", "export", "--restart")


@pytest.mark.needs("strace")
def test_a_worker_whose_fsync_hangs_leaves_within_ten_seconds(tmp_path: Path, miniature: Path) -> None:
    """strace holds the first fsync for a minute, and the worker's main thread with it; its signal thread must end the
    process. (strace 6.1 then keeps the held thread, so the call is read from its log.)"""
    job = write_job(tmp_path, miniature)
    log = tmp_path / "trace"
    hold = ["-e", "trace=fsync,exit_group", "-e", "inject=fsync:delay_enter=60000000"]
    traced = subprocess.Popen(["strace", "-f", "-qq", "-o", str(log), *hold, *worker("export", job)])
    try:
        wait_until(lambda: log.exists() and "fsync(" in log.read_text())
        (pid,) = [pid for pid in of_job(job) if pid != traced.pid]
        subprocess.run(["kill", "-TERM", str(pid)], check=True)
        wait_until(lambda: "exit_group(75" in log.read_text(), 10)
    finally:
        traced.kill()
        traced.wait()
        kill_all(job)
    subprocess.run(worker("export", job), check=True, capture_output=True, timeout=120)


def test_workers_go_when_their_launcher_is_killed(tmp_path: Path, miniature: Path) -> None:
    job = write_job(tmp_path, miniature, launcher__workers=2, export__weights="requantize")
    run = subprocess.Popen(command("run", job, "--stage", "export"), stderr=subprocess.DEVNULL)
    wait_until(lambda: begun(tmp_path))
    run.kill()
    run.wait()
    wait_until(lambda: of_job(job) == [], 10)
    subprocess.run(command("run", job, "--stage", "export"), check=True, capture_output=True, timeout=120)


@pytest.mark.parametrize(("faults", "code"), [(0, 69), (1, 0)])
def test_a_worker_that_is_killed_is_a_peers_fault(tmp_path: Path, miniature: Path, faults: int, code: int) -> None:
    job = write_job(tmp_path, miniature, launcher__workers=1, launcher__max_faults=faults)
    run = subprocess.Popen(command("run", job, "--stage", "export"), stderr=subprocess.PIPE, text=True)
    found: list[int] = []
    wait_until(lambda: found.extend(pid for pid in of_job(job) if pid != run.pid) or found)
    (pid,) = found
    os.kill(pid, signal.SIGKILL)
    _, said = run.communicate(timeout=60)
    assert run.returncode == code, said
    assert code == 0 or ("SIGKILL" in said and str(pid) in said)
    told = [one["what"] for one in events(tmp_path / "work") if one["event"] == "again"]
    assert told == [line for line in said.splitlines() if line.endswith("; starting again (1 of 1)")]
    assert len(told) == faults


CHILD = """
import sys, time
from dsqjob.engine.execute import StopRequest
from dsqjob.worker import die_with_parent
die_with_parent()
stop = StopRequest()
with stop.listening():
    print("ready", flush=True)
    while not stop.cause:
        time.sleep(0.05)
    print(stop.cause, flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=str)
def test_the_end_of_a_launcher_is_told_from_a_signal(number: signal.Signals) -> None:
    """The kernel sends SIGTERM when a launcher dies; it is not what a scheduler's SIGTERM is."""
    launch = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {CHILD!r}]); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", launch], stdout=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout is not None and launcher.stdout.readline() == "ready\n"
        (child,) = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
        os.kill(launcher.pid if number == signal.SIGKILL else int(child), number)
        heard = launcher.stdout.readline()
        launcher.kill()
    assert heard == ("SIGTERM\n" if number == signal.SIGTERM else f"the end of its launcher (process {launcher.pid})\n")
