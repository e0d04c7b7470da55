"""What is tried on a node's storage before hours are spent."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from dsqjob.errors import StorageError, UsageError
from dsqjob.gang import preflight

HOST = socket.gethostname()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k,nr_inodes=2000", "tmpfs", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_good_folder_is_left_as_it_was(tmp_path: Path) -> None:
    preflight.probe_storage(tmp_path, 1)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=HOST) as caught:
        preflight.probe_storage(tmp_path / "missing", 1)
    assert (caught.value.id, caught.value.where) == ("workspace-probe", str(tmp_path / "missing"))


@pytest.mark.needs("root")
def test_a_read_only_mount(disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    with pytest.raises(UsageError, match=HOST) as caught:
        preflight.probe_storage(disk, 1)
    assert caught.value.id == "workspace-probe"


@pytest.mark.needs("root")
def test_a_full_disk_and_one_that_is_too_small(disk: Path) -> None:
    with pytest.raises(StorageError, match=HOST) as caught:
        preflight.probe_storage(disk, 1 << 30)
    assert caught.value.id == "storage-full"
    with suppress(OSError), (disk / "filler").open("wb", buffering=0) as filler:
        while True:
            filler.write(bytes(4096))
    with pytest.raises(StorageError, match=HOST) as caught:
        preflight.probe_storage(disk, 0)
    assert caught.value.id == "storage-full"


@pytest.mark.needs("root")
def test_too_few_inodes(disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,nr_inodes=100", str(disk)], check=True)
    with pytest.raises(StorageError, match="inodes"):
        preflight.probe_storage(disk, 0)


def test_a_file_system_without_exclusive_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "create_exclusively", lambda path, *_: path.touch() or True)
    with pytest.raises(UsageError, match="two processes could claim one file") as caught:
        preflight.probe_storage(tmp_path, 0)
    assert caught.value.id == "workspace-probe"
