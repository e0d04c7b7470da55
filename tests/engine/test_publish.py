"""Files appear whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dsqjob.engine.publish import create_exclusively, publish_bytes, publishing, write_all


def test_a_file_appears_complete_with_the_umasks_mode(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        publish_bytes(tmp_path / "a", b"x" * 100_000, "t")
    finally:
        os.umask(before)
    assert (tmp_path / "a").read_bytes() == b"x" * 100_000
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_an_error_leaves_the_old_file_and_no_partial(tmp_path: Path) -> None:
    publish_bytes(tmp_path / "a", b"old", "t")
    with pytest.raises(ZeroDivisionError), publishing(tmp_path / "a", "t") as fd:
        write_all(fd, b"new", 0)
        assert (tmp_path / "a").read_bytes() == b"old"
        raise ZeroDivisionError
    assert (tmp_path / "a").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_of_many_processes_one_creates(tmp_path: Path) -> None:
    children = []
    for n in range(8):
        child = os.fork()
        if child == 0:
            won = [create_exclusively(tmp_path / f"f{k}", str(n).encode(), f"t{n}") for k in range(50)]
            os._exit(sum(won))
        children.append(child)
    assert sum(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children) == 50
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(f"f{k}" for k in range(50))
    assert all(path.read_bytes() in [str(n).encode() for n in range(8)] for path in tmp_path.iterdir())


def test_without_hard_links_one_still_creates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)  # a file system without links cannot be had here
    assert create_exclusively(tmp_path / "a", b"one", "t1")
    assert not create_exclusively(tmp_path / "a", b"two", "t2")
    assert (tmp_path / "a").read_bytes() == b"one" and len(list(tmp_path.iterdir())) == 1
