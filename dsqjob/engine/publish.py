"""Files appear under their final name complete and durable, or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

PARTIAL = ".partial-"


def partial_path(path: Path, token: str) -> Path:
    """The unfinished sibling of ``path`` that the holder of ``token`` writes."""
    return path.with_name(f"{path.name}{PARTIAL}{token}")


@contextmanager
def publishing(path: Path, token: str) -> Iterator[int]:
    """A file descriptor (read and write) of a partial; on leaving: fsync, rename, fsync of the folder.

    The file gets the umask's mode. On an error the partial is removed and nothing stands under ``path``.
    """
    partial = partial_path(path, token)
    fd = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    try:
        try:
            yield fd
            os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(partial, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(partial)
        raise
    sync_folder(path.parent)


def publish_bytes(path: Path, data: bytes, token: str) -> None:
    """Publish a small file."""
    with publishing(path, token) as fd:
        write_all(fd, data, 0)


def publish_json(path: Path, value: Any, token: str) -> None:
    """Publish JSON with sorted keys."""
    publish_bytes(path, json_bytes(value), token)


def json_bytes(value: Any) -> bytes:
    """Readable JSON, the same bytes for the same value."""
    return (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


def create_exclusively(path: Path, data: bytes, token: str, *, durable: bool = True) -> bool:
    """Make ``path`` with its content in one step, unless it exists; whether this call made it.

    ``link`` shows a file with its content at once; where the file system has no hard links, ``O_EXCL`` and a write
    stand in, and a reader may meet an empty file for an instant. A sweep that takes the unlinked file away in between
    costs another try. ``durable`` files survive a loss of power; a claim need not.
    """
    aside = partial_path(path, token)
    while True:
        _write_new(aside, data, os.O_TRUNC, durable)
        try:
            os.link(aside, path)
            if durable:
                sync_folder(path.parent)
            return True
        except FileExistsError:
            return False
        except FileNotFoundError:
            continue
        except OSError:
            try:
                _write_new(path, data, os.O_EXCL, durable)
                return True
            except FileExistsError:
                return False
        finally:
            with suppress(FileNotFoundError):
                aside.unlink()


def _write_new(path: Path, data: bytes, how: int, durable: bool) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | how | os.O_CLOEXEC, 0o666)
    try:
        write_all(fd, data, 0)
        if durable:
            os.fsync(fd)
    finally:
        os.close(fd)


def write_all(fd: int, data: bytes | memoryview, offset: int) -> None:
    """Write every byte at ``offset``."""
    view = memoryview(data).cast("B")
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written


def sync_folder(folder: Path) -> None:
    """Make renames in ``folder`` durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
