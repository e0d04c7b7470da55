"""Storage that refuses: 74 while working, 64 where the plan can see it; nothing half-written, nothing lost."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import digests, dsqjob, error_id, worker, write_job


def mount(folder: Path, options: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True)


@pytest.fixture
def mounts() -> Iterator[list[Path]]:
    """Folders to unmount afterwards."""
    made: list[Path] = []
    yield made
    for folder in reversed(made):
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.needs("root")
@pytest.mark.parametrize("size", ["3m", "6m", "9m"])
def test_a_full_disk_is_74_and_the_work_resumes(tmp_path: Path, miniature: Path, mounts: list[Path], size: str) -> None:
    disk = tmp_path / "disk"
    mount(disk, f"size={size}")
    mounts.append(disk)
    job = write_job(tmp_path / "job", miniature, export__output=disk / "out")
    done = subprocess.run(worker("export", job), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 74, done.stderr
    assert error_id(done) == "storage-full" and "resumes" in done.stderr and "Traceback" not in done.stderr
    calm = write_job(tmp_path / "calm", miniature)
    dsqjob("run", calm, "--stage", "export", "--through", "finalize")
    expected = digests(tmp_path / "calm" / "out")
    left = {name: value for name, value in digests(disk / "out").items() if name != ".dsqjob-owner"}
    assert all(expected[name] == value for name, value in left.items())
    subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
    dsqjob("run", job, "--stage", "export", "--through", "finalize")
    assert digests(disk / "out") == expected


@pytest.mark.needs("root")
def test_a_full_workspace_is_74_and_the_work_resumes(tmp_path: Path, miniature: Path, mounts: list[Path]) -> None:
    disk = tmp_path / "disk"
    mount(disk, "size=1m,nr_inodes=16")
    mounts.append(disk)
    job = write_job(tmp_path / "job", miniature, workspace=disk / "work", export__output=tmp_path / "out")
    done = subprocess.run(worker("export", job), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 74, done.stderr
    subprocess.run(["mount", "-o", "remount,nr_inodes=1000", str(disk)], check=True)
    dsqjob("run", job, "--through", "verify")


@pytest.mark.needs("root")
def test_too_little_disk_is_seen_in_the_plan(tmp_path: Path, miniature: Path, mounts: list[Path]) -> None:
    disk = tmp_path / "disk"
    mount(disk, "size=4m")
    mounts.append(disk)
    job = write_job(tmp_path / "job", miniature, export__output=disk / "out")
    for command in (("plan", job), ("run", job)):
        done = dsqjob(*command, code=64)
        assert error_id(done) == "disk-too-small" and str(disk / "out") in done.stderr
    assert not (disk / "out").exists()


@pytest.mark.needs("root")
def test_a_read_only_workspace_is_refused(tmp_path: Path, miniature: Path, mounts: list[Path]) -> None:
    disk = tmp_path / "disk"
    mount(disk, "size=4m,ro")
    mounts.append(disk)
    job = write_job(tmp_path / "job", miniature, workspace=disk / "work", export__output=tmp_path / "out")
    for command in (("run", job), ("worker", "export", job, "--worker", 0, "--workers", 1)):
        done = dsqjob(*command, code=64)
        assert error_id(done) == "workspace-unwritable" and str(disk) in done.stderr
    assert not (tmp_path / "out").exists()
