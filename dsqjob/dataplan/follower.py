"""Hashes a file on a second thread while it is being written, and starts its way to the disk."""

from __future__ import annotations

import hashlib
import os
import threading

_PIECE = 4 << 20


class Follower:
    """Follows a writer: everything below the last ``advance`` is final and may be hashed and written back.

    Hashing and reading release the GIL. ``posix_fadvise(DONTNEED)`` starts writing dirty pages without waiting,
    so that the closing fsync finds little left to do.
    """

    def __init__(self, fd: int, *, checksum: bool) -> None:
        self._fd = fd
        self._hash = hashlib.sha256() if checksum else None
        self._final = self._done = 0
        self._aborted = False
        self._closed = False
        self._error: BaseException | None = None
        self._moved = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="checksum", daemon=True)

    def advance(self, position: int) -> None:
        """Everything below ``position`` is final."""
        with self._moved:
            self._final = position
            self._moved.notify()

    def finish(self) -> str | None:
        """Wait for the rest; the SHA-256 in hexadecimal where checksums are on."""
        self._stop()
        if self._error is not None:
            raise self._error
        return self._hash.hexdigest() if self._hash is not None else None

    def __enter__(self) -> Follower:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._aborted = True
        self._stop()

    def _stop(self) -> None:
        with self._moved:
            self._closed = True
            self._moved.notify()
        self._thread.join()

    def _run(self) -> None:
        try:
            self._follow()
        except BaseException as error:  # handed to the writer by finish()
            self._error = error

    def _follow(self) -> None:
        buffer = memoryview(bytearray(_PIECE))
        while not self._aborted:
            with self._moved:
                self._moved.wait_for(lambda: self._closed or self._final - self._done >= _PIECE)
                final = self._final
                if self._closed and self._done == final:
                    return
            while self._done < final and not self._aborted:
                count = min(_PIECE, final - self._done)
                if self._hash is not None:
                    count = os.preadv(self._fd, [buffer[:count]], self._done)
                    self._hash.update(buffer[:count])
                os.posix_fadvise(self._fd, self._done, count, os.POSIX_FADV_DONTNEED)
                self._done += count
