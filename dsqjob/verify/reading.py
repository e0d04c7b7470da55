"""Positioned reads of tensors, whole rows at a time, and a hash of the file beside them."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from dsqjob.checkpoint.header import Entry, Header
from dsqjob.errors import DataError

Tick = Callable[[int], None]
_HASH_BYTES = 4 << 20
_WAIT_S = 0.2
_LARGEST_PIECE = 8 << 20
"""Larger pieces are not faster: the allocator would give them back to the system each time."""


class ShardFile:
    """An open shard. Reads are of bytes; the header says what they are."""

    def __init__(self, path: Path, header: Header) -> None:
        self.path = path
        self.header = header
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def close(self) -> None:
        os.close(self._fd)

    def entry(self, name: str) -> Entry:
        return self.header.tensors[name]

    def read(self, name: str, begin: int, nbytes: int) -> NDArray[np.uint8]:
        """``nbytes`` bytes of a tensor from its byte ``begin`` on. DataError ``shard-truncated`` at the file's end."""
        buffer = np.empty(nbytes, np.uint8)
        view, done = buffer.data, 0
        start = self.header.offset(name) + begin
        while done < nbytes:
            got = os.preadv(self._fd, [view[done:]], start + done)
            if got == 0:
                raise DataError(
                    "shard-truncated",
                    "the file ends inside this tensor; it shrank while it was read",
                    where=f"{self.path}: {name}",
                    way_out="let nothing else write into the folder, and verify again",
                )
            done += got
        return buffer

    def rows(self, name: str, begin: int, count: int) -> NDArray[np.uint8]:
        """Rows of a 2-D tensor as bytes, uint8 [count, bytes per row]."""
        entry = self.entry(name)
        width = entry.nbytes // entry.shape[0]
        return self.read(name, begin * width, count * width).reshape(count, width)


class Readers:
    """The open shards of some folders; each is opened when first asked for and closed at the end.

    ``chunk_bytes`` bounds what is held at a time, ``tick`` is told the bytes compared.
    """

    def __init__(self, chunk_bytes: int, tick: Tick) -> None:
        self.chunk_bytes = min(chunk_bytes, _LARGEST_PIECE)
        self.tick = tick
        self._open: dict[Path, ShardFile] = {}

    def __enter__(self) -> Readers:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._open.values():
            file.close()
        self._open.clear()

    def get(self, path: Path, header: Header) -> ShardFile:
        if path not in self._open:
            self._open[path] = ShardFile(path, header)
        return self._open[path]


def row_ranges(rows: int, row_bytes: int, limit: int) -> Iterator[tuple[int, int]]:
    """(first row, count) of pieces of at most ``limit`` bytes, though never less than a row."""
    step = max(1, limit // max(1, row_bytes))
    for begin in range(0, rows, step):
        yield begin, min(step, rows - begin)


def pieces(nbytes: int, limit: int) -> Iterator[tuple[int, int]]:
    """(first byte, count) of pieces of at most ``limit`` bytes."""
    return row_ranges(nbytes, 1, limit)


class FileHash:
    """SHA-256 of a file, made on a second thread while the first one compares. Leaving early stops it."""

    def __init__(self, path: Path, chunk_bytes: int) -> None:
        self._path = path
        self._chunk = max(1, min(chunk_bytes, _HASH_BYTES))
        self._digest = hashlib.sha256()
        self._error: BaseException | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sha256", daemon=True)

    def __enter__(self) -> FileHash:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def result(self, tick: Tick) -> str:
        """The digest in hexadecimal, once the whole file is read; ``tick(0)`` while waiting."""
        while self._thread.is_alive():
            tick(0)
            self._thread.join(_WAIT_S)
        if self._error is not None:
            raise self._error
        return self._digest.hexdigest()

    def _run(self) -> None:
        try:
            buffer = bytearray(self._chunk)
            with self._path.open("rb", buffering=0) as file:
                while not self._stop.is_set() and (got := file.readinto(buffer)):
                    self._digest.update(memoryview(buffer)[:got])
        except OSError as error:
            self._error = error
